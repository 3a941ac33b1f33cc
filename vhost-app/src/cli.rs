//! The command line, in SPDK's spelling and with SPDK's exit codes.
//!
//! SPDK parses with `getopt_long`: options and positional arguments may be mixed, positional
//! ones are ignored, long names may be cut short, the later of two wins, `-h` and `-v` act
//! when they are reached (a mistake before them wins), and a value may start with a dash.
//! What cannot be parsed exits with 2; what parses but cannot be done exits with 1.
//!
//! `-v` prints one line as SPDK does, which starts with the version of SPDK this program
//! stands in for, since that is what tools look for.

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, Parser};
use vhost_target::Mode;
use vhost_target::session::DRAIN_LIMIT_S;

use crate::logging;

mod cores;

use cores::parse_lcores;
pub(crate) use cores::{Lcore, parse_cores};

/// The SPDK release whose command line, RPCs and sockets this program offers.
pub(crate) const SPDK_VERSION: &str = "v26.09-pre";

/// The line `-v` prints.
pub(crate) const VERSION: &str =
    concat!("SPDK v26.09-pre compatible, vhost v", env!("CARGO_PKG_VERSION"));

/// Where RPC clients look for the socket.
const RPC_SOCKET: &str = "/var/tmp/spdk.sock";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Write the process id here (`-f`).
    pub(crate) pid_file: Option<PathBuf>,
    /// Directory of the vhost sockets (`-S`); the working directory if none.
    pub(crate) socket_dir: Option<PathBuf>,
    /// Configuration to replay (`-c`).
    pub(crate) config: Option<PathBuf>,
    /// Go on after entries of the configuration that fail.
    pub(crate) ignore_config_errors: bool,
    /// The RPC socket (`-r`); none for no server.
    pub(crate) rpc_socket: Option<PathBuf>,
    /// Wait for `framework_start_init` before the subsystems start.
    pub(crate) wait_for_rpc: bool,
    /// Methods that may be called; all if none.
    pub(crate) rpcs_allowed: Option<Vec<String>>,
    /// Cores with a reactor (`-m`, or the ids in `--lcores`), ascending, at least one.
    pub(crate) cores: Vec<usize>,
    /// Where each core's thread runs, if not on the CPU of the same number (`--lcores`).
    pub(crate) lcores: Option<Vec<Lcore>>,
    /// The main core (`-p`), one of `cores`.
    pub(crate) main_core: usize,
    /// Take locks on the cores in /var/tmp.
    pub(crate) cpumask_locks: bool,
    /// What reactors do when there is nothing to do (`--interrupt-mode`, `--reactor-idle-us`).
    pub(crate) reactor_mode: Mode,
    /// DPDK's memory in MiB (`-s`); as much as it takes if none.
    pub(crate) mem_size_mib: Option<u32>,
    /// A hugetlbfs mount.
    pub(crate) huge_dir: Option<PathBuf>,
    /// Use ordinary pages.
    pub(crate) no_huge: bool,
    /// Allow core dumps (`-d` forbids them).
    pub(crate) core_dump: bool,
    /// Log flags to set (`-L`), all of them known.
    pub(crate) log_flags: Vec<String>,
    /// Print warnings and errors only.
    pub(crate) silence_noticelog: bool,
    /// How long a front end that stops a ring waits for its I/O before its connection is ended.
    pub(crate) drain_limit: Duration,
    /// Files and block devices may be written by several bdevs and processes at the same time.
    pub(crate) share: bool,
    /// The sandbox (`--sandbox`, `--no-sandbox`).
    pub(crate) sandbox: SandboxMode,
    /// Directories of disks (`--disk-dir`); if empty, disks may be anywhere.
    pub(crate) disk_dirs: Vec<PathBuf>,
    /// Options that were given and change nothing here, as SPDK spells them, for one log line.
    pub(crate) unused: Vec<&'static str>,
}

/// Whether the process enters the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SandboxMode {
    /// No sandbox.
    Off,
    /// As much as the kernel supports.
    Available,
    /// All of it, or the process does not start.
    Required,
}

/// Why the program ends without starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 for help and version, 2 for what cannot be parsed, 1 for what cannot be done.
    pub(crate) code: u8,
    /// What to print: to stdout if `code` is 0, to stderr otherwise.
    pub(crate) text: String,
}

