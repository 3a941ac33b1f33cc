//! Model checks of every ordering: with `--cfg loom` these run all interleavings that matter.
//!
//! The published value is a loom cell: reading it as a reader and writing it as the one who frees
//! it must never overlap, and loom says so if they do. `qsbr/mutants` runs these tests once for
//! each weakened ordering and expects a failure.
#![cfg(loom)]
#![expect(unsafe_code, reason = "calls `Published::load`")]

use loom::cell::UnsafeCell;
use loom::thread;
use qsbr::handshake::say_then_look;
use qsbr::{Domain, Published, Reader, Retired};
use std::sync::Arc;

/// A value whose every use loom watches.
struct Watched(UnsafeCell<u64>);

// SAFETY: loom checks the very thing that this asserts.
unsafe impl Sync for Watched {}

impl Watched {
    fn boxed(n: u64) -> Box<Self> {
        Box::new(Self(UnsafeCell::new(n)))
    }
}

fn use_it(published: &Published<Watched>, reader: &Reader) -> u64 {
    // SAFETY: callers are online, in the one domain that there is.
    let watched = unsafe { published.load(reader) };
    // SAFETY: loom checks that nobody writes meanwhile.
    watched.0.with(|n| unsafe { *n })
}

/// Waits for the grace period and then writes the value, as freeing it would.
fn free(mut retired: Retired<Watched>) {
    loop {
        match retired.try_into_inner() {
            Ok(watched) => {
                // SAFETY: loom checks that nobody reads meanwhile.
                watched.0.with_mut(|n| unsafe { *n = u64::MAX });
                return;
            }
            Err(again) => retired = again,
        }
        thread::yield_now();
    }
}

fn setup(readers: usize) -> (Arc<Domain>, Arc<Published<Watched>>) {
    let domain = Domain::new(readers);
    let published = Arc::new(Published::new(&domain, Watched::boxed(1)));
    (domain, published)
}

#[test]
fn a_busy_reader() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        reader.online();
        let turns = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                for _ in 0..2 {
                    assert_ne!(use_it(&published, &reader), u64::MAX);
                    reader.quiesce();
                }
            })
        };
        free(published.replace(Watched::boxed(2)));
        turns.join().expect("reader");
    });
}

/// A reader that keeps what it loaded for as long as `quiesce` says that no epoch has ended.
#[test]
fn a_reader_that_keeps_what_it_has() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        reader.online();
        let turns = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                // SAFETY: online, in the one domain that there is.
                let load = |reader: &Reader| std::ptr::from_ref(unsafe { published.load(reader) });
                let mut kept = load(&reader);
                for _ in 0..3 {
                    if reader.quiesce() {
                        kept = load(&reader);
                    }
                    // SAFETY: what `quiesce` promises, which loom checks.
                    let watched = unsafe { &*kept };
                    // SAFETY: loom checks that nobody writes meanwhile.
                    assert_ne!(watched.0.with(|n| unsafe { *n }), u64::MAX);
                }
            })
        };
        free(published.replace(Watched::boxed(2)));
        turns.join().expect("reader");
    });
}

/// What is written before an epoch is ended is seen by the reader that notices it.
#[test]
fn an_epoch_as_a_signal() {
    loom::model(|| {
        let domain = Domain::new(1);
        let stop = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let mut reader = domain.reader().expect("free");
        reader.online();
        let turns = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !reader.quiesce() {
                    thread::yield_now();
                }
                assert!(stop.load(std::sync::atomic::Ordering::Relaxed));
            })
        };
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let _ = domain.advance();
        turns.join().expect("reader");
    });
}

#[test]
fn a_reader_that_sleeps() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        reader.online();
        let turns = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                assert_ne!(use_it(&published, &reader), u64::MAX);
                reader.offline();
                reader.online();
                assert_ne!(use_it(&published, &reader), u64::MAX);
                reader.offline();
            })
        };
        free(published.replace(Watched::boxed(2)));
        turns.join().expect("reader");
    });
}

#[test]
fn a_reader_that_wakes() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        let turns = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                reader.online();
                assert_ne!(use_it(&published, &reader), u64::MAX);
                reader.offline();
            })
        };
        free(published.replace(Watched::boxed(2)));
        turns.join().expect("reader");
    });
}

#[test]
fn two_readers() {
    loom::model(|| {
        let (domain, published) = setup(2);
        let turns: Vec<_> = (0..2)
            .map(|_| {
                let mut reader = domain.reader().expect("free");
                reader.online();
                let published = Arc::clone(&published);
                thread::spawn(move || {
                    assert_ne!(use_it(&published, &reader), u64::MAX);
                    reader.quiesce();
                    assert_ne!(use_it(&published, &reader), u64::MAX);
                })
            })
            .collect();
        free(published.replace(Watched::boxed(2)));
        turns.into_iter().for_each(|t| t.join().expect("reader"));
    });
}

