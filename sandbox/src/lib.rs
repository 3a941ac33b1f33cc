//! Drops the rights that the process does not need when it starts.
//!
//! # Threat model
//! A front end or a guest exploits a fault in this program or in rte_vhost to run its own code on
//! one of the threads. Threads share memory, so such code can gain the rights of all threads. The
//! restrictions of a single thread only make that harder; the restrictions of the *process* count.
//! So the main restrictions hold for every thread from its start: [`enter`] is called while the
//! process has one thread, and later threads inherit them.
//!
//! # Restrictions
//! | | all threads | some threads |
//! |---|---|---|
//! | privileges | no new privileges; of the capabilities, only CAP_DAC_OVERRIDE, those for io_uring and, for another owner of sockets, CAP_CHOWN (see below) are kept | workers keep only those for io_uring, reactors none |
//! | Landlock | allows only the paths of [`Needs`], and reading `/proc`, `/sys`, library directories and some devices; if the kernel supports it, also refuses TCP (with [`Network::Allowed`] only listening), abstract sockets of other processes, and signals to them | |
//! | seccomp | refuses all system calls that are not on a list, and `socket` except for Unix sockets, and for network sockets with [`Network::Allowed`]; calls that start programs, control other processes, or change namespaces or identities kill the process | further filters, see [`Thread`] |
//! | io_uring | | with kernel 5.10 or newer, reactors' rings are restricted to reads and writes of one disk (`bdev`), or to one operation (calls to a guest, `vhost-blk`) |
//!
//! - Disks may be in any directory, so a separate process opens them and sends the fd ([`Opener`]).
//!   It opens only regular files (but none of procfs, sysfs and the like) and block devices; with
//!   `--disk-dir`, only those in the given directories. Without `--disk-dir` it does not protect the files of the host, but an attacker
//!   still cannot run programs or create files in most directories, and can make fewer system
//!   calls.
//! - Of NVMe, that process opens block devices only: no controller, and nothing through which one
//!   is reset or connected.
//! - CAP_DAC_OVERRIDE is kept because `-S` often belongs to the user of the VMs. Landlock limits
//!   it to the granted paths.
//! - The mode, owner and group of a file can be changed only if [`Needs::socket_access`] requires
//!   it, and then only to those of [`SocketAccess`]. Landlock does not restrict such changes. For
//!   another owner, CAP_CHOWN is kept: an attacker can then give files of any user to that owner.
//! - An io_uring needs CAP_IPC_LOCK, without which its memory counts against RLIMIT_MEMLOCK, and
//!   CAP_SYS_ADMIN if `kernel.io_uring_disabled` is 1. CAP_SYS_ADMIN is kept only if the setting is
//!   1 when the process starts. Workers create the rings of disks and of calls to guests.
//! - seccomp filters system calls, not the requests in an io_uring. An attacker on any thread but a
//!   reactor can create an io_uring and send requests that the filters refuse as system calls, such
//!   as UDP or, on a worker, removing files: only Landlock and capabilities restrict these. A
//!   reactor cannot create an io_uring and can use only restricted rings. Through Linux AIO
//!   (`io_submit`) and the disks' rings, a reactor can read and write every disk of the process.
//! - Landlock restricts neither UDP nor connecting to Unix sockets by path.
//! - A thread that closes fds (`vhost-close`) or does I/O for a file disk (`vhost-disk`) has the
//!   restrictions of the thread that started it.
//! - A call that is on no list fails with EPERM instead of killing the process: a library may try a
//!   new call and fall back to an old one. Calls that no library tries kill the process.
//! - The lists include the calls of EAL's initialisation, because its threads stay.
//!
//! # Kernels without a part
//! If the kernel lacks a part, the process runs without that part, and [`Sandbox::missing`] lists
//! it.

mod capabilities;
mod filters;
mod opener;
mod paths;

use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use caps::Capability;
use filters::Programs;
use paths::Entered;

pub use opener::Opener;

/// The paths that the process uses after it has entered the sandbox.
#[derive(Clone, Debug)]
pub struct Needs {
    /// The directory in which the vhost-user sockets are created and removed.
    pub socket_dir: PathBuf,
    /// The RPC socket; its lock file is in the same directory.
    pub rpc_socket: Option<PathBuf>,
    /// A directory in which the process creates a private socket, and which it then removes.
    pub private_dir: Option<PathBuf>,
    /// The configuration file, which is read later.
    pub config: Option<PathBuf>,
    /// A directory in which the process creates, renames and removes lock files.
    pub locks_in: Option<PathBuf>,
    /// Directories whose files the process reads, besides those that every process reads.
    pub reads_in: Vec<PathBuf>,
    /// Directories of disks; if empty, disks may be in any directory.
    pub disk_dirs: Vec<PathBuf>,
    /// Whether the process may connect to storage clusters.
    pub network: Network,
    /// What the process changes of the files of its sockets.
    pub socket_access: SocketAccess,
}

/// Whether threads other than workers and reactors may connect to other hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// No thread may.
    #[default]
    Refused,
    /// They may.
    Allowed,
}

/// The mode and owner that a process gives to the files of its sockets. `None` leaves an attribute
/// as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// The permission bits.
    pub mode: Option<u32>,
    /// The user id of the owner.
    pub owner: Option<u32>,
    /// The group id.
    pub group: Option<u32>,
}

