//! A guest is notified eventually: after a call that the system has refused, and before a stop
//! while a call is delayed. A reactor does not sleep while there is work that it has not seen.
#![expect(unsafe_code, reason = "takes io_uring from a thread")]

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::thread;

use closer::ForeignFd;
use reactor::EventFd;
use reactor::ticks_per_second;
use vhost_target::notify::CallFd;
use vhost_target::queue::Event;
use vhost_target::queue::QueueState;
use vhost_target::queue::TargetQueue;
use vm_memory::Bytes;

use super::device::{Hook, TestDevice};
use super::scene::{ADDRS, LAYOUTS, Scene};

/// Creates a scene whose guest is called on the eventfd, and whose device completes I/O at once.
pub(super) fn called<D: TestDevice>(packed: bool) -> (Scene<D>, EventFd) {
    let mut scene = Scene::new(packed, 32, D::create());
    scene.device.state().at_once = true;
    let eventfd = EventFd::new().unwrap();
    let theirs = ForeignFd::alone(eventfd.as_fd().try_clone_to_owned().unwrap());
    scene.ask_for_calls();
    scene.call = Some(Arc::new(CallFd::from_front_end(theirs).unwrap()));
    (scene, eventfd)
}

/// Runs `visits` while the system refuses every call: on a thread that has closed the io_urings in
/// its own fd table. Returns `None` if there is no io_uring. The test is skipped then.
fn refusing<T: Send>(visits: impl FnOnce() -> T + Send) -> Option<T> {
    let run = || {
        // SAFETY: from here on this thread has its own table of fds.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
        let rings: Vec<i32> = std::fs::read_dir("/proc/thread-self/fd")
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| {
                std::fs::read_link(entry.path())
                    .is_ok_and(|to| to.ends_with("anon_inode:[io_uring]"))
            })
            .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
            .collect();
        for ring in &rings {
            // SAFETY: only this thread uses this table, and it ends after `visits`.
            assert_eq!(unsafe { libc::close(ring.as_raw_fd()) }, 0);
        }
        (!rings.is_empty()).then(visits)
    };
    let result = thread::scope(|scope| scope.spawn(run).join());
    let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    if result.is_none() {
        test_report::skipped("io-uring", "calls are writes, which are never refused");
    }
    result
}

pub(crate) fn a_refused_call_is_retried_at_the_next_visit<D: TestDevice>() {
    for packed in LAYOUTS {
        let (mut scene, eventfd) = called::<D>(packed);
        scene.start().unwrap();
        scene.visit();
        eventfd.take();
        scene.submit_one();
        let Some(()) = refusing(|| {
            scene.visit();
            scene.visit();
        }) else {
            return;
        };
        assert_eq!((scene.done().len(), eventfd.take()), (1, 0));
        scene.visit();
        assert_eq!(eventfd.take(), 1);
        scene.visit();
        assert_eq!(eventfd.take(), 0, "the call is made once");
    }
}

pub(crate) fn a_stop_waits_for_a_refused_call<D: TestDevice>() {
    let (mut scene, eventfd) = called::<D>(false);
    scene.start().unwrap();
    scene.submit_one();
    let Some(()) = refusing(|| {
        scene.visit();
        scene.queue().control().stop();
        scene.visit();
    }) else {
        return;
    };
    assert_eq!((scene.queue().control().state(), eventfd.take()), (QueueState::Attached, 0));
    assert!(scene.events.pop().is_none());
    scene.visit();
    assert_eq!((scene.queue().control().state(), eventfd.take()), (QueueState::Stopped, 1));
    assert!(matches!(scene.events.pop(), Some(Event::Drained(_))));
}

pub(crate) fn a_sleep_with_a_refused_call_is_limited<D: TestDevice>() {
    let (mut scene, eventfd) = called::<D>(false);
    let (_reactor, mut steps) = scene.start_to_sleep();
    // Several poll iterations: earlier wake-ups are consumed.
    let Some(asleep) = refusing(|| (0..4).map(|_| steps.step()).collect::<Vec<_>>()) else {
        return;
    };
    assert_eq!(asleep, [true; 4], "the reactor does not poll for the refused call");
    assert_eq!(eventfd.take(), 0);
    // A stepped reactor treats a sleep with a time limit as one that has ended.
    steps.step();
    assert_eq!(eventfd.take(), 1);
    steps.step();
    assert_eq!(eventfd.take(), 0);
}

