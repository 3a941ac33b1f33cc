//! The lease of a disk in a file: while rings use the disk, other processes of this program wait.
//!
//! io_uring does not wait for direct I/O when its process ends: after SIGKILL, a write may reach
//! the disk when the next process has already done the same request again and has completed it. So
//! a disk that may be written holds a lock on one byte of its file, far beyond any data, while
//! rings use it. The lock belongs to the disk's open file description (`F_OFD_SETLK`), and every
//! request in the kernel holds a reference to that description. Therefore the lock of a process
//! that has ended is free only when the last of its I/O has ended, and until then the next process
//! does not start its rings. Linux AIO, and threads that are inside a system call, delay the end of
//! the process itself, and with it the release of the lock.
//!
//! `F_GETLK` does not report the owner of such a lock. So the process also takes a process-owned
//! lock (`F_SETLK`) on a second byte. The kernel releases it when the process exits, before its I/O
//! ends. If it is free while the lease is taken, only I/O is left. The kernel also releases it if
//! the process closes any other file descriptor of the same file; then the owner is unknown.
//!
//! A lock call waits for the server on NFS and FUSE. So a thread of the disk makes all of them. The
//! thread exists only while it has work, and another thread starts it: any thread may call
//! [`Lease::add_user`], and starting a thread waits for the lock of the address space.
#![expect(unsafe_code, reason = "locks with fcntl")]

use std::fmt;
use std::fs::File;
use std::io;
use std::mem::take;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::contract::{Granted, Lease};
use crate::error::Error;

/// The byte that the lease locks. QEMU locks bytes 100 to 300.
const LEASE_BYTE: i64 = i64::MAX - 2;
/// The byte whose lock shows which process has the lease.
const OWNER_BYTE: i64 = i64::MAX - 1;

/// The pause before the next try: a fraction of the time waited so far, within limits. The end of
/// the I/O is detected late by at most this pause.
const PAUSE_PART: u32 = 16;
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// A wait of this length is logged. In a live migration, one side may wait for the other's last
/// system call.
const WARN_AFTER: Duration = Duration::from_millis(100);

/// The number of calls of [`FileDisk::tick_lease`](super::FileDisk::tick_lease), one a second,
/// after which a lock call is reported as slow.
const STUCK_TICKS: u32 = 3;

/// The pause before the next try to start a thread.
const START_AGAIN: Duration = Duration::from_millis(10);

/// The lease of one disk.
#[derive(Clone)]
pub(super) struct FileLease(Arc<Inner>);

struct Inner {
    /// The name of the disk.
    name: String,
    filename: PathBuf,
    state: Mutex<State>,
    /// Signals the thread to stop waiting and look for work.
    news: Condvar,
}

#[derive(Default)]
struct State {
    /// The disk's file; `None` when the disk is gone.
    file: Option<Arc<File>>,
    /// No lock is needed: the lease is not requested, or the file has no locks.
    off: bool,
    users: usize,
    held: bool,
    /// Being released: not held any more, and not free for other processes yet.
    returning: bool,
    /// A thread has been requested or exists.
    has_thread: bool,
    /// Ticks since the lock call under way began; `None` if there is none.
    calling: Option<u32>,
    /// The holder at the last try.
    holder: Option<Holder>,
    /// The part of the present wait that is logged already.
    warned: Option<Holder>,
    granted: Vec<Granted>,
}

/// The holder of a lease that another process waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process, by its id.
    Process(i32),
    /// A process without an id in this PID namespace.
    Elsewhere,
    /// I/O of a process that has ended. A process that has lost its owner lock is reported like
    /// this too.
    Ended,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Elsewhere => f.write_str("a process in another PID namespace or on another host"),
            Self::Ended => f.write_str("I/O of a process that has ended (or an unknown process)"),
        }
    }
}

/// The state of a disk's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// Other processes may use the disk: no ring uses it, or it is shared, read-only, or on a file
    /// system without locks.
    None,
    /// Rings wait for it; with the holder, if known.
    Waiting(Option<Holder>),
    /// Rings may use the disk.
    Held,
}

impl super::FileDisk {
    /// Lets other processes use the file at the same time, also for writing. Must be called before
    /// the disk is used.
    pub fn share(&self) {
        if let Some(FileLease(inner)) = &self.lease {
            inner.state().off = true;
        }
    }

    /// Counts a tick for a lock call under way. Returns true once for each call that has become
    /// slow. Must be called once a second.
    pub fn tick_lease(&self) -> bool {
        let Some(FileLease(inner)) = &self.lease else { return false };
        let mut state = inner.state();
        let Some(ticks) = &mut state.calling else { return false };
        *ticks = ticks.saturating_add(1);
        *ticks == STUCK_TICKS
    }