impl Exit {
    fn failed(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into() }
    }

    fn usage(text: impl Into<String>) -> Self {
        Self { code: 2, text: text.into() }
    }

    /// Prints the text where it belongs.
    pub(crate) fn print(&self) {
        let text = self.text.trim_end();
        if self.code == 0 {
            println!("{text}");
        } else {
            eprintln!("{text}");
        }
    }
}

impl Options {
    /// Parses a command line, the program's name included.
    ///
    /// # Errors
    /// With exit code 0 if help or version were asked for; see [`Exit`].
    pub(crate) fn parse<I, T>(args: I) -> Result<Self, Exit>
    where
        I: IntoIterator<Item = T>,
        T: Into<std::ffi::OsString> + Clone,
    {
        let args = Args::try_parse_from(args).map_err(|error| {
            let text = error.render().to_string();
            match error.kind() {
                ErrorKind::DisplayHelp => Exit { code: 0, text },
                // clap puts the program's name before it.
                ErrorKind::DisplayVersion => Exit { code: 0, text: VERSION.into() },
                _ => Exit { code: 2, text },
            }
        })?;
        args.check()
    }
}

/// Serves block devices to virtual machines over vhost-user sockets.
#[derive(Debug, Parser)]
#[command(
    name = "vhost",
    override_usage = "vhost [options]",
    disable_help_flag = true,
    disable_version_flag = true,
    infer_long_args = true,
    args_override_self = true,
    max_term_width = 100,
    version = VERSION,
    help_template = "{about}\n\nUsage: {usage}\n\n{options}\n"
)]
struct Args {
    /// Write the process id to this file.
    #[arg(short = 'f', value_name = "PATH", allow_hyphen_values = true)]
    pid_file: Option<String>,
    /// Make the vhost sockets in this directory [default: the working directory].
    #[arg(short = 'S', value_name = "DIR", allow_hyphen_values = true)]
    socket_dir: Option<String>,
    /// Replay this JSON configuration at start (--json is the same).
    #[arg(short, long, alias = "json", value_name = "FILE", allow_hyphen_values = true)]
    config: Option<String>,
    /// Go on when entries of the configuration fail.
    #[arg(long)]
    json_ignore_init_errors: bool,
    /// Serve RPCs on this Unix socket.
    #[arg(
        short,
        long,
        value_name = "PATH",
        default_value = RPC_SOCKET,
        overrides_with = "no_rpc_server",
        allow_hyphen_values = true
    )]
    rpc_socket: String,
    /// Serve no RPCs.
    #[arg(long)]
    no_rpc_server: bool,
    /// Start the subsystems only when the framework_start_init RPC asks for it.
    #[arg(long)]
    wait_for_rpc: bool,
    /// Allow only these RPCs, separated by commas [default: all].
    #[arg(long, value_name = "NAMES", allow_hyphen_values = true)]
    rpcs_allowed: Option<String>,
    /// Run reactors on these cores: a hex mask, or a list like [0,2-4] [default: 0x1].
    #[arg(short = 'm', long, value_name = "MASK|LIST", allow_hyphen_values = true)]
    cpumask: Option<String>,
    /// Run reactors on logical cores mapped to CPUs, like 0@2,1@(4-5); not with -m.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    lcores: Option<String>,
    /// Main core [default: the first].
    #[arg(short = 'p', long, value_name = "CORE", value_parser = number, allow_hyphen_values = true)]
    main_core: Option<u64>,
    /// Do not lock the cores in /var/tmp.
    #[arg(long)]
    disable_cpumask_locks: bool,
    /// Reactors sleep whenever there is nothing to do; not with --reactor-idle-us.
    #[arg(long)]
    interrupt_mode: bool,
    /// Reactors poll, and sleep after this many microseconds without work; not with
    /// --interrupt-mode (not in SPDK).
    #[arg(long, value_name = "N", value_parser = number, conflicts_with = "interrupt_mode")]
    reactor_idle_us: Option<u64>,
    /// Memory for DPDK in MiB, or with K, M or G [default: as needed].
    #[arg(short = 's', long, value_name = "SIZE", value_parser = mem_size, allow_hyphen_values = true)]
    mem_size: Option<u32>,
    /// Accepted, no effect: hugepages are taken without a mount.
    #[arg(long, value_name = "DIR", allow_hyphen_values = true)]
    huge_dir: Option<String>,
    /// Use ordinary pages; needs -s.
    #[arg(long)]
    no_huge: bool,
    /// Do not allow large core dumps.
    #[arg(short = 'd', long)]
    limit_coredump: bool,
    /// Print INFO and DEBUG lines of this component; repeatable, "all" for all.
    #[arg(short = 'L', long, value_name = "FLAG", value_parser = log_flag, action = ArgAction::Append, allow_hyphen_values = true)]
    logflag: Vec<String>,
    /// Print warnings and errors only.
    #[arg(long)]
    silence_noticelog: bool,
    /// End a connection whose ring does not drain within this time after it was stopped (not in
    /// SPDK).
    #[arg(long, value_name = "SECONDS", default_value_t = DRAIN_LIMIT_S)]
    drain_limit: u64,
    /// Let several bdevs and processes write to the same file or block device at the same time. Also
    /// switches off waiting for I/O of a killed vhost, which may then overwrite newer data (not in SPDK).
    #[arg(long)]
    share: bool,
    /// Do not start unless the kernel supports the whole sandbox [default: use what it supports]
    /// (not in SPDK).
    #[arg(long, overrides_with = "no_sandbox")]
    sandbox: bool,
    /// Start without the sandbox, for profilers, sanitizers, or system calls that it refuses (not
    /// in SPDK).
    #[arg(long, overrides_with = "sandbox")]
    no_sandbox: bool,
    /// Open the files of disks beneath this directory only; repeatable, not with --no-sandbox (not
    /// in SPDK).
    #[arg(long, value_name = "DIR", action = ArgAction::Append, allow_hyphen_values = true)]
    disk_dir: Vec<String>,
    /// Accepted, no effect: memory channels.
    #[arg(short = 'n', long, value_name = "N", value_parser = number, allow_hyphen_values = true)]
    mem_channels: Option<u64>,
    /// Accepted, no effect: one file for all hugepages.
    #[arg(short = 'g', long)]
    single_file_segments: bool,
    /// Accepted, no effect: hugepage files are always unlinked.
    #[arg(short = 'R', long)]
    huge_unlink: bool,
    /// Accepted, no effect: address mode of DMA, pa or va.
    #[arg(long, value_name = "MODE", allow_hyphen_values = true)]
    iova_mode: Option<String>,
    /// Accepted, no effect: base address of DPDK's memory.
    #[arg(long, value_name = "ADDRESS", value_parser = positive, allow_hyphen_values = true)]
    base_virtaddr: Option<u64>,
    /// Accepted, no effect: keep memory to its NUMA node.
    #[arg(long)]
    enforce_numa: bool,
    /// Accepted, no effect: size of SPDK's message pool.
    #[arg(long, value_name = "N", value_parser = positive_decimal, allow_hyphen_values = true)]
    msg_mempool_size: Option<u64>,
    /// Accepted, no effect: shared memory id.
    #[arg(short = 'i', long, value_name = "ID", value_parser = shm_id, allow_hyphen_values = true)]
    shm_id: Option<i64>,
    /// Accepted, no effect: PCI is never used.
    #[arg(short = 'u', long)]
    no_pci: bool,
    /// Accepted, no effect: a PCI device that may be used; repeatable, not with -B.
    #[arg(short = 'A', long, value_name = "BDF", value_parser = pci_address, action = ArgAction::Append, allow_hyphen_values = true)]
    pci_allowed: Vec<String>,
    /// Accepted, no effect: a PCI device that may not be used; repeatable, not with -A.
    #[arg(short = 'B', long, value_name = "BDF", value_parser = pci_address, action = ArgAction::Append, allow_hyphen_values = true)]
    pci_blocked: Vec<String>,
    /// Accepted, no effect: VFIO token.
    #[arg(long, value_name = "UUID", allow_hyphen_values = true)]
    vfio_vf_token: Option<String>,
    /// Accepted, no effect: trace point groups.
    #[arg(short = 'e', long, value_name = "GROUPS", allow_hyphen_values = true)]
    tpoint_group: Option<String>,
    /// Accepted, no effect: trace entries per core, a power of two or 0.
    #[arg(long, value_name = "N", value_parser = trace_entries, allow_hyphen_values = true)]
    num_trace_entries: Option<u64>,
    /// Accepted, no effect: further arguments for SPDK's DPDK.
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    env_context: Option<String>,
    /// Print this help.
    #[arg(short, long, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version.
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[arg(hide = true)]
    ignored: Vec<String>,
}

