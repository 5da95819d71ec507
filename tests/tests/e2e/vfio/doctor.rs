//! `fanlight doctor` on a working host, and with each requirement broken in turn.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
};

use fanlight_devices::vfio::{HostDevice, Iommu};
use fanlight_tests::{
    Context, Failure, Result, common::pci::Function, ensure, host_side::guest::Assets,
};

use super::{IGB, host_function, run, virtual_function};

const NOBODY: u32 = 65534;
const UDMABUF_LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";

/// The doctor's exit status and output.
struct Diagnosis(Option<i32>, String);

impl Diagnosis {
    fn of(command: &mut Command) -> Result<Self> {
        let output = command.output().context("cannot run the doctor")?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text += &String::from_utf8_lossy(&output.stderr);
        Ok(Self(output.status.code(), text))
    }

    /// Checks the exit status, and that the output has lines with these starts. A fix is a line of its own.
    fn says(&self, status: i32, lines: &[&str]) -> Result<()> {
        let Self(code, text) = self;
        ensure(*code == Some(status), format!("{code:?} {text}"))?;
        for line in lines {
            let found = text.lines().any(|other| other.trim().starts_with(line));
            ensure(found, format!("no {line:?} in {text}"))?;
        }
        Ok(())
    }
}

/// The doctor's output for a function before and after it is bound, the list's output, and the output where a
/// requirement is missing.
pub fn doctor_and_list(assets: &Assets) -> Result<()> {
    let ask = |arguments: &[&str]| {
        Diagnosis::of(Command::new(&assets.fanlight).arg("doctor").args(arguments))
    };
    let physical = Function::only(IGB)?.address();
    ask(&[&physical])?.says(
        1,
        &[
            "NO    driver: igb, a driver of the host",
            &format!("fix: fanlight vfio bind {physical}"),
        ],
    )?;
    let (_, vf) = virtual_function(assets, IGB)?;
    ask(&[&vf])?.says(
        0,
        &[
            "yes   KVM:",
            "yes   IOMMU:",
            "yes   VFIO driver: vfio-pci is loaded",
            "yes   DMA interface: iommufd",
            "warn  dma-bufs of guest memory: /dev/udmabuf, at most 64 MiB",
            &format!("fix: echo 1024 > {UDMABUF_LIMIT}"),
            &format!("yes   virtual functions: is one, of {physical}"),
            "yes   driver: vfio-pci",
            "yes   isolation: IOMMU group",
            "yes   reset: flr",
            "yes   BARs: 16 KiB, 16 KiB",
            "yes   access: opened through iommufd",
            "yes   dma-bufs of device memory:",
            "yes   DMA address width:",
        ],
    )?;
    ask(&[&physical])?.says(
        1,
        &[
            "NO    virtual functions: 1 of 7",
            &format!("fix: fanlight doctor {vf}"),
        ],
    )?;
    let report = ask(&[&vf, "--json"])?;
    let json: serde_json::Value = serde_json::from_str(&report.1).context("not JSON")?;
    ensure(json["ready"] == true, &report.1)?;
    let list = run(&assets.fanlight, &["vfio", "list"])?;
    let line = list
        .lines()
        .find(|line| line.starts_with(&vf))
        .unwrap_or_default();
    ensure(
        line.contains("8086:10ca") && line.contains("ready for --vfio"),
        &list,
    )?;
    host_lacks(assets, &vf)?;
    device_lacks(assets, &vf)?;
    kernel_lacks(assets, &vf)?;
    user_lacks(assets, &vf)
}

