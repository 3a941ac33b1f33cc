//! rte_vhost's event thread: its name, and how it waits.
#![expect(unsafe_code, reason = "interrupts a thread")]

use std::ffi::c_int;
use std::fs;

use spdk_sys as sys;

/// Whether the event thread uses poll() rather than epoll. With poll(), it reads its list of
/// sockets again only when it wakes.
pub(crate) const POLLS: bool =
    sys::RTE_VER_YEAR < 24 || (sys::RTE_VER_YEAR == 24 && sys::RTE_VER_MONTH < 7);

/// The name of rte_vhost's event thread in DPDK releases before 23.11.
pub(crate) const NAME: &str = "vhost-events";

/// Interrupts the event thread's system call with a signal whose handler is empty.
pub(crate) fn interrupt() {
    extern "C" fn nothing(_signal: c_int) {}
    // SAFETY: the handler is empty, and no other code uses this signal.
    unsafe { libc::signal(libc::SIGURG, nothing as *const () as libc::sighandler_t) };
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return };
    for task in tasks.flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let tid = task.file_name().to_str().and_then(|name| name.parse::<c_int>().ok());
        if let (true, Some(tid)) =
            (name.starts_with(NAME) || name.starts_with("dpdk-vhost-evt"), tid)
        {
            // SAFETY: the target is a thread of this process that never ends.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, libc::SIGURG) };
        }
    }
}
