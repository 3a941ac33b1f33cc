//! A file system of the tests' own, in memory, whose operations hang for as long as a test says.
//!
//! ```ignore
//! let Some(files) = SlowFiles::mount(&[("disk", Kind::Direct, 8 << 20)]) else { return };
//! vhost.ok("bdev_aio_create", json!({"name": "F", "filename": files.path("disk"), …}));
//! files.hold("disk", Op::Fsync);                 // from now on
//! …
//! files.wait_for_held("disk", Op::Fsync, 1);     // it has arrived, and is not answered
//! files.release("disk", Op::Fsync);              // it is, and so are those to come
//! ```
//!
//! Faults that it shows: an operation is answered late, or never before the test ends. No operation
//! fails, and each takes effect when it is answered: a write that is held has not changed the
//! [`contents`](SlowFiles::contents).
//!
//! A thread that waits for an answer cannot be killed, so a process with such a thread is not
//! reaped before the answer. Dropping a `SlowFiles` answers everything, then and later: let it be
//! dropped before a [`Vhost`](crate::support::harness::Vhost), which waits for the end of its process. No
//! thread of the test itself may use what is held.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small files")]

mod fs;
mod locks;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use fuser::{BackgroundSession, Config};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use fs::Server;
use locks::Locks;

use crate::support::harness::LIMIT;

/// What can be held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Open,
    Read,
    Write,
    Fsync,
    /// Of any kind: holes and zeroes too.
    Fallocate,
    Getattr,
    /// A new size, or another attribute.
    Setattr,
    /// A close, which the protocol calls flush.
    Close,
    /// Taking a lock, giving it up, and asking about one.
    Lock,
}

/// How a file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It cannot be opened with `O_DIRECT`, and its reads come from the page cache.
    PageCache,
    /// As it was opened.
    Direct,
    /// However it was opened, every read and write arrives (`FOPEN_DIRECT_IO`).
    Uncached,
}

/// The file system, mounted.
pub(crate) struct SlowFiles {
    shared: Arc<Shared>,
    /// Unmounted by hand, since its own unmounting fails while a file is open.
    _session: BackgroundSession,
    dir: TempDir,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    files: Vec<File>,
    held: VecDeque<Held>,
    /// Nothing is held any more.
    open: bool,
    handles: u64,
}

struct File {
    name: String,
    kind: Kind,
    bytes: Vec<u8>,
    locks: Locks,
    holds: Vec<Op>,
    /// Everything that has come, whether it is held or not.
    arrived: Vec<Op>,
}

/// A request that has no answer yet.
struct Held {
    file: usize,
    op: Op,
    /// Does it and answers.
    go: Go,
}

type Go = Box<dyn FnOnce(&mut File) + Send>;

impl SlowFiles {
    /// Mounts it with files of zeroes: name, kind and size. `None`, and the skip is reported, if
    /// the host does not let us.
    #[track_caller]
    pub(crate) fn mount(files: &[(&str, Kind, u64)]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let shared = Arc::<Shared>::default();
        let made = files.iter().map(|&(name, kind, bytes)| File::new(name, kind, bytes));
        shared.lock().files = made.collect();
        let server = Server(Arc::clone(&shared));
        match fuser::spawn_mount(server, dir.path(), &Config::default()) {
            Ok(session) => Some(Self { shared, _session: session, dir }),
            Err(e) => {
                test_report::skipped("fuse", &e.to_string());
                None
            }
        }
    }

    /// Where a file is for everybody.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// From now on, answers no such operation on this file.
    pub(crate) fn hold(&self, name: &str, op: Op) {
        self.shared.lock().file(name).holds.push(op);
    }

    /// Answers those that it holds, in the order in which they came, and those to come.
    pub(crate) fn release(&self, name: &str, op: Op) {
        self.shared.lock().file(name).holds.retain(|held| *held != op);
        self.answer(name, op, usize::MAX);
    }

