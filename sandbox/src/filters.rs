//! The system calls that each kind of thread may make, as seccomp filters.
//!
//! Filters add up: a thread has those of the thread that started it and its own, and the strictest
//! verdict counts. A call that is not on a list fails with EPERM and is in the kernel's audit log,
//! so a new libc that tries a new call uses its fallback and no disk is lost. Calls that only an
//! attacker makes end the process: the code that runs then is not this program's any more.
#![expect(unsafe_code, reason = "installs the programs")]

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule,
};

mod calls;

use calls::{Call, Check};

/// The filters, compiled while the process may still allocate and fail.
#[derive(Debug)]
pub(crate) struct Programs {
    /// For all threads of the process.
    pub(crate) process: Vec<BpfProgram>,
    /// For all threads but EAL's, which may load libraries, and the log thread, which already runs.
    pub(crate) no_code: BpfProgram,
    /// For threads that need no new sockets and no files by name.
    pub(crate) worker: BpfProgram,
    pub(crate) reactor: BpfProgram,
}

impl Programs {
    /// Compiles the filters for the calling process, whose id they contain: it may send signals
    /// only to itself.
    ///
    /// # Errors
    /// seccompiler does not support this processor.
    pub(crate) fn compile() -> Result<Self, BackendError> {
        let process = allow(&[calls::LIBC, calls::THREADS, calls::DATA, calls::CONTROL])?;
        Ok(Self {
            process: vec![no_clone3()?, kill(calls::INTRUDER)?, process],
            no_code: answer(calls::NEW_CODE, libc::EPERM)?,
            worker: answer(calls::NOT_A_WORKERS, libc::EPERM)?,
            reactor: allow(&[calls::LIBC, calls::REACTOR])?,
        })
    }
}

/// Compiles the filters of the process that opens disks, which must be the calling process.
///
/// # Errors
/// As [`Programs::compile`].
pub(crate) fn of_opener() -> Result<Vec<BpfProgram>, BackendError> {
    let opener = allow(&[calls::LIBC, calls::THREADS, calls::OPENER])?;
    Ok(vec![no_clone3()?, kill(calls::INTRUDER)?, answer(calls::NEW_CODE, libc::EPERM)?, opener])
}

fn no_clone3() -> Result<BpfProgram, BackendError> {
    answer(&[calls::CLONE3], libc::ENOSYS)
}

fn allow(lists: &[&[Call]]) -> Result<BpfProgram, BackendError> {
    let calls = lists.iter().flat_map(|list| list.iter());
    program(calls, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn answer(calls: &[Call], errno: i32) -> Result<BpfProgram, BackendError> {
    program(calls.iter(), SeccompAction::Allow, SeccompAction::Errno(errno as u32))
}

fn kill(calls: &[Call]) -> Result<BpfProgram, BackendError> {
    program(calls.iter(), SeccompAction::Allow, SeccompAction::KillProcess)
}

/// A filter with the action `these` for `calls` and `rest` for all others.
fn program<'a>(
    calls: impl Iterator<Item = &'a Call>,
    rest: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (number, checks) in calls {
        let of_call = rules.entry(*number).or_default();
        for check in *checks {
            of_call.push(rule(*check)?);
        }
    }
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, rest, these, arch)?.try_into()
}

fn rule(check: Check) -> Result<SeccompRule, BackendError> {
    let (argument, operator, value) = match check {
        Check::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Check::Masked(argument, mask, value) => {
            (argument, SeccompCmpOp::MaskedEq(mask.into()), value)
        }
        Check::OwnProcess(argument) => (argument, SeccompCmpOp::Eq, std::process::id()),
    };
    SeccompRule::new(vec![SeccompCondition::new(argument, Dword, operator, value.into())?])
}

/// Adds a filter to the calling thread. Threads that it starts inherit it.
///
/// # Errors
/// The kernel has no seccomp, or the thread may still gain privileges.
pub(crate) fn install(program: &BpfProgram) -> io::Result<()> {
    install_as(program, false)
}

/// Adds several filters; the first is the one for `clone3`.
///
/// # Errors
/// As [`install`].
pub(crate) fn install_all(programs: &[BpfProgram]) -> io::Result<()> {
    (0..).zip(programs).try_for_each(|(n, program)| install_as(program, n == 0))
}

fn install_as(program: &BpfProgram, is_quiet: bool) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SPEC_ALLOW: otherwise kernels before 5.16 turn on a mitigation that slows the whole thread
    // down and is meant for untrusted programs. LOG: refused calls are in the audit log, but for
    // the `clone3` of each thread that starts.
    let log = if is_quiet { 0 } else { libc::SECCOMP_FILTER_FLAG_LOG };
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW | log;
    let set = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies the instructions, which outlive the call.
    let rc = unsafe { libc::syscall(libc::SYS_seccomp, set, flags, &raw const program) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
