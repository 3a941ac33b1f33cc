//! The command line, with fio's names of options.

use std::path::PathBuf;
use std::time::Duration;

use bench::Idle;
use bench::perf::{Device, Order, Plan};
use clap::{Parser, Subcommand, ValueEnum};
use front_end::{Backing, RingLayout};

use crate::values::{
    Cores, block_bytes, bytes, cores, limit, rate, ring_size, seconds, sectors, two_cores,
};

/// Limit on requests in flight on a queue: the largest ring.
const DEPTH_MAX: i64 = 32_768;
/// Limit on queues: vhost-user's vring messages have 8 bits for the index.
const QUEUES_MAX: i64 = 256;

#[derive(Debug, Parser)]
#[command(
    name = "vhost-perf",
    version,
    about = "Generate load on a vhost-user-blk or vhost-user-scsi socket and measure it, with fio's \
        options",
    long_about = "Generate load on a vhost-user-blk or vhost-user-scsi socket and measure it, with \
        fio's options.\n\n\
        vhost-perf takes the place of a virtual machine: it allocates guest memory and rings, and \
        submits requests as a guest's driver does. Latency is the time from just before a request \
        (with a deeper queue, its batch) is made available until its completion is seen.\n\n\
        Exit status: 0 on success; 1 if the server cannot be used, or if a request failed, did not \
        complete, or read wrong data; 2 if the command line is invalid.",
    args_conflicts_with_subcommands = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// The server's socket
    #[arg(value_name = "SOCKET", required_unless_present = "filename")]
    socket: Option<PathBuf>,
    /// The server's socket, as an option
    #[arg(long, visible_alias = "socket", conflicts_with = "socket", value_name = "SOCKET")]
    filename: Option<PathBuf>,

    /// Kind of the controller
    #[arg(long, value_enum, default_value = "blk")]
    device: DeviceKind,
    /// With --device scsi: the target, whose logical unit 0 is used [default: 0]
    #[arg(long, value_name = "N", requires = "device")]
    scsi_target: Option<u8>,

    /// Kind and order of the requests
    #[arg(long, value_enum, default_value = "randread", visible_alias = "readwrite")]
    rw: Rw,
    /// With randrw: percentage of reads
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,
    /// Bytes of a request: 512 to 1m, a multiple of 512
    #[arg(long, default_value = "4k", value_parser = block_bytes)]
    bs: u32,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=DEPTH_MAX))]
    iodepth: u16,
    /// Queues; each uses a separate part of the range
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=QUEUES_MAX))]
    numjobs: u16,
    /// Seconds of the measurement
    #[arg(long, default_value = "10", value_parser = limit, value_name = "SECONDS")]
    runtime: Duration,
    /// Seconds to run before the measurement; the results exclude them
    #[arg(long = "ramp_time", alias = "ramp-time", default_value = "0", value_parser = seconds)]
    #[arg(value_name = "SECONDS")]
    ramp_time: Duration,
    /// Write a pattern with the block's number and version, and compare it when reading
    ///
    /// Each block is written before it is first read, except with --rw read or randread: then the
    /// blocks must have been written by a run with --verify and the same --bs and --randseed.
    #[arg(long)]
    verify: bool,
    /// Requests per second on each queue, on a fixed schedule (an open loop)
    ///
    /// Latency is then the time since a request was due, not since there was room to submit it. So
    /// a stall counts in every request that it delays (no coordinated omission).
    #[arg(long = "rate_iops", alias = "rate-iops", value_parser = rate, value_name = "IOPS")]
    rate_iops: Option<f64>,
    /// Use this many bytes of the disk (k, m, g, t: powers of 1024) [default: up to its end]
    #[arg(long, value_parser = bytes)]
    size: Option<u64>,
    /// The first byte of the disk to use
    #[arg(long, default_value = "0", value_parser = sectors)]
    offset: u64,
    /// Seed of the random sequence and of the pattern
    #[arg(long, default_value_t = 1)]
    randseed: u64,

    /// Split rings (the default)
    #[arg(long, conflicts_with = "packed")]
    split: bool,
    /// Packed rings
    #[arg(long)]
    packed: bool,
    /// Put each request into an indirect table
    #[arg(long)]
    indirect: bool,
    /// Negotiate VIRTIO_RING_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,
    /// Descriptors of each ring, a power of two [default: 256, or more if the load needs it]
    #[arg(long, value_parser = ring_size, value_name = "N")]
    ring_size: Option<u16>,
    /// Kind of guest memory
    #[arg(long, value_enum, default_value = "memfd")]
    mem: Memory,
    /// Bytes of guest memory [default: as much as the load needs]
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    mem_size: Option<u64>,

    /// Poll for completions (the default)
    #[arg(long, conflicts_with = "interrupts")]
    poll: bool,
    /// Sleep until the server sends a notification
    #[arg(long)]
    interrupts: bool,
    /// Run a thread on each of these cores, such as 0,2-3, but no more threads than queues
    #[arg(long = "cpus_allowed", alias = "cpus-allowed", value_parser = cores, value_name = "LIST")]
    cpus_allowed: Option<Cores>,
    /// Threads that share the queues [default: one, or one for each core of --cpus_allowed]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=QUEUES_MAX), value_name = "N")]
    threads: Option<u16>,
    /// Seconds to wait for an answer of the server, and for requests in flight at the end
    #[arg(long, default_value = "30", value_parser = limit, value_name = "SECONDS")]
    timeout: Duration,

    /// Format of the results
    #[arg(long, value_enum, default_value = "normal", value_name = "FORMAT")]
    pub(crate) output_format: Output,
    /// Draw latencies, IOPS and gaps to this SVG file
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Print the line "started" to stderr when the measurement begins (and no progress)
    #[arg(long)]
    pub(crate) start_line: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the round-trip time of a cache line between two cores, the lower bound of latencies
    Floor(FloorArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct FloorArgs {
    /// The two cores
    #[arg(long = "cpus_allowed", alias = "cpus-allowed", default_value = "0,1")]
    #[arg(value_parser = two_cores, value_name = "A,B")]
    cpus_allowed: Cores,
    /// Format of the result
    #[arg(long, value_enum, default_value = "normal", value_name = "FORMAT")]
    pub(crate) output_format: Output,
}

impl FloorArgs {
    pub(crate) fn cores(&self) -> (usize, usize) {
        (self.cpus_allowed.0[0], self.cpus_allowed.0[1])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DeviceKind {
    /// virtio-blk
    Blk,
    /// virtio-scsi: READ(16) and WRITE(16)
    Scsi,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rw {
    Randread,
    Randwrite,
    Randrw,
    Read,
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Normal,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Memory {
    /// Ordinary pages
    Memfd,
    /// Hugepages of 2 MiB
    Hugetlb,
}

impl Args {
    /// The load that the options describe.
    pub(crate) fn plan(&self) -> Plan {
        let socket = self.socket.as_ref().or(self.filename.as_ref());
        let cores = self.cpus_allowed.as_ref().map_or(Vec::new(), |cores| cores.0.clone());
        let threads = self.threads.map_or(cores.len().max(1), usize::from);
        let (order, reads) = match self.rw {
            Rw::Randread => (Order::Random, 100),
            Rw::Randwrite => (Order::Random, 0),
            Rw::Randrw => (Order::Random, self.rwmixread),
            Rw::Read => (Order::Sequential, 100),
            Rw::Write => (Order::Sequential, 0),
        };
        let backing = match self.mem {
            Memory::Memfd => Backing::Pages,
            Memory::Hugetlb => Backing::Hugepages,
        };
        let device = match self.device {
            DeviceKind::Blk => Device::Blk,
            DeviceKind::Scsi => Device::Scsi { target: self.scsi_target.unwrap_or(0) },
        };
        Plan {
            device,
            order,
            reads,
            block_bytes: self.bs,
            depth: self.iodepth,
            queues: self.numjobs.into(),
            threads: threads.min(self.numjobs.into()),
            cores,
            runtime: self.runtime,
            ramp: self.ramp_time,
            verify: self.verify,
            rate: self.rate_iops,
            offset: self.offset,
            size: self.size,
            rings: if self.packed { RingLayout::Packed } else { RingLayout::Split },
            ring_size: self.ring_size,
            indirect: self.indirect,
            event_idx: self.event_idx,
            backing,
            ram_bytes: self.mem_size,
            idle: if self.interrupts { Idle::Sleep } else { Idle::Spin },
            limit: self.timeout,
            seed: self.randseed,
            ..Plan::new(socket.cloned().unwrap_or_default())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(std::iter::once("vhost-perf").chain(line.split_whitespace()))
    }

    #[test]
    fn options_of_fio_make_a_plan() {
        let plan = parse(
            "/tmp/s --rw randrw --rwmixread 30 --bs 64k --iodepth 16 --numjobs 4 --runtime 2.5 \
             --ramp_time 0.5 --rate_iops 1000 --offset 1m --size 1g --packed --indirect --event-idx \
             --mem hugetlb --mem-size 64m --interrupts --cpus_allowed 0,2-3 --verify",
        )
        .unwrap()
        .plan();
        assert_eq!(plan.socket, PathBuf::from("/tmp/s"));
        assert_eq!((plan.order, plan.reads, plan.block_bytes), (Order::Random, 30, 65536));
        assert_eq!((plan.depth, plan.queues, plan.threads), (16, 4, 3));
        assert_eq!((plan.runtime.as_millis(), plan.ramp.as_millis()), (2500, 500));
        assert_eq!((plan.rate, plan.offset, plan.size), (Some(1000.0), 1 << 20, Some(1 << 30)));
        assert_eq!((plan.rings, plan.indirect, plan.event_idx), (RingLayout::Packed, true, true));
        assert_eq!((plan.backing, plan.ram_bytes), (Backing::Hugepages, Some(64 << 20)));
        assert_eq!((plan.idle, plan.cores, plan.verify), (Idle::Sleep, vec![0, 2, 3], true));
    }

    #[test]
    fn the_rest_has_defaults() {
        for line in ["/tmp/s", "--filename /tmp/s", "--socket=/tmp/s", "/tmp/s --split --poll"] {
            let plan = parse(line).unwrap().plan();
            assert_eq!(format!("{plan:?}"), format!("{:?}", Plan::new("/tmp/s".into())), "{line}");
        }
        let sequential = parse("/tmp/s --rw write").unwrap().plan();
        assert_eq!((sequential.order, sequential.reads), (Order::Sequential, 0));
        let pinned = parse("/tmp/s --cpus_allowed 1,0 --numjobs 4 --threads 1").unwrap().plan();
        assert_eq!((pinned.threads, pinned.cores), (1, vec![1, 0]));
    }

    #[test]
    fn invalid_options_are_usage_errors() {
        for line in [
            "",
            "/tmp/s --bs 1000",
            "/tmp/s --bs 2m",
            "/tmp/s --bs 0",
            "/tmp/s --rw trim",
            "/tmp/s --iodepth 0",
            "/tmp/s --numjobs 257",
            "/tmp/s --runtime -1",
            "/tmp/s --runtime 0",
            "/tmp/s --offset 100",
            "/tmp/s --runtime nan",
            "/tmp/s --timeout 0",
            "/tmp/s --rwmixread 101",
            "/tmp/s --rate_iops 0",
            "/tmp/s --split --packed",
            "/tmp/s --poll --interrupts",
            "/tmp/s --ring-size 100",
            "/tmp/s --cpus_allowed 3-1",
            "/tmp/s --cpus_allowed 0,0",
            "/tmp/s --cpus_allowed x",
            "/tmp/s --filename /tmp/t",
            "/tmp/s --size 5q",
            "/tmp/s --size 99999999t",
            "floor --cpus_allowed 0",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_floor_is_a_command() {
        let args = parse("floor --cpus_allowed 1,3 --output-format json").unwrap();
        let Some(Command::Floor(floor)) = args.command else { panic!("{args:?}") };
        assert_eq!((floor.cores(), floor.output_format), ((1, 3), Output::Json));
    }
}