    /// Returns the state of its lease.
    #[must_use]
    pub fn lease_state(&self) -> LeaseState {
        let Some(FileLease(inner)) = &self.lease else { return LeaseState::None };
        let state = inner.state();
        match *state {
            State { off: true, .. } => LeaseState::None,
            State { held: true, .. } => LeaseState::Held,
            State { users: 1.., holder, .. } => LeaseState::Waiting(holder),
            State { returning: true, .. } => LeaseState::Held,
            _ => LeaseState::None,
        }
    }
}

impl FileLease {
    /// Makes the lease of the disk `name` on `file`; it is not held yet.
    pub(super) fn new(name: &str, filename: &Path, file: &Arc<File>) -> Result<Self, Error> {
        let what = || format!("{}: cannot start a thread for file locks", filename.display());
        start_starter().map_err(|source| Error::System { what: what(), source })?;
        let state = State { file: Some(Arc::clone(file)), ..State::default() };
        let (name, filename) = (name.to_owned(), filename.to_owned());
        let (state, news) = (Mutex::new(state), Condvar::new());
        Ok(Self(Arc::new(Inner { name, filename, state, news })))
    }

    /// Returns the lease for the users of the disk; `None` if the disk is shared.
    pub(super) fn shown(&self) -> Option<Arc<dyn Lease>> {
        (!self.0.state().off).then(|| Arc::new(self.clone()) as Arc<dyn Lease>)
    }

    /// The disk is gone. The caller must drop the returned value where that may block.
    pub(super) fn end(self) -> impl Send + 'static {
        let mut state = self.0.state();
        // Rings that wait may start now, and their requests fail.
        state.off = true;
        let file = state.file.take();
        self.0.call_thread(&mut state);
        file
    }
}

impl fmt::Debug for FileLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let State { users, held, .. } = &*self.0.state();
        f.debug_struct("FileLease").field("users", users).field("held", held).finish()
    }
}

impl Lease for FileLease {
    fn add_user(&self, granted: &Granted) -> bool {
        let mut state = self.0.state();
        state.users += 1;
        if state.may_use() {
            return true;
        }
        if !state.granted.iter().any(|known| Arc::ptr_eq(known, granted)) {
            state.granted.push(Arc::clone(granted));
        }
        self.0.call_thread(&mut state);
        false
    }

    fn remove_user(&self) {
        let mut state = self.0.state();
        state.users -= 1;
        if state.users == 0 {
            state.granted.clear();
            self.0.call_thread(&mut state);
        }
    }

    fn is_held(&self) -> bool {
        self.0.state().may_use()
    }
}

/// The thread's next task.
enum Task {
    Take(Arc<File>),
    /// Tells the waiting users that they may use the disk.
    Tell(Vec<Granted>),
    GiveBack(Arc<File>),
    Nothing,
}

impl State {
    fn may_use(&self) -> bool {
        self.held || self.off
    }

