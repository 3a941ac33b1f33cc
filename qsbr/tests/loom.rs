//! Model checks of every ordering. With `--cfg loom`, loom runs all relevant interleavings.
//!
//! The published value is a loom cell. A read by a reader and the write that represents freeing
//! must not overlap; loom reports an overlap as an error. `qsbr/mutants` runs these tests once for
//! each weakened ordering and expects a failure.
#![cfg(loom)]
#![expect(unsafe_code, reason = "calls `Published::load`")]

use loom::cell::UnsafeCell;
use loom::thread;
use qsbr::handshake::store_then_load;
use qsbr::{Domain, Published, Reader, Retired};
use std::sync::Arc;

/// A value whose every use loom checks.
struct Watched(UnsafeCell<u64>);

// SAFETY: loom checks that accesses do not overlap.
unsafe impl Sync for Watched {}

impl Watched {
    fn boxed(n: u64) -> Box<Self> {
        Box::new(Self(UnsafeCell::new(n)))
    }
}

fn use_it(published: &Published<Watched>, reader: &Reader) -> u64 {
    // SAFETY: callers are online, and the test has one domain.
    let watched = unsafe { published.load(reader) };
    // SAFETY: loom checks that no other thread writes at the same time.
    watched.0.with(|n| unsafe { *n })
}

/// Waits for the grace period, and then writes the value, which represents freeing it.
fn free(mut retired: Retired<Watched>) {
    loop {
        match retired.try_into_inner() {
            Ok(watched) => {
                // SAFETY: loom checks that no other thread reads at the same time.
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
        let reader_thread = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                for _ in 0..2 {
                    assert_ne!(use_it(&published, &reader), u64::MAX);
                    reader.quiesce();
                }
            })
        };
        free(published.replace(Watched::boxed(2)));
        reader_thread.join().expect("reader");
    });
}

/// A reader that keeps using a loaded value while `quiesce` returns that no epoch has ended.
#[test]
fn a_reader_that_keeps_a_value_between_epochs() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        reader.online();
        let reader_thread = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                // SAFETY: online, and the test has one domain.
                let load = |reader: &Reader| std::ptr::from_ref(unsafe { published.load(reader) });
                let mut kept = load(&reader);
                for _ in 0..3 {
                    if reader.quiesce() {
                        kept = load(&reader);
                    }
                    // SAFETY: `quiesce` guarantees that the value is not freed; loom checks it.
                    let watched = unsafe { &*kept };
                    // SAFETY: loom checks that no other thread writes at the same time.
                    assert_ne!(watched.0.with(|n| unsafe { *n }), u64::MAX);
                }
            })
        };
        free(published.replace(Watched::boxed(2)));
        reader_thread.join().expect("reader");
    });
}

/// A reader that sees a new epoch also sees the writes before its start.
#[test]
fn an_epoch_as_a_signal() {
    loom::model(|| {
        let domain = Domain::new(1);
        let stop = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let mut reader = domain.reader().expect("free");
        reader.online();
        let reader_thread = {
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
        reader_thread.join().expect("reader");
    });
}

#[test]
fn a_reader_that_sleeps() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        reader.online();
        let reader_thread = {
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
        reader_thread.join().expect("reader");
    });
}

#[test]
fn a_reader_that_wakes() {
    loom::model(|| {
        let (domain, published) = setup(1);
        let mut reader = domain.reader().expect("free");
        let reader_thread = {
            let published = Arc::clone(&published);
            thread::spawn(move || {
                reader.online();
                assert_ne!(use_it(&published, &reader), u64::MAX);
                reader.offline();
            })
        };
        free(published.replace(Watched::boxed(2)));
        reader_thread.join().expect("reader");
    });
}

