//! Random I/O on one channel of an NBD disk, for `bench/nbd`: `nbd_load URI read|write BYTES DEPTH
//! SECONDS poll|sleep` prints I/Os per second and the median latency in microseconds.
#![expect(unsafe_code, reason = "submits I/Os")]

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{Bdev, BdevChannel, Channel, Completion, Io, Op, Segment, Status, Submit, Tag, Wait};
use nbd::{NbdDisk, NbdOptions, NbdUri};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [uri, op, bytes, depth, seconds, mode] = &args[..] else {
        return Err("usage: nbd_load URI read|write BYTES DEPTH SECONDS poll|sleep".into());
    };
    let disk = NbdDisk::connect(NbdOptions {
        name: "bench".into(),
        uri: NbdUri::parse(uri)?,
        block_size: None,
        readonly: false,
        uuid: None,
        reconnect_delay: Some(Duration::ZERO),
        reconnect_interval: Duration::from_secs(1),
        connections: 1,
    })?;
    let load = Load {
        op: if op == "write" { Op::Write } else { Op::Read },
        bytes: bytes.parse()?,
        depth: depth.parse()?,
        time: Duration::from_secs(seconds.parse()?),
        sleeps: mode == "sleep",
    };
    let (rate, median_us) = load.run(disk)?;
    println!("{rate:.0} {median_us:.1}");
    Ok(())
}

struct Load {
    op: Op,
    bytes: usize,
    depth: u16,
    time: Duration,
    sleeps: bool,
}

impl Load {
    fn run(&self, disk: Arc<NbdDisk>) -> Result<(f64, f64), Box<dyn Error>> {
        let disk: Arc<dyn Bdev> = disk;
        let places = disk.size_bytes() / self.bytes as u64;
        let mut channel = BdevChannel::open(&disk, self.depth)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in channel.wake_fds() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags)?;
        }
        let mut memory = vec![0x5a_u8; self.bytes * usize::from(self.depth)];
        let segments: Vec<_> = memory
            .chunks_mut(self.bytes)
            .map(|part| [Segment::new(part.as_mut_ptr(), part.len())])
            .collect();
        let mut starts = vec![Instant::now(); self.depth.into()];
        let mut latencies_ns: Vec<u128> = Vec::with_capacity(1 << 24);
        let mut done = vec![Completion { tag: Tag(0), status: Status::Ok }; self.depth.into()];
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut free: Vec<u16> = (0..self.depth).collect();
        let begin = Instant::now();
        let mut running = true;
        while running || free.len() < self.depth.into() {
            while running && let Some(tag) = free.pop() {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let offset = random % places * self.bytes as u64;
                let at = usize::from(tag);
                let io = Io::rw(self.op, Tag(tag), offset, self.bytes as u64, &segments[at]);
                starts[at] = Instant::now();
                // SAFETY: the memory outlives the channel's I/O: the loop ends when none is left.
                if !matches!(unsafe { channel.submit(io) }, Submit::Queued) {
                    return Err("an I/O was refused".into());
                }
            }
            channel.kick();
            let n = channel.poll(&mut done);
            for completion in &done[..n] {
                if completion.status != Status::Ok {
                    return Err("an I/O has failed".into());
                }
                latencies_ns.push(starts[usize::from(completion.tag.0)].elapsed().as_nanos());
                free.push(completion.tag.0);
            }
            if n == 0 && self.sleeps && channel.wait() == Wait::Event {
                let mut events = Vec::with_capacity(4);
                let _ = epoll::wait(&epoll, spare_capacity(&mut events), None);
            }
            running = begin.elapsed() < self.time;
        }
        let rate = latencies_ns.len() as f64 / begin.elapsed().as_secs_f64();
        let middle = latencies_ns.len() / 2;
        let (_, median, _) = latencies_ns.select_nth_unstable(middle);
        Ok((rate, *median as f64 / 1000.0))
    }
}
