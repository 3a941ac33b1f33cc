//! How long it takes until a reactor on another core, with a busy queue, has adopted a new view:
//! from publishing it until the old one may be freed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::pin::pin;
use criterion::Criterion;
use front_end::LIMIT;
use reactor::{Garbage, Reclaim};
use vhost_target::{Core, Mode};
use vhost_target::{Events, Reactor};

use crate::scene::disks;
use crate::scene::guest::{Form, Guest, Kind};

const DRIVER_CORE: usize = 0;
const REACTOR_CORE: Core = Core(1);
/// Requests that the reactor always has to do, as many as it takes in a visit.
const DEPTH: u64 = 32;

pub(crate) fn bench(c: &mut Criterion) {
    let mut guest = Guest::new(1, Form::DIRECT, &disks::null());
    let events = Arc::new(Events::new().unwrap());
    let reactor = Reactor::start(REACTOR_CORE, &guest.domain, &events, Mode::Poll, Arc::new(|| {}));
    let (Ok((reactor, thread)), Ok(())) = (reactor, pin(DRIVER_CORE)) else {
        println!("hand-over: skipped, as this process may not use cores 0 and 1");
        return;
    };
    reactor.publish(guest.pollables(), &Reclaim::start(|| {}).unwrap());
    c.bench_function("hand-over of a view, busy queue", |b| {
        b.iter_custom(|views| (0..views).map(|_| hand_over(&mut guest)).sum());
    });
    reactor.shut_down();
    thread.join().unwrap();
}

fn hand_over(guest: &mut Guest) -> Duration {
    let view = guest.next_view();
    guest.driver.submit(Kind::Read, DEPTH);
    let start = Instant::now();
    let mut before: Box<dyn Garbage> = guest.hand_over(view);
    while let Some(not_yet) = before.try_free() {
        before = not_yet;
        let back = guest.driver.take_back();
        guest.driver.submit(Kind::Read, back);
        assert!(start.elapsed() < LIMIT, "the reactor does not adopt it");
    }
    let took = start.elapsed();
    let mut left = DEPTH;
    while left > 0 {
        left -= guest.driver.take_back();
        assert!(start.elapsed() < LIMIT, "a request is lost");
    }
    took
}
