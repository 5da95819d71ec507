//! The options of `fanlight run` that describe the machine: their values, keys and examples.
//!
//! Help pages, completions, man pages and the book's page come from this table. The text of a key is the
//! description of the field in the configuration's JSON schema.

use fanlight_api::{
    CharBackend, ConsoleConfig, DiskConfig, GpuConfig, MemoryConfig, NetConfig, PathOrFd,
    RngConfig, VfioConfig, VsockConfig,
};
use serde::Serialize;
use serde_json::{Value as Json, json};

/// An option of `fanlight run` and the field of the same name.
pub struct OptionSpec {
    /// Name without the dashes.
    pub name: &'static str,
    /// What follows the name.
    pub form: Form,
    /// Values to show as examples.
    pub examples: &'static [&'static str],
    /// Reads a value as the command line does, and returns the JSON of the field.
    pub read: fn(&str) -> Result<Json, String>,
}

/// The form of an option's value.
pub enum Form {
    /// One value.
    One(Value),
    /// `key=value,key=value`. The first key may be omitted.
    Keys(&'static [(&'static str, Value)]),
    /// One of several words, some of which take a value: `word` or `word=value`.
    Choice(&'static [(&'static str, Option<Value>)]),
}

/// The kind of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A file or device node.
    File,
    /// A tap interface.
    Tap,
    /// A PCI address.
    PciAddress,
    /// Free text.
    Text,
    /// A device's name.
    Name,
    /// A MAC address.
    Mac,
    /// A size in bytes.
    Size,
    /// The size of a huge page.
    HugePage,
    /// A number.
    Number,
    /// A PCIe root port.
    Port,
    /// A vsock context ID.
    Cid,
    /// A boolean.
    Switch,
    /// A word of the schema's enumeration.
    Word,
    /// Output sizes.
    Outputs,
}

impl Value {
    /// The placeholder in a grammar. That of `Word` is the words themselves.
    pub fn placeholder(self) -> &'static str {
        match self {
            Self::File => "FILE",
            Self::Tap => "TAP",
            Self::PciAddress => "ADDRESS",
            Self::Text => "TEXT",
            Self::Name => "NAME",
            Self::Mac => "MAC",
            Self::Size => "SIZE",
            Self::HugePage => "2M|1G",
            Self::Number | Self::Port | Self::Cid => "N",
            Self::Switch => "on|off",
            Self::Word => "WORD",
            Self::Outputs => "WxH[+WxH...]",
        }
    }

    /// Whether `fd:N` can take the value's place.
    pub fn takes_descriptor(self) -> bool {
        matches!(self, Self::File | Self::Tap | Self::PciAddress)
    }
}

/// The host ends of a serial port or console.
const BACKENDS: Form = Form::Choice(&[
    ("stdio", None),
    ("null", None),
    ("file", Some(Value::File)),
    ("socket", Some(Value::File)),
]);

