//! `fanlight doctor`: what this host, and one device of it, has of what a guest with a GPU needs; for each
//! thing that is missing, what mends it.

use std::{fs, io, path::Path, sync::Arc};

use fanlight_arch::{cpuid::physical_address_bits, layout};
use fanlight_devices::{
    dmabuf::vfio_export,
    error_line,
    vfio::{
        HostDevice, Iommu, VfioError,
        sysfs::{HostFunction, VFIO_PCI, others_in_group},
    },
    virtio::gpu::render::wire::Start,
};
use rustix::{fs::MemfdFlags, process::Resource};
use serde::Serialize;

use fanlight::{
    kvm,
    renderer::{RendererError, Starter},
};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Yes,
    /// Works, with less than there could be.
    Partly,
    /// Stands in the way.
    No,
    /// Could not be found out.
    Unknown,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it, where there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// All that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing stands in the way.
    pub ready: bool,
    /// In the order in which things are to be mended.
    pub checks: Vec<Check>,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict,
            found: found.into(),
            mend: None,
        }
    }

    fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

impl Report {
    /// Looks at the host and, if one is named, at a device.
    pub fn of(device: Option<&HostFunction>) -> Self {
        let mut checks = vec![
            kvm_works(),
            iommu_is_on(),
            vfio_driver(),
            dma_interface(),
            udmabuf(),
            memory_lock(),
            draws("OpenGL for guests (virgl)", true),
            draws("Vulkan for guests (Venus)", false),
        ];
        if let Some(function) = device {
            checks.extend([
                virtual_functions(function),
                driver(function),
                isolation(function),
                reset(function),
                bars(function),
            ]);
            checks.extend(opened(function));
        }
        Self {
            ready: checks.iter().all(|check| check.verdict != Verdict::No),
            checks,
        }
    }

    /// A line for each check, and one more for what mends it.
    pub fn for_people(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Yes => "yes   ",
                Verdict::Partly => "partly",
                Verdict::No => "NO    ",
                Verdict::Unknown => "?     ",
            };
            text += &format!("{mark}  {}: {}\n", check.name, check.found);
            if let Some(mend) = &check.mend {
                text += &format!("          {mend}\n");
            }
        }
        text
    }
}

fn kvm_works() -> Check {
    const NAME: &str = "KVM";
    match kvm::KvmVm::new(1, None) {
        Ok(_) if kvm::processor_virtualizes() => {
            Check::new(NAME, Verdict::Yes, "/dev/kvm makes virtual machines")
        }
        Ok(_) => Check::new(NAME, Verdict::No, "the processor shows neither vmx nor svm")
            .mend("use a host with hardware virtualization"),
        Err(error) => Check::new(NAME, Verdict::No, error_line(&error)),
    }
}

fn iommu_is_on() -> Check {
    const NAME: &str = "IOMMU";
    let count = |dir: &str| fs::read_dir(dir).map_or(0, |entries| entries.count());
    let (units, groups) = (count("/sys/class/iommu"), count("/sys/kernel/iommu_groups"));
    if groups > 0 {
        Check::new(
            NAME,
            Verdict::Yes,
            format!("{units} units, {groups} groups of devices"),
        )
    } else {
        Check::new(NAME, Verdict::No, "no group of devices is isolated").mend(
            "switch VT-d or AMD-Vi on in the firmware; on Intel hosts add intel_iommu=on to the kernel's \
             command line",
        )
    }
}

fn vfio_driver() -> Check {
    const NAME: &str = "VFIO's driver";
    if Path::new("/sys/bus/pci/drivers").join(VFIO_PCI).exists() {
        Check::new(NAME, Verdict::Yes, format!("{VFIO_PCI} is there"))
    } else {
        Check::new(NAME, Verdict::No, format!("no {VFIO_PCI}")).mend(format!("modprobe {VFIO_PCI}"))
    }
}

/// Whether a device node can be opened for reading and writing.
fn opens(path: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(path);
    file.map(drop)
}