impl Args {
    fn check(self) -> Result<Options, Exit> {
        if self.cpumask.is_some() && self.lcores.is_some() {
            return Err(Exit::usage("-m and --lcores cannot be used at the same time"));
        }
        if !self.pci_allowed.is_empty() && !self.pci_blocked.is_empty() {
            return Err(Exit::usage("-A and -B cannot be used at the same time"));
        }
        if self.no_rpc_server && self.wait_for_rpc {
            return Err(Exit::failed("--wait-for-rpc needs an RPC server"));
        }
        if self.no_sandbox && !self.disk_dir.is_empty() {
            return Err(Exit::failed("--disk-dir needs the sandbox"));
        }
        self.check_memory()?;
        let unused = self.unused();
        let (cores, lcores) = match (&self.cpumask, &self.lcores) {
            (_, Some(list)) => {
                let lcores = parse_lcores(list)
                    .ok_or_else(|| Exit::failed(format!("invalid --lcores {list}")))?;
                (lcores.iter().map(|lcore| lcore.id).collect(), Some(lcores))
            }
            (mask, None) => {
                let mask = mask.as_deref().unwrap_or("0x1");
                let cores = parse_cores(mask)
                    .ok_or_else(|| Exit::failed(format!("invalid core mask {mask}")))?;
                (cores, None)
            }
        };
        let main_core = match self.main_core {
            None => cores[0],
            Some(core) => cores
                .iter()
                .copied()
                .find(|&known| known as u64 == core)
                .ok_or_else(|| Exit::failed(format!("main core {core} has no reactor")))?,
        };
        let path = |text: Option<String>| text.filter(|text| !text.is_empty()).map(PathBuf::from);
        let list = |names: String| {
            names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
        };
        Ok(Options {
            pid_file: self.pid_file.map(PathBuf::from),
            socket_dir: path(self.socket_dir),
            config: self.config.map(PathBuf::from),
            ignore_config_errors: self.json_ignore_init_errors,
            rpc_socket: (!self.no_rpc_server).then(|| self.rpc_socket.into()),
            wait_for_rpc: self.wait_for_rpc,
            rpcs_allowed: self.rpcs_allowed.map(list),
            cores,
            lcores,
            main_core,
            cpumask_locks: !self.disable_cpumask_locks,
            reactor_mode: match (self.interrupt_mode, self.reactor_idle_us) {
                (true, _) => Mode::Sleep { after_us: 0 },
                (false, Some(after_us)) => Mode::Sleep { after_us },
                (false, None) => Mode::Poll,
            },
            mem_size_mib: self.mem_size,
            huge_dir: path(self.huge_dir),
            no_huge: self.no_huge,
            core_dump: !self.limit_coredump,
            log_flags: self.logflag,
            silence_noticelog: self.silence_noticelog,
            drain_limit: Duration::from_secs(self.drain_limit),
            share: self.share,
            sandbox: match (self.sandbox, self.no_sandbox) {
                (_, true) => SandboxMode::Off,
                (true, false) => SandboxMode::Required,
                (false, false) => SandboxMode::Available,
            },
            disk_dirs: self.disk_dir.into_iter().map(PathBuf::from).collect(),
            unused,
        })
    }

