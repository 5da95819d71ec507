//! The nested host's own kernel: everything built in, so that L1 starts in two seconds and has what Debian's
//! kernel leaves out (iommufd, VFIO's device interface).

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    Cache,
    packages::{kernel_source, run},
};
use crate::{Context, Failure, Result, progress};

/// What the kernel has.
pub(super) const CONFIG: &str = include_str!("../../../resources/nested_host/kernel.config");
/// What is changed in the source: file, what is there once, and what comes in its place.
const CHANGES: &[[&str; 3]] = &[
    // KVM takes a fault for one in the delivery of an event when EXITINTINFO has a type, valid or not. A processor
    // leaves nothing there when it is not valid; QEMU clears the valid bit of EVENTINJ and copies the rest. A guest
    // whose access to a device came next after an exception of its own was given up for that (internal error 3).
    [
        "arch/x86/kvm/svm/svm.c",
        "if ((svm->vmcb->control.exit_int_info & SVM_EXITINTINFO_TYPE_MASK) &&",
        "if ((svm->vmcb->control.exit_int_info & SVM_EXITINTINFO_VALID) &&",
    ],
    // QEMU's VMRUN delivers an injected interrupt at once, and yet leaves it as the processor's exception to come
    // (`helper_vmrun`: `exception_index` keeps the vector). When something makes the emulated processor leave its loop
    // before the next interrupt or exception, it is delivered again: in its own handler, with interrupts off. Guests
    // spun for ever on a lock that they held, or panicked. An interrupt of L1's own that is pending makes the guest
    // exit before its first instruction, which clears what was left.
    [
        "arch/x86/kvm/svm/svm.c",
        "\tif (force_immediate_exit)\n\t\tsmp_send_reschedule",
        "\tif (force_immediate_exit || (svm->vmcb->control.event_inj &\n\t\t(SVM_EVTINJ_VALID | SVM_EVTINJ_TYPE_MASK)) \
         == (SVM_EVTINJ_VALID | SVM_EVTINJ_TYPE_INTR))\n\t\tsmp_send_reschedule",
    ],
];
/// Programs and headers that the build needs, and the packages that have them.
const NEEDED: &[(&str, &str)] = &[
    ("/usr/bin/make", "make"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/flex", "flex"),
    ("/usr/bin/bison", "bison"),
    ("/usr/bin/bc", "bc"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/include/openssl/ssl.h", "libssl-dev"),
];

/// The built kernel.
#[derive(Clone, Debug)]
pub struct BuiltKernel {
    /// What L1 boots.
    pub bzimage: PathBuf,
    /// The same as an ELF file with a PVH entry.
    pub vmlinux: PathBuf,
}

impl BuiltKernel {
    /// The kernel in the cache entry `dir`.
    fn at(dir: &Path) -> Self {
        Self {
            bzimage: dir.join("bzImage"),
            vmlinux: dir.join("vmlinux"),
        }
    }
}

/// Configures a source tree by way of the file `config`; what runs make in it.
pub(super) fn configure(
    tree: &Path,
    config: &Path,
) -> Result<impl Fn(&[&str]) -> Result<String> + use<>> {
    fs::write(config, CONFIG).context("cannot write the kernel's configuration")?;
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let tree = tree.to_owned();
    let make = move |arguments: &[&str]| {
        run(Command::new("make")
            .arg("-C")
            .arg(&tree)
            .arg(format!("-j{jobs}"))
            .args(arguments))
    };
    let all = format!("KCONFIG_ALLCONFIG={}", config.display());
    make(&[&all, "allnoconfig"])?;
    Ok(make)
}

fn change(tree: &Path) -> Result<()> {
    for [file, from, to] in CHANGES {
        let path = tree.join(file);
        let text = fs::read_to_string(&path).context(format!("cannot read {file}"))?;
        if text.matches(from).count() != 1 {
            return Err(Failure(format!(
                "{file} of this kernel does not have {from:?} once: look whether it still needs the change"
            )));
        }
        fs::write(&path, text.replace(from, to)).context(format!("cannot write {file}"))?;
    }
    Ok(())
}

/// The kernel from the cache, or built: about five minutes on two cores.
pub fn built_kernel(cache: &Cache) -> Result<BuiltKernel> {
    let mut hasher = DefaultHasher::new();
    (CONFIG, CHANGES).hash(&mut hasher);
    let key = format!("nested-host-kernel-{:016x}", hasher.finish());
    if let dir = cache.root().join(&key)
        && dir.exists()
    {
        return Ok(BuiltKernel::at(&dir));
    }
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(path, _)| !Path::new(path).exists())
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        return Err(Failure(format!(
            "building the nested host's kernel needs packages that are missing: run `apt-get install {}`",
            missing.join(" ")
        )));
    }
    let source = kernel_source(cache)?;
    let dir = cache.entry(
        &key,
        "building the nested host's kernel (about five minutes)",
        |at| {
            let tree = at.join("source");
            fs::create_dir(&tree).context("cannot make a directory")?;
            run(Command::new("tar")
                .args(["--strip-components=1", "-xf"])
                .arg(&source)
                .arg("-C")
                .arg(&tree))?;
            change(&tree)?;
            let make = configure(&tree, &at.join("config"))?;
            progress::step("compiling", || make(&["bzImage"]))?;
            let kernel = BuiltKernel::at(at);
            for (from, to) in [
                ("arch/x86/boot/bzImage", &kernel.bzimage),
                ("vmlinux", &kernel.vmlinux),
            ] {
                fs::copy(tree.join(from), to).context("cannot keep the kernel")?;
            }
            fs::remove_dir_all(&tree).context("cannot remove the kernel's source")
        },
    )?;
    Ok(BuiltKernel::at(&dir))
}