    fn task(&mut self) -> Task {
        match &self.file {
            _ if self.may_use() && !self.granted.is_empty() => Task::Tell(take(&mut self.granted)),
            Some(file) if self.users > 0 && !self.may_use() => Task::Take(Arc::clone(file)),
            Some(file) if self.users == 0 && self.held => Task::GiveBack(Arc::clone(file)),
            // Closing the file releases the lock.
            _ => Task::Nothing,
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes or starts the thread, so that it handles the changed state.
    fn call_thread(self: &Arc<Self>, state: &mut State) {
        if !std::mem::replace(&mut state.has_thread, true) {
            start_thread(Arc::clone(self));
        } else {
            self.news.notify_one();
        }
    }

    /// The thread's main function.
    fn run(&self) {
        let mut waiting = None;
        let mut state = self.state();
        loop {
            match state.task() {
                Task::Nothing => {
                    (state.has_thread, state.holder) = (false, None);
                    return;
                }
                Task::Tell(granted) => {
                    drop(state);
                    granted.iter().for_each(|granted| granted());
                    state = self.state();
                }
                Task::GiveBack(file) => {
                    // From here on, a new user must wait.
                    (state.held, state.returning, state.calling) = (false, true, Some(0));
                    drop(state);
                    let unlocked = unlock(&file);
                    drop(file);
                    if let Err(e) = unlocked {
                        warn!(
                            "bdev {}: cannot unlock {}: {e}; other processes wait for it until \
                             this bdev is deleted",
                            self.name,
                            self.filename.display()
                        );
                    }
                    state = self.state();
                    (state.returning, state.calling) = (false, None);
                }
                Task::Take(file) => {
                    state.calling = Some(0);
                    drop(state);
                    let locked = lock(&file);
                    // This may be the last reference, and a close may block.
                    drop(file);
                    state = self.state();
                    state.calling = None;
                    match locked {
                        Ok(Locked::Yes) => self.taken(&mut state, waiting.take()),
                        Ok(Locked::No(holder)) => {
                            let since = *waiting.get_or_insert_with(Instant::now);
                            state = self.not_yet(state, since.elapsed(), holder);
                        }
                        Err(e) => self.goes_without(&mut state, &e),
                    }
                }
            }
        }
    }

    fn taken(&self, state: &mut State, since: Option<Instant>) {
        (state.held, state.holder) = (true, None);
        if state.warned.take().is_none() {
            return;
        }
        let waited_s = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let filename = self.filename.display();
        info!("bdev {}: {filename} is free after a wait of {waited_s:.1} s", self.name);
    }

    fn not_yet<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        waited: Duration,
        holder: Holder,
    ) -> MutexGuard<'a, State> {
        state.holder = Some(holder);
        if waited >= WARN_AFTER && state.warned != Some(holder) {
            state.warned = Some(holder);
            let filename = self.filename.display();
            warn!("bdev {}: {filename} is in use by {holder}; rings of this bdev wait", self.name);
        }
        if state.users == 0 || state.file.is_none() {
            return state;
        }
        let pause = (waited / PAUSE_PART).clamp(PAUSE_MIN, PAUSE_MAX);
        let woken = self.news.wait_timeout(state, pause);
        woken.unwrap_or_else(PoisonError::into_inner).0
    }

    fn goes_without(&self, state: &mut State, e: &io::Error) {
        state.off = true;
        let filename = self.filename.display();
        warn!(
            "bdev {}: cannot lock {filename}: {e}; other processes may use it at the same time, \
             and I/O of a process that has ended may still reach it",
            self.name,
        );
    }
}

enum Locked {
    Yes,
    No(Holder),
}

/// Takes the lease, or returns its holder.
fn lock(file: &File) -> io::Result<Locked> {
    let busy = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
    match fcntl(file, libc::F_OFD_SETLK, &mut byte(LEASE_BYTE, libc::F_WRLCK)) {
        Ok(()) => {
            // The owner lock is informative only: nothing depends on it.
            let _ = fcntl(file, libc::F_SETLK, &mut byte(OWNER_BYTE, libc::F_WRLCK));
            Ok(Locked::Yes)
        }
        Err(e) if busy(&e) => Ok(Locked::No(holder(file))),
        Err(e) => Err(e),
    }
}

fn holder(file: &File) -> Holder {
    let mut owner = byte(OWNER_BYTE, libc::F_WRLCK);
    match fcntl(file, libc::F_GETLK, &mut owner) {
        Ok(()) if i32::from(owner.l_type) == libc::F_UNLCK => Holder::Ended,
        Ok(()) if owner.l_pid > 0 => Holder::Process(owner.l_pid),
        _ => Holder::Elsewhere,
    }
}

fn unlock(file: &File) -> io::Result<()> {
    let _ = fcntl(file, libc::F_SETLK, &mut byte(OWNER_BYTE, libc::F_UNLCK));
    fcntl(file, libc::F_OFD_SETLK, &mut byte(LEASE_BYTE, libc::F_UNLCK))
}