/// All options that describe the machine, in the order of the help.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "kernel",
        form: Form::One(Value::File),
        examples: &["vmlinuz", "fd:3"],
        read: read::<PathOrFd, _>,
    },
    OptionSpec {
        name: "initrd",
        form: Form::One(Value::File),
        examples: &["initrd.img"],
        read: read::<PathOrFd, _>,
    },
    OptionSpec {
        name: "cmdline",
        form: Form::One(Value::Text),
        examples: &["root=/dev/vda1 console=ttyS0 panic=-1"],
        read: |text| Ok(json!(text)),
    },
    OptionSpec {
        name: "unpack",
        form: Form::One(Value::Word),
        examples: &["guest"],
        read: |text| Ok(json!(text)),
    },
    OptionSpec {
        name: "on-reset",
        form: Form::One(Value::Word),
        examples: &["exit"],
        read: |text| Ok(json!(text)),
    },
    OptionSpec {
        name: "on-panic",
        form: Form::One(Value::Word),
        examples: &["restart"],
        read: |text| Ok(json!(text)),
    },
    OptionSpec {
        name: "cpus",
        form: Form::One(Value::Number),
        examples: &["4"],
        read: read::<u32, _>,
    },
    OptionSpec {
        name: "memory",
        form: Form::Keys(&[("size", Value::Size), ("hugepages", Value::HugePage)]),
        examples: &["2G", "size=2G,hugepages=2M"],
        read: read::<MemoryConfig, _>,
    },
    OptionSpec {
        name: "kvm",
        form: Form::One(Value::File),
        examples: &["fd:3"],
        read: read::<PathOrFd, _>,
    },
    OptionSpec {
        name: "disk",
        form: Form::Keys(&[
            ("path", Value::File),
            ("readonly", Value::Switch),
            ("format", Value::Word),
            ("serial", Value::Text),
            ("id", Value::Name),
            ("port", Value::Port),
        ]),
        examples: &["disk.img", "path=disk.qcow2,format=qcow2,readonly=on"],
        read: read::<DiskConfig, _>,
    },
    OptionSpec {
        name: "net",
        form: Form::Keys(&[
            ("tap", Value::Tap),
            ("mac", Value::Mac),
            ("vhost", Value::Switch),
            ("id", Value::Name),
            ("port", Value::Port),
        ]),
        examples: &["tap0", "tap=tap0,mac=02:00:00:00:00:01,vhost=off"],
        read: read::<NetConfig, _>,
    },
    OptionSpec {
        name: "vsock",
        form: Form::Keys(&[("cid", Value::Cid), ("device", Value::File)]),
        examples: &["3"],
        read: read::<VsockConfig, _>,
    },
    OptionSpec {
        name: "gpu",
        form: Form::Keys(&[
            ("outputs", Value::Outputs),
            ("edid-name", Value::Text),
            ("renderer", Value::Word),
            ("hostmem", Value::Size),
            ("hostmem-slots", Value::Switch),
            ("max-resource-memory", Value::Size),
            ("port", Value::Port),
        ]),
        examples: &["1920x1080", "outputs=1920x1080+1280x1024,renderer=venus"],
        read: read::<GpuConfig, _>,
    },
    OptionSpec {
        name: "vfio",
        form: Form::Keys(&[
            ("device", Value::PciAddress),
            ("iommufd", Value::Word),
            ("iommu", Value::File),
            ("group", Value::File),
            ("id", Value::Name),
            ("port", Value::Port),
        ]),
        examples: &["0000:03:00.1", "device=0000:03:00.1,iommufd=on,port=1"],
        read: read::<VfioConfig, _>,
    },
    OptionSpec {
        name: "serial",
        form: BACKENDS,
        examples: &["null", "socket=serial.sock"],
        read: read::<CharBackend, _>,
    },
    OptionSpec {
        name: "console",
        form: BACKENDS,
        examples: &["stdio", "file=console.log"],
        read: read::<ConsoleConfig, _>,
    },
    OptionSpec {
        name: "rng",
        form: Form::Keys(&[("enabled", Value::Switch)]),
        examples: &["off"],
        read: read::<RngConfig, _>,
    },
    OptionSpec {
        name: "hotplug-ports",
        form: Form::One(Value::Number),
        examples: &["8"],
        read: read::<u8, _>,
    },
];

/// The option of this name, with or without the dashes.
pub fn find(name: &str) -> Option<&'static OptionSpec> {
    let name = name.strip_prefix("--").unwrap_or(name);
    OPTIONS.iter().find(|option| option.name == name)
}

fn read<T, E>(text: &str) -> Result<Json, String>
where
    T: std::str::FromStr<Err = E> + Serialize,
    E: std::fmt::Display,
{
    let config: T = text.parse().map_err(|error: E| error.to_string())?;
    serde_json::to_value(config).map_err(|error| error.to_string())
}
