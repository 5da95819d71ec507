//! Checks of one PCI device.

use fanlight::kvm;
use fanlight_arch::{cpuid::physical_address_bits, layout};
use fanlight_devices::{
    dmabuf::vfio_export,
    error_line,
    vfio::{
        HostDevice, Iommu, VfioError,
        sysfs::{HostFunction, VFIO_PCI, others_in_group},
    },
};

use super::report::{Check, Verdict};

/// Checks whether `function` can be passed through.
pub fn checks(function: &HostFunction) -> Vec<Check> {
    let mut checks = vec![
        virtual_functions(function),
        driver(function),
        isolation(function),
        reset(function),
        bars(function),
    ];
    checks.extend(opened(function));
    checks
}

fn virtual_functions(function: &HostFunction) -> Check {
    const NAME: &str = "virtual functions";
    let address = function.address;
    match (function.physical_function(), function.virtual_functions()) {
        (Some(physical), _) => Check::new(NAME, Verdict::Yes, format!("is one, of {physical}")),
        (None, Some((0, total))) => Check::new(
            NAME,
            Verdict::Warn,
            format!("0 of {total}; the guest would get the whole device"),
        )
        .fix(format!("fanlight vfio bind {address} --vfs 1")),
        (None, Some((now, total))) => {
            let children = function.children();
            let first = children
                .first()
                .map_or("ADDRESS".into(), ToString::to_string);
            Check::new(
                NAME,
                Verdict::No,
                format!(
                    "{now} of {total}; a device with virtual functions cannot be passed through"
                ),
            )
            .fix(format!("fanlight doctor {first}"))
        }
        (None, None) => Check::new(
            NAME,
            Verdict::Yes,
            "not supported; the guest gets the whole device",
        ),
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
        .fix(format!(
            "echo {VFIO_PCI} > /sys/bus/pci/devices/{address}/driver_override; echo {address} > \
             /sys/bus/pci/drivers/{other}/unbind; echo {address} > /sys/bus/pci/drivers_probe"
        )),
        Some(other) => {
            Check::new(NAME, Verdict::No, format!("{other}, a driver of the host")).fix(bind)
        }
        None => Check::new(NAME, Verdict::No, "none").fix(bind),
    }
}

fn isolation(function: &HostFunction) -> Check {
    const NAME: &str = "isolation";
    let Some(group) = function.group() else {
        return Check::new(NAME, Verdict::No, "in no IOMMU group").fix("see the check IOMMU");
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
    .fix(format!(
        "bind those devices to {VFIO_PCI} too, or move this one to another slot"
    ))
}

fn reset(function: &HostFunction) -> Check {
    const NAME: &str = "reset";
    match function.attribute("reset_method") {
        Ok(methods) if !methods.is_empty() => Check::new(NAME, Verdict::Yes, methods),
        _ => Check::new(
            NAME,
            Verdict::Warn,
            "not supported; the device keeps its state when the guest restarts",
        ),
    }
}

/// Whether the guest-physical address space has room for the BARs.
fn bars(function: &HostFunction) -> Check {
    const NAME: &str = "BARs";
    let cpuid = kvm::KvmVm::new(1, None).and_then(|kvm| kvm.supported_cpuid());
    let Ok(cpuid) = cpuid else {
        return Check::new(
            NAME,
            Verdict::Unknown,
            "KVM does not report its physical address width",
        );
    };
    let bits = physical_address_bits(&cpuid);
    let window = layout::pci_mmio64(layout::HIGH_RAM_START, bits);
    let room = window.end - window.start;
    let sizes = bar_sizes(&function.attribute("resource").unwrap_or_default());
    let total = sizes
        .iter()
        .fold(0u64, |sum, size| sum.saturating_add(*size));
    let list: Vec<_> = sizes.iter().map(|size| size_text(*size)).collect();
    let found = format!(
        "{}; the guest has {} for BARs, with {bits} address bits",
        list.join(", "),
        size_text(room)
    );
    if total <= room {
        Check::new(NAME, Verdict::Yes, found)
    } else {
        Check::new(NAME, Verdict::No, found)
            .fix("create more virtual functions; each then has smaller BARs")
    }
}

/// BAR sizes from a sysfs `resource` file, whose first six lines are the BARs.
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

fn size_text(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match UNITS.iter().find(|(shift, _)| bytes >> shift != 0) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

/// Checks that need the device open.
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
        Ok(()) => Check::new(
            export,
            Verdict::Yes,
            "the kernel exports BARs; frames need no copy",
        ),
        Err(error) => Check::new(export, Verdict::No, error_line(&error)),
    });
    let width = "DMA address width";
    checks.push(match device.iommu.address_bits() {
        Ok(bits) => Check::new(width, Verdict::Yes, format!("{bits} bits")),
        Err(error) => Check::new(width, Verdict::Unknown, error_line(&error)),
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_implemented_bars() {
        let resource = "0x00000000fe000000 0x00000000fe003fff 0x0\n\
                        0x0000000000000000 0x0000000000000000 0x0\n\
                        0x0000380000000000 0x00003803ffffffff 0x14220c";
        assert_eq!(bar_sizes(resource), [0x4000, 16 << 30]);
        assert_eq!(size_text(16 << 30), "16 GiB");
        assert_eq!(size_text(256), "256 bytes");
    }
}
