//! The mode, owner and group of the vhost-user sockets and of the RPC socket.
//!
//! Names are resolved once, before the sandbox starts, because the C library may load code and
//! connect to other processes for it.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::unistd::{Group, User};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, fstat, open};
use rustix::process::{getegid, geteuid, getgroups};
use rustix::thread::set_thread_groups;
use sandbox::SocketAccess;

use crate::cli::Options;

/// Why a user or group on the command line cannot be resolved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NameError {
    #[error("{option}: unknown {kind} {name:?}")]
    Unknown { option: &'static str, kind: &'static str, name: String },
    #[error("{option}: cannot look up {kind} {name:?}: {source}")]
    Lookup { option: &'static str, kind: &'static str, name: String, source: io::Error },
}

/// What could not be changed of a socket's file. The text names no path, which the caller adds.
#[derive(Debug, thiserror::Error)]
enum AccessError {
    #[error("cannot open the socket's file to change it: {0}")]
    Open(#[source] io::Error),
    #[error("another process has replaced the socket's file")]
    Replaced,
    #[error("cannot change the mode to {0:03o}: {1}")]
    Mode(u32, #[source] io::Error),
    #[error("cannot change the owner to user {0}: {1}; vhost needs CAP_CHOWN for it")]
    Owner(u32, #[source] io::Error),
    #[error(
        "cannot change the group to {0}: {1}; add the user that vhost runs as to this group, or \
         give vhost CAP_CHOWN"
    )]
    Group(u32, #[source] io::Error),
}

/// Resolves `--socket-mode`, `--socket-owner` and `--socket-group`.
pub(crate) fn resolve(options: &Options) -> Result<SocketAccess, NameError> {
    let user = |name: &str| User::from_name(name).map(|user| user.map(|user| user.uid.as_raw()));
    let group = |name: &str| Group::from_name(name).map(|group| group.map(|g| g.gid.as_raw()));
    let (owner, owners) = ("--socket-owner", options.socket_owner.as_deref());
    let (of_group, groups) = ("--socket-group", options.socket_group.as_deref());
    Ok(SocketAccess {
        mode: options.socket_mode,
        owner: owners.map(|name| id(owner, "user", name, user)).transpose()?,
        group: groups.map(|name| id(of_group, "group", name, group)).transpose()?,
    })
}

/// The id of a name. A number is an id, as no name consists of digits only.
fn id(
    option: &'static str,
    kind: &'static str,
    name: &str,
    look_up: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, NameError> {
    if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
        // The largest number stands for "unchanged" in system calls.
        let id = name.parse().ok().filter(|&id| id != u32::MAX);
        return id.ok_or_else(|| NameError::Unknown { option, kind, name: name.into() });
    }
    match look_up(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(NameError::Unknown { option, kind, name: name.into() }),
        Err(e) => Err(NameError::Lookup { option, kind, name: name.into(), source: e.into() }),
    }
}

/// Adds the group of the sockets to the groups of this process, if that is permitted. A member of
/// the group needs no capability to give it a file. The process must have one thread.
pub(crate) fn join_group(access: &SocketAccess) {
    let (None, Some(group)) = (access.owner, access.group) else { return };
    let group = Gid::from_raw(group);
    let Ok(mut groups) = getgroups() else { return };
    if getegid() != group && !groups.contains(&group) {
        groups.push(group);
        // If it fails, giving the group a socket fails too, and that is reported.
        let _ = set_thread_groups(&groups);
    }
}

/// Changes the mode, owner and group of a socket's file that this process has just bound.
///
/// The directory may belong to a user who replaces the file with a link to another one. So this
/// changes only a socket that this process's user has made, and follows no link to it.
pub(crate) fn apply(access: &SocketAccess, path: &Path) -> io::Result<()> {
    change(access, path).map_err(io::Error::other)
}

fn change(access: &SocketAccess, path: &Path) -> Result<(), AccessError> {
    if *access == SocketAccess::default() {
        return Ok(());
    }
    let failed = |e: rustix::io::Errno| AccessError::Open(e.into());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(failed)?;
    let stat = fstat(&file).map_err(failed)?;
    let is_ours = stat.st_uid == geteuid().as_raw() && stat.st_nlink == 1;
    if !is_ours || FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(AccessError::Replaced);
    }
    // First, as the new owner alone may change the mode.
    if let Some(mode) = access.mode {
        // `fchmod` does not take such an fd.
        let file = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmodat(CWD, file, Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(|e| AccessError::Mode(mode, e.into()))?;
    }
    if access.owner.or(access.group).is_some() {
        let (owner, group) = (access.owner.map(Uid::from_raw), access.group.map(Gid::from_raw));
        chownat(&file, "", owner, group, AtFlags::EMPTY_PATH).map_err(|e| {
            match (access.owner, access.group) {
                (Some(owner), _) => AccessError::Owner(owner, e.into()),
                (None, group) => AccessError::Group(group.unwrap_or_default(), e.into()),
            }
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn names_and_numbers() {
        let known = |name: &str| Ok((name == "qemu").then_some(107));
        let id = |name: &str| super::id("--socket-owner", "user", name, known);
        assert_eq!(id("qemu").unwrap(), 107);
        assert_eq!(id("65534").unwrap(), 65534);
        for name in ["", "nobody-at-all", "4294967295", "4294967296", "-1"] {
            let error = id(name).unwrap_err().to_string();
            assert_eq!(error, format!("--socket-owner: unknown user {name:?}"));
        }
        let failing = |_: &str| Err(nix::errno::Errno::EIO);
        let error = super::id("--socket-group", "group", "kvm", failing).unwrap_err().to_string();
        assert!(error.starts_with("--socket-group: cannot look up group \"kvm\": "), "{error}");
    }

    #[test]
    fn only_a_socket_of_this_user_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let _listener = UnixListener::bind(at("socket")).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink("socket", at("link")).unwrap();
        let access = SocketAccess {
            mode: Some(0o604),
            owner: None,
            group: Some(fs::metadata(at("file")).unwrap().gid()),
        };
        for name in ["file", "link"] {
            let before = fs::metadata(at(name)).unwrap().permissions();
            let error = apply(&access, &at(name)).unwrap_err().to_string();
            assert_eq!(error, "another process has replaced the socket's file", "{name}");
            assert_eq!(fs::metadata(at(name)).unwrap().permissions(), before);
        }
        apply(&access, &at("socket")).unwrap();
        assert_eq!(fs::metadata(at("socket")).unwrap().permissions().mode() & 0o7777, 0o604);
        // Another name of a socket that stands elsewhere.
        fs::hard_link(at("socket"), at("other")).unwrap();
        assert!(apply(&access, &at("other")).is_err());
        assert!(apply(&access, &at("none")).unwrap_err().to_string().contains("cannot open"));
        apply(&SocketAccess::default(), &at("none")).unwrap();
    }
}
