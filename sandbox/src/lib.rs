//! What the process gives up when it starts.
//!
//! # Against whom
//! A front end or a guest that finds a fault in this program or in rte_vhost and makes one of its
//! threads run code of its own. Threads share memory, so such code has the rights of all threads
//! together before long. What a single thread gives up makes the way there longer; what counts is
//! what the *process* cannot do. Hence all of it holds for every thread from its birth: [`enter`]
//! is called while there is one thread, and threads inherit.
//!
//! # What is given up
//! | | for all threads | besides |
//! |---|---|---|
//! | privileges | no new ones; of capabilities only CAP_DAC_OVERRIDE is kept | reactors and workers: none |
//! | Landlock | files by name but in `-S`, the RPC socket's directory, `/proc`, `/sys`, libraries; TCP; abstract sockets of and signals to others | |
//! | seccomp | all but a list; other programs, processes, namespaces, identities: the process ends | [`Thread`] |
//! | io_uring | | the rings that a reactor enters do I/O on their own disk and nothing else (`bdev`), or nothing at all (a guest's call) |
//!
//! - Disks may be anywhere, so a process of its own opens them and sends the fd ([`Opener`]). It is
//!   asked by a path, and gives what is a file or block device; with `--disk-dir` only what is
//!   beneath. Without, it stands between an intruder and the kernel, running programs and making
//!   files, but not between an intruder and the files of the host.
//! - CAP_DAC_OVERRIDE stays because `-S` often belongs to the user of the VMs. Landlock says where
//!   it is of use: there, and where everything is read only.
//! - seccomp sees calls, not what is put into a ring. Landlock and capabilities are asked for both,
//!   and a reactor can make no ring and enters those that are restricted.
//! - A call that is on no list fails with EPERM. A library may try something new and fall back; if
//!   it ended the process, all disks would go down with it. What no library tries ends it.
//! - Of EAL's start the lists have what it needs, since it starts threads that stay.
//!
//! # What does not depend on it
//! What a front end hands over are fds, and they need no path. A kernel that lacks a part goes
//! without it, and [`Sandbox::missing`] says so.

mod capabilities;
mod filters;
mod opener;
mod paths;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use filters::Programs;

pub use opener::Opener;

/// What the process goes on to need of the file system.
#[derive(Clone, Debug)]
pub struct Needs {
    /// Where the vhost sockets are made and removed.
    pub socket_dir: PathBuf,
    /// The RPC socket, with its lock beside it.
    pub rpc_socket: Option<PathBuf>,
    /// A directory of the process's own, in which it makes a socket, and which it then removes.
    pub private_dir: Option<PathBuf>,
    /// The configuration, which is read later.
    pub config: Option<PathBuf>,
    /// A directory in which files that are there are removed at the end.
    pub removes_in: Option<PathBuf>,
    /// Where disks may be; anywhere if there are none.
    pub disk_dirs: Vec<PathBuf>,
}

/// Kinds of threads that give up more than the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// All that start after EAL's: no new executable memory.
    Control,
    /// Hears front ends, unmaps, closes: no sockets of its own, no files that come and go, no
    /// signals, no capabilities.
    Worker,
    /// Serves queues: enters rings, writes to eventfds, sleeps.
    Reactor,
}

/// The sandbox of this process.
#[derive(Clone, Debug)]
pub struct Sandbox {
    programs: Option<Arc<Programs>>,
    opener: Opener,
    in_effect: Vec<String>,
    missing: Vec<String>,
    absent: Vec<PathBuf>,
}

/// Why there is no sandbox, not even a part.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Sandbox {
    /// None: nothing is given up.
    #[must_use]
    pub fn none() -> Self {
        let opener = Opener::in_process();
        Self { programs: None, opener, in_effect: vec![], missing: vec![], absent: vec![] }
    }

    /// What disks are opened with.
    #[must_use]
    pub fn opener(&self) -> Opener {
        self.opener.clone()
    }

    /// What is in effect, for the operator; empty if nothing is.
    #[must_use]
    pub fn in_effect(&self) -> String {
        self.in_effect.join(", ")
    }

    /// What the kernel cannot do or does not allow, with its reason.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Paths among the [`Needs`] that are not there. What is made at their place later will be out
    /// of reach.
    #[must_use]
    pub fn absent(&self) -> &[PathBuf] {
        &self.absent
    }

    /// Has the calling thread, and those that it starts from now on, give up more. What the kernel
    /// refuses it has refused at the start, and [`Sandbox::missing`] has it.
    pub fn narrow(&self, thread: Thread) {
        let Some(programs) = &self.programs else { return };
        let program = match thread {
            Thread::Control => &programs.no_code,
            Thread::Worker => &programs.worker,
            Thread::Reactor => &programs.reactor,
        };
        if thread != Thread::Control {
            let _ = capabilities::keep(&[]);
        }
        let _ = filters::install(program);
    }
}

/// Gives up what the process does not need. To be called while it has one thread, when it has taken
/// what only its start needs: limits raised, files made.
///
/// # Errors
/// No process can be had that opens disks, or it cannot be kept to `disk_dirs`; nothing has been
/// given up then.
pub fn enter(needs: &Needs) -> Result<Sandbox, Error> {
    capabilities::raise_locked_memory_limit();
    let programs = Programs::compile().map_err(|e| Error(format!("system call filters: {e}")))?;
    let (opener, pid) = opener::fork(&programs, &needs.disk_dirs).map_err(Error)?;
    let mut sandbox = Sandbox { opener, ..Sandbox::none() };
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
        Ok(absent) => {
            sandbox.in_effect.push("Landlock".into());
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
    /// Whether a path is one of these, and not one that every process needs.
    fn names(&self, path: &PathBuf) -> bool {
        *path == self.socket_dir || self.config.as_ref() == Some(path)
    }
}