#[test]
fn two_writers() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        reader.online();
        let writer = {
            let published = Arc::clone(&published);
            thread::spawn(move || published.replace(Watched::boxed(2)))
        };
        let turns = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                assert_ne!(use_it(&published, &reader), u64::MAX);
                reader.quiesce();
                assert_ne!(use_it(&published, &reader), u64::MAX);
            })
        };
        let ours = published.replace(Watched::boxed(3));
        let theirs = writer.join().expect("writer");
        free(ours);
        free(theirs);
        turns.join().expect("reader");
    });
}

/// Two pointers, one writer after the other: a reader that sees the epoch of the second
/// retirement must see the swap of the first.
#[test]
fn epochs_chain_writers() {
    loom::model(|| {
        let (domain, first) = setup(1);
        let second = Arc::new(Published::new(&domain, Watched::boxed(1)));
        let mut reader = domain.reader().expect("free");
        reader.online();
        let writer = {
            let second = Arc::clone(&second);
            thread::spawn(move || {
                let _ = second.replace(Watched::boxed(2));
            })
        };
        let turns = {
            let first = Arc::clone(&first);
            thread::spawn(move || {
                reader.quiesce();
                assert_ne!(use_it(&first, &reader), u64::MAX);
            })
        };
        free(first.replace(Watched::boxed(2)));
        turns.join().expect("reader");
        writer.join().expect("writer");
    });
}

/// Something with one owner at a time goes from one reader's list to another's: whoever finds it in
/// its list writes it, as does the one who hands it over, in between. The mutant of this one does not
/// wait for the first reader.
#[test]
fn what_changes_hands() {
    type List = Published<Option<Arc<Watched>>>;
    let mutant = std::env::var("QSBR_MUTANT").is_ok_and(|mutant| mutant == "hand_over_at_once");
    loom::model(move || {
        let domain = Domain::new(2);
        let owned = Arc::new(Watched(UnsafeCell::new(0)));
        // SAFETY: loom checks that this is the only use meanwhile.
        let write = |owned: &Watched| owned.0.with_mut(|n| unsafe { *n += 1 });
        let from: Arc<List> = Arc::new(Published::new(&domain, Box::new(Some(Arc::clone(&owned)))));
        let to: Arc<List> = Arc::new(Published::new(&domain, Box::new(None)));
        let readers = [(&from, 2), (&to, 1)].map(|(list, turns)| {
            let list = Arc::clone(list);
            let mut reader = domain.reader().expect("free");
            thread::spawn(move || {
                reader.online();
                for _ in 0..turns {
                    // SAFETY: online, in the one domain that there is.
                    if let Some(owned) = unsafe { list.load(&reader) } {
                        write(owned);
                    }
                    reader.quiesce();
                }
                reader.offline();
            })
        });
        drop(from.replace(Box::new(None)));
        let epoch = domain.advance();
        while !mutant && !domain.passed(epoch) {
            thread::yield_now();
        }
        write(&owned);
        drop(to.replace(Box::new(Some(owned))));
        readers.into_iter().for_each(|reader| reader.join().expect("reader"));
    });
}

/// A bell as epoll and an eventfd make one: rung once, it wakes whoever waits then or later.
struct Bell(loom::sync::Mutex<bool>, loom::sync::Condvar);

impl Bell {
    fn ring(&self) {
        *self.0.lock().expect("nobody panics") = true;
        self.1.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.0.lock().expect("nobody panics");
        while !std::mem::take(&mut *rung) {
            rung = self.1.wait(rung).expect("nobody panics");
        }
    }
}

/// A reactor falls asleep while a driver makes a request available and looks whether to kick, and
/// the control side replaces what the reactor reads. Loom reports a reactor that never wakes as a
/// deadlock, and one that uses what was freed as a race.
#[test]
fn a_sleeper_misses_no_kick() {
    use loom::sync::atomic::{AtomicBool, AtomicUsize};
    use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
    loom::model(|| {
        let (domain, published) = setup(1);
        let index = Arc::new(AtomicUsize::new(0));
        let wants_kick = Arc::new(AtomicBool::new(false));
        let bell = Arc::new(Bell(loom::sync::Mutex::new(false), loom::sync::Condvar::new()));
        let mut reader = domain.reader().expect("free");
        reader.online();
        let reactor = {
            let (index, wants_kick) = (Arc::clone(&index), Arc::clone(&wants_kick));
            let (bell, published) = (Arc::clone(&bell), Arc::clone(&published));
            thread::spawn(move || {
                loop {
                    reader.quiesce();
                    assert_ne!(use_it(&published, &reader), u64::MAX);
                    let arm = || wants_kick.store(true, Relaxed);
                    if say_then_look(arm, || index.load(Acquire)) == 1 {
                        break;
                    }
                    reader.offline();
                    bell.wait();
                    reader.online();
                }
                reader.offline();
            })
        };
        let driver = thread::spawn(move || {
            let publish = || index.store(1, Release);
            if say_then_look(publish, || wants_kick.load(Relaxed)) {
                bell.ring();
            }
        });
        free(published.replace(Watched::boxed(2)));
        driver.join().expect("driver");
        reactor.join().expect("reactor");
    });
}