    /// Answers the first `count` of those that it holds, and goes on holding.
    pub(crate) fn answer(&self, name: &str, op: Op, count: usize) {
        self.shared.lock().answer(Some((name, op)), count);
        self.shared.changed.notify_all();
    }

    /// How many such operations it holds.
    pub(crate) fn held(&self, name: &str, op: Op) -> usize {
        self.shared.lock().held(name, op)
    }

    /// How many such operations have come.
    pub(crate) fn arrived(&self, name: &str, op: Op) -> usize {
        self.shared.lock().file(name).arrived.iter().filter(|came| **came == op).count()
    }

    /// Waits until it holds so many.
    #[track_caller]
    pub(crate) fn wait_for_held(&self, name: &str, op: Op, count: usize) {
        self.wait(&format!("{count} held {op:?} of {name}"), |state| state.held(name, op) >= count);
    }

    /// Waits until so many have come and are answered.
    #[track_caller]
    pub(crate) fn wait_for_answered(&self, name: &str, op: Op, count: usize) {
        self.wait(&format!("{count} answered {op:?} of {name}"), |state| {
            let arrived = state.file(name).arrived.iter().filter(|came| **came == op).count();
            arrived - state.held(name, op) >= count
        });
    }

    #[track_caller]
    fn wait(&self, what: &str, done: impl Fn(&mut State) -> bool) {
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, LIMIT, |state| !done(state));
        let timeout = waited.unwrap_or_else(PoisonError::into_inner).1;
        assert!(!timeout.timed_out(), "never came: {what}");
    }

    /// What a file holds.
    pub(crate) fn contents(&self, name: &str) -> Vec<u8> {
        self.shared.lock().file(name).bytes.clone()
    }

    /// Gives a file another size, behind its users' backs.
    pub(crate) fn resize(&self, name: &str, bytes: u64) {
        self.shared.lock().file(name).bytes.resize(bytes as usize, 0);
    }
}

impl Drop for SlowFiles {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.open = true;
        state.answer(None, usize::MAX);
        drop(state);
        // Its threads go on for those who have files open, up to the end of the test's process.
        if let Err(e) = unmount(self.dir.path(), UnmountFlags::DETACH) {
            eprintln!("{}: cannot unmount: {e}", self.dir.path().display());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that fails in a wait still has to answer what it held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request, and does it now or keeps it.
    fn request(&self, file: usize, op: Op, go: impl FnOnce(&mut File) + Send + 'static) {
        let mut state = self.lock();
        let open = state.open;
        let of = &mut state.files[file];
        of.arrived.push(op);
        if open || !of.holds.contains(&op) {
            go(of);
        } else {
            state.held.push_back(Held { file, op, go: Box::new(go) });
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl State {
    fn index(&self, name: &str) -> usize {
        self.files.iter().position(|file| file.name == name).unwrap()
    }

    fn file(&mut self, name: &str) -> &mut File {
        let index = self.index(name);
        &mut self.files[index]
    }

    fn held(&self, name: &str, op: Op) -> usize {
        let index = self.index(name);
        self.held.iter().filter(|held| (held.file, held.op) == (index, op)).count()
    }

    fn answer(&mut self, which: Option<(&str, Op)>, count: usize) {
        let which = which.map(|(name, op)| (self.index(name), op));
        let mut left = count;
        for held in std::mem::take(&mut self.held) {
            if left > 0 && which.is_none_or(|which| which == (held.file, held.op)) {
                (held.go)(&mut self.files[held.file]);
                left -= 1;
            } else {
                self.held.push_back(held);
            }
        }
    }
}

impl File {
    fn new(name: &str, kind: Kind, bytes: u64) -> Self {
        Self {
            name: name.into(),
            kind,
            bytes: vec![0; bytes as usize],
            locks: Locks::default(),
            holds: vec![],
            arrived: vec![],
        }
    }
}