fn dma_interface() -> Check {
    const NAME: &str = "DMA interface";
    let permission = |path: &str| format!("chown $USER {path}");
    let cdev = Path::new("/dev/vfio/devices").exists();
    match (opens("/dev/iommu"), opens("/dev/vfio/vfio")) {
        (Ok(()), _) if cdev => Check::new(NAME, Verdict::Yes, "iommufd with VFIO's device nodes"),
        // It is what is used as long as it is there.
        (Err(error), _) if cdev && error.kind() == io::ErrorKind::PermissionDenied => {
            Check::new(NAME, Verdict::No, "no permission on /dev/iommu")
                .mend(permission("/dev/iommu"))
        }
        (_, Ok(())) => Check::new(
            NAME,
            Verdict::Yes,
            "VFIO's container; this kernel has no iommufd for devices, or none is bound",
        ),
        (_, Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            Check::new(NAME, Verdict::No, "no permission on /dev/vfio/vfio")
                .mend(permission("/dev/vfio/vfio"))
        }
        (_, Err(error)) => Check::new(
            NAME,
            Verdict::No,
            format!("neither /dev/iommu nor /dev/vfio/vfio ({error})"),
        )
        .mend(format!("modprobe {VFIO_PCI}")),
    }
}

fn udmabuf() -> Check {
    const NAME: &str = "dma-bufs of guest memory";
    /// A frame of 8K in 32 bits a pixel.
    const ENOUGH_MIB: u64 = 128;
    match opens("/dev/udmabuf") {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Check::new(NAME, Verdict::No, "no permission on /dev/udmabuf")
                .mend("chown $USER /dev/udmabuf");
        }
        Err(error) => {
            return Check::new(NAME, Verdict::No, format!("no /dev/udmabuf ({error})"))
                .mend("modprobe udmabuf, or use a kernel with CONFIG_UDMABUF");
        }
    }
    let limit = |name: &str| -> Option<u64> {
        let path = format!("/sys/module/udmabuf/parameters/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    match (limit("size_limit_mb"), limit("list_limit")) {
        (Some(size), list) => {
            let list = list.map_or("?".into(), |list| list.to_string());
            let found = format!("/dev/udmabuf, up to {size} MiB in {list} pieces");
            if size >= ENOUGH_MIB {
                Check::new(NAME, Verdict::Yes, found)
            } else {
                Check::new(
                    NAME,
                    Verdict::Partly,
                    format!("{found}: too little for a screen of 8K"),
                )
                .mend("echo 1024 > /sys/module/udmabuf/parameters/size_limit_mb")
            }
        }
        _ => Check::new(NAME, Verdict::Yes, "/dev/udmabuf"),
    }
}

/// Whether virglrenderer draws here: it is asked, in a process of its own.
fn draws(name: &'static str, virgl: bool) -> Check {
    let start = Start {
        virgl: virgl.into(),
        venus: (!virgl).into(),
    };
    let nothing = rustix::fs::memfd_create("fanlight-doctor", MemfdFlags::CLOEXEC);
    let asked = nothing
        .and_then(|file| rustix::fs::ftruncate(&file, 1 << 12).map(|()| file))
        .map_err(|error| RendererError::Start(error.into()))
        .and_then(|file| Starter::new(Arc::new(file.into()), start).capabilities());
    match asked {
        Ok(infos) => {
            let sets: Vec<_> = infos
                .iter()
                .map(|info| format!("{} version {}", info.id, info.max_version))
                .collect();
            let found = format!("virglrenderer with capability set {}", sets.join(", "));
            Check::new(name, Verdict::Yes, found)
        }
        Err(RendererError::Failed(why)) => {
            // What is missing, and what mends it.
            let (found, mend) = why.split_once(": install").unwrap_or((&why, ""));
            let check = Check::new(name, Verdict::Partly, format!("none: {found}"));
            match mend {
                "" => check,
                mend => check.mend(format!("install{mend}")),
            }
        }
        Err(error) => Check::new(
            name,
            Verdict::Partly,
            format!("none: {}", error_line(&error)),
        ),
    }
}

