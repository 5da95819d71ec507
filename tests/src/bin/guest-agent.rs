//! Runs in guests: the other end of conversations over TCP and vsock, and system calls that busybox has
//! no command for.

use std::{ffi::CString, fs::File, os::fd::AsRawFd, process::ExitCode};

use fanlight_tests::{
    Context, Failure, Result,
    common::echo,
    guest_side::{
        bad_driver, decoding, device_check, edu, evdev,
        graphics::{blobs, drm, gl, shared, vulkan},
        guest_draw, masked_vector,
        noiommu::Interrupt,
        raw_gpu, show_pattern,
    },
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match act(&arguments) {
        Ok(line) => {
            println!("agent: {line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("agent failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &[String]) -> Result<String> {
    match arguments {
        [verb, address] if verb == "serve" => {
            let bytes = echo::serve(&address.parse()?)?;
            Ok(format!("served {bytes} bytes"))
        }
        [verb, address, bytes] if verb == "call" => {
            let bytes = number(bytes)?;
            echo::call(&address.parse()?, bytes)?;
            Ok(format!("called with {bytes} bytes"))
        }
        [verb, device, start, len] if verb == "zero" => {
            zero(device, number(start)?, number(len)?)?;
            Ok(format!("zeroed {len} bytes"))
        }
        [verb, kernel, initrd, cmdline] if verb == "kexec" => kexec(kernel, initrd, cmdline),
        [verb] if verb == "show" => {
            raw_gpu::show(wait_after)?;
            Ok("showed everything".into())
        }
        [verb] if verb == "peer" => {
            let bytes = edu::copy_in_peer()?;
            Ok(format!("edu copied {bytes} bytes of its peer"))
        }
        [verb] if verb == "absent-peer" => {
            let address = edu::write_to_absent_peer()?;
            Ok(format!("edu wrote to memory that was off: {address:#x}"))
        }
        [verb, mark] if verb == "mark" => {
            let before = edu::swap_mark(number(mark)?)?;
            Ok(format!("mark was {before}"))
        }
        [verb, ids] if verb == "break-device" => {
            let status = bad_driver::break_device(ids)?;
            Ok(format!("the device's status is {status:#x}"))
        }
        [verb, ids, bar, rounds] if verb == "switch-memory" => {
            let reads =
                decoding::switch_under_reads(ids, number(bar)? as usize, number(rounds)?)?;
            Ok(format!("memory was off {rounds} times; reads: {reads:?}"))
        }
        [verb] if verb == "masked-vector" => {
            masked_vector::wait_for_unmask()?;
            Ok("a masked vector waited".into())
        }
        [verb, name, count, options @ ..] if verb == "interrupts" => {
            let kind = match name.as_str() {
                "msi" => Interrupt::Msi,
                _ => Interrupt::Intx,
            };
            let hold = || match options {
                [] => Ok(()),
                _ => wait_after("holds the interrupt"),
            };
            let time = edu::interrupts(kind, number(count)? as u32, hold)?.as_micros();
            Ok(format!("{count} of {name} took {time} microseconds"))
        }
        [verb, ids, bar, offset] if verb == "show-bar" => {
            show_pattern::show_bar(ids, number(bar)? as u32, number(offset)?)
        }
        [verb] if verb == "show-buffers" => show_pattern::show_buffers(),
        [verb, description, options @ ..] if verb == "check-device" => {
            let has = |option: &str| options.iter().any(|other| other == option);
            device_check::check_device(description, has("driver"), has("reset"))
        }
        [verb] if verb == "listen" => evdev::listen(),
        [verb, count] if verb == "neighbours" => raw_gpu::blob_of_neighbours(number(count)? as usize),
        [verb, width, height, frame, colour] if verb == "draw" => {
            let side = |text| number(text).map(|side| u16::try_from(side).unwrap_or(u16::MAX));
            guest_draw::draw(side(width)?, side(height)?, number(frame)? as u32, colour)
        }
        [verb] if verb == "gl" => gl::draw(),
        [verb] if verb == "vulkan" => vulkan::work(),
        [verb, count, pairs] if verb == "blobs" => blobs::at_once(number(count)?, number(pairs)?),
        [verb] if verb == "outlive" => blobs::outlive(),
        [verb] if verb == "serve-blobs" => blobs::serve(),
        [verb] if verb == "serve-raw-blobs" => raw_gpu::serve_blobs(),
        [verb, count, pairs] if verb == "raw-blobs" => {
            raw_gpu::blobs_at_once(number(count)? as usize, number(pairs)? as usize)
        }
        [verb] if verb == "blobs-until-refused" => blobs::until_refused(),
        [verb] if verb == "shared-blobs" => shared::with_a_device(),
        [verb] if verb == "show-blob" => drm::show_blob(0x0000_c000),
        [verb] if verb == "show-red" => drm::show([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        _ => Err(Failure(
            "usage: guest-agent serve ADDRESS | call ADDRESS BYTES | zero DEVICE START BYTES | \
             kexec KERNEL INITRD CMDLINE | show | peer | absent-peer | mark NUMBER | interrupts KIND COUNT [hold] | \
             switch-memory IDS BAR ROUNDS | masked-vector | \
             break-device VENDOR:DEVICE | show-bar IDS BAR OFFSET | show-buffers | listen | check-device DESCRIPTION [driver] [reset] | \
             draw WIDTH HEIGHT MICROSECONDS COLOUR | neighbours COUNT | gl | vulkan | blobs COUNT PAIRS | \
             outlive | serve-blobs | serve-raw-blobs | raw-blobs COUNT PAIRS | blobs-until-refused | shared-blobs | show-blob | show-red"
                .into(),
        )),
    }
}

/// Says what was done, and waits until a line is typed.
fn wait_after(done: &str) -> Result<()> {
    println!("agent: {done}");
    let read = std::io::stdin().read_line(&mut String::new());
    read.map(drop).context("cannot wait for a line")
}

fn number(text: &str) -> Result<u64> {
    text.parse()
        .map_err(|_| Failure(format!("{text:?} is not a number")))
}

/// Has a block device write zeroes (Linux `include/uapi/linux/fs.h`).
fn zero(device: &str, start: u64, len: u64) -> Result<()> {
    const BLKZEROOUT: libc::c_ulong = 0x127f;
    let device = File::options()
        .write(true)
        .open(device)
        .context("cannot open the device")?;
    let range = [start, len];
    // SAFETY: the ioctl reads two 64-bit numbers.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKZEROOUT as _, &range) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context("cannot write zeroes"),
    }
}

/// Replaces the running kernel.
fn kexec(kernel: &str, initrd: &str, cmdline: &str) -> Result<String> {
    let open = |path| File::open(path).context(format!("cannot open {path}"));
    let (kernel, initrd) = (open(kernel)?, open(initrd)?);
    let cmdline = CString::new(cmdline).context("a command line with a NUL")?;
    // SAFETY: the kernel reads the command line with its NUL, and no other memory.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            cmdline.as_bytes_with_nul().len(),
            cmdline.as_ptr(),
            0,
        )
    };
    if loaded != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot load the kernel");
    }
    // SAFETY: does not return, or changes nothing.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    Err(std::io::Error::last_os_error()).context("cannot start the kernel")
}
