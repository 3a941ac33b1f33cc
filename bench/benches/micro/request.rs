//! A request from end to end, driver and device in one thread: no other core, so what remains is
//! the work of both.

use criterion::{BenchmarkId, Criterion, Throughput};

use crate::scene::disks;
use crate::scene::guest::{Form, Kind};
use crate::scene::stage::Stage;

pub(crate) fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("request, 4 KiB");
    for (name, disk) in [("null", disks::null()), ("malloc", disks::malloc())] {
        for (op, kind, form) in [
            ("read", Kind::Read, Form::DIRECT),
            ("write", Kind::Write, Form::DIRECT),
            ("read, indirect", Kind::Read, Form::INDIRECT),
            ("read, packed", Kind::Read, Form::PACKED),
            ("read, packed, indirect", Kind::Read, Form::PACKED_INDIRECT),
        ] {
            for depth in [1, 32] {
                let mut stage = Stage::new(1, form, &disk);
                group.throughput(Throughput::Elements(depth));
                group.bench_function(BenchmarkId::new(format!("{name} {op}"), depth), |b| {
                    b.iter(|| {
                        stage.batch(kind, depth, |reactor| {
                            reactor.step();
                        });
                    });
                });
            }
        }
    }
    group.finish();
}