fn memory_lock() -> Check {
    const NAME: &str = "memory lock limit";
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    match limit {
        None => Check::new(NAME, Verdict::Yes, "none"),
        Some(_) if rustix::process::geteuid().is_root() => {
            Check::new(NAME, Verdict::Yes, "none for root")
        }
        Some(limit) => Check::new(
            NAME,
            Verdict::Partly,
            format!(
                "{} MiB: guests with passed-through devices must be smaller",
                limit >> 20
            ),
        )
        .mend("ulimit -l unlimited, or LimitMEMLOCK=infinity in a service"),
    }
}

fn virtual_functions(function: &HostFunction) -> Check {
    const NAME: &str = "virtual functions";
    let address = function.address;
    match (function.physical_function(), function.virtual_functions()) {
        (Some(physical), _) => Check::new(NAME, Verdict::Yes, format!("this is one of {physical}")),
        (None, Some((0, total))) => Check::new(
            NAME,
            Verdict::Partly,
            format!("none of {total}; the whole device would be given away"),
        )
        .mend(format!("fanlight vfio bind {address} --vfs 1")),
        (None, Some((now, total))) => {
            let children = function.children();
            let first = children
                .first()
                .map_or("one of them".into(), ToString::to_string);
            Check::new(
                NAME,
                Verdict::No,
                format!("{now} of {total}: it cannot be given away itself"),
            )
            .mend(format!("fanlight doctor {first}"))
        }
        (None, None) => Check::new(NAME, Verdict::Yes, "none: the device is given away whole"),
    }
}

fn driver(function: &HostFunction) -> Check {
    const NAME: &str = "driver";
    let address = function.address;
    let bind = format!("fanlight vfio bind {address}");
    match function.driver().as_deref() {
        Some(VFIO_PCI) => Check::new(NAME, Verdict::Yes, VFIO_PCI),
        // A variant driver serves passthrough, but exports no memory (`get_dmabuf_phys`).
        Some(other) if other.ends_with("vfio-pci") => Check::new(
            NAME,
            Verdict::No,
            format!("{other}, a variant of {VFIO_PCI} that cannot export device memory"),
        )
        .mend(format!(
            "echo {VFIO_PCI} > /sys/bus/pci/devices/{address}/driver_override; echo {address} > \
             /sys/bus/pci/drivers/{other}/unbind; echo {address} > /sys/bus/pci/drivers_probe"
        )),
        Some(other) => {
            Check::new(NAME, Verdict::No, format!("{other}, which is the host's")).mend(bind)
        }
        None => Check::new(NAME, Verdict::No, "none").mend(bind),
    }
}

fn isolation(function: &HostFunction) -> Check {
    const NAME: &str = "isolation";
    let Some(group) = function.group() else {
        return Check::new(NAME, Verdict::No, "in no IOMMU group").mend("see IOMMU above");
    };
    let others = others_in_group(function);
    if others.is_empty() {
        return Check::new(NAME, Verdict::Yes, format!("IOMMU group {group}"));
    }
    Check::new(
        NAME,
        Verdict::No,
        format!("IOMMU group {group} is shared with {others}"),
    )
    .mend(format!(
        "bind those to {VFIO_PCI} too, or move the device to another slot"
    ))
}

fn reset(function: &HostFunction) -> Check {
    const NAME: &str = "reset";
    match function.attribute("reset_method") {
        Ok(methods) if !methods.is_empty() => Check::new(NAME, Verdict::Yes, methods),
        _ => Check::new(
            NAME,
            Verdict::Partly,
            "none: the device keeps its state when the guest restarts",
        ),
    }
}

