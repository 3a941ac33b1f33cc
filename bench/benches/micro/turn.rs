//! A reactor's turn with queues that have nothing to do.

use criterion::{BenchmarkId, Criterion};

use crate::scene::disks;
use crate::scene::guest::Form;
use crate::scene::stage::Stage;

pub(crate) fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("idle turn");
    for queues in [0, 1, 16, 256] {
        let mut stage = Stage::new(queues, Form::DIRECT, &disks::null());
        group.bench_function(BenchmarkId::new("queues", queues), |b| {
            b.iter(|| stage.reactor.step());
        });
    }
    group.finish();
}
