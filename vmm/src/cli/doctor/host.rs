//! Checks of the host.

use std::{fs, io, path::Path, sync::Arc};

use fanlight::{
    kvm,
    renderer::{RendererError, RendererLauncher},
};
use fanlight_devices::{error_line, vfio::sysfs::VFIO_PCI, virtio::gpu::render::wire::Start};
use rustix::{fs::MemfdFlags, process::Resource};

use super::report::{Check, Verdict};

/// Checks everything that a guest with a GPU needs of the host.
pub fn checks() -> Vec<Check> {
    vec![
        kvm_works(),
        iommu_is_on(),
        vfio_driver(),
        dma_interface(),
        udmabuf(),
        memory_lock(),
        renderer("OpenGL for guests (virgl)", Draws::OpenGl),
        renderer("Vulkan for guests (Venus)", Draws::Vulkan),
    ]
}

fn kvm_works() -> Check {
    const NAME: &str = "KVM";
    match kvm::KvmVm::new(1, None) {
        Ok(_) if kvm::processor_virtualizes() => {
            Check::new(NAME, Verdict::Yes, "/dev/kvm creates virtual machines")
        }
        Ok(_) => Check::new(NAME, Verdict::No, "/proc/cpuinfo lists neither vmx nor svm")
            .fix("use a host with hardware virtualization"),
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
            format!("{units} IOMMUs, {groups} groups"),
        )
    } else {
        Check::new(NAME, Verdict::No, "the kernel has no IOMMU groups").fix(
            "enable VT-d or AMD-Vi in the firmware; on Intel hosts add intel_iommu=on to the kernel command \
             line",
        )
    }
}

fn vfio_driver() -> Check {
    const NAME: &str = "VFIO driver";
    if Path::new("/sys/bus/pci/drivers").join(VFIO_PCI).exists() {
        Check::new(NAME, Verdict::Yes, format!("{VFIO_PCI} is loaded"))
    } else {
        Check::new(NAME, Verdict::No, format!("{VFIO_PCI} is not loaded"))
            .fix(format!("modprobe {VFIO_PCI}"))
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
        (Ok(()), _) if cdev => Check::new(NAME, Verdict::Yes, "iommufd and /dev/vfio/devices"),
        // Fanlight prefers iommufd whenever it exists.
        (Err(error), _) if cdev && error.kind() == io::ErrorKind::PermissionDenied => {
            Check::new(NAME, Verdict::No, "no permission on /dev/iommu")
                .fix(permission("/dev/iommu"))
        }
        (_, Ok(())) => Check::new(
            NAME,
            Verdict::Yes,
            "VFIO container; the kernel has no iommufd for VFIO, or no device is bound",
        ),
        (_, Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            Check::new(NAME, Verdict::No, "no permission on /dev/vfio/vfio")
                .fix(permission("/dev/vfio/vfio"))
        }
        (_, Err(error)) => Check::new(
            NAME,
            Verdict::No,
            format!("neither /dev/iommu nor /dev/vfio/vfio ({error})"),
        )
        .fix(format!("modprobe {VFIO_PCI}")),
    }
}

fn udmabuf() -> Check {
    const NAME: &str = "dma-bufs of guest memory";
    /// An 8K frame (7680 × 4320) of 32 bits a pixel.
    const ENOUGH_MIB: u64 = 128;
    match opens("/dev/udmabuf") {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Check::new(NAME, Verdict::No, "no permission on /dev/udmabuf")
                .fix("chown $USER /dev/udmabuf");
        }
        Err(error) => {
            return Check::new(NAME, Verdict::No, format!("no /dev/udmabuf ({error})"))
                .fix("modprobe udmabuf, or use a kernel with CONFIG_UDMABUF");
        }
    }
    let limit = |name: &str| -> Option<u64> {
        let path = format!("/sys/module/udmabuf/parameters/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    match (limit("size_limit_mb"), limit("list_limit")) {
        (Some(size), list) => {
            let list = list.map_or("?".into(), |list| list.to_string());
            let found = format!("/dev/udmabuf, at most {size} MiB and {list} ranges a buffer");
            if size >= ENOUGH_MIB {
                Check::new(NAME, Verdict::Yes, found)
            } else {
                Check::new(
                    NAME,
                    Verdict::Warn,
                    format!("{found}: too little for an 8K frame"),
                )
                .fix("echo 1024 > /sys/module/udmabuf/parameters/size_limit_mb")
            }
        }
        _ => Check::new(NAME, Verdict::Yes, "/dev/udmabuf"),
    }
}

/// What a renderer process draws.
#[derive(Clone, Copy)]
enum Draws {
    OpenGl,
    Vulkan,
}

/// Starts a renderer process and asks it for its capability sets.
fn renderer(name: &'static str, draws: Draws) -> Check {
    let start = Start {
        virgl: matches!(draws, Draws::OpenGl).into(),
        venus: matches!(draws, Draws::Vulkan).into(),
    };
    let memory = rustix::fs::memfd_create("fanlight-doctor", MemfdFlags::CLOEXEC);
    let answer = memory
        .and_then(|file| rustix::fs::ftruncate(&file, 1 << 12).map(|()| file))
        .map_err(|error| RendererError::Start(error.into()))
        .and_then(|file| RendererLauncher::new(Arc::new(file.into()), start).capabilities());
    match answer {
        Ok(infos) => {
            let sets: Vec<_> = infos
                .iter()
                .map(|info| format!("{} version {}", info.id, info.max_version))
                .collect();
            let found = format!("virglrenderer with capset {}", sets.join(", "));
            Check::new(name, Verdict::Yes, found)
        }
        Err(RendererError::Failed(why)) => {
            // The renderer ends its reason with the packages to install.
            let (found, fix) = why.split_once(": install").unwrap_or((&why, ""));
            let check = Check::new(name, Verdict::Warn, format!("none: {found}"));
            match fix {
                "" => check,
                fix => check.fix(format!("install{fix}")),
            }
        }
        Err(error) => Check::new(name, Verdict::Warn, format!("none: {}", error_line(&error))),
    }
}

fn memory_lock() -> Check {
    const NAME: &str = "memory lock limit";
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    match limit {
        None => Check::new(NAME, Verdict::Yes, "unlimited"),
        Some(_) if rustix::process::geteuid().is_root() => {
            Check::new(NAME, Verdict::Yes, "unlimited for root")
        }
        Some(limit) => Check::new(
            NAME,
            Verdict::Warn,
            format!(
                "{} MiB; a guest with passed-through devices must have less memory",
                limit >> 20
            ),
        )
        .fix("ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit"),
    }
}
