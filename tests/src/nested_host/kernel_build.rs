//! How the L1 kernel and modules for it are built: the source, the programs, the configuration.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use super::{
    Cache,
    command::{run, run_lines},
    packages::{build_programs, kernel_source},
};
use crate::{Context, Failure, Result, progress::Step};

/// The configuration of the kernel, a fragment that all else is off besides.
pub(super) const CONFIG: &str = include_str!("../../../resources/nested_host/kernel.config");
/// Changes to the source: file, text that is there once, and text in its place.
pub(super) const CHANGES: &[[&str; 3]] = &[
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
    // spun for ever on a lock that they held, or panicked. An interrupt of L1 itself that is pending makes the guest
    // exit before its first instruction, which clears what was left.
    [
        "arch/x86/kvm/svm/svm.c",
        "\tif (force_immediate_exit)\n\t\tsmp_send_reschedule",
        "\tif (force_immediate_exit || (svm->vmcb->control.event_inj &\n\t\t(SVM_EVTINJ_VALID | SVM_EVTINJ_TYPE_MASK)) \
         == (SVM_EVTINJ_VALID | SVM_EVTINJ_TYPE_INTR))\n\t\tsmp_send_reschedule",
    ],
    // objtool needs the headers of libelf. Without it static calls go by way of trampolines; nothing else that this
    // configuration has depends on it.
    [
        "arch/x86/Kconfig",
        "\tselect HAVE_OBJTOOL\t\t\tif X86_64\n",
        "",
    ],
];
/// Parts of the source that this configuration does not compile. Only C files: the configuration reads the Kconfig
/// files of all.
const LEFT_OUT: [&str; 9] = [
    "*.rst",
    "*.yaml",
    "*.dts*",
    "*/arch/arm*.[chS]",
    "*/drivers/gpu/drm/amd/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/perf/*",
];

/// What a build starts from.
pub(super) struct BuildInputs {
    /// Archive with the source.
    source: PathBuf,
    /// The programs of the build, then those of the machine.
    search_path: OsString,
}

impl BuildInputs {
    /// From the cache or the archive.
    pub(super) fn get(cache: &Cache) -> Result<Self> {
        run(Command::new("gcc").arg("--version")).context(
            "the build of the L1 kernel needs gcc and the headers of the C library: \
             run `apt-get install gcc libc6-dev`",
        )?;
        let programs = build_programs(cache)?;
        let others = env::var_os("PATH").unwrap_or_default();
        let search_path = env::join_paths([programs].into_iter().chain(env::split_paths(&others)))
            .context("the path of the cache has a colon")?;
        Ok(Self {
            source: kernel_source(cache)?,
            search_path,
        })
    }
}

/// A configured source tree.
pub(super) struct KernelTree {
    path: PathBuf,
    search_path: OsString,
}

impl KernelTree {
    /// Unpacks the source at `at`, leaves out files of these patterns too, and configures it.
    pub(super) fn new(
        inputs: BuildInputs,
        at: &Path,
        left_out: &[&str],
        step: &Step,
    ) -> Result<Self> {
        let tree = Self {
            path: at.join("source"),
            search_path: inputs.search_path,
        };
        step.detail("unpacking");
        fs::create_dir(&tree.path).context("cannot make a directory")?;
        let patterns = LEFT_OUT.iter().chain(left_out);
        run(tree
            .command("tar")
            .args(patterns.map(|pattern| format!("--exclude={pattern}")))
            .args(["--strip-components=1", "-xf"])
            .arg(inputs.source)
            .arg("-C")
            .arg(&tree.path))?;
        tree.change()?;
        step.detail("configuring");
        let config = at.join("config");
        fs::write(&config, CONFIG).context("cannot write the kernel configuration")?;
        let all = format!("KCONFIG_ALLCONFIG={}", config.display());
        tree.make(&[&all, "allnoconfig"], step)?;
        Ok(tree)
    }

    fn change(&self) -> Result<()> {
        for [file, from, to] in CHANGES {
            let path = self.path.join(file);
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

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("PATH", &self.search_path);
        command
    }

    /// Runs make, and shows how many files it has made.
    pub(super) fn make(&self, arguments: &[&str], step: &Step) -> Result<()> {
        let jobs = thread::available_parallelism().map_or(2, usize::from);
        let made = AtomicUsize::new(0);
        step.watch(
            || format!("{} files made", made.load(Ordering::Relaxed)),
            || {
                let mut command = self.command("make");
                command
                    .arg("-C")
                    .arg(&self.path)
                    .arg(format!("-j{jobs}"))
                    .args(arguments);
                run_lines(&mut command, |_| {
                    made.fetch_add(1, Ordering::Relaxed);
                })
            },
        )
    }

    /// Copies a file out of the tree.
    pub(super) fn copy(&self, file: &str, to: &Path) -> Result<()> {
        fs::copy(self.path.join(file), to)
            .map(drop)
            .context(format!("cannot copy {file} of the kernel"))
    }

    /// Removes the tree.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.path).context("cannot remove the kernel source")
    }
}
