//! The command line, in fio's words.

use std::path::PathBuf;
use std::time::Duration;

use bench::Idle;
use bench::perf::{Order, Plan};
use clap::{Parser, Subcommand, ValueEnum};
use front_end::{Backing, RingLayout};

/// The most requests in flight on a queue, and queues: what rings and protocol can name.
const DEPTH_MAX: i64 = 32_768;
const QUEUES_MAX: i64 = 256;

#[derive(Debug, Parser)]
#[command(
    name = "vhost-perf",
    version,
    about = "Puts load on a vhost-user-blk socket and measures it, in fio's words",
    long_about = "Puts load on a vhost-user-blk socket and measures it, in fio's words.\n\n\
        It is the virtual machine: it brings guest memory and rings, and submits requests as a \
        guest's driver does. Latency is counted from just before a request (or, with a deeper \
        queue, the batch it is in) is put into the ring until its completion is seen.\n\n\
        Exit status: 0 if all is well; 1 if the socket is of no use, or if a request failed, did not \
        come back, or read something wrong; 2 for a mistake on the command line.",
    args_conflicts_with_subcommands = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// The server's socket
    #[arg(value_name = "SOCKET", required_unless_present = "filename")]
    socket: Option<PathBuf>,
    /// The same, as fio names it
    #[arg(long, visible_alias = "socket", conflicts_with = "socket", value_name = "SOCKET")]
    filename: Option<PathBuf>,

    /// What the requests do
    #[arg(long, value_enum, default_value = "randread", visible_alias = "readwrite")]
    rw: Rw,
    /// With randrw: how many of a hundred requests are reads
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,
    /// Bytes in a request: 512 to 1m, a multiple of 512
    #[arg(long, default_value = "4k", value_parser = block_bytes)]
    bs: u32,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=DEPTH_MAX))]
    iodepth: u16,
    /// Queues; each works on a part of the range of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=QUEUES_MAX))]
    numjobs: u16,
    /// Seconds to measure for
    #[arg(long, default_value = "10", value_parser = limit, value_name = "SECONDS")]
    runtime: Duration,
    /// Seconds to run before that, which no figure counts
    #[arg(long = "ramp_time", alias = "ramp-time", default_value = "0", value_parser = seconds)]
    #[arg(value_name = "SECONDS")]
    ramp_time: Duration,
    /// Write a pattern that names block and version, and compare what is read with it
    ///
    /// Unless there are only reads, each block is written before it is first read. Reads alone
    /// expect what an earlier run with --verify and the same --bs and --randseed has written.
    #[arg(long)]
    verify: bool,
    /// Requests a second on each queue, sent when they are due (an open loop)
    ///
    /// Latency is then counted from when a request was due, not from when there was room to send it,
    /// so that a stall is seen in every request that it held up (no coordinated omission).
    #[arg(long = "rate_iops", alias = "rate-iops", value_parser = rate, value_name = "IOPS")]
    rate_iops: Option<f64>,
    /// Use this many bytes of the disk (k, m, g, t: powers of 1024) [default: to its end]
    #[arg(long, value_parser = bytes)]
    size: Option<u64>,
    /// The first byte of the disk to use
    #[arg(long, default_value = "0", value_parser = sectors)]
    offset: u64,
    /// Chooses the random sequence, and is part of the pattern
    #[arg(long, default_value_t = 1)]
    randseed: u64,

    /// Split rings (the default)
    #[arg(long, conflicts_with = "packed")]
    split: bool,
    /// Packed rings
    #[arg(long)]
    packed: bool,
    /// Each request in an indirect table
    #[arg(long)]
    indirect: bool,
    /// Agree on VIRTIO_RING_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,
    /// Descriptors in each ring, a power of two [default: 256, or what depth and block size need]
    #[arg(long, value_parser = ring_size, value_name = "N")]
    ring_size: Option<u16>,
    /// What guest memory is made of
    #[arg(long, value_enum, default_value = "memfd")]
    mem: Memory,
    /// Bytes of guest memory [default: what is needed]
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    mem_size: Option<u64>,

    /// Look for completions all the time (the default)
    #[arg(long, conflicts_with = "interrupts")]
    poll: bool,
    /// Sleep until the server calls
    #[arg(long)]
    interrupts: bool,
    /// Run on these cores, like 0,2-3, a thread on each as far as there are queues
    #[arg(long = "cpus_allowed", alias = "cpus-allowed", value_parser = cores, value_name = "LIST")]
    cpus_allowed: Option<Cores>,
    /// Threads that share the queues [default: one, or one for each core of --cpus_allowed]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=QUEUES_MAX), value_name = "N")]
    threads: Option<u16>,
    /// Seconds to wait for the server's answers, and for requests in flight at the end
    #[arg(long, default_value = "30", value_parser = limit, value_name = "SECONDS")]
    timeout: Duration,

    /// How to print the figures
    #[arg(long, value_enum, default_value = "normal", value_name = "FORMAT")]
    pub(crate) output_format: Output,
    /// Draw latencies, IOPS and gaps into this SVG file
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Print the line "started" to stderr when the ramp is over (and no progress)
    #[arg(long)]
    pub(crate) start_line: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print how long a cache line takes to another core and back: no request can be faster
    Floor(FloorArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct FloorArgs {
    /// The two cores
    #[arg(long = "cpus_allowed", alias = "cpus-allowed", default_value = "0,1")]
    #[arg(value_parser = two_cores, value_name = "A,B")]
    cpus_allowed: Cores,
    /// How to print it
    #[arg(long, value_enum, default_value = "normal", value_name = "FORMAT")]
    pub(crate) output_format: Output,
}

impl FloorArgs {
    pub(crate) fn cores(&self) -> (usize, usize) {
        (self.cpus_allowed.0[0], self.cpus_allowed.0[1])
    }
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

/// A list of cores, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cores(Vec<usize>);

impl Args {
    /// What to do.
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
        Plan {
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

/// A number of bytes: digits, and k, m, g or t for a power of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| !c.is_ascii_digit());
    let power = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        unit => return Err(format!("{unit} is none of k, m, g, t")),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{e}"))?;
    number.checked_mul(1 << (10 * power)).ok_or_else(|| "too large".into())
}

fn sectors(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    if bytes.is_multiple_of(512) { Ok(bytes) } else { Err("not a multiple of 512".into()) }
}

fn block_bytes(text: &str) -> Result<u32, String> {
    let bytes = bytes(text)?;
    let fits = (512..=1 << 20).contains(&bytes) && bytes % 512 == 0;
    if fits { Ok(bytes as u32) } else { Err("not a multiple of 512 from 512 to 1m".into()) }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.trim_end_matches('s').parse().map_err(|e| format!("{e}"))?;
    // A year is enough, and no sum of such times overflows.
    let fits = (0.0..=31_536_000.0).contains(&seconds);
    if fits { Ok(Duration::from_secs_f64(seconds)) } else { Err("not from 0 to a year".into()) }
}

fn limit(text: &str) -> Result<Duration, String> {
    let limit = seconds(text)?;
    if limit.is_zero() { Err("some time is needed".into()) } else { Ok(limit) }
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|e| format!("{e}"))?;
    let fits = (0.001..=1e9).contains(&rate);
    if fits { Ok(rate) } else { Err("not from 0.001 to 1e9".into()) }
}

fn ring_size(text: &str) -> Result<u16, String> {
    let size: u16 = text.parse().map_err(|e| format!("{e}"))?;
    if size.is_power_of_two() { Ok(size) } else { Err("not a power of two up to 32768".into()) }
}

/// Cores as in taskset: numbers and ranges, with commas between.
fn cores(text: &str) -> Result<Cores, String> {
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().map_err(|e| format!("{part}: {e}"));
        let (first, last) = (number(first)?, number(last)?);
        // As many as sched_setaffinity's usual mask has.
        if first > last || last >= 1024 {
            return Err(format!("{part} are no cores"));
        }
        for core in first..=last {
            if cores.contains(&core) {
                return Err(format!("core {core} is named twice"));
            }
            cores.push(core);
        }
    }
    Ok(Cores(cores))
}

fn two_cores(text: &str) -> Result<Cores, String> {
    let cores = cores(text)?;
    if cores.0.len() == 2 { Ok(cores) } else { Err("two cores are needed".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(std::iter::once("vhost-perf").chain(line.split_whitespace()))
    }

    #[test]
    fn fio_s_words_make_a_plan() {
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
    fn mistakes_are_usage_errors() {
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

    #[test]
    fn bytes_have_units() {
        let cases = [("512", 512), ("4k", 4096), ("4K", 4096), ("1MiB", 1 << 20), ("2g", 2 << 30)];
        cases.iter().for_each(|(text, value)| assert_eq!(bytes(text), Ok(*value), "{text}"));
        assert!(["", "k", "-1", "1.5k", "4kk"].iter().all(|text| bytes(text).is_err()));
    }
}
