//! Accounts, and the threads that close the values charged to them.
//!
//! Each account has a queue. An account with a non-empty queue is in the pool's list once, whatever
//! the length of its queue. A thread takes the account from the list, closes one entry, and puts
//! the account back at the end: accounts take turns, and no account occupies two threads. A thread
//! is started when an account has work and no thread is idle, so blocked closes occupy one thread
//! per account.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use crate::message;

/// Idle threads that are kept; a further thread exits when it finds no work.
const IDLE_MAX: usize = 2;

/// Limit on threads. An account occupies one thread while one of its closes blocks.
const THREADS_MAX: usize = 1024;

/// Ticks of about one second that one close may take before its account counts as stuck.
const STUCK_TICKS: u32 = 2;

/// Limit on the open fds of one account: twice the call and kick fds of 128 rings, the memory slots
/// of a guest in messages, and some fds of earlier front ends. If the process may have few fds, the
/// limit is one in [`ACCOUNTS_PART`] of them, but at least [`ACCOUNT_FDS_MIN`].
const ACCOUNT_FDS_MAX: usize = 2048;
/// Room for two messages.
const ACCOUNT_FDS_MIN: usize = 2 * message::FDS_MAX;
/// See [`ACCOUNT_FDS_MAX`].
const ACCOUNTS_PART: usize = 4;

/// One in so many of all foreign fds is reserved for operators' accounts.
const OPERATORS_PART: usize = 8;

/// Open foreign fds in the process, and the limit on them.
static OPEN: AtomicUsize = AtomicUsize::new(0);
static FDS_MAX: AtomicUsize = AtomicUsize::new(1 << 16);

/// Sets the limit on open foreign fds: the process's limit on open files less the fds of its own.
pub fn set_fds_max(max: usize) {
    FDS_MAX.store(max, Ordering::Relaxed);
}

/// An account: the fds and files of one owner that have to be closed. Clones refer to the same
/// account.
#[derive(Clone)]
pub struct Account(Arc<Inner>);

struct Inner {
    name: String,
    /// Open fds, including those that wait to be closed.
    open: AtomicUsize,
    queue: Mutex<Queue>,
    owner: Owner,
    /// Dropped when the account has no fds and no clones left.
    _guard: Option<Box<dyn Any + Send + Sync>>,
}

/// Whose account it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// An untrusted process.
    Untrusted,
    /// An operator, who may use the reserved fds.
    Operator,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Box<dyn Send>>,
    /// The account is in the pool's list, or a thread is closing one of its entries.
    scheduled: bool,
    /// A thread is closing an entry.
    closing: bool,
    /// Ticks since the current close began.
    ticks: u32,
    /// [`tick`] has returned the current close as stuck.
    reported: bool,
}

/// An account whose current close takes long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The account's name.
    pub name: String,
    /// Entries that are not closed yet, including the current one.
    pub waiting: usize,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Account").field(&self.0.name).finish()
    }
}

impl Account {
    /// A new account. `name` is for the log.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self::with(name.into(), Owner::Untrusted, None)
    }

    /// An operator's account, which may use the reserved fds. It keeps `guard`, such as a semaphore
    /// permit, until everything that is charged to it is closed and its last clone is dropped.
    #[must_use]
    pub fn operator(name: impl Into<String>, guard: impl Any + Send + Sync) -> Self {
        Self::with(name.into(), Owner::Operator, Some(Box::new(guard)))
    }

    fn with(name: String, owner: Owner, guard: Option<Box<dyn Any + Send + Sync>>) -> Self {
        let (open, queue) = (AtomicUsize::new(0), Mutex::default());
        Self(Arc::new(Inner { name, open, queue, owner, _guard: guard }))
    }

    /// Drops `value` on a thread that may block. Does not block.
    pub fn drop_later(&self, value: impl Send + 'static) {
        let mut queue = self.0.queue();
        queue.waiting.push_back(Box::new(value));
        if !std::mem::replace(&mut queue.scheduled, true) {
            drop(queue);
            POOL.schedule(Arc::clone(&self.0));
        }
    }

    /// Open fds of this account, including those that wait to be closed.
    #[must_use]
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// Entries that are not closed yet, including the current one.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.queue().unclosed()
    }

    /// Whether a close has been in progress for some seconds. Until it ends, the caller should
    /// refuse new requests of the account's owner (a front end or a client).
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.0.queue().is_stuck()
    }

    /// Whether `count` more fds fit into the limits of the account and of the process. Only an
    /// operator's account may use the reserved fds.
    #[must_use]
    pub fn has_room(&self, count: usize) -> bool {
        let all = FDS_MAX.load(Ordering::Relaxed);
        let max = match self.0.owner {
            Owner::Operator => all,
            Owner::Untrusted => all - all / OPERATORS_PART,
        };
        // Two threads may both find the last room free. The limit leaves fds for the process
        // itself, which absorb the excess.
        let account_max = (max / ACCOUNTS_PART).clamp(ACCOUNT_FDS_MIN, ACCOUNT_FDS_MAX);
        OPEN.load(Ordering::Relaxed) + count <= max && self.open() + count <= account_max
    }

    pub(crate) fn opened(&self) {
        self.0.open.fetch_add(1, Ordering::Relaxed);
        OPEN.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn close_later(&self, fd: OwnedFd) {
        self.drop_later(Open { fd: Some(fd), account: self.clone() });
    }
}

