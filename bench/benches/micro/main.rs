//! What each part of the data path costs in time, in one thread but for the hand-over.
//!
//! `cargo bench -p bench --bench micro`, with part of a name at the end (`-- ring`) for some of
//! them. criterion compares with the run before and draws a report in
//! `target/criterion/report/index.html`. Times drift with the machine; instructions, which do not,
//! are counted by `ci/perf`.
#![expect(clippy::unwrap_used, reason = "a bench that cannot be set up ends")]

#[path = "../scene/mod.rs"]
#[expect(dead_code, reason = "some of it is for the counts only")]
mod scene;

mod channel;
mod copy;
mod hand_over;
mod publication;
mod request;
mod ring;
mod turn;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

/// Half of criterion's own times: what is measured takes nanoseconds, and all of it two minutes.
fn times() -> Criterion {
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_millis(2500));
    Criterion::default().warm_up_time(warm_up).measurement_time(measurement)
}

criterion_group! {
    name = benches;
    config = times();
    targets =
        publication::bench,
        turn::bench,
        ring::bench,
        channel::bench,
        copy::bench,
        request::bench,
        // Last, as it ties this thread to a core.
        hand_over::bench
}
criterion_main!(benches);
