//! The hot paths, each run a known number of times, for `ci/perf` to count their instructions.
//!
//! Under `valgrind --tool=callgrind --toggle-collect=*counted* --dump-after=*part_ends*` only what
//! runs inside [`counted`] is counted: neither setting up, nor the driver that makes the requests
//! and takes the answers. Each path runs in three parts, after each of which callgrind writes what
//! it counted to a file of its own: the first warms up (queues are adopted, functions bound), the
//! second is the figure, and the third has to repeat it.
//!
//! On stdout: the path's name, and the units (requests, turns, …) in a part, a line for each path.
#![expect(clippy::unwrap_used, reason = "a path that cannot be set up ends the run")]

mod scene;

use std::hint::black_box;
use std::sync::Arc;

use bdev::Bdev;
use scene::{Kind, Scene, malloc, null};

/// Requests in a part: rings and sectors wrap round many times.
const REQUESTS: u64 = 4096;
/// Turns in a part; a multiple of those after which an idle reactor reads its clock.
const TURNS: u64 = 1024;

/// A part of a path: runs it, and answers how many units that was.
type Part = Box<dyn FnMut() -> u64>;

fn main() {
    let only: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for (name, set_up) in paths() {
        if !only.is_empty() && !only.contains(&name) {
            continue;
        }
        let mut part = set_up();
        let mut units = 0;
        for _ in 0..3 {
            units = part();
            part_ends();
        }
        println!("{name} {units}");
    }
}

/// What is counted, and nothing else is. Costs two or three instructions of its own.
#[inline(never)]
fn counted<T>(path: impl FnOnce() -> T) -> T {
    path()
}

/// Where callgrind writes down what it has counted.
#[inline(never)]
fn part_ends() {
    black_box(());
}

fn paths() -> Vec<(String, Box<dyn Fn() -> Part>)> {
    let mut paths: Vec<(String, Box<dyn Fn() -> Part>)> = Vec::new();
    for queues in [0, 1, 16, 256] {
        paths.push((format!("turn-idle-{queues}"), Box::new(move || idle(queues))));
    }
    for (disk, bdev) in [("null", null as fn() -> Arc<dyn Bdev>), ("malloc", malloc)] {
        for (op, kind) in [("read", Kind::Read), ("write", Kind::Write)] {
            for depth in [1, 32] {
                let name = format!("{disk}-{op}-{depth}");
                paths.push((name, Box::new(move || requests(&bdev(), false, kind, depth))));
            }
        }
    }
    let two = || requests(&null(), false, Kind::ReadInTwo, 32);
    paths.push(("null-read-two-segments-32".into(), Box::new(two)));
    let indirect = || requests(&null(), true, Kind::Read, 32);
    paths.push(("null-read-indirect-32".into(), Box::new(indirect)));
    paths
}

/// Turns of a reactor whose queues have nothing to do.
fn idle(queues: usize) -> Part {
    let mut scene = Scene::new(queues, false, &null());
    Box::new(move || {
        counted(|| {
            for _ in 0..TURNS {
                scene.reactor.step();
            }
        });
        TURNS
    })
}

/// Requests in batches of `depth`, the device's side of them.
fn requests(bdev: &Arc<dyn Bdev>, indirect: bool, kind: Kind, depth: u64) -> Part {
    let mut scene = Scene::new(1, indirect, bdev);
    Box::new(move || {
        for _ in 0..REQUESTS / depth {
            scene.batch(kind, depth, |reactor| {
                counted(|| reactor.step());
            });
        }
        REQUESTS
    })
}
