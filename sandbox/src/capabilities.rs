//! The capabilities that threads keep.
#![expect(unsafe_code, reason = "prctl and setrlimit")]

use std::fs;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// Prevents the calling thread, and threads that it starts, from gaining privileges through
/// `execve`. This cannot be undone.
///
/// # Errors
/// The system's error.
pub(crate) fn no_new_privileges() -> std::io::Result<()> {
    // SAFETY: this option of `prctl` has no precondition.
    let rc = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// The capabilities that the main process keeps if it has them: it creates sockets in directories
/// of other users. Landlock restricts the directories. `gives_away`: the sockets get another owner.
pub(crate) fn of_process(gives_away: bool) -> Vec<Capability> {
    let mut kept = vec![Capability::CAP_DAC_OVERRIDE];
    if gives_away {
        kept.push(Capability::CAP_CHOWN);
    }
    [kept, of_workers()].concat()
}

/// The capabilities that workers keep: they create io_urings and open no files.
pub(crate) fn of_workers() -> Vec<Capability> {
    // Without it, the kernel counts the memory of io_urings against RLIMIT_MEMLOCK.
    let mut kept = vec![Capability::CAP_IPC_LOCK];
    // With the value 1, io_uring needs CAP_SYS_ADMIN or membership in a group. Without io_uring,
    // worker threads do all writes to regular files, and calls to guests are writes to eventfds.
    let restricted = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    if restricted.is_ok_and(|text| text.trim() == "1") {
        kept.push(Capability::CAP_SYS_ADMIN);
    }
    kept
}

/// The capabilities of the process that opens disks, whose files may belong to other users.
pub(crate) const OF_OPENER: &[Capability] =
    &[Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH];

/// Drops the calling thread's capabilities except those in `kept`. Returns those that it still has.
///
/// # Errors
/// The system's error.
pub(crate) fn keep(kept: &[Capability]) -> Result<Vec<Capability>, CapsError> {
    // Fails without privileges, and then the bounding set has no effect.
    let _ = caps::clear(None, CapSet::Bounding);
    // Fails before kernel 4.3, which has no ambient capabilities.
    let _ = caps::clear(None, CapSet::Ambient);
    let now: CapsHashSet = caps::read(None, CapSet::Permitted)?;
    let left: CapsHashSet = kept.iter().copied().filter(|cap| now.contains(cap)).collect();
    caps::set(None, CapSet::Effective, &left)?;
    caps::set(None, CapSet::Permitted, &left)?;
    caps::clear(None, CapSet::Inheritable)?;
    Ok(kept.iter().copied().filter(|cap| left.contains(cap)).collect())
}

/// Removes the limit on locked memory, if that is permitted. The kernel counts the memory of
/// io_urings as locked unless the thread has CAP_IPC_LOCK, which containers often lack.
pub(crate) fn raise_locked_memory_limit() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the kernel reads `limit`, which is live. A failure leaves the limit unchanged.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Root starts with all capabilities; other users have none to lose.
    #[test]
    fn a_thread_keeps_the_given_capabilities_and_regains_none() {
        std::thread::spawn(|| {
            let kept = keep(OF_OPENER).unwrap();
            no_new_privileges().unwrap();
            assert!(kept.iter().all(|cap| OF_OPENER.contains(cap)));
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            let of = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim().to_owned()
            };
            let mask: u64 = kept.iter().map(Capability::bitmask).sum();
            assert_eq!(of("CapEff:"), format!("{mask:016x}"));
            assert_eq!(of("CapPrm:"), format!("{mask:016x}"));
            assert_eq!(of("CapInh:"), "0".repeat(16));
            assert_eq!(of("NoNewPrivs:"), "1");
            if !kept.is_empty() {
                assert_eq!(of("CapBnd:"), "0".repeat(16));
            }
            assert!(keep(&[Capability::CAP_SYS_ADMIN]).unwrap().is_empty());
        })
        .join()
        .unwrap();
    }
}