/// An fd that is counted until it has been closed.
struct Open {
    fd: Option<OwnedFd>,
    account: Account,
}

impl Drop for Open {
    fn drop(&mut self) {
        drop(self.fd.take());
        self.account.0.open.fetch_sub(1, Ordering::Relaxed);
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn unclosed(&self) -> usize {
        self.waiting.len() + usize::from(self.closing)
    }

    fn is_stuck(&self) -> bool {
        self.closing && self.ticks >= STUCK_TICKS
    }
}

/// Counts a tick for every close in progress, and returns the accounts that have become stuck since
/// the last call. Call it once a second, but not for time in which the process was stopped.
pub fn tick() -> Vec<Stuck> {
    let newly_stuck = |account: Arc<Inner>| {
        let mut queue = account.queue();
        queue.ticks = queue.ticks.saturating_add(1);
        if !queue.is_stuck() || queue.reported {
            return None;
        }
        queue.reported = true;
        Some(Stuck { name: account.name.clone(), waiting: queue.unclosed() })
    };
    POOL.busy().into_iter().filter_map(newly_stuck).collect()
}

/// The accounts that are stuck now, including those without clones.
#[must_use]
pub fn stuck() -> Vec<Stuck> {
    let if_stuck = |account: Arc<Inner>| {
        let queue = account.queue();
        queue.is_stuck().then(|| Stuck { name: account.name.clone(), waiting: queue.unclosed() })
    };
    POOL.busy().into_iter().filter_map(if_stuck).collect()
}

static POOL: Pool = Pool { state: Mutex::new(State::new()), ready: Condvar::new() };

struct Pool {
    state: Mutex<State>,
    ready: Condvar,
}

struct State {
    /// Accounts with work that no thread is processing.
    ready: VecDeque<Arc<Inner>>,
    /// Accounts that a thread is processing.
    busy: Vec<Weak<Inner>>,
    idle: usize,
    threads: usize,
}

impl State {
    const fn new() -> Self {
        Self { ready: VecDeque::new(), busy: Vec::new(), idle: 0, threads: 0 }
    }
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The accounts that a thread is processing.
    fn busy(&self) -> Vec<Arc<Inner>> {
        self.state().busy.iter().filter_map(Weak::upgrade).collect()
    }

    fn schedule(&'static self, account: Arc<Inner>) {
        let mut state = self.state();
        state.ready.push_back(account);
        if state.ready.len() <= state.idle {
            self.ready.notify_one();
        } else if state.threads < THREADS_MAX {
            state.threads += 1;
            // Starting a thread takes long, so the lock is released first.
            drop(state);
            let started = thread::Builder::new().name("vhost-close".into()).spawn(|| self.close());
            if started.is_err() {
                // An existing thread processes the account later.
                self.state().threads -= 1;
            }
        }
    }

