//! Drops pages that only the start of the program needed.
//!
//! Parsing options, unpacking a kernel and writing tables use more code than running a guest, and the kernel maps
//! sixteen pages for each one touched. Nothing is lost: a page that is used again comes from the page cache, at the
//! cost of a minor fault.

use std::ffi::{c_int, c_void};

use fanlight_arch::layout::PAGE_SIZE;
use libc::{MADV_DONTNEED, PF_W, PT_LOAD, dl_iterate_phdr, dl_phdr_info, madvise};

/// Drops pages of code and constants of the program and its libraries, and freed memory of the heap.
pub fn drop_startup_pages() {
    // SAFETY: `drop_segments` has the type that is asked for, does not unwind, and ignores its data pointer.
    unsafe { dl_iterate_phdr(Some(drop_segments), std::ptr::null_mut()) };
    // SAFETY: only frees memory of the allocator's free lists.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

unsafe extern "C" fn drop_segments(
    object: *mut dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the loader passes a valid description, whose headers live as long as the object is loaded.
    let (base, headers) = unsafe {
        let object = &*object;
        if object.dlpi_phdr.is_null() {
            return 0;
        }
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers)
    };
    for header in headers {
        if header.p_type != PT_LOAD || header.p_flags & PF_W != 0 {
            continue;
        }
        let start = (base + header.p_vaddr) & !(PAGE_SIZE - 1);
        let end = base + header.p_vaddr + header.p_memsz;
        // SAFETY: a segment without PF_W is mapped from its file and was never written: relocations are in writable
        // segments. So its pages read the same after they are dropped.
        unsafe { madvise(start as *mut c_void, (end - start) as usize, MADV_DONTNEED) };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of this program's code that are mapped.
    fn resident_code() -> u64 {
        let program = std::env::current_exe().unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_code = false;
        let mut sum = 0;
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match *words {
                [_, flags, _, _, _, path] => {
                    is_code = flags == "r-xp" && path == program.to_str().unwrap();
                }
                ["Rss:", size, "kB"] if is_code => sum += size.parse::<u64>().unwrap(),
                _ => {}
            }
        }
        sum
    }

    #[test]
    fn code_comes_back_when_it_is_used() {
        let text = format!("{:?}", vec![1.5, 2.25]);
        let before = resident_code();
        // Other tests run beside this one, and use code at the same time.
        let mut after = before;
        for _ in 0..50 {
            drop_startup_pages();
            after = resident_code();
            if after < before / 2 {
                break;
            }
        }
        assert!(after < before / 2, "{before} KiB before, {after} after");
        assert_eq!(format!("{:?}", vec![1.5, 2.25]), text);
    }
}
