//! Callbacks of the library: passed fences and log messages.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::ffi::LOG_LEVEL_WARNING;

/// Receives passed fences, on a thread of the library.
pub trait Fences: Sync {
    /// All fences of the device up to this number have passed.
    fn passed(&self, number: u32);
    /// All fences of a context's ring up to this number have passed.
    fn ring_passed(&self, context: u32, ring: u32, number: u32);
}

/// `virgl_renderer_callbacks.write_fence`.
///
/// # Safety
/// `cookie` points to a `&'static dyn Fences` that is never freed.
pub unsafe extern "C" fn write_fence(cookie: *mut c_void, number: u32) {
    // SAFETY: it lives as long as the process.
    let fences = unsafe { &*cookie.cast::<&'static dyn Fences>() };
    fences.passed(number);
}

/// `virgl_renderer_callbacks.write_context_fence`.
///
/// # Safety
/// `cookie` points to a `&'static dyn Fences` that is never freed.
pub unsafe extern "C" fn write_context_fence(
    cookie: *mut c_void,
    context: u32,
    ring: u32,
    number: u64,
) {
    // SAFETY: it lives as long as the process.
    let fences = unsafe { &*cookie.cast::<&'static dyn Fences>() };
    fences.ring_passed(context, ring, number as u32);
}

/// Logs warnings and errors of the library, up to a limit: a guest can cause any number.
///
/// # Safety
/// `message` is null or a string that ends with 0.
pub unsafe extern "C" fn log(level: c_int, message: *const c_char, _: *mut c_void) {
    use std::sync::atomic::{AtomicU32, Ordering};
    const MAX_MESSAGES: u32 = 50;
    static LOGGED: AtomicU32 = AtomicU32::new(0);
    if level < LOG_LEVEL_WARNING || message.is_null() {
        return;
    }
    let logged = LOGGED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the caller guarantees the string during the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    if logged < MAX_MESSAGES {
        tracing::warn!("renderer: {}", message.trim_end());
    } else if logged == MAX_MESSAGES {
        tracing::warn!("renderer: more messages follow, which are not logged");
    }
    // The counter must not wrap to 0.
    LOGGED.fetch_min(MAX_MESSAGES + 1, Ordering::Relaxed);
}