/// Runs the doctor in a mount namespace in which `break_it` hid something.
fn broken(assets: &Assets, function: &str, break_it: &str) -> Result<Diagnosis> {
    let doctor = assets.fanlight.display();
    // Links can be removed where device nodes cannot.
    let script = format!(
        "set -e; mkdir -p /tmp/dev; mount --bind /dev /tmp/dev; mount -t tmpfs none /dev
         for node in /tmp/dev/*; do ln -s $node /dev/; done
         {break_it}
         exec {doctor} doctor {function}"
    );
    Diagnosis::of(Command::new("unshare").args(["-m", "sh", "-c", &script]))
}

fn host_lacks(assets: &Assets, vf: &str) -> Result<()> {
    let raise = format!("echo 1024 > {UDMABUF_LIMIT}");
    for (break_it, status, lines) in [
        (
            raise.as_str(),
            0,
            &[
                "yes   dma-bufs of guest memory: /dev/udmabuf, at most 1024 MiB",
                "yes   access: opened through iommufd",
            ][..],
        ),
        (
            "rm /dev/kvm",
            1,
            &["NO    KVM: no /dev/kvm: load the module", "?     BARs:"],
        ),
        (
            "sed 's/ svm / /' /proc/cpuinfo > /dev/cpuinfo; mount --bind /dev/cpuinfo /proc/cpuinfo",
            1,
            &[
                "NO    KVM: /proc/cpuinfo lists neither vmx nor svm",
                "fix: use a host with hardware virtualization",
            ],
        ),
        (
            "mount -t tmpfs none /sys/kernel/iommu_groups",
            1,
            &[
                "NO    IOMMU: the kernel has no IOMMU groups",
                "fix: enable VT-d or AMD-Vi in the firmware; on Intel hosts add intel_iommu=on",
            ],
        ),
        (
            "mount -t tmpfs none /sys/bus/pci/drivers",
            1,
            &[
                "NO    VFIO driver: vfio-pci is not loaded",
                "fix: modprobe vfio-pci",
            ],
        ),
        (
            "rm /dev/iommu",
            0,
            &[
                "yes   DMA interface: VFIO container; the kernel has no iommufd",
                "yes   access: opened through container",
            ],
        ),
        (
            "rm /dev/iommu /dev/vfio",
            1,
            &[
                "NO    DMA interface: neither /dev/iommu nor /dev/vfio/vfio",
                "fix: modprobe vfio-pci",
                "NO    access: no /dev/vfio/vfio: load VFIO",
            ],
        ),
        (
            "rm /dev/udmabuf",
            1,
            &[
                "NO    dma-bufs of guest memory: no /dev/udmabuf",
                "fix: modprobe udmabuf",
            ],
        ),
    ] {
        broken(assets, vf, break_it)?
            .says(status, lines)
            .context(break_it)?;
    }
    Ok(())
}

/// Features that a device may lack. Where no device of the nested host lacks one, the doctor sees a made-up sysfs
/// without it.
fn device_lacks(assets: &Assets, vf: &str) -> Result<()> {
    let in_vain = |directory: &str| {
        format!(
            "mount -t tmpfs none /sys/bus/pci/devices; cd /sys/bus/pci/devices
             mkdir -p {vf} 7/devices/{vf} 7/devices/0000:77:00.0 0000:77:00.0; cd {vf}
             ln -s /drivers/vfio-pci driver; ln -s ../7 iommu_group
             ln -s /drivers/nvme ../0000:77:00.0/driver
             {directory}; cd /"
        )
    };
    for (directory, lines) in [
        (
            "rm iommu_group",
            &[
                "NO    isolation: in no IOMMU group",
                "fix: see the check IOMMU",
            ][..],
        ),
        (
            ":",
            &[
                "NO    isolation: IOMMU group 7 is shared with 0000:77:00.0 (driver nvme)",
                "fix: bind those devices to vfio-pci too",
                "warn  reset: not supported",
            ],
        ),
        (
            "rm driver; ln -s /drivers/xe-vfio-pci driver",
            &[
                "NO    driver: xe-vfio-pci, a variant of vfio-pci",
                &format!(
                    "fix: echo vfio-pci > /sys/bus/pci/devices/{vf}/driver_override; echo {vf} >"
                ),
            ],
        ),
        (
            "echo 0 > sriov_numvfs; echo 7 > sriov_totalvfs",
            &[
                "warn  virtual functions: 0 of 7",
                &format!("fix: fanlight vfio bind {vf} --vfs 1"),
            ],
        ),
        (
            "echo 0x4000000000000 0x7ffffffffffff 0x14220c > resource",
            &["NO    BARs: 1024 TiB", "fix: create more virtual functions"],
        ),
    ] {
        broken(assets, vf, &in_vain(directory))?
            .says(1, lines)
            .context(directory)?;
    }
    let function = host_function(vf)?;
    let failure = |error| Failure(format!("cannot hold the device: {error}"));
    let iommu = Iommu::open(std::slice::from_ref(&function), None, None).map_err(failure)?;
    let held = HostDevice::open(&function, iommu, None).map_err(failure)?;
    broken(assets, vf, ":")?.says(0, &["?     access: ", "yes   driver: vfio-pci"])?;
    drop(held);
    let driver = Path::new("/sys/bus/pci/drivers/vfio-pci");
    fs::write(driver.join("unbind"), vf).context("cannot unbind")?;
    broken(assets, vf, ":")?.says(
        1,
        &[
            "NO    driver: none",
            &format!("fix: fanlight vfio bind {vf}"),
        ],
    )?;
    fs::write(driver.join("bind"), vf).context("cannot bind")?;
    broken(assets, vf, ":")?.says(0, &["yes   access:"])
}

/// A kernel without VFIO_DEVICE_FEATURE (Linux 5.16 has it), or without its dma-bufs (Linux 6.19 has them).
fn kernel_lacks(assets: &Assets, vf: &str) -> Result<()> {
    let mut command = Command::new(&assets.fanlight);
    command.args(["doctor", vf]);
    // SAFETY: the closure makes only system calls between fork and exec.
    unsafe { command.pre_exec(without_device_features) };
    Diagnosis::of(&mut command)?.says(
        1,
        &[
            "yes   access: opened through iommufd",
            "NO    dma-bufs of device memory: the host's kernel cannot export device memory as a dma-buf: it needs \
             Linux 6.19 or later",
        ],
    )
}

/// Makes the ioctl VFIO_DEVICE_FEATURE fail from now on, as on a kernel that does not know it.
fn without_device_features() -> io::Result<()> {
    const REQUEST: u32 = 0x3b75;
    /// Offsets in `struct seccomp_data`: the system call's number, and the low half of its second argument.
    const NUMBER_AT: u32 = 0;
    const REQUEST_AT: u32 = 24;
    let step = |code: u32, k: u32, skip: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: skip,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let unless = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let end = libc::BPF_RET | libc::BPF_K;
    let mut steps = [
        step(load, NUMBER_AT, 0),
        step(unless, libc::SYS_ioctl as u32, 3),
        step(load, REQUEST_AT, 0),
        step(unless, REQUEST, 1),
        step(end, libc::SECCOMP_RET_ERRNO | libc::ENOTTY as u32, 0),
        step(end, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the filter program, which is alive and as long as its length says.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An unprivileged user, and one with access to all nodes and a low limit of locked memory.
fn user_lacks(assets: &Assets, vf: &str) -> Result<()> {
    let node = host_function(vf)?.character_device();
    let node = node.ok_or_else(|| Failure(format!("{vf} has no node")))?;
    let nodes = ["/dev/kvm", "/dev/iommu", "/dev/udmabuf"].map(Path::new);
    let nodes = nodes.into_iter().chain([node.as_path()]);
    let allow = |mode: u32| {
        nodes.clone().try_for_each(|node| {
            fs::set_permissions(node, fs::Permissions::from_mode(mode)).context(node.display())
        })
    };
    let ask = || {
        let script = "ulimit -l 8192; exec \"$0\" doctor \"$1\"";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&assets.fanlight).arg(vf);
        Diagnosis::of(command.uid(NOBODY).gid(NOBODY))
    };
    allow(0o600)?;
    ask()?.says(
        1,
        &[
            "NO    KVM: no permission on /dev/kvm: join its group",
            "NO    DMA interface: no permission on /dev/iommu",
            "fix: chown $USER /dev/iommu",
            "NO    dma-bufs of guest memory: no permission on /dev/udmabuf",
            "fix: chown $USER /dev/udmabuf",
            "NO    access: no permission on /dev/iommu",
        ],
    )?;
    allow(0o666)?;
    ask()?.says(
        0,
        &[
            "warn  memory lock limit: 8 MiB",
            "fix: ulimit -l unlimited",
            "yes   access: opened through iommufd",
        ],
    )
}
