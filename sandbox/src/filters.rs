//! The system calls that each kind of thread may make, as seccomp filters.
//!
//! A thread has its own filters and those of the thread that started it; the strictest action
//! applies. A call that is not on a list fails with EPERM and appears in the kernel's audit log. A
//! new libc that tries a new call then uses its fallback. Calls that only an attacker makes kill
//! the process.
#![expect(unsafe_code, reason = "the seccomp system call")]

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule,
};

mod calls;

use crate::{Network, SocketAccess};
use calls::Check::IsNot;
use calls::{Call, Check};

/// The compiled filters. Compiling allocates and can fail, so it happens once, at startup.
#[derive(Debug)]
pub(crate) struct Programs {
    /// For all threads of the process.
    pub(crate) process: Vec<BpfProgram>,
    /// For all threads but EAL's, which load libraries, and the log thread, which starts earlier.
    pub(crate) no_code: BpfProgram,
    /// For threads that create no sockets and no files.
    pub(crate) worker: BpfProgram,
    /// For reactors.
    pub(crate) reactor: BpfProgram,
}

impl Programs {
    /// Compiles the filters for the calling process. They contain its id, because it may send
    /// signals only to itself.
    ///
    /// # Errors
    /// seccompiler does not support this processor.
    pub(crate) fn compile(access: &SocketAccess, network: Network) -> Result<Self, BackendError> {
        let sockets = match network {
            Network::Refused => &[][..],
            Network::Allowed => calls::NETWORK,
        };
        let lists = [calls::LIBC, calls::THREADS, calls::DATA, calls::CONTROL, sockets];
        let mut process = vec![no_clone3()?, kill(calls::KILL)?];
        match access_calls(access) {
            needed if needed.is_empty() => process.push(allow(&lists)?),
            needed => {
                let any: Vec<Call> = needed.iter().map(|(number, _)| (*number, &[][..])).collect();
                process.push(allow(&[&lists[..], &[&any]].concat())?);
                let other: Vec<Call> =
                    needed.iter().map(|(number, checks)| (*number, &checks[..])).collect();
                process.push(refuse(&other, EPERM)?);
            }
        }
        Ok(Self {
            process,
            no_code: refuse(calls::NEW_CODE, EPERM)?,
            worker: refuse(calls::NOT_FOR_WORKERS, EPERM)?,
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
    Ok(vec![no_clone3()?, kill(calls::KILL)?, refuse(calls::NEW_CODE, EPERM)?, opener])
}

/// The calls, as rustix makes them, that give sockets this mode and owner, each with the checks of
/// a call that gives a file another mode or owner.
fn access_calls(access: &SocketAccess) -> Vec<(i64, Vec<Check>)> {
    let SocketAccess { mode, owner, group } = *access;
    let mut calls = vec![];
    if let Some(mode) = mode {
        calls.push((libc::SYS_fchmodat, vec![IsNot(2, mode)]));
    }
    if owner.or(group).is_some() {
        // The kernel takes this number for an owner or group that stays.
        let id = |id: Option<u32>| id.unwrap_or(u32::MAX);
        calls.push((libc::SYS_fchownat, vec![IsNot(2, id(owner)), IsNot(3, id(group))]));
    }
    calls
}

fn no_clone3() -> Result<BpfProgram, BackendError> {
    refuse(&[calls::CLONE3], ENOSYS)
}

const EPERM: u32 = libc::EPERM.cast_unsigned();
const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();

fn allow(lists: &[&[Call]]) -> Result<BpfProgram, BackendError> {
    let calls = lists.iter().flat_map(|list| list.iter());
    program(calls, SeccompAction::Errno(EPERM), SeccompAction::Allow)
}

fn refuse(calls: &[Call<'_>], errno: u32) -> Result<BpfProgram, BackendError> {
    program(calls.iter(), SeccompAction::Allow, SeccompAction::Errno(errno))
}

fn kill(calls: &[Call]) -> Result<BpfProgram, BackendError> {
    program(calls.iter(), SeccompAction::Allow, SeccompAction::KillProcess)
}

/// A filter with the action `on_match` for `calls`, and `on_mismatch` for all other calls.
fn program<'a>(
    calls: impl Iterator<Item = &'a Call<'a>>,
    on_mismatch: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (number, checks) in calls {
        let of_call = rules.entry(*number).or_default();
        for check in *checks {
            of_call.push(rule(*check)?);
        }
    }
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, on_mismatch, on_match, arch)?.try_into()
}

fn rule(check: Check) -> Result<SeccompRule, BackendError> {
    let (argument, operator, value) = match check {
        Check::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Check::IsNot(argument, value) => (argument, SeccompCmpOp::Ne, value),
        Check::Masked(argument, mask, value) => {
            (argument, SeccompCmpOp::MaskedEq(mask.into()), value)
        }
        Check::OwnProcess(argument) => (argument, SeccompCmpOp::Eq, std::process::id()),
    };
    SeccompRule::new(vec![SeccompCondition::new(argument, Dword, operator, value.into())?])
}

/// Whether the kernel's audit log shows the calls that a filter refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Audit {
    Log,
    Silent,
}

/// Adds a filter to the calling thread. Threads that it starts inherit it.
///
/// # Errors
/// The kernel has no seccomp, or the thread may still gain privileges.
pub(crate) fn install(program: &BpfProgram) -> io::Result<()> {
    install_with(program, Audit::Log)
}

/// Adds several filters. The first must be the filter for `clone3`: it is not logged, because libc
/// tries `clone3` for each thread that it starts.
///
/// # Errors
/// As [`install`].
pub(crate) fn install_all(programs: &[BpfProgram]) -> io::Result<()> {
    let audits = std::iter::once(Audit::Silent).chain(std::iter::repeat(Audit::Log));
    programs.iter().zip(audits).try_for_each(|(program, audit)| install_with(program, audit))
}

fn install_with(program: &BpfProgram, audit: Audit) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let log = match audit {
        Audit::Log => libc::SECCOMP_FILTER_FLAG_LOG,
        Audit::Silent => 0,
    };
    // Without SPEC_ALLOW, kernels before 5.16 enable a mitigation for untrusted programs, which
    // slows down the whole thread.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW | log;
    let set = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies the instructions during the call; `program` is live.
    let rc = unsafe { libc::syscall(libc::SYS_seccomp, set, flags, &raw const program) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