/// Creates a scene in which coalescing delays a call by an hour. There are completions that the
/// guest was not notified of.
fn delayed<D: TestDevice>(packed: bool) -> (Scene<D>, EventFd) {
    let (mut scene, eventfd) = called::<D>(packed);
    scene.coalescing.delay_base_ticks.store(3600 * ticks_per_second(), Ordering::Relaxed);
    scene.coalescing.threshold.store(1, Ordering::Relaxed);
    scene.start().unwrap();
    // Submits until coalescing delays a call, after a 10 ms window with more than one completion.
    loop {
        scene.submit_one();
        scene.visit();
        assert_eq!(scene.done().len(), 1);
        if eventfd.take() == 0 {
            scene.visit();
            assert_eq!(eventfd.take(), 0);
            return (scene, eventfd);
        }
    }
}

pub(crate) fn a_stopping_queue_makes_the_delayed_call<D: TestDevice>() {
    for packed in LAYOUTS {
        let (mut scene, eventfd) = delayed::<D>(packed);
        scene.queue().control().stop();
        scene.visit();
        assert_eq!(eventfd.take(), 1);
        assert_eq!(scene.queue().control().state(), QueueState::Stopped);
        assert!(matches!(scene.events.pop(), Some(Event::Drained(_))));
    }
}

pub(crate) fn a_delayed_call_is_made_when_coalescing_is_switched_off<D: TestDevice>() {
    let (mut scene, eventfd) = delayed::<D>(false);
    scene.coalescing.delay_base_ticks.store(0, Ordering::Relaxed);
    scene.visit();
    assert_eq!(eventfd.take(), 1);
}

/// The control side acts in the middle of a poll iteration, after the queue was visited with the
/// earlier state. In production the waker is signalled too, and a reactor that fell asleep would
/// wake up. Here it is not.
pub(crate) fn a_change_during_the_last_visit_prevents_sleep<D: TestDevice>() {
    for renewed in [false, true] {
        let mut scene = Scene::new(false, 32, D::create());
        let (reactor, mut steps) = scene.start_to_sleep();
        scene.submit_one();
        steps.step();
        assert_eq!(scene.device.state().waiting(), 1);
        while !(steps.step() && steps.step()) {}
        reactor.wake();
        let asleep = steps.step();
        assert!(asleep && steps.step(), "nothing has changed");
        let queue = Arc::clone(scene.queue());
        let memory = Arc::clone(&scene.memory);
        let view = renewed.then(|| scene.view(&memory));
        let (retired_in, retired) = channel();
        let change = move || match view {
            Some(view) => retired_in.send(queue.publish(view).unwrap()).unwrap(),
            None => queue.control().stop(),
        };
        scene.device.state().at_poll = Hook(Some(Box::new(change)));
        reactor.wake();
        assert!(!steps.step(), "a new view: {renewed}");
        // The replaced view is not freed before the next poll iteration.
        steps.step();
        drop(retired);
    }
}

/// A request arrives after the last read of the ring, and before the reactor asks for kicks.
pub(crate) fn a_request_during_the_last_visit_prevents_sleep<D: TestDevice>() {
    let mut scene = Scene::new(false, 32, D::create());
    let (_reactor, mut steps) = scene.start_to_sleep();
    scene.submit_one();
    assert!(!steps.step(), "the reactor had work");
    scene.submit_one();
    // The available index, which the driver is about to advance.
    scene.put(ADDRS.avail + 2, &1_u16.to_le_bytes());
    let memory = Arc::clone(&scene.memory);
    let show = move || {
        memory.slice(ADDRS.avail + 2, 2).unwrap().write_slice(&2_u16.to_le_bytes(), 0).unwrap();
    };
    scene.device.state().at_wait = Hook(Some(Box::new(show)));
    assert!(!steps.step());
    assert_eq!(scene.device.state().waiting(), 1);
    steps.step();
    assert_eq!(scene.device.state().waiting(), 2);
    while !(steps.step() && steps.step()) {}
}
