//! A process that is refused some system calls from its start, as in a container.
#![expect(unsafe_code, reason = "installs a filter between fork and exec")]

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// The kernel answers EPERM to these calls of `command`'s process and of all that it starts, as
/// Docker's seccomp profile makes it do.
pub(super) fn forbid(command: &mut Command, calls: &[i64]) {
    let rules: BTreeMap<_, _> = calls.iter().map(|call| (*call, vec![])).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let install = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
    // SAFETY: in the new process, before its program starts, this makes two system calls, with
    // memory that was allocated before. Only after a failure does it allocate, to tell of it.
    unsafe { command.pre_exec(install) };
}