#[expect(clippy::cast_possible_truncation, reason = "libc's constants are 0 to 2")]
fn byte(at: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: at,
        l_len: 1,
        // The kernel requires pid 0 for locks of an open file description.
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: each of the three commands reads and writes one such structure.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The channel to the thread that starts the leases' threads.
static STARTER: Mutex<Option<Sender<Arc<Inner>>>> = Mutex::new(None);

fn starter() -> MutexGuard<'static, Option<Sender<Arc<Inner>>>> {
    STARTER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the thread that starts threads. May wait.
fn start_starter() -> io::Result<()> {
    if starter().is_some() {
        return Ok(());
    }
    let (sender, leases) = mpsc::channel();
    let start_all = move || leases.into_iter().for_each(start_now);
    thread::Builder::new().name("vhost-lease-0".into()).spawn(start_all)?;
    // If another thread has started one meanwhile, the new thread ends.
    starter().get_or_insert(sender);
    Ok(())
}

fn start_now(lease: Arc<Inner>) {
    loop {
        let mine = Arc::clone(&lease);
        if thread::Builder::new().name("vhost-lease".into()).spawn(move || mine.run()).is_ok() {
            return;
        }
        // Too many threads exist; the system may allow one later.
        thread::sleep(START_AGAIN);
    }
}

fn start_thread(lease: Arc<Inner>) {
    let starter = starter();
    let sender = starter.as_ref().expect("the first lease has started it");
    // The thread never ends, as the sender is never dropped.
    let _ = sender.send(lease);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::contract::Bdev;
    use crate::modules::file::{FileDisk, FileOptions, Flavour};

    fn disk(path: &Path, name: &str, readonly: bool) -> Arc<FileDisk> {
        FileDisk::create(FileOptions {
            name: name.into(),
            filename: path.into(),
            block_size: Some(512),
            readonly,
            fallocate: false,
            uuid: None,
            flavour: Flavour::Aio,
            engine: None,
        })
        .unwrap()
    }

    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file
    }

    fn telling() -> (Granted, Receiver<()>) {
        let (sender, told) = channel();
        let sender = Mutex::new(sender);
        (Arc::new(move || sender.lock().unwrap().send(()).unwrap()), told)
    }

    /// Becomes a user and waits until the lease is held.
    fn use_it(lease: &dyn Lease) {
        let (granted, told) = telling();
        if !lease.add_user(&granted) {
            told.recv().unwrap();
        }
        assert!(lease.is_held());
    }

    fn until(mut done: impl FnMut() -> bool) {
        while !done() {
            thread::yield_now();
        }
    }

    #[test]
    fn one_open_file_at_a_time_has_the_lease_while_it_has_users() {
        let file = file();
        let [one, other] = ["one", "other"].map(|name| disk(file.path(), name, false));
        let [first, second] = [&one, &other].map(|disk| disk.lease().unwrap());
        assert_eq!(one.lease_state(), LeaseState::None);
        use_it(&*first);
        use_it(&*first);
        assert_eq!(one.lease_state(), LeaseState::Held);
        let (granted, told) = telling();
        assert!(!second.add_user(&granted));
        // A process does not conflict with its own owner lock, so the holder is unknown.
        until(|| other.lease_state() == LeaseState::Waiting(Some(Holder::Ended)));
        first.remove_user();
        assert!(!second.is_held() && told.try_recv().is_err(), "the other user still holds it");
        first.remove_user();
        told.recv().unwrap();
        assert_eq!(other.lease_state(), LeaseState::Held);
        until(|| one.lease_state() == LeaseState::None);
        second.remove_user();
        use_it(&*first);
    }

    #[test]
    fn the_lease_ends_with_the_last_reference_to_the_open_file() {
        let file = file();
        let [one, other] = ["one", "other"].map(|name| disk(file.path(), name, false));
        let lease = one.lease().unwrap();
        use_it(&*lease);
        // A request in the kernel holds such a reference.
        let reference = one.file().try_clone().unwrap();
        drop((one, lease));
        let (granted, told) = telling();
        assert!(!other.lease().unwrap().add_user(&granted));
        until(|| matches!(other.lease_state(), LeaseState::Waiting(Some(_))));
        assert!(told.try_recv().is_err());
        drop(reference);
        told.recv().unwrap();
        assert_eq!(other.lease_state(), LeaseState::Held);
    }

    #[test]
    fn a_waiting_user_is_told_when_the_disk_is_gone_or_released() {
        let file = file();
        let [one, other] = ["one", "other"].map(|name| disk(file.path(), name, false));
        use_it(&*one.lease().unwrap());
        let (lease, (granted, told)) = (other.lease().unwrap(), telling());
        assert!(!lease.add_user(&granted));
        lease.remove_user();
        let inner = Arc::clone(&other.lease.as_ref().unwrap().0);
        until(|| !inner.state().has_thread);
        assert!(told.try_recv().is_err());
        assert!(!lease.add_user(&granted));
        drop(other);
        told.recv().unwrap();
        assert!(lease.is_held());
        until(|| !inner.state().has_thread);
    }

    #[test]
    fn read_only_and_shared_disks_have_none() {
        let file = file();
        assert!(disk(file.path(), "r", true).lease().is_none());
        let shared = disk(file.path(), "s", false);
        shared.share();
        assert!(shared.lease().is_none());
    }

    #[test]
    fn a_file_without_locks_is_used_without_a_lease() {
        let file = file();
        // Locks on such a file descriptor fail.
        let path = File::options().read(true).custom_flags(libc::O_PATH).open(file.path()).unwrap();
        let lease = FileLease::new("p", file.path(), &Arc::new(path)).unwrap();
        use_it(&lease);
        lease.remove_user();
        use_it(&lease);
        assert!(!lease.0.state().held);
    }
}