/// Whether the guest's addresses have room for the device's memory.
fn bars(function: &HostFunction) -> Check {
    const NAME: &str = "BARs";
    let cpuid = kvm::KvmVm::new(1, None).and_then(|kvm| kvm.supported_cpuid());
    let Ok(cpuid) = cpuid else {
        return Check::new(
            NAME,
            Verdict::Unknown,
            "KVM does not tell how many address bits there are",
        );
    };
    let bits = physical_address_bits(&cpuid);
    let window = layout::pci_mmio64(layout::HIGH_RAM_START, bits);
    let room = window.end - window.start;
    let sizes = bar_sizes(&function.attribute("resource").unwrap_or_default());
    let total = sizes
        .iter()
        .fold(0u64, |sum, size| sum.saturating_add(*size));
    let list: Vec<_> = sizes.iter().map(|size| size_for_people(*size)).collect();
    let found = format!(
        "{}; {} for them with {bits} address bits",
        list.join(", "),
        size_for_people(room)
    );
    if total <= room {
        Check::new(NAME, Verdict::Yes, found)
    } else {
        Check::new(NAME, Verdict::No, found)
            .mend("make more virtual functions, which makes each smaller")
    }
}

/// Sizes of what is in a `resource` file: the first six lines are BARs.
fn bar_sizes(resource: &str) -> Vec<u64> {
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    resource
        .lines()
        .take(6)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (start, last) = (hex(words.next()?)?, hex(words.next()?)?);
            last.checked_sub(start)?
                .checked_add(1)
                .filter(|_| last != 0)
        })
        .collect()
}

fn size_for_people(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match UNITS.iter().find(|(shift, _)| bytes >> shift != 0) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

/// What only an open device tells. One that cannot be opened has its reason in a check above, or here.
fn opened(function: &HostFunction) -> Vec<Check> {
    const NAME: &str = "access";
    let open = || {
        let iommu = Iommu::open(std::slice::from_ref(function), None, None)?;
        HostDevice::open(function, iommu, None)
    };
    if function.driver().as_deref() != Some(VFIO_PCI) {
        return vec![Check::new(
            NAME,
            Verdict::Unknown,
            format!("not bound to {VFIO_PCI}"),
        )];
    }
    let device = match open() {
        Ok(device) => device,
        Err(error @ VfioError::Busy(_)) => {
            return vec![Check::new(NAME, Verdict::Unknown, error_line(&error))];
        }
        Err(error) => return vec![Check::new(NAME, Verdict::No, error_line(&error))],
    };
    let mut checks = vec![Check::new(
        NAME,
        Verdict::Yes,
        format!("opened through {}", device.iommu.name()),
    )];
    let export = "dma-bufs of device memory";
    checks.push(match vfio_export::probe(&device) {
        Ok(()) => Check::new(export, Verdict::Yes, "frames can leave without a copy"),
        Err(error) => Check::new(export, Verdict::No, error_line(&error)),
    });
    let reach = "DMA addresses";
    checks.push(match device.iommu.address_bits() {
        Ok(bits) => Check::new(reach, Verdict::Yes, format!("{bits} bits")),
        Err(error) => Check::new(reach, Verdict::Unknown, error_line(&error)),
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_to_do_and_reads_as_json() {
        let checks = vec![
            Check::new("KVM", Verdict::Yes, "works"),
            Check::new("driver", Verdict::No, "none").mend("fanlight vfio bind 0000:03:00.1"),
        ];
        let report = Report {
            ready: false,
            checks,
        };
        let text = report.for_people();
        assert!(
            text.contains("NO      driver: none\n          fanlight vfio bind"),
            "{text}"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["checks"][1]["verdict"], "no");
        assert_eq!(json["checks"][0].get("mend"), None);
    }

    #[test]
    fn this_host_gets_a_report() {
        let report = Report::of(None);
        assert_eq!(report.checks.len(), 8);
        let missing = report
            .checks
            .iter()
            .any(|check| check.verdict == Verdict::No);
        assert_eq!(report.ready, !missing);
    }

    #[test]
    fn sizes_are_those_of_bars_that_are_there() {
        let resource = "0x00000000fe000000 0x00000000fe003fff 0x0\n\
                        0x0000000000000000 0x0000000000000000 0x0\n\
                        0x0000380000000000 0x00003803ffffffff 0x14220c";
        assert_eq!(bar_sizes(resource), [0x4000, 16 << 30]);
        assert_eq!(size_for_people(16 << 30), "16 GiB");
        assert_eq!(size_for_people(256), "256 bytes");
    }
}
