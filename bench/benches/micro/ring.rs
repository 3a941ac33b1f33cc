//! A ring's work alone: chains taken off it, requests made of them, chains given back.
//!
//! In rounds of as many requests as a visit takes, with the clock read before and after: that is
//! about a nanosecond of each request's time.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};

use crate::scene::guest::{Form, Kind};
use crate::scene::rings::{ROUND, Rings, Step};

pub(crate) fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("ring, {ROUND} requests"));
    group.throughput(Throughput::Elements(ROUND));
    for (chain, kind, form) in [
        ("direct", Kind::Read, Form::DIRECT),
        ("indirect", Kind::Read, Form::INDIRECT),
        ("direct, two buffers", Kind::ReadInTwo, Form::DIRECT),
        ("packed", Kind::Read, Form::PACKED),
        ("packed, indirect", Kind::Read, Form::PACKED_INDIRECT),
    ] {
        let mut rings = Rings::new(kind, form);
        for (name, step) in [("pop", Step::Pop), ("parse", Step::Parse), ("push", Step::Push)] {
            group.bench_function(BenchmarkId::new(name, chain), |b| {
                b.iter_custom(|rounds| (0..rounds).map(|_| timed(&mut rings, step)).sum());
            });
        }
    }
    group.finish();
}

fn timed(rings: &mut Rings, step: Step) -> Duration {
    let mut took = Duration::ZERO;
    rings.round(step, |act| {
        let start = Instant::now();
        act();
        took = start.elapsed();
    });
    took
}
