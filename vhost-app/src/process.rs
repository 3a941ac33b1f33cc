//! What the process asks of the system about itself: CPUs, core dumps, signals, its end.
#![expect(unsafe_code, reason = "affinity, limits, signals and _exit are libc calls")]

use std::io;

/// The largest core dump that SPDK's applications allow.
const CORE_DUMP_BYTES: libc::rlim_t = 5 << 30;

/// Ends the process at once: no destructors, no exit handlers, as other threads may be inside
/// what those would take down, or may never come back.
pub(crate) fn exit_now(code: u8) -> ! {
    // SAFETY: ends the process whatever its state.
    unsafe { libc::_exit(code.into()) }
}

/// Keeps the calling thread, and the threads that it will start, on `cpus`.
pub(crate) fn pin_to(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|cpu| **cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the number was checked.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the kernel reads a set of the size it is told; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Allows core dumps of up to 5 GiB, or of what the system allows if that is less.
pub(crate) fn allow_core_dumps() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the structure.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit) } == 0;
    if known {
        limit.rlim_cur = limit.rlim_max.min(CORE_DUMP_BYTES);
        // SAFETY: the kernel reads the structure. Nothing depends on the outcome.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const limit) };
    }
}

/// Sends a signal to this process.
pub(crate) fn raise(signal: i32) {
    let pid = std::process::id() as libc::pid_t;
    // SAFETY: the process's own id; what the signal does is what the caller asked for.
    unsafe { libc::kill(pid, signal) };
}

/// Raises the limit on open files as far as it goes: a connection takes a handful, and so does each
/// of its rings. Half of them are for fds that clients send, the rest for this program.
pub(crate) fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is ours.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above. If it is refused, the limit stays as it is.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        closer::set_fds_max(usize::try_from(limit.rlim_max / 2).unwrap_or(usize::MAX));
    }
}