#[test]
fn two_readers() {
    loom::model(|| {
        let (domain, published) = setup(2);
        let reader_threads: Vec<_> = (0..2)
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
        reader_threads.into_iter().for_each(|t| t.join().expect("reader"));
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
        let reader_thread = {
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
        reader_thread.join().expect("reader");
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
        let reader_thread = {
            let first = Arc::clone(&first);
            thread::spawn(move || {
                reader.quiesce();
                assert_ne!(use_it(&first, &reader), u64::MAX);
            })
        };
        free(first.replace(Watched::boxed(2)));
        reader_thread.join().expect("reader");
        writer.join().expect("writer");
    });
}

/// A value with one owner at a time moves from one reader's list to another's. The reader that
/// finds it in its list writes it; between the two, the thread that moves it writes it. The mutant
/// of this test does not wait for the first reader.
#[test]
fn a_value_that_moves_between_readers() {
    type List = Published<Option<Arc<Watched>>>;
    let mutant = std::env::var("QSBR_MUTANT").is_ok_and(|mutant| mutant == "hand_over_at_once");
    loom::model(move || {
        let domain = Domain::new(2);
        let owned = Arc::new(Watched(UnsafeCell::new(0)));
        // SAFETY: loom checks that no other thread uses it at the same time.
        let write = |owned: &Watched| owned.0.with_mut(|n| unsafe { *n += 1 });
        let from: Arc<List> = Arc::new(Published::new(&domain, Box::new(Some(Arc::clone(&owned)))));
        let to: Arc<List> = Arc::new(Published::new(&domain, Box::new(None)));
        let readers = [(&from, 2), (&to, 1)].map(|(list, iterations)| {
            let list = Arc::clone(list);
            let mut reader = domain.reader().expect("free");
            thread::spawn(move || {
                reader.online();
                for _ in 0..iterations {
                    // SAFETY: online, and the test has one domain.
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

/// A waker like epoll with an eventfd: one wake-up ends the current or the next wait.
struct Waker(loom::sync::Mutex<bool>, loom::sync::Condvar);

impl Waker {
    fn wake(&self) {
        *self.0.lock().expect("no thread panics") = true;
        self.1.notify_one();
    }

    fn wait(&self) {
        let mut woken = self.0.lock().expect("no thread panics");
        while !std::mem::take(&mut *woken) {
            woken = self.1.wait(woken).expect("no thread panics");
        }
    }
}

/// A reactor goes to sleep while a driver makes a request available and decides whether to kick,
/// and while the control side replaces a value that the reactor reads. Loom reports a reactor that
/// never wakes as a deadlock, and a use after free as a race.
#[test]
fn a_sleeper_misses_no_kick() {
    use loom::sync::atomic::{AtomicBool, AtomicUsize};
    use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
    loom::model(|| {
        let (domain, published) = setup(1);
        let index = Arc::new(AtomicUsize::new(0));
        let wants_kick = Arc::new(AtomicBool::new(false));
        let waker = Arc::new(Waker(loom::sync::Mutex::new(false), loom::sync::Condvar::new()));
        let mut reader = domain.reader().expect("free");
        reader.online();
        let reactor = {
            let (index, wants_kick) = (Arc::clone(&index), Arc::clone(&wants_kick));
            let (waker, published) = (Arc::clone(&waker), Arc::clone(&published));
            thread::spawn(move || {
                loop {
                    reader.quiesce();
                    assert_ne!(use_it(&published, &reader), u64::MAX);
                    let arm = || wants_kick.store(true, Relaxed);
                    if store_then_load(arm, || index.load(Acquire)) == 1 {
                        break;
                    }
                    reader.offline();
                    waker.wait();
                    reader.online();
                }
                reader.offline();
            })
        };
        let driver = thread::spawn(move || {
            let publish = || index.store(1, Release);
            if store_then_load(publish, || wants_kick.load(Relaxed)) {
                waker.wake();
            }
        });
        free(published.replace(Watched::boxed(2)));
        driver.join().expect("driver");
        reactor.join().expect("reactor");
    });
}
