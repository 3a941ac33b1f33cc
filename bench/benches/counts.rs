//! The hot paths, each run a known number of times, for `ci/perf` to count their instructions.
//!
//! Under callgrind, with `--toggle-collect` on [`counted`] and `--dump-after` on [`part_ends`],
//! only what runs inside [`counted`] is counted: neither setting up, nor the driver that makes the
//! requests and takes the answers. Each path runs in three parts, after each of which callgrind
//! writes what it counted to a file of its own: the first warms up (queues are adopted, functions
//! bound), the second is the figure, and the third has to repeat it. An instruction that repeats
//! itself (`rep movsb`, glibc's way to copy much) counts once for each time.
//!
//! On stdout: the path's name, and the units (requests, turns, …) in a part, a line for each path.
//! Arguments name the paths to run; all, if there are none.
#![expect(clippy::unwrap_used, reason = "a path that cannot be set up ends the run")]

mod scene;

use std::hint::black_box;
use std::sync::Arc;

use bdev::{Bdev, Op};
use scene::channel::Line;
use scene::disks::{self, DISK_BYTES};
use scene::guest::{Form, Kind};
use scene::reader::Qsbr;
use scene::rings::{ROUND, Rings, Step};
use scene::stage::Stage;

/// Requests in a part: rings and sectors wrap round many times.
const REQUESTS: u64 = 4096;
/// Turns in a part; a multiple of those after which an idle reactor reads its clock.
const TURNS: u64 = 1024;

/// A part of a path: runs it, and answers how many units that was.
type Part = Box<dyn FnMut() -> u64>;

/// Paths by name, with what sets each of them up.
#[derive(Default)]
struct Paths(Vec<(String, Box<dyn Fn() -> Part>)>);

