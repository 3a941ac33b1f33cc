//! Each disk's channel without a queue before it: submit, kick, and poll until all is done.
//!
//! The file is full of data and read directly where its file system can: its figures are the
//! device's more than ours.

use std::io::Write;
use std::sync::Arc;

use bdev::{Bdev, Op};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use tempfile::NamedTempFile;

use crate::scene::channel::Line;
use crate::scene::disks::{self, DISK_BYTES};

const SMALL: u64 = 4 << 10;
const LARGE: u64 = 64 << 10;

pub(crate) fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("channel");
    let mut memory = |name, disk: &Arc<dyn Bdev>, op, len| run(&mut group, name, disk, 32, op, len);
    memory("null read", &disks::null(), Op::Read, SMALL);
    memory("delay read", &disks::delay(), Op::Read, SMALL);
    memory("error read", &disks::error(), Op::Read, SMALL);
    let malloc = disks::malloc();
    for len in [SMALL, LARGE] {
        memory("malloc read", &malloc, Op::Read, len);
        memory("malloc write", &malloc, Op::Write, len);
    }
    let mut data = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    data.write_all(&vec![0x5a; DISK_BYTES.try_into().unwrap()]).unwrap();
    data.as_file().sync_all().unwrap();
    let file = disks::file(data.path());
    for (depth, len) in [(1, SMALL), (16, SMALL), (16, LARGE)] {
        run(&mut group, "file read", &file, depth, Op::Read, len);
        run(&mut group, "file write", &file, depth, Op::Write, len);
    }
    group.finish();
}

fn run(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    disk: &Arc<dyn Bdev>,
    depth: u16,
    op: Op,
    len: u64,
) {
    let mut line = Line::new(disk, depth, len);
    group.throughput(Throughput::Elements(depth.into()));
    let size = format!("{} KiB, depth {depth}", len >> 10);
    group.bench_function(BenchmarkId::new(name, size), |b| b.iter(|| line.run(op)));
}
