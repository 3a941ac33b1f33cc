//! Drops the rights that the process does not need when it starts.
//!
//! # Threat model
//! A front end or a guest exploits a fault in this program or in rte_vhost to run its own code on
//! one of the threads. Threads share memory, so such code soon has the rights of all threads
//! together. Narrowing a single thread makes that harder; what counts is what the *process* cannot
//! do. So the main restrictions hold for every thread from its start: [`enter`] is called while
//! there is one thread, and later threads inherit them.
//!
//! # Restrictions
//! | | all threads | some threads |
//! |---|---|---|
//! | privileges | no new ones; of capabilities only CAP_DAC_OVERRIDE and those for io_uring (see below) are kept | workers keep only those for io_uring, reactors none |
//! | Landlock | refuses files by name except those of [`Needs`], and reading `/proc`, `/sys`, library directories and some devices; as far as the kernel can, also TCP, and abstract sockets of, and signals to, other processes | |
//! | seccomp | refuses all calls that are not on a list, and `socket` except for Unix sockets; calls about other programs, processes, namespaces and identities end the process | further filters, see [`Thread`] |
//! | io_uring | | from kernel 5.10 on, those of reactors are restricted to reads and writes of one disk (`bdev`), or to one operation (calls to a guest, `vhost-blk`) |
//!
//! - Disks may be anywhere, so a separate process opens them and sends the fd ([`Opener`]). It gets
//!   a path and returns only regular files and block devices; with `--disk-dir`, only those beneath
//!   the given directories. Without `--disk-dir` it does not protect the files of the host, but an
//!   attacker still cannot run programs or create files in most places, and reaches less of the
//!   kernel.
//! - CAP_DAC_OVERRIDE is kept because `-S` often belongs to the user of the VMs. Landlock limits
//!   it to the granted paths.
//! - Creating io_urings needs CAP_IPC_LOCK, without which their memory counts against
//!   RLIMIT_MEMLOCK, and CAP_SYS_ADMIN, which is dropped unless `kernel.io_uring_disabled` is 1 when
//!   the process starts. Workers create those of disks and of calls to guests.
//! - seccomp sees system calls, not what is submitted to an io_uring. An attacker on any thread but
//!   a reactor can create an io_uring and do through it what the filters refuse, such as sending
//!   UDP or, on a worker, removing files: only Landlock and capabilities apply there. A reactor can
//!   create no io_uring and use only restricted ones. With Linux AIO (`io_submit`) it can read and
//!   write every file that the process has open, as with every disk's ring: the memory is shared.
//! - Landlock restricts neither UDP nor connecting to Unix sockets by path.
//! - A thread that closes fds (`vhost-close`), or does I/O for a file disk (`vhost-disk`), has the
//!   restrictions of the thread that started it.
//! - A call that is on no list fails with EPERM, as a library may try something new and fall back;
//!   ending the process would take all disks down. Calls that no library tries do end it.
//! - The lists include what EAL's start needs, since it starts threads that stay.
//!
//! # What works without it
//! A front end sends fds, for which no path is needed. If the kernel lacks a part, the process runs
//! without that part, and [`Sandbox::missing`] lists it.

mod capabilities;
mod filters;
mod opener;
mod paths;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use caps::Capability;
use filters::Programs;
use paths::Entered;

pub use opener::Opener;

/// What the process needs of the file system after its start.
#[derive(Clone, Debug)]
pub struct Needs {
    /// Where the vhost sockets are made and removed.
    pub socket_dir: PathBuf,
    /// The RPC socket; its lock file is beside it.
    pub rpc_socket: Option<PathBuf>,
    /// A directory of the process's own, in which it makes a socket, and which it then removes.
    pub private_dir: Option<PathBuf>,
    /// The configuration file, which is read later.
    pub config: Option<PathBuf>,
    /// A directory whose existing files the process removes when it ends.
    pub removes_in: Option<PathBuf>,
    /// Directories whose files the process reads, besides those that every process reads.
    pub reads_in: Vec<PathBuf>,
    /// Directories of disks; if empty, disks may be anywhere.
    pub disk_dirs: Vec<PathBuf>,
}

/// Kinds of threads that are restricted further than the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// All that start after EAL's: no new executable memory.
    Control,
    /// Serves front ends, reclaims and unmaps: creates no sockets but pairs, connects to none,
    /// creates, renames and removes no files, does not call `kill`, has no capabilities but those
    /// for creating io_urings.
    Worker,
    /// Serves queues: submits to io_urings, writes to eventfds, sleeps, has no capabilities.
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

/// Why there is no sandbox at all.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Sandbox {
    /// No sandbox.
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

    /// Opens the files of disks.
    #[must_use]
    pub fn opener(&self) -> Opener {
        self.opener.clone()
    }

    /// The parts that are in effect, for the operator; empty if there are none.
    #[must_use]
    pub fn in_effect(&self) -> String {
        self.in_effect.join(", ")
    }

    /// The parts that the kernel lacks or does not allow, with the reason.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Paths among the [`Needs`] that do not exist. What is made there later cannot be accessed.
    #[must_use]
    pub fn absent(&self) -> &[PathBuf] {
        &self.absent
    }

    /// Restricts the calling thread, and those that it starts from now on, further. Errors are
    /// ignored: the kernel has refused the same at the start, and [`Sandbox::missing`] lists it.
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

/// Drops the rights that the process does not need. To be called while it has one thread, after
/// what only its start needs: raised limits, new files.
///
/// # Errors
/// The process that opens disks cannot be started, or cannot be restricted to `disk_dirs`; no
/// restriction is in effect then.
pub fn enter(needs: &Needs) -> Result<Sandbox, Error> {
    capabilities::raise_locked_memory_limit();
    let programs = Programs::compile().map_err(|e| Error(format!("system call filters: {e}")))?;
    let (opener, pid) = opener::fork(&needs.disk_dirs).map_err(Error)?;
    let of_workers = capabilities::of_workers();
    let mut sandbox = Sandbox { opener, of_workers, ..Sandbox::none() };
    sandbox.note("no new privileges", capabilities::no_new_privileges());
    match capabilities::keep(&capabilities::of_process()) {
        Ok(kept) if kept.is_empty() => sandbox.in_effect.push("no capabilities".into()),
        Ok(kept) => {
            let names: Vec<String> = kept.iter().map(ToString::to_string).collect();
            sandbox.in_effect.push(format!("no capabilities but {}", names.join(" ")));
        }
        Err(e) => sandbox.missing.push(format!("capabilities: {e}")),
    }
    match paths::enter(needs) {
        Ok(Entered { absent, lacking }) => {
            sandbox.in_effect.push("Landlock".into());
            sandbox.missing.extend(lacking);
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
    fn note(&mut self, what: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.in_effect.push(what.into()),
            Err(e) => self.missing.push(format!("{what}: {e}")),
        }
    }
}

impl Needs {
    /// Whether a path was given by the operator, unlike those that every process needs.
    fn names(&self, path: &PathBuf) -> bool {
        *path == self.socket_dir || self.config.as_ref() == Some(path)
    }
}
