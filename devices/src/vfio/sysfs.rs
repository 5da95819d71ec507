//! PCI devices of the host as sysfs shows them (Linux `Documentation/ABI/testing/sysfs-bus-pci`).

use std::{
    fmt, fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    str::FromStr,
};

use thiserror::Error;

/// The driver that gives devices to user space.
pub const VFIO_PCI: &str = "vfio-pci";
const DEVICES: &str = "/sys/bus/pci/devices";

/// Where a function is on the host: domain, bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// The text is no PCI address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a PCI address: write it like 0000:03:00.1, as `fanlight vfio list` shows it")]
pub struct PciAddressError(String);

impl FromStr for PciAddress {
    type Err = PciAddressError;

    /// The domain may be left out, and is 0 then.
    fn from_str(text: &str) -> Result<Self, PciAddressError> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let mut parts = rest.rsplit(':');
            let (device, bus) = (parts.next()?, parts.next()?);
            let domain = parts.next().unwrap_or("0");
            let hex = |text: &str, max: u32| {
                let digits = (1..=8).contains(&text.len())
                    && text.bytes().all(|byte| byte.is_ascii_hexdigit());
                let value = u32::from_str_radix(text, 16).ok()?;
                (digits && value <= max).then_some(value)
            };
            let address = Self {
                domain: hex(domain, u32::MAX)?,
                bus: hex(bus, 0xff)? as u8,
                device: hex(device, 31)? as u8,
                function: hex(function, 7)? as u8,
            };
            parts.next().is_none().then_some(address)
        };
        parse().ok_or_else(|| PciAddressError(text.into()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

/// A PCI function of the host, in sysfs.
#[derive(Clone, Debug)]
pub struct HostFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Its directory.
    pub path: PathBuf,
}

impl HostFunction {
    /// The function at `address`, if there is one.
    pub fn find(address: PciAddress) -> Option<Self> {
        let path = Path::new(DEVICES).join(address.to_string());
        path.exists().then_some(Self { address, path })
    }

    /// The function whose node in `/dev/vfio/devices` is open, if it is one.
    pub fn of_node(node: &impl AsFd) -> Option<Self> {
        let stat = rustix::fs::fstat(node).ok()?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode)
            != rustix::fs::FileType::CharacterDevice
        {
            return None;
        }
        let (major, minor) = (
            rustix::fs::major(stat.st_rdev),
            rustix::fs::minor(stat.st_rdev),
        );
        // Leads to FUNCTION/vfio-dev/vfioN.
        let entry = fs::canonicalize(format!("/sys/dev/char/{major}:{minor}")).ok()?;
        let parent = entry.parent()?;
        if parent.file_name()? != "vfio-dev" {
            return None;
        }
        let address = parent.parent()?.file_name()?.to_str()?.parse().ok()?;
        Self::find(address)
    }

    /// All functions, by address.
    pub fn all() -> io::Result<Vec<Self>> {
        Self::in_dir(Path::new(DEVICES))
    }

    fn in_dir(dir: &Path) -> io::Result<Vec<Self>> {
        let mut functions = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            if let Some(address) = name.to_str().and_then(|name| name.parse().ok()) {
                functions.extend(Self::find(address));
            }
        }
        functions.sort_by_key(|function| function.address);
        Ok(functions)
    }

    /// The content of an attribute, without surrounding white space.
    pub fn attribute(&self, name: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.path.join(name))?.trim().into())
    }

    /// A hexadecimal attribute, such as `vendor`.
    pub fn hex(&self, name: &str) -> Option<u32> {
        let text = self.attribute(name).ok()?;
        u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    }

    /// The last component of the target of a link.
    fn link(&self, name: &str) -> Option<String> {
        let target = fs::read_link(self.path.join(name)).ok()?;
        Some(target.file_name()?.to_str()?.into())
    }

    /// The driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    /// Number of its IOMMU group.
    pub fn group(&self) -> Option<u32> {
        self.link("iommu_group")?.parse().ok()
    }

    /// All functions of its IOMMU group, itself included.
    pub fn group_members(&self) -> io::Result<Vec<Self>> {
        Self::in_dir(&self.path.join("iommu_group/devices"))
    }

    /// The physical function that it is a virtual function of.
    pub fn physical_function(&self) -> Option<PciAddress> {
        self.link("physfn")?.parse().ok()
    }

    /// How many virtual functions it has and can have, if it can have any.
    pub fn virtual_functions(&self) -> Option<(u32, u32)> {
        let number = |name| self.attribute(name).ok()?.parse().ok();
        Some((number("sriov_numvfs")?, number("sriov_totalvfs")?))
    }

    /// Its virtual functions, by number.
    pub fn children(&self) -> Vec<PciAddress> {
        (0..)
            .map_while(|index| self.link(&format!("virtfn{index}"))?.parse().ok())
            .collect()
    }

    /// Its VFIO character device, if the kernel makes one.
    pub fn character_device(&self) -> Option<PathBuf> {
        let entry = fs::read_dir(self.path.join("vfio-dev")).ok()?.next()?;
        Some(Path::new("/dev/vfio/devices").join(entry.ok()?.file_name()))
    }
}

/// The devices that keep a group from user space, with their drivers.
pub fn others_in_group(function: &HostFunction) -> String {
    /// Drivers that do no harm to a group (Linux `drivers/pci/pcie/portdrv.c`, driver_managed_dma).
    const HARMLESS: [&str; 2] = [VFIO_PCI, "pcieport"];
    let members = function.group_members().unwrap_or_default();
    let others: Vec<_> = members
        .iter()
        .filter(|member| member.address != function.address)
        .filter_map(|member| {
            let driver = member.driver()?;
            let harmless = HARMLESS.contains(&driver.as_str());
            (!harmless).then(|| format!("{} (driver {driver})", member.address))
        })
        .collect();
    others.join(", ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_node_of_vfios_is_no_function() {
        let file = tempfile::tempfile().unwrap();
        assert!(HostFunction::of_node(&file).is_none());
        let null = fs::File::open("/dev/null").unwrap();
        assert!(HostFunction::of_node(&null).is_none());
    }

    #[test]
    fn the_domain_may_be_left_out() {
        let address: PciAddress = "03:1f.7".parse().unwrap();
        assert_eq!(address.to_string(), "0000:03:1f.7");
        assert_eq!(
            "10000:e1:00.0".parse::<PciAddress>().unwrap().to_string(),
            "10000:e1:00.0"
        );
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "0000:03:00",
            "03:20.0",
            "03:00.8",
            "1:2:3:4.5",
            "+3:00.0",
            "../x",
            "::.",
            "0:0.0.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived_and_addresses_read_back(text in ".*") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert_eq!(address.to_string().parse::<PciAddress>().unwrap(), address);
            }
        }
    }
}