    /// The main loop of a thread: takes an account, closes one of its entries, repeats.
    fn close(&self) {
        let mut state = self.state();
        loop {
            let Some(account) = state.ready.pop_front() else {
                if state.idle >= IDLE_MAX {
                    state.threads -= 1;
                    return;
                }
                state.idle += 1;
                state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            let here = Arc::downgrade(&account);
            state.busy.push(Weak::clone(&here));
            drop(state);
            let more = account.close_one();
            state = self.state();
            state.busy.retain(|busy| !Weak::ptr_eq(busy, &here));
            if more {
                state.ready.push_back(account);
            } else {
                // This may drop the account's guard, so the lock is released first.
                drop(state);
                drop(account);
                state = self.state();
            }
        }
    }
}

impl Inner {
    /// Closes one entry. Returns whether there are more.
    fn close_one(&self) -> bool {
        let mut queue = self.queue();
        let next = queue.waiting.pop_front();
        (queue.closing, queue.ticks) = (true, 0);
        drop(queue);
        drop(next);
        let mut queue = self.queue();
        if std::mem::take(&mut queue.reported) {
            tracing::info!("{}: the close that took long has completed", self.name);
        }
        queue.closing = false;
        queue.scheduled = !queue.waiting.is_empty();
        queue.scheduled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Sends a message when its drop begins, and blocks in it until a message arrives.
    struct Hanging(Sender<()>, Receiver<()>);

    impl Drop for Hanging {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
            self.1.recv().unwrap();
        }
    }

    fn hanging() -> (Hanging, Receiver<()>, Sender<()>) {
        let (begun_in, begun) = channel();
        let (end, end_out) = channel();
        (Hanging(begun_in, end_out), begun, end)
    }

    /// Sends its number when it is dropped.
    struct Notifying(Sender<u32>, u32);

    impl Drop for Notifying {
        fn drop(&mut self) {
            self.0.send(self.1).unwrap();
        }
    }

    #[test]
    fn a_close_that_blocks_delays_only_its_own_account() {
        let (bad, good) = (Account::new("bad"), Account::new("good"));
        let (value, begun, end) = hanging();
        bad.drop_later(value);
        begun.recv().unwrap();
        let (dropped_in, dropped) = channel();
        bad.drop_later(Notifying(dropped_in.clone(), 1));
        for n in 2..100 {
            good.drop_later(Notifying(dropped_in.clone(), n));
        }
        for n in 2..100 {
            assert_eq!(dropped.recv().unwrap(), n, "in order");
        }
        assert_eq!(bad.waiting(), 2);
        end.send(()).unwrap();
        assert_eq!(dropped.recv().unwrap(), 1);
    }

    #[test]
    fn each_of_many_stuck_accounts_is_reported_once() {
        let mut ends = vec![];
        let mut accounts = vec![];
        for n in 0..20 {
            let account = Account::new(format!("stuck {n}"));
            let (value, begun, end) = hanging();
            account.drop_later(value);
            let (more, more_begun, more_end) = hanging();
            account.drop_later(more);
            begun.recv().unwrap();
            ends.extend([end, more_end]);
            accounts.push((account, more_begun));
        }
        let mine = |stuck: &Stuck| stuck.name.starts_with("stuck ");
        let mut reported: Vec<Stuck> = (0..4).flat_map(|_| tick()).filter(mine).collect();
        reported.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(reported.len(), 20);
        assert_eq!(reported[0], Stuck { name: "stuck 0".into(), waiting: 2 });
        assert!(accounts.iter().all(|(account, _)| account.is_stuck()));
        assert_eq!(stuck().iter().filter(|stuck| mine(stuck)).count(), 20);
        for end in ends {
            end.send(()).unwrap();
        }
        while accounts.iter().any(|(account, _)| account.waiting() > 0) {
            thread::yield_now();
        }
        assert!(!accounts.iter().any(|(account, _)| account.is_stuck()));
        assert!(!stuck().iter().any(mine));
    }

    #[test]
    fn a_guard_is_held_until_the_last_close_has_ended() {
        let (dropped_in, dropped) = channel();
        let account = Account::operator("with a guard", Mutex::new(Notifying(dropped_in, 7)));
        let (value, begun, end) = hanging();
        account.drop_later(value);
        begun.recv().unwrap();
        drop(account);
        assert!(dropped.try_recv().is_err());
        end.send(()).unwrap();
        assert_eq!(dropped.recv().unwrap(), 7);
    }
}
