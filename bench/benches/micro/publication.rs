//! What a reactor pays, each turn, for following a pointer that others replace: qsbr beside what
//! else there is. Nobody replaces it meanwhile, and no other core reads: the least that each costs.
#![expect(unsafe_code, reason = "crossbeam-epoch hands out pointers")]

use std::hint::black_box;
use std::sync::atomic::Ordering::Acquire;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use criterion::Criterion;
use crossbeam_epoch::{Atomic, pin};

use crate::scene::reader::Qsbr;

pub(crate) fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("publication");
    let mut qsbr = Qsbr::new();
    group.bench_function("qsbr, quiesce and load", |b| b.iter(|| black_box(qsbr.turn())));

    let atomic = Atomic::new(1_u64);
    group.bench_function("crossbeam-epoch, pin and load", |b| {
        b.iter(|| {
            let guard = pin();
            let shared = atomic.load(Acquire, &guard);
            // SAFETY: nobody replaces the value.
            black_box(unsafe { *shared.deref() })
        });
    });
    // SAFETY: no guard is left, and this is its last use.
    drop(unsafe { atomic.into_owned() });

    let swap = ArcSwap::new(Arc::new(1_u64));
    group.bench_function("arc-swap, load", |b| b.iter(|| black_box(**swap.load())));

    let mutex = Mutex::new(Box::new(1_u64));
    group.bench_function("Mutex, lock", |b| b.iter(|| black_box(**mutex.lock().unwrap())));
    group.finish();
}
