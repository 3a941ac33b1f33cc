//! Landlock: the paths that the process may open.
//!
//! A Landlock domain covers the thread that enters it and the threads that it starts later, so the
//! process enters it while it has one thread. The domain restricts opening: files that are already
//! open, and fds that other processes send, keep their rights. If the kernel supports it, the
//! domain also refuses TCP, abstract sockets of processes outside the domain, and signals to them.
//! It restricts neither UDP nor connecting to Unix sockets by path.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use crate::{Needs, Network};

/// The newest Landlock version that this program was tested with. Older kernels restrict less.
const ABI_TESTED: ABI = ABI::V6;

/// Rights on a disk's file. They do not include `IoctlDev`, which the domain of the process that
/// opens disks does not handle. Truncation is refused, also later, on the fds that the process
/// sends.
const DISK: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile});

/// Paths of libraries, time zones, and information about the machine and the process.
const READ: &[&str] = &["/proc", "/sys", "/usr", "/lib", "/lib64", "/etc/ld.so.cache"];

/// Devices that every process may use.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"];

/// A path, and the rights on it and on all paths below it.
type Grant = (PathBuf, BitFlags<AccessFs>);

/// A domain that was entered.
#[derive(Debug)]
pub(crate) struct Entered {
    /// The granted paths that do not exist.
    pub(crate) absent: Vec<PathBuf>,
    /// Restrictions that the kernel does not support, as a text for operators.
    pub(crate) unsupported: Option<String>,
}

/// Why no Landlock domain was entered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LandlockError {
    #[error("{0}")]
    Ruleset(#[from] RulesetError),
    #[error("the kernel has no Landlock, or Landlock is disabled")]
    Unavailable,
    #[error("{} does not exist", .0.display())]
    NoSuchDirectory(PathBuf),
}

/// Restrictions that Landlock versions after the first have added.
const ADDED: &[(ABI, &str)] = &[
    (ABI::V3, "truncation"),
    (ABI::V4, "TCP"),
    (ABI::V5, "ioctl on devices"),
    (ABI::V6, "signals and abstract sockets"),
];

/// Enters the domain of the main process.
///
/// # Errors
/// The kernel has no Landlock, or refuses a rule.
pub(crate) fn enter(needs: &Needs) -> Result<Entered, LandlockError> {
    restrict(AccessFs::from_all(ABI_TESTED), needs.network, &grants(needs))
}

/// Enters the domain of the process that opens disks: it may open existing files and devices only;
/// with `dirs`, only those in these directories and their subdirectories.
///
/// # Errors
/// As [`enter`]; also if one of `dirs` does not exist.
pub(crate) fn enter_opener(dirs: &[PathBuf]) -> Result<(), LandlockError> {
    let all = AccessFs::from_all(ABI_TESTED) & !BitFlags::from(AccessFs::IoctlDev);
    if dirs.is_empty() {
        return restrict(all & !DISK, Network::Refused, &[]).map(drop);
    }
    let grants: Vec<Grant> = dirs.iter().map(|dir| (dir.clone(), DISK)).collect();
    match restrict(all, Network::Refused, &grants)?.absent.first() {
        Some(missing) => Err(LandlockError::NoSuchDirectory(missing.clone())),
        None => Ok(()),
    }
}

fn grants(needs: &Needs) -> Vec<Grant> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let listen = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
    let lock = make_bitflags!(AccessFs::{MakeReg | ReadFile | WriteFile});
    let mut grants: Vec<Grant> = READ.iter().map(|path| (path.into(), read)).collect();
    grants.extend(DEVICES.iter().map(|path| (path.into(), DISK)));
    // For the times of log lines. It is usually a link into /usr.
    grants.push(("/etc/localtime".into(), AccessFs::ReadFile.into()));
    grants.push((needs.socket_dir.clone(), listen));
    if let Some(dir) = &needs.private_dir {
        grants.push((dir.clone(), listen | AccessFs::ReadDir));
        grants.push((parent(dir), AccessFs::RemoveDir.into()));
    }
    if let Some(socket) = &needs.rpc_socket {
        grants.push((parent(socket), listen | lock));
    }
    grants.extend(needs.config.iter().map(|path| (path.clone(), AccessFs::ReadFile.into())));
    grants.extend(needs.reads_in.iter().map(|dir| (dir.clone(), read)));
    let locks = lock | make_bitflags!(AccessFs::{ReadDir | RemoveFile | Truncate});
    grants.extend(needs.locks_in.iter().map(|dir| (dir.clone(), locks)));
    grants
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => ".".into(),
    }
}

/// Refuses the rights in `handled` except those in `grants`.
fn restrict(
    handled: BitFlags<AccessFs>,
    network: Network,
    grants: &[Grant],
) -> Result<Entered, LandlockError> {
    let tcp = match network {
        Network::Refused => AccessNet::from_all(ABI_TESTED),
        // A client of a storage cluster listens on no port.
        Network::Allowed => AccessNet::BindTcp.into(),
    };
    let mut absent = vec![];
    let mut ruleset = Ruleset::default()
        .handle_access(handled)?
        .handle_access(tcp)?
        .scope(Scope::from_all(ABI_TESTED))?
        .create()?
        .set_compatibility(landlock::CompatLevel::BestEffort);
    for (path, access) in grants {
        let Ok(fd) = PathFd::new(path) else {
            absent.push(path.clone());
            continue;
        };
        // A file takes only the rights that apply to files. The error of a file is ignored: a pipe,
        // which is on no file system, needs no grant.
        let is_dir = path.is_dir();
        let access = if is_dir { *access } else { *access & AccessFs::from_file(ABI_TESTED) };
        let added = (&mut ruleset).add_rule(PathBeneath::new(fd, access));
        if is_dir {
            added?;
        }
    }
    let status = ruleset.restrict_self()?;
    Ok(Entered { absent, unsupported: unsupported(status.ruleset, status.landlock.into())? })
}

/// The restrictions that a kernel with this Landlock version does not support.
fn unsupported(status: RulesetStatus, abi: ABI) -> Result<Option<String>, LandlockError> {
    match status {
        RulesetStatus::FullyEnforced => Ok(None),
        RulesetStatus::PartiallyEnforced => {
            let later = ADDED.iter().filter(|(added_by, _)| *added_by > abi);
            let names: Vec<&str> = later.map(|(_, name)| *name).collect();
            let (has, wanted, names) = (abi as i32, ABI_TESTED as i32, names.join(", "));
            Ok(Some(format!(
                "the kernel has Landlock {has}, not {wanted}, and does not restrict: {names}"
            )))
        }
        RulesetStatus::NotEnforced => Err(LandlockError::Unavailable),
    }
}

#[cfg(test)]
mod tests;
