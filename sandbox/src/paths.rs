//! Landlock: the files and sockets that the process can still open by name.
//!
//! A Landlock domain covers the thread that enters it and the threads that it starts, so it is
//! entered while there is one thread. It restricts opening: files that are already open, and fds
//! that others send, keep their rights. TCP is refused, and so are abstract sockets of, and signals
//! to, processes outside of the domain, as far as the kernel can. UDP, and connecting to
//! Unix sockets by path, are not restricted.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use crate::Needs;

/// The newest Landlock version that this program was tested with. Older kernels refuse less.
const ABI_TRIED: ABI = ABI::V6;

/// Rights on a disk's file. Not `IoctlDev`: the domain of the process that opens disks does not
/// handle it. Truncation is not granted, and stays refused on the fds that this process sends.
const DISK: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile});

/// Libraries, time zones, and information about the machine and the process.
const READ: &[&str] = &["/proc", "/sys", "/usr", "/lib", "/lib64", "/etc/ld.so.cache"];

/// Devices that any process may use.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"];

/// A path, and the rights on it and everything beneath it.
type Grant = (PathBuf, BitFlags<AccessFs>);

/// The domain that was entered.
#[derive(Debug)]
pub(crate) struct Entered {
    /// The paths to be granted that do not exist.
    pub(crate) absent: Vec<PathBuf>,
    /// What the kernel cannot restrict.
    pub(crate) lacking: Option<String>,
}

/// What later Landlock versions restrict in addition to the first.
const ADDED: &[(ABI, &str)] = &[
    (ABI::V3, "truncation"),
    (ABI::V4, "TCP"),
    (ABI::V5, "ioctl on devices"),
    (ABI::V6, "signals and abstract sockets"),
];

/// Enters the domain of the main process.
///
/// # Errors
/// The reason, if the kernel lacks Landlock or refuses.
pub(crate) fn enter(needs: &Needs) -> Result<Entered, String> {
    restrict(AccessFs::from_all(ABI_TRIED), &grants(needs))
}

/// Enters the domain of the process that opens disks: existing files and devices only; with `dirs`,
/// only those beneath these directories.
///
/// # Errors
/// The reason; also if one of `dirs` does not exist.
pub(crate) fn enter_opener(dirs: &[PathBuf]) -> Result<(), String> {
    let all = AccessFs::from_all(ABI_TRIED) & !BitFlags::from(AccessFs::IoctlDev);
    if dirs.is_empty() {
        return restrict(all & !DISK, &[]).map(drop);
    }
    let grants: Vec<Grant> = dirs.iter().map(|dir| (dir.clone(), DISK)).collect();
    match restrict(all, &grants)?.absent.first() {
        Some(missing) => Err(format!("{} does not exist", missing.display())),
        None => Ok(()),
    }
}

fn grants(needs: &Needs) -> Vec<Grant> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let listen = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
    let lock = make_bitflags!(AccessFs::{MakeReg | ReadFile | WriteFile});
    let mut grants: Vec<Grant> = READ.iter().map(|path| (path.into(), read)).collect();
    grants.extend(DEVICES.iter().map(|path| (path.into(), DISK)));
    // For the times of log lines; usually a link into /usr.
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
    grants.extend(needs.removes_in.iter().map(|dir| (dir.clone(), AccessFs::RemoveFile.into())));
    grants
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => ".".into(),
    }
}

/// Refuses the rights in `handled` except where granted.
fn restrict(handled: BitFlags<AccessFs>, grants: &[Grant]) -> Result<Entered, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let mut absent = vec![];
    let mut ruleset = Ruleset::default()
        .handle_access(handled)
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI_TRIED)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI_TRIED)))
        .and_then(Ruleset::create)
        .map_err(|e| text(&e))?
        .set_compatibility(landlock::CompatLevel::BestEffort);
    for (path, access) in grants {
        let Ok(fd) = PathFd::new(path) else {
            absent.push(path.clone());
            continue;
        };
        // For a file, only the rights that apply to files. A path on no file system, as a pipe's,
        // needs no grant.
        let is_dir = path.is_dir();
        let access = if is_dir { *access } else { *access & AccessFs::from_file(ABI_TRIED) };
        let added = (&mut ruleset).add_rule(PathBeneath::new(fd, access));
        if is_dir {
            added.map_err(|e| text(&e))?;
        }
    }
    let status = ruleset.restrict_self().map_err(|e| text(&e))?;
    Ok(Entered { absent, lacking: lacking(status.ruleset, status.landlock.into())? })
}

/// What a kernel with this Landlock version cannot restrict.
fn lacking(status: RulesetStatus, abi: ABI) -> Result<Option<String>, String> {
    match status {
        RulesetStatus::FullyEnforced => Ok(None),
        RulesetStatus::PartiallyEnforced => {
            let later = ADDED.iter().filter(|(added_by, _)| *added_by > abi);
            let names: Vec<&str> = later.map(|(_, name)| *name).collect();
            let (has, wanted, names) = (abi as i32, ABI_TRIED as i32, names.join(", "));
            Ok(Some(format!(
                "the kernel has Landlock {has}, not {wanted}, and does not restrict: {names}"
            )))
        }
        RulesetStatus::NotEnforced => Err("the kernel has no Landlock, or it is turned off".into()),
    }
}

#[cfg(test)]
mod tests;