fn main() {
    let only: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for (name, set_up) in all().0 {
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

/// What is counted, and nothing else is. Costs a few instructions of its own.
#[inline(never)]
fn counted<T>(path: impl FnOnce() -> T) -> T {
    path()
}

/// Where callgrind writes down what it has counted.
#[inline(never)]
fn part_ends() {
    black_box(());
}

impl Paths {
    fn add(&mut self, name: impl Into<String>, set_up: impl Fn() -> Part + 'static) {
        self.0.push((name.into(), Box::new(set_up)));
    }
}

fn all() -> Paths {
    let mut paths = Paths::default();
    paths.add("qsbr-turn", qsbr);
    for queues in [1, 16, 256] {
        paths.add(format!("turn-idle-{queues}"), move || idle(queues));
    }
    paths.add("turn-adopting", adopting);
    for (name, kind, form) in [
        ("direct", Kind::Read, Form::DIRECT),
        ("indirect", Kind::Read, Form::INDIRECT),
        ("two", Kind::ReadInTwo, Form::DIRECT),
    ] {
        for (step, name) in
            [(Step::Pop, format!("ring-pop-{name}")), (Step::Parse, format!("parse-{name}"))]
        {
            paths.add(name, move || ring(kind, form, step));
        }
    }
    for (name, form) in [("packed", Form::PACKED), ("packed-indirect", Form::PACKED_INDIRECT)] {
        paths.add(format!("ring-pop-{name}"), move || ring(Kind::Read, form, Step::Pop));
    }
    paths.add("ring-push", || ring(Kind::Read, Form::DIRECT, Step::Push));
    paths.add("ring-push-packed", || ring(Kind::Read, Form::PACKED, Step::Push));
    for (disk, bdev) in [("null", disks::null as fn() -> _), ("malloc", disks::malloc)] {
        for (op, kind) in [("read", Kind::Read), ("write", Kind::Write)] {
            for depth in [1, 32] {
                paths.add(format!("{disk}-{op}-{depth}"), move || {
                    requests(&bdev(), Form::DIRECT, kind, depth)
                });
            }
        }
    }
    for (disk, bdev) in [("null", disks::null as fn() -> _), ("malloc", disks::malloc)] {
        for depth in [1, 32] {
            paths.add(format!("scsi-{disk}-read-{depth}"), move || {
                batches(Stage::scsi(&bdev()), Kind::Read, depth)
            });
        }
    }
    for (name, form) in [("tracked", Form::DIRECT), ("tracked-packed", Form::PACKED)] {
        for depth in [1, 32] {
            paths.add(format!("null-read-{name}-{depth}"), move || {
                batches(Stage::tracked(form, &disks::null()), Kind::Read, depth)
            });
        }
    }
    paths.add("null-read-two-32", || requests(&disks::null(), Form::DIRECT, Kind::ReadInTwo, 32));
    paths.add("null-read-32-beside-255-idle", || {
        batches(Stage::new(256, Form::DIRECT, &disks::null()), Kind::Read, 32)
    });
    for (name, form) in [
        ("indirect", Form::INDIRECT),
        ("packed", Form::PACKED),
        ("packed-indirect", Form::PACKED_INDIRECT),
    ] {
        for depth in [1, 32] {
            paths.add(format!("null-read-{name}-{depth}"), move || {
                requests(&disks::null(), form, Kind::Read, depth)
            });
        }
    }
    for (disk, bdev) in [("delay", disks::delay as fn() -> _), ("error", disks::error)] {
        paths.add(format!("{disk}-read-32"), move || {
            requests(&bdev(), Form::DIRECT, Kind::Read, 32)
        });
    }
    for depth in [1, 16] {
        paths.add(format!("file-read-{depth}"), move || {
            requests(&holes(), Form::DIRECT, Kind::Read, depth)
        });
    }
    paths.add("file-channel-read-16", file_channel);
    paths
}

/// Turns of a reader of a published value.
fn qsbr() -> Part {
    let mut qsbr = Qsbr::new();
    Box::new(move || {
        counted(|| {
            for _ in 0..TURNS {
                black_box(qsbr.turn());
            }
        });
        TURNS
    })
}

/// Turns of a reactor whose queues have nothing to do.
fn idle(queues: usize) -> Part {
    let mut stage = Stage::new(queues, Form::DIRECT, &disks::null());
    Box::new(move || {
        counted(|| {
            for _ in 0..TURNS {
                stage.reactor.step();
            }
        });
        TURNS
    })
}

/// Turns in which an idle queue adopts a new view.
fn adopting() -> Part {
    let mut stage = Stage::new(1, Form::DIRECT, &disks::null());
    Box::new(move || {
        for _ in 0..TURNS {
            let view = stage.guest.next_view();
            let before = stage.guest.hand_over(view);
            counted(|| stage.reactor.step());
            assert!(before.try_free().is_none(), "it was adopted");
        }
        TURNS
    })
}

/// One step of requests on their way through a ring.
fn ring(kind: Kind, form: Form, step: Step) -> Part {
    let mut rings = Rings::new(kind, form);
    Box::new(move || {
        for _ in 0..REQUESTS / ROUND {
            rings.round(step, |act| counted(act));
        }
        REQUESTS
    })
}

/// Requests in batches of `depth`, the device's side of them.
fn requests(bdev: &Arc<dyn Bdev>, form: Form, kind: Kind, depth: u64) -> Part {
    batches(Stage::new(1, form, bdev), kind, depth)
}

fn batches(mut stage: Stage, kind: Kind, depth: u64) -> Part {
    Box::new(move || {
        for _ in 0..REQUESTS / depth {
            stage.batch(kind, depth, |reactor| {
                counted(|| reactor.step());
            });
        }
        REQUESTS
    })
}

/// Reads of 64 KiB on a file's channel, 16 at a time, without a queue before it.
fn file_channel() -> Part {
    const DEPTH: u16 = 16;
    let mut line = Line::new(&holes(), DEPTH, 64 << 10);
    Box::new(move || {
        for _ in 0..TURNS {
            counted(|| line.run(Op::Read));
        }
        TURNS * u64::from(DEPTH)
    })
}

/// A disk in a file of holes. The kernel answers a direct read of a hole within the system call
/// that submits it, so that the number of turns does not depend on a device; its own instructions
/// are not counted, and ours are those for any file. (Where the target directory is on a file
/// system that answers later, as tmpfs does, ci/perf says that the path does not repeat.)
fn holes() -> Arc<dyn Bdev> {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    disks::file(file.path())
}