    fn check_memory(&self) -> Result<(), Exit> {
        let iova_mode = self.iova_mode.as_deref();
        if !matches!(iova_mode, None | Some("pa" | "va")) {
            return Err(Exit::failed("--iova-mode is pa or va"));
        }
        if !self.no_huge {
            return Ok(());
        }
        if self.mem_size.is_none() {
            return Err(Exit::failed("--no-huge needs the size of the memory, -s"));
        }
        if self.single_file_segments || self.huge_unlink || self.huge_dir.is_some() {
            return Err(Exit::failed("--no-huge cannot be used with -g, -R or --huge-dir"));
        }
        if iova_mode == Some("pa") {
            return Err(Exit::failed("--no-huge cannot be used with --iova-mode pa"));
        }
        Ok(())
    }

    /// Not -u, -R, `--iova-mode va` and a negative -i: what they ask for is so anyway.
    fn unused(&self) -> Vec<&'static str> {
        [
            ("--mem-channels", self.mem_channels.is_some()),
            ("--single-file-segments", self.single_file_segments),
            ("--iova-mode pa", self.iova_mode.as_deref() == Some("pa")),
            ("--base-virtaddr", self.base_virtaddr.is_some()),
            ("--enforce-numa", self.enforce_numa),
            ("--msg-mempool-size", self.msg_mempool_size.is_some()),
            ("--shm-id", self.shm_id.is_some_and(|id| id >= 0)),
            ("--pci-allowed", !self.pci_allowed.is_empty()),
            ("--pci-blocked", !self.pci_blocked.is_empty()),
            ("--vfio-vf-token", self.vfio_vf_token.is_some()),
            ("--tpoint-group", self.tpoint_group.is_some()),
            ("--num-trace-entries", self.num_trace_entries.is_some()),
            ("--env-context", self.env_context.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
        .collect()
    }
}

/// MiB of a number, or of a number with a unit, of which the first letter counts.
fn mem_size(text: &str) -> Result<u32, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let mib = number.parse::<u64>().ok().and_then(|number| match unit.bytes().next() {
        None => Some(number),
        Some(b'k' | b'K') => Some(number / 1024),
        Some(b'm' | b'M') => Some(number),
        Some(b'g' | b'G') => number.checked_mul(1024),
        Some(_) => None,
    });
    mib.filter(|&mib| mib <= i32::MAX as u64)
        .map(|mib| mib as u32)
        .ok_or_else(|| format!("invalid memory pool size `-s {text}`"))
}

