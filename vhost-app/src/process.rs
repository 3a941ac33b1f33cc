//! Attributes of the process: CPU affinity, core dumps, limits, environment, signals, exit.
#![expect(
    unsafe_code,
    reason = "affinity, limits, signals and _exit are libc calls; the environment belongs to all threads"
)]

use std::ffi::OsString;
use std::io;

/// The largest core dump that SPDK's applications allow.
const CORE_DUMP_BYTES: libc::rlim_t = 5 << 30;

/// Ends the process at once, without destructors and exit handlers: other threads still use what
/// these would destroy, and may be blocked for ever.
pub(crate) fn exit_now(code: u8) -> ! {
    // SAFETY: `_exit` has no precondition.
    unsafe { libc::_exit(code.into()) }
}

/// Removes a variable from the environment, which child processes inherit, and returns its value.
/// The process must have one thread.
pub(crate) fn take_variable(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: the caller guarantees one thread, so no other reads the environment.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

/// Restricts the calling thread, and threads that it starts later, to `cpus`.
pub(crate) fn pin_to(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // A set has one bit for each CPU.
    for &cpu in cpus.iter().filter(|cpu| **cpu < 8 * size_of::<libc::cpu_set_t>()) {
        // SAFETY: the set has a bit of this number, as checked above.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the kernel reads `set`, which has the given size; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Numbers as operators read them: `0, 2, 3`.
pub(crate) fn list(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// Allows core dumps of up to 5 GiB, or up to the hard limit if that is less.
pub(crate) fn allow_core_dumps() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes to `limit`, which is live.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit) } == 0;
    if known {
        limit.rlim_cur = limit.rlim_max.min(CORE_DUMP_BYTES);
        // SAFETY: the kernel reads `limit`, which is live. A failure leaves the limit unchanged.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const limit) };
    }
}

/// Sends a signal to this process.
pub(crate) fn raise(signal: i32) {
    // SAFETY: `getpid` has no precondition.
    let pid = unsafe { libc::getpid() };
    // SAFETY: `kill` has no precondition.
    unsafe { libc::kill(pid, signal) };
}

/// Raises the limit on open files to the hard limit: each connection and each of its rings needs
/// several fds. Half of the limit is for fds that front ends send, the rest for this program.
pub(crate) fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes to `limit`, which is live.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the kernel reads `limit`, which is live. A failure leaves the limit unchanged.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        closer::set_fds_max(usize::try_from(limit.rlim_max / 2).unwrap_or(usize::MAX));
    }
}
