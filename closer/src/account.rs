//! Accounts, and the threads that close what is charged to them.
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

use crate::receive;

/// Idle threads that are kept; a further thread ends when it finds no work.
const IDLE_MAX: usize = 2;

/// Limit on threads. An account occupies one of them while a close of its blocks.
const THREADS_MAX: usize = 1024;

/// Ticks (seconds, in the product) that one close may take before its account counts as stuck.
const STUCK_TICKS: u32 = 2;

/// Fds that one account may have open: twice the call and kick fds of 128 rings, the memory slots
/// of a guest in messages, and some fds of earlier front ends. A process that may have few fds
/// gives an account one part in [`ACCOUNTS_PART`] of them, but room for two messages.
const ACCOUNT_FDS_MAX: usize = 2048;
const ACCOUNT_FDS_MIN: usize = 2 * receive::FDS_MAX;
const ACCOUNTS_PART: usize = 4;

/// One part in so many of all foreign fds is reserved for operator accounts.
const OPERATORS_PART: usize = 8;

/// Open foreign fds in the process, and the limit on them.
static OPEN: AtomicUsize = AtomicUsize::new(0);
static FDS_MAX: AtomicUsize = AtomicUsize::new(1 << 16);

/// Sets the limit on open foreign fds: the process's limit on open files less what it needs itself.
pub fn set_fds_max(most: usize) {
    FDS_MAX.store(most, Ordering::Relaxed);
}

/// The owner of fds and files that have to be closed. Clones refer to the same account.
#[derive(Clone)]
pub struct Account(Arc<Inner>);

struct Inner {
    name: String,
    /// Open fds, including those that wait to be closed.
    open: AtomicUsize,
    queue: Mutex<Queue>,
    /// May use the reserved fds.
    operator: bool,
    /// Dropped when the account has no fds and no clones left.
    _held: Option<Box<dyn Any + Send + Sync>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Box<dyn Send>>,
    /// It is in the pool's list, or a thread is closing one of its entries.
    scheduled: bool,
    closing: bool,
    /// Ticks since the current close began.
    ticks: u32,
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
        Self::with(name.into(), false, None)
    }

    /// An operator's account: it may use the reserved fds. It keeps `guard` until everything that
    /// is charged to it has been closed and its last clone is dropped; a semaphore permit, for
    /// example.
    #[must_use]
    pub fn operator(name: impl Into<String>, guard: impl Any + Send + Sync) -> Self {
        Self::with(name.into(), true, Some(Box::new(guard)))
    }

    fn with(name: String, operator: bool, held: Option<Box<dyn Any + Send + Sync>>) -> Self {
        let (open, queue) = (AtomicUsize::new(0), Mutex::default());
        Self(Arc::new(Inner { name, open, queue, operator, _held: held }))
    }

    /// Drops `value` on a thread where blocking is harmless. Does not block.
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
        self.0.queue().in_all()
    }

    /// Whether a close has been in progress for some seconds. Until it ends, the account's owner (a
    /// front end or client) should get nothing new.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.0.queue().is_stuck()
    }

    /// Whether `count` more fds can be opened within the account's own limit and the process's,
    /// without using fds that are reserved for operators.
    #[must_use]
    pub fn has_room(&self, count: usize) -> bool {
        let most = FDS_MAX.load(Ordering::Relaxed);
        let most = if self.0.operator { most } else { most - most / OPERATORS_PART };
        // Two threads may claim the same room; the fds that are set aside for the process itself
        // absorb that.
        let of_account = (most / ACCOUNTS_PART).clamp(ACCOUNT_FDS_MIN, ACCOUNT_FDS_MAX);
        OPEN.load(Ordering::Relaxed) + count <= most && self.open() + count <= of_account
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
    fn in_all(&self) -> usize {
        self.waiting.len() + usize::from(self.closing)
    }

    fn is_stuck(&self) -> bool {
        self.closing && self.ticks >= STUCK_TICKS
    }
}

/// Counts a tick for every close in progress, and returns the accounts that have become stuck since
/// the last call. To be called once a second, by the same clock that counts the process's other
/// time limits, so that time in which the process was stopped does not count.
pub fn tick() -> Vec<Stuck> {
    let newly_stuck = |account: Arc<Inner>| {
        let mut queue = account.queue();
        queue.ticks = queue.ticks.saturating_add(1);
        if !queue.is_stuck() || queue.reported {
            return None;
        }
        queue.reported = true;
        Some(Stuck { name: account.name.clone(), waiting: queue.in_all() })
    };
    POOL.busy().into_iter().filter_map(newly_stuck).collect()
}

/// The accounts that are stuck now, including those with no other handle.
#[must_use]
pub fn stuck() -> Vec<Stuck> {
    let if_stuck = |account: Arc<Inner>| {
        let queue = account.queue();
        queue.is_stuck().then(|| Stuck { name: account.name.clone(), waiting: queue.in_all() })
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
            // Starting a thread takes time; the lock is not held meanwhile.
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
                // It may hold the last reference to the account's guard.
                drop(state);
                drop(account);
                state = self.state();
            }
        }
    }
}

impl Inner {
    /// Closes one entry; true if there are more.
    fn close_one(&self) -> bool {
        let mut queue = self.queue();
        let next = queue.waiting.pop_front();
        (queue.closing, queue.ticks) = (true, 0);
        drop(queue);
        drop(next);
        let mut queue = self.queue();
        if std::mem::take(&mut queue.reported) {
            tracing::info!("{}: the close that took long has returned", self.name);
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

    /// Reports when its drop has begun, and blocks in it until told to end.
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

    /// Reports that it was dropped.
    struct Telling(Sender<u32>, u32);

    impl Drop for Telling {
        fn drop(&mut self) {
            self.0.send(self.1).unwrap();
        }
    }

    #[test]
    fn a_close_that_hangs_holds_up_its_own_account_only() {
        let (bad, good) = (Account::new("bad"), Account::new("good"));
        let (value, begun, end) = hanging();
        bad.drop_later(value);
        begun.recv().unwrap();
        let (told_in, told) = channel();
        bad.drop_later(Telling(told_in.clone(), 1));
        for n in 2..100 {
            good.drop_later(Telling(told_in.clone(), n));
        }
        for n in 2..100 {
            assert_eq!(told.recv().unwrap(), n, "in order");
        }
        assert_eq!(bad.waiting(), 2);
        end.send(()).unwrap();
        assert_eq!(told.recv().unwrap(), 1);
    }

    #[test]
    fn each_of_many_stuck_accounts_costs_one_thread_and_says_so_once() {
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
        let mut said: Vec<Stuck> = (0..4).flat_map(|_| tick()).filter(mine).collect();
        said.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(said.len(), 20);
        assert_eq!(said[0], Stuck { name: "stuck 0".into(), waiting: 2 });
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
        let (told_in, told) = channel();
        let account = Account::operator("with a guard", Mutex::new(Telling(told_in, 7)));
        let (value, begun, end) = hanging();
        account.drop_later(value);
        begun.recv().unwrap();
        drop(account);
        assert!(told.try_recv().is_err());
        end.send(()).unwrap();
        assert_eq!(told.recv().unwrap(), 7);
    }
}