/// A number from 0 on as C writes them: decimal, 0x hexadecimal, 0 octal.
fn number(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    u64::from_str_radix(digits, radix)
        .ok()
        .filter(|&number| !digits.starts_with('+') && number <= i64::MAX as u64)
        .ok_or_else(|| "it is not a number from 0 on".into())
}

fn positive(text: &str) -> Result<u64, String> {
    number(text)?.checked_sub(1).map(|less| less + 1).ok_or_else(|| "it is 0".into())
}

fn positive_decimal(text: &str) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(number @ 1..) if number <= i64::MAX as u64 => Ok(number),
        _ => Err("it is not a number from 1 on".into()),
    }
}

fn shm_id(text: &str) -> Result<i64, String> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let size = i32::try_from(number(digits)?).map_err(|error| error.to_string())?;
    Ok(i64::from(if negative { -size } else { size }))
}

fn trace_entries(text: &str) -> Result<u64, String> {
    let entries = number(text)?;
    if entries == 0 || entries.is_power_of_two() {
        return Ok(entries);
    }
    Err("it is not a power of 2".into())
}

fn log_flag(text: &str) -> Result<String, String> {
    if logging::is_flag(text) { Ok(text.to_owned()) } else { Err("unknown flag".into()) }
}

/// `[domain:]bus:device[.function]`, where a dot may stand for a colon.
fn pci_address(text: &str) -> Result<String, String> {
    let parts: Vec<&str> = text.split([':', '.']).collect();
    let is_hex =
        |part: &&str| (1..=8).contains(&part.len()) && u32::from_str_radix(part, 16).is_ok();
    if (2..=4).contains(&parts.len()) && parts.iter().all(is_hex) {
        return Ok(text.to_owned());
    }
    Err("it is not a PCI address".into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(line: &str) -> Result<Options, Exit> {
        Options::parse(std::iter::once("vhost").chain(line.split_ascii_whitespace()))
    }

    fn ok(line: &str) -> Options {
        parse(line).unwrap_or_else(|exit| panic!("{line}: {exit:?}"))
    }

    fn code(line: &str) -> u8 {
        parse(line).map_or_else(|exit| exit.code, |options| panic!("{line}: {options:?}"))
    }

    #[test]
    fn clap_finds_no_fault_with_the_definition() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let options = ok("");
        let expected = Options {
            pid_file: None,
            socket_dir: None,
            config: None,
            ignore_config_errors: false,
            rpc_socket: Some("/var/tmp/spdk.sock".into()),
            wait_for_rpc: false,
            rpcs_allowed: None,
            cores: vec![0],
            lcores: None,
            main_core: 0,
            cpumask_locks: true,
            reactor_mode: Mode::Poll,
            mem_size_mib: None,
            huge_dir: None,
            no_huge: false,
            core_dump: true,
            log_flags: vec![],
            silence_noticelog: false,
            drain_limit: Duration::from_secs(30),
            share: false,
            sandbox: SandboxMode::Available,
            disk_dirs: vec![],
            unused: vec![],
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn what_tools_use() {
        // SPDK's tests.
        let options = ok(
            "-r /t/rpc.sock -S /t --wait-for-rpc -m 0x3 -p 1 -s 512 -u -g --disable-cpumask-locks \
             --logflag=all",
        );
        assert_eq!(options.rpc_socket.unwrap().to_str(), Some("/t/rpc.sock"));
        assert_eq!((options.cores, options.main_core), (vec![0, 1], 1));
        assert_eq!((options.mem_size_mib, options.wait_for_rpc), (Some(512), true));
        assert!(!options.cpumask_locks);
        assert_eq!(options.log_flags, ["all"]);
        assert_eq!(options.unused, ["--single-file-segments"]);
        // A systemd unit.
        let options = ok(
            "-S /var/vhost --huge-dir /mnt/h --iova-mode va --rpc-socket /r.sock --cpumask [0,1] \
             --disable-cpumask-locks --config /etc/c.json",
        );
        assert_eq!(options.cores, [0, 1]);
        assert_eq!(options.config.unwrap().to_str(), Some("/etc/c.json"));
        assert!(options.unused.is_empty());
    }

    #[test]
    fn as_getopt_reads_it() {
        // Later wins; flags may be repeated and joined; values may be attached.
        let options = ok("-s 1 -s2048 -uuRd -m0x2 --cpumask=0x4 --json a -c b -f p -f q");
        assert_eq!((options.mem_size_mib, options.cores), (Some(2048), vec![2]));
        assert_eq!(options.config, Some("b".into()));
        assert_eq!(options.pid_file, Some("q".into()));
        assert!(!options.core_dump);
        // Long names may be cut short as long as one is left.
        let options = ok("--rpc-s x --silence --wait --no-p --mem-s 5 --json-ig");
        assert!(options.silence_noticelog && options.wait_for_rpc);
        assert_eq!(options.mem_size_mib, Some(5));
        assert_eq!(code("--huge /x"), 2);
        assert_eq!(code("--mem 5"), 2);
        // Positional arguments are ignored wherever they stand.
        let options = ok("one -d two -s 7 three -- -x --nonsense");
        assert_eq!(options.mem_size_mib, Some(7));
        // A value may start with a dash, and even be an option's name.
        assert_eq!(ok("-S -d").socket_dir, Some("-d".into()));
        assert!(ok("-S -d").core_dump);
        assert_eq!(Options::parse(["vhost", "-S", ""]).unwrap().socket_dir, None);
        // Repeatable ones add up.
        assert_eq!(ok("-L vhost -L vhost_blk --logflag bdev").log_flags.len(), 3);
        // --sandbox and --no-sandbox override each other.
        assert_eq!(ok("--sandbox").sandbox, SandboxMode::Required);
        assert_eq!(ok("--sandbox --no-sandbox").sandbox, SandboxMode::Off);
        assert_eq!(ok("--no-sandbox --sandbox").sandbox, SandboxMode::Required);
        assert_eq!(ok("--disk-dir /a --disk-dir b").disk_dirs, [Path::new("/a"), Path::new("b")]);
        assert!(ok("--share").share);
        // -r and --no-rpc-server override each other.
        assert_eq!(ok("-r x --no-rpc-server").rpc_socket, None);
        assert_eq!(ok("--no-rpc-server -r x").rpc_socket, Some("x".into()));
    }

    /// The option cases of SPDK's test/vhost/other/negative.sh, and their like.
    #[test]
    fn help_version_and_mistakes() {
        assert_eq!(code("-c /no/such -S /t -e 0x0 -s 1024 -d -h --silence-noticelog"), 0);
        assert_eq!(code("-x -h"), 2);
        assert_eq!(code("-h -x"), 0);
        assert_eq!(code("-s nonsense -h"), 2);
        assert_eq!(code("-L nonsense -h"), 2);
        assert_eq!(code("-L vhost_scsi -h"), 0);
        assert_eq!(code("-t vhost_scsi -h"), 2);
        assert_eq!(code("--help"), 0);
        assert_eq!(code("--version"), 0);
        assert_eq!(parse("-v").unwrap_err().text.trim_end(), VERSION);
        assert!(VERSION.starts_with(&format!("SPDK {SPDK_VERSION} ")));
        let help = parse("-h").unwrap_err().text;
        assert!(help.contains("--rpc-socket") && help.contains("-S"), "{help}");
        for line in ["-W 0000:01:00.0", "-s", "-m", "--nope", "--wait-for-rpc=1", "-c"] {
            assert_eq!(code(line), 2, "{line}");
        }
    }

    #[test]
    fn what_parses_but_cannot_be_done_exits_with_1() {
        for line in [
            "--no-rpc-server --wait-for-rpc",
            "-m 0x0",
            "-m 0",
            "-m xyz",
            "-m [1",
            "-m []",
            "-m [1-]",
            "-m [,]",
            "-m -1",
            "--lcores (0",
            "--lcores 0@",
            "--lcores 1,1",
            "-m 0x3 -p 2",
            "--no-huge",
            "--no-huge -s 64 -g",
            "--no-huge -s 64 -R",
            "--no-huge -s 64 --huge-dir /x",
            "--no-huge -s 64 --iova-mode pa",
            "--iova-mode zz",
            "--no-sandbox --disk-dir /x",
        ] {
            assert_eq!(code(line), 1, "{line}");
        }
        assert_eq!(code("-m 0x1 --lcores 0"), 2);
        assert_eq!(code("-A 0000:01:00.0 -B 0000:02:00.0"), 2);
        assert!(ok("--no-huge -s 64 --iova-mode va").no_huge);
    }

    #[test]
    fn lcores_map_to_cpus() {
        let lcore = |id, cpus: &[usize]| Lcore { id, cpus: cpus.into() };
        let options = ok("--lcores 5@2,(1-2)@(4,6-7),0");
        assert_eq!(options.cores, [0, 1, 2, 5]);
        assert_eq!(
            options.lcores.unwrap(),
            [lcore(0, &[0]), lcore(1, &[4, 6, 7]), lcore(2, &[4, 6, 7]), lcore(5, &[2])]
        );
    }

    #[test]
    fn sizes_and_numbers() {
        for (text, mib) in [
            ("0", 0),
            ("512", 512),
            ("2048K", 2),
            ("1k", 0),
            ("64M", 64),
            ("2G", 2048),
            ("2GB", 2048),
        ] {
            assert_eq!(mem_size(text), Ok(mib), "{text}");
        }
        for text in ["", "x", "-5", "5T", "2147483648", "99999999999999999999", "4194304G"] {
            assert!(mem_size(text).is_err(), "{text}");
            assert_eq!(Options::parse(["vhost", "-s", text]).unwrap_err().code, 2, "{text}");
        }
        for line in [
            "-n -1",
            "-n x",
            "-p -1",
            "-p 0x",
            "-i x",
            "-i --1",
            "--num-trace-entries 3",
            "--num-trace-entries -1",
            "--base-virtaddr 0",
            "--msg-mempool-size 0",
            "--msg-mempool-size 0x10",
            "-A nonsense",
            "-B 1:2:3:4:5",
        ] {
            assert_eq!(code(line), 2, "{line}");
        }
        let options =
            ok("-n 0 -i 0x10 --num-trace-entries 0 --base-virtaddr 0x200000000000 --enforce-numa \
             --msg-mempool-size 1 -A 0000:01:00.0 -A 02:00.1 --vfio-vf-token x -e a:b,c \
             --env-context --foo --iova-mode pa -p 00");
        assert_eq!(options.unused.len(), 11, "{:?}", options.unused);
        assert!(ok("-i -1 -u -R --iova-mode va").unused.is_empty());
    }

    #[test]
    fn allowed_methods() {
        assert_eq!(ok("--rpcs-allowed a,b,,c").rpcs_allowed.unwrap(), ["a", "b", "c"]);
    }
}