/// Kinds of threads that have restrictions besides those of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// A thread that starts after EAL's threads: no new executable memory.
    Control,
    /// A thread that serves front ends, reclaims or unmaps: no sockets but pairs, no `connect`, no
    /// creating, renaming or removing of files, no `kill`, no capabilities but those for creating
    /// io_urings.
    Worker,
    /// A thread that serves queues: it may submit to io_urings, write to eventfds, and sleep. It
    /// has no capabilities.
    Reactor,
}

/// The sandbox of this process.
#[derive(Clone, Debug)]
pub struct Sandbox {
    programs: Option<Arc<Programs>>,
    of_workers: Vec<Capability>,
    opener: Opener,
    in_effect: Vec<String>,
    missing: Vec<String>,
    absent: Vec<PathBuf>,
}

/// Why no part of the sandbox is in effect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// seccompiler does not support this processor.
    #[error("cannot compile the system call filters: {0}")]
    Filters(#[source] seccompiler::BackendError),
    /// The process that opens disks could not be started.
    #[error("cannot start the process that opens disks: {0}")]
    Opener(#[source] io::Error),
    /// The process that opens disks could not restrict itself. The text comes from that process.
    #[error("cannot restrict the process that opens disks: {0}")]
    OpenerRestrictions(String),
}

impl Sandbox {
    /// A sandbox without restrictions.
    #[must_use]
    pub fn none() -> Self {
        Self {
            programs: None,
            of_workers: vec![],
            opener: Opener::in_process(),
            in_effect: vec![],
            missing: vec![],
            absent: vec![],
        }
    }

    /// A handle to the process that opens files for disks.
    #[must_use]
    pub fn opener(&self) -> Opener {
        self.opener.clone()
    }

    /// The parts that are in effect, as a text for operators; empty without a sandbox.
    #[must_use]
    pub fn in_effect(&self) -> String {
        self.in_effect.join(", ")
    }

    /// The parts that the kernel lacks or refuses, each with the reason.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Paths among the [`Needs`] that did not exist. The process cannot access them even if they
    /// are created later.
    #[must_use]
    pub fn absent(&self) -> &[PathBuf] {
        &self.absent
    }

    /// Adds the restrictions of a kind of thread to the calling thread and to threads that it
    /// starts later. Ignores errors: the kernel refused the same at startup, and
    /// [`Sandbox::missing`] lists it.
    pub fn narrow(&self, thread: Thread) {
        let Some(programs) = &self.programs else { return };
        let (program, kept) = match thread {
            Thread::Control => (&programs.no_code, None),
            Thread::Worker => (&programs.worker, Some(&self.of_workers[..])),
            Thread::Reactor => (&programs.reactor, Some(&[][..])),
        };
        if let Some(kept) = kept {
            let _ = capabilities::keep(kept);
        }
        let _ = filters::install(program);
    }
}

/// Drops the rights that the process does not need. The process must have one thread, and must
/// already have raised its limits and created its files.
///
/// # Errors
/// On an error, no restriction is in effect.
pub fn enter(needs: &Needs) -> Result<Sandbox, Error> {
    capabilities::raise_locked_memory_limit();
    let access = &needs.socket_access;
    let programs = Programs::compile(access, needs.network).map_err(Error::Filters)?;
    let (opener, pid) = opener::fork(&needs.disk_dirs)?;
    let of_workers = capabilities::of_workers();
    let mut sandbox = Sandbox { opener, of_workers, ..Sandbox::none() };
    sandbox.note("no new privileges", capabilities::no_new_privileges());
    match capabilities::keep(&capabilities::of_process(access.owner.is_some())) {
        Ok(kept) if kept.is_empty() => sandbox.in_effect.push("no capabilities".into()),
        Ok(kept) => {
            let names: Vec<String> = kept.iter().map(ToString::to_string).collect();
            sandbox.in_effect.push(format!("no capabilities but {}", names.join(" ")));
        }
        Err(e) => sandbox.missing.push(format!("capabilities: {e}")),
    }
    match paths::enter(needs) {
        Ok(Entered { absent, unsupported }) => {
            sandbox.in_effect.push("Landlock".into());
            sandbox.missing.extend(unsupported);
            sandbox.absent = absent.into_iter().filter(|path| needs.names(path)).collect();
        }
        Err(e) => sandbox.missing.push(format!("Landlock: {e}")),
    }
    let installed = filters::install_all(&programs.process);
    let works = installed.is_ok();
    sandbox.note("system call filters", installed);
    sandbox.programs = works.then(|| Arc::new(programs));
    sandbox.in_effect.push(format!("disks are opened by process {pid}"));
    Ok(sandbox)
}

impl Sandbox {
    fn note(&mut self, part: &str, result: Result<(), impl Display>) {
        match result {
            Ok(()) => self.in_effect.push(part.into()),
            Err(e) => self.missing.push(format!("{part}: {e}")),
        }
    }
}

impl Needs {
    /// Whether the operator named this path.
    fn names(&self, path: &PathBuf) -> bool {
        *path == self.socket_dir || self.config.as_ref() == Some(path)
    }
}
