//! The command line, in SPDK's spelling and with SPDK's exit codes.
//!
//! SPDK parses with `getopt_long`: options and positional arguments may be mixed, positional
//! arguments are ignored, long names may be abbreviated, the last occurrence of an option wins,
//! `-h` and `-v` take effect where they stand (an invalid option before them wins), and a value may
//! start with a dash. A command line that cannot be parsed exits with 2, options that contradict
//! each other or the machine exit with 1.
//!
//! `-v` prints one line that starts as SPDK's does, with the SPDK version that this program
//! replaces, because tools look for it.

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, Parser};
use vhost_target::Mode;
use vhost_target::session::DRAIN_LIMIT_S;

mod address;
mod cores;
mod exit;
mod tpoints;
mod values;

pub(crate) use address::Address;
use cores::parse_lcores;
pub(crate) use cores::{Lcore, parse_cores};
pub(crate) use exit::Exit;
pub(crate) use tpoints::TPOINT_GROUPS;
use tpoints::is_group_list;
use values::{
    Switch, log_flag, mem_size, mode, number, pci_address, positive, positive_decimal, shm_id,
    trace_entries,
};

/// The SPDK release whose command line, RPCs and sockets this program implements.
pub(crate) const SPDK_VERSION: &str = "v26.09-pre";

/// The line `-v` prints.
pub(crate) const VERSION: &str =
    concat!("SPDK v26.09-pre compatible, vhost v", env!("CARGO_PKG_VERSION"));

/// The RPC socket's default path, as in SPDK.
const RPC_SOCKET: &str = "/var/tmp/spdk.sock";

/// The command line, parsed and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// File for the process id (`-f`).
    pub(crate) pid_file: Option<PathBuf>,
    /// Directory of the vhost sockets (`-S`); `None` is the working directory.
    pub(crate) socket_dir: Option<PathBuf>,
    /// Permission bits of the vhost sockets and of the RPC socket.
    pub(crate) socket_mode: Option<u32>,
    /// Name or id of the user that owns these sockets.
    pub(crate) socket_owner: Option<String>,
    /// Name or id of the group that owns these sockets.
    pub(crate) socket_group: Option<String>,
    /// Configuration to check instead of serving.
    pub(crate) check: Option<PathBuf>,
    /// Where metrics are served; `None` is nowhere.
    pub(crate) metrics: Option<Address>,
    /// Configuration to load at startup (`-c`).
    pub(crate) config: Option<PathBuf>,
    /// Continue after configuration entries that fail.
    pub(crate) ignore_config_errors: bool,
    /// The RPC socket (`-r`); `None` starts no RPC server.
    pub(crate) rpc_socket: Option<PathBuf>,
    /// Wait for `framework_start_init` before the subsystems start.
    pub(crate) wait_for_rpc: bool,
    /// Methods that may be called; `None` allows all.
    pub(crate) rpcs_allowed: Option<Vec<String>>,
    /// Cores with a reactor (`-m`, or the ids in `--lcores`), ascending, at least one.
    pub(crate) cores: Vec<usize>,
    /// The CPUs of each core's thread (`--lcores`); `None` puts core n on CPU n.
    pub(crate) lcores: Option<Vec<Lcore>>,
    /// Lock the cores in /var/tmp.
    pub(crate) cpumask_locks: bool,
    /// What reactors do without work (`--interrupt-mode`, `--reactor-idle-us`).
    pub(crate) reactor_mode: Mode,
    /// DPDK's memory in MiB (`-s`); `None` takes the minimum.
    pub(crate) mem_size_mib: Option<u32>,
    /// DPDK uses ordinary pages instead of hugepages.
    pub(crate) no_huge: bool,
    /// Allow core dumps (`-d` forbids them).
    pub(crate) core_dump: bool,
    /// Log flags to set (`-L`), all of them known.
    pub(crate) log_flags: Vec<String>,
    /// Print warnings and errors only.
    pub(crate) silence_noticelog: bool,
    /// Time limit for the I/O in flight of a ring that its front end stops. After it, the
    /// connection is closed.
    pub(crate) drain_limit: Duration,
    /// Several bdevs and processes may write to one file or block device.
    pub(crate) share: bool,
    /// The sandbox (`--sandbox`, `--no-sandbox`).
    pub(crate) sandbox: SandboxMode,
    /// Directories that may hold disks (`--disk-dir`); if empty, every directory may.
    pub(crate) disk_dirs: Vec<PathBuf>,
    /// Whether the process may connect to storage on other hosts (`--network`); `None`: if librbd is
    /// installed.
    pub(crate) network: Option<bool>,
    /// Directories that hold Ceph configurations and keyrings (`--ceph-dir`).
    pub(crate) ceph_dirs: Vec<PathBuf>,
    /// Options on the command line that have no effect, as SPDK spells them.
    pub(crate) without_effect: Vec<&'static str>,
    /// Arguments that belong to no option; SPDK ignores them, too.
    pub(crate) positional: Vec<String>,
}

/// Whether the process enters the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SandboxMode {
    /// No sandbox.
    Off,
    /// The parts that the kernel supports.
    Available,
    /// The whole sandbox, or the process does not start.
    Required,
}

impl Options {
    /// Parses a command line that starts with the program's name.
    ///
    /// # Errors
    /// See [`Exit`]; code 0 stands for `-h` and `-v`.
    pub(crate) fn parse<I, T>(args: I) -> Result<Self, Exit>
    where
        I: IntoIterator<Item = T>,
        T: Into<std::ffi::OsString> + Clone,
    {
        let args = Args::try_parse_from(args).map_err(|error| {
            let text = error.render().to_string();
            match error.kind() {
                ErrorKind::DisplayHelp => Exit { code: 0, text },
                // clap's own text starts with the program's name.
                ErrorKind::DisplayVersion => Exit { code: 0, text: VERSION.into() },
                _ => Exit { code: 2, text },
            }
        })?;
        args.check()
    }
}

/// Serve block devices to virtual machines over vhost-user sockets
// `vhost-app/examples/manual.rs` writes the manual from it.
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
pub(crate) struct Args {
    /// Write the process id to this file.
    #[arg(short = 'f', value_name = "PATH", allow_hyphen_values = true)]
    pid_file: Option<String>,
    /// Create the vhost-user sockets in this directory [default: the working directory].
    #[arg(short = 'S', value_name = "DIR", allow_hyphen_values = true)]
    socket_dir: Option<String>,
    /// Give the vhost-user sockets and the RPC socket these permissions [default: by the umask] (not
    /// in SPDK).
    #[arg(long, value_name = "OCTAL", value_parser = mode, allow_hyphen_values = true)]
    socket_mode: Option<u32>,
    /// Give these sockets to this user; needs CAP_CHOWN (not in SPDK).
    #[arg(long, value_name = "USER|UID")]
    socket_owner: Option<String>,
    /// Give these sockets to this group; unless started as root, vhost must be a member (not in
    /// SPDK).
    #[arg(long, value_name = "GROUP|GID")]
    socket_group: Option<String>,
    /// Serve metrics for Prometheus over HTTP on this port of the loopback address, this address and
    /// port, or this Unix socket (not in SPDK).
    #[arg(long, value_name = "PORT|ADDR:PORT|PATH", allow_hyphen_values = true)]
    metrics: Option<Address>,
    /// Only check this JSON configuration: print what would fail or would have no effect, and exit with
    /// 1 if it cannot be loaded (not in SPDK).
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    check: Option<String>,
    /// Load this JSON configuration at startup; --json is an alias.
    #[arg(short, long, alias = "json", value_name = "FILE", allow_hyphen_values = true)]
    config: Option<String>,
    /// Continue when an entry of the configuration fails.
    #[arg(long)]
    json_ignore_init_errors: bool,
    /// Accept RPCs on this Unix socket.
    #[arg(
        short,
        long,
        value_name = "PATH",
        default_value = RPC_SOCKET,
        overrides_with = "no_rpc_server",
        allow_hyphen_values = true
    )]
    rpc_socket: String,
    /// Start no RPC server.
    #[arg(long)]
    no_rpc_server: bool,
    /// Initialize the subsystems only after the framework_start_init RPC.
    #[arg(long)]
    wait_for_rpc: bool,
    /// Allow only these RPC methods, separated by commas [default: all].
    #[arg(long, value_name = "NAMES", allow_hyphen_values = true)]
    rpcs_allowed: Option<String>,
    /// Run a reactor on each of these cores: a hexadecimal mask, or a list such as [0,2-4]
    /// [default: 0x1].
    #[arg(short = 'm', long, value_name = "MASK|LIST", allow_hyphen_values = true)]
    cpumask: Option<String>,
    /// Run a reactor on each of these logical cores, mapped to CPUs, such as 0@2,1@(4-5); not
    /// with -m.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    lcores: Option<String>,
    /// Accepted, no effect: main core, one of the reactors' cores.
    #[arg(short = 'p', long, value_name = "CORE", value_parser = number, allow_hyphen_values = true)]
    main_core: Option<u64>,
    /// Do not create lock files for the cores in /var/tmp.
    #[arg(long)]
    disable_cpumask_locks: bool,
    /// Let a reactor sleep as soon as it has no work; not with --reactor-idle-us.
    #[arg(long)]
    interrupt_mode: bool,
    /// Let a reactor sleep after this many microseconds of polling without work; not with
    /// --interrupt-mode (not in SPDK).
    #[arg(long, value_name = "N", value_parser = number, conflicts_with = "interrupt_mode")]
    reactor_idle_us: Option<u64>,
    /// Memory for DPDK in MiB, or a number with K, M or G [default: the minimum].
    #[arg(short = 's', long, value_name = "SIZE", value_parser = mem_size, allow_hyphen_values = true)]
    mem_size: Option<u32>,
    /// Accepted, no effect: hugetlbfs mount. Hugepages need no mount.
    #[arg(long, value_name = "DIR", allow_hyphen_values = true)]
    huge_dir: Option<String>,
    /// Use ordinary pages instead of hugepages; requires -s.
    #[arg(long)]
    no_huge: bool,
    /// Do not raise the limit on the size of core dumps.
    #[arg(short = 'd', long)]
    limit_coredump: bool,
    /// Enable INFO and DEBUG log lines of this component, or of "all"; repeatable.
    #[arg(short = 'L', long, value_name = "FLAG", value_parser = log_flag, action = ArgAction::Append, allow_hyphen_values = true)]
    logflag: Vec<String>,
    /// Print warnings and errors only.
    #[arg(long)]
    silence_noticelog: bool,
    /// Close a connection when the I/O of a ring that its front end stops does not complete within
    /// this time (not in SPDK).
    #[arg(long, value_name = "SECONDS", default_value_t = DRAIN_LIMIT_S)]
    drain_limit: u64,
    /// Let several bdevs and processes write to one file or block device. Also disables waiting for
    /// the I/O of a killed vhost, which may then overwrite newer data (not in SPDK).
    #[arg(long)]
    share: bool,
    /// Do not start unless the kernel supports the whole sandbox [default: use the parts that it
    /// supports] (not in SPDK).
    #[arg(long, overrides_with = "no_sandbox")]
    sandbox: bool,
    /// Start without the sandbox, for profilers, sanitizers, or libraries whose system calls it
    /// refuses (not in SPDK).
    #[arg(long, overrides_with = "sandbox")]
    no_sandbox: bool,
    /// Open files for disks in this directory and its subdirectories only; repeatable, not with
    /// --no-sandbox (not in SPDK).
    #[arg(long, value_name = "DIR", action = ArgAction::Append, allow_hyphen_values = true)]
    disk_dir: Vec<String>,
    /// Allow or forbid connections to storage on other hosts, Ceph and NBD over TCP [default: on if
    /// librbd is installed] (not in SPDK).
    #[arg(long, value_name = "on|off")]
    network: Option<Switch>,
    /// Let librbd read configurations and keyrings in this directory, besides /etc/ceph and that of
    /// $CEPH_CONF; repeatable (not in SPDK).
    #[arg(long, value_name = "DIR", action = ArgAction::Append, allow_hyphen_values = true)]
    ceph_dir: Vec<String>,
    /// Accepted, no effect: number of memory channels.
    #[arg(short = 'n', long, value_name = "N", value_parser = number, allow_hyphen_values = true)]
    mem_channels: Option<u64>,
    /// Accepted, no effect: one file for all hugepages.
    #[arg(short = 'g', long)]
    single_file_segments: bool,
    /// Accepted, no effect: hugepage files are always unlinked.
    #[arg(short = 'R', long)]
    huge_unlink: bool,
    /// Accepted, no effect: DMA address mode, pa or va.
    #[arg(long, value_name = "MODE", allow_hyphen_values = true)]
    iova_mode: Option<String>,
    /// Accepted, no effect: base address of DPDK's memory.
    #[arg(long, value_name = "ADDRESS", value_parser = positive, allow_hyphen_values = true)]
    base_virtaddr: Option<u64>,
    /// Accepted, no effect: allocate memory on the requested NUMA node only.
    #[arg(long)]
    enforce_numa: bool,
    /// Accepted, no effect: size of SPDK's message pool.
    #[arg(long, value_name = "N", value_parser = positive_decimal, allow_hyphen_values = true)]
    msg_mempool_size: Option<u64>,
    /// Accepted, no effect: shared memory id.
    #[arg(short = 'i', long, value_name = "ID", value_parser = shm_id, allow_hyphen_values = true)]
    shm_id: Option<i64>,
    /// Accepted, no effect: no PCI. PCI is never used.
    #[arg(short = 'u', long)]
    no_pci: bool,
    /// Accepted, no effect: allowed PCI device; repeatable, not with -B.
    #[arg(short = 'A', long, value_name = "BDF", value_parser = pci_address, action = ArgAction::Append, allow_hyphen_values = true)]
    pci_allowed: Vec<String>,
    /// Accepted, no effect: blocked PCI device; repeatable, not with -A.
    #[arg(short = 'B', long, value_name = "BDF", value_parser = pci_address, action = ArgAction::Append, allow_hyphen_values = true)]
    pci_blocked: Vec<String>,
    /// Accepted, no effect: VFIO VF token.
    #[arg(long, value_name = "UUID", allow_hyphen_values = true)]
    vfio_vf_token: Option<String>,
    /// Checked, no effect: trace point groups, such as bdev,sock:0x3.
    #[arg(short = 'e', long, value_name = "GROUPS", allow_hyphen_values = true)]
    tpoint_group: Option<String>,
    /// Accepted, no effect: trace entries per core, a power of two or 0.
    #[arg(long, value_name = "N", value_parser = trace_entries, allow_hyphen_values = true)]
    num_trace_entries: Option<u64>,
    /// Accepted, no effect: additional EAL arguments.
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    env_context: Option<String>,
    /// Print this help.
    #[arg(short, long, action = ArgAction::Help)]
    help: Option<bool>,
    /// Print the version.
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[arg(hide = true)]
    positional: Vec<String>,
}

impl Args {
    fn check(self) -> Result<Options, Exit> {
        self.check_conflicts()?;
        self.check_memory()?;
        let (cores, lcores) = self.cores()?;
        let list = |names: String| {
            names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
        };
        Ok(Options {
            reactor_mode: self.reactor_mode(),
            sandbox: self.sandbox_mode(),
            without_effect: self.without_effect(),
            positional: self.positional,
            pid_file: self.pid_file.map(PathBuf::from),
            socket_dir: self.socket_dir.filter(|dir| !dir.is_empty()).map(PathBuf::from),
            check: self.check.map(PathBuf::from),
            metrics: self.metrics,
            socket_mode: self.socket_mode,
            socket_owner: self.socket_owner,
            socket_group: self.socket_group,
            config: self.config.map(PathBuf::from),
            ignore_config_errors: self.json_ignore_init_errors,
            rpc_socket: (!self.no_rpc_server).then(|| self.rpc_socket.into()),
            wait_for_rpc: self.wait_for_rpc,
            rpcs_allowed: self.rpcs_allowed.map(list),
            cores,
            lcores,
            cpumask_locks: !self.disable_cpumask_locks,
            mem_size_mib: self.mem_size,
            no_huge: self.no_huge,
            core_dump: !self.limit_coredump,
            log_flags: self.logflag,
            silence_noticelog: self.silence_noticelog,
            drain_limit: Duration::from_secs(self.drain_limit),
            share: self.share,
            disk_dirs: self.disk_dir.into_iter().map(PathBuf::from).collect(),
            network: self.network.map(|switch| switch == Switch::On),
            ceph_dirs: self.ceph_dir.into_iter().map(PathBuf::from).collect(),
        })
    }

    fn check_conflicts(&self) -> Result<(), Exit> {
        if self.cpumask.is_some() && self.lcores.is_some() {
            return Err(Exit::usage("-m and --lcores cannot be used at the same time"));
        }
        if !self.pci_allowed.is_empty() && !self.pci_blocked.is_empty() {
            return Err(Exit::usage("-A and -B cannot be used at the same time"));
        }
        if self.no_rpc_server && self.wait_for_rpc {
            return Err(Exit::failed("--wait-for-rpc cannot be used with --no-rpc-server"));
        }
        if let Some(groups) = self.tpoint_group.as_deref().filter(|groups| !is_group_list(groups)) {
            return Err(Exit::failed(format!(
                "unknown trace point group in --tpoint-group {groups}"
            )));
        }
        if self.no_sandbox && !self.disk_dir.is_empty() {
            return Err(Exit::failed("--disk-dir cannot be used with --no-sandbox"));
        }
        Ok(())
    }

    /// The reactors' cores, and their CPUs if `--lcores` maps them.
    fn cores(&self) -> Result<(Vec<usize>, Option<Vec<Lcore>>), Exit> {
        let (cores, lcores): (Vec<usize>, _) = match (&self.cpumask, &self.lcores) {
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
        if let Some(main) = self.main_core
            && !cores.iter().any(|&core| core as u64 == main)
        {
            let text = format!("main core {main} (-p) is not among the reactors' cores");
            return Err(Exit::failed(text));
        }
        Ok((cores, lcores))
    }

    fn reactor_mode(&self) -> Mode {
        match (self.interrupt_mode, self.reactor_idle_us) {
            (true, _) => Mode::Sleep { after_us: 0 },
            (false, Some(after_us)) => Mode::Sleep { after_us },
            (false, None) => Mode::Poll,
        }
    }

    fn sandbox_mode(&self) -> SandboxMode {
        match (self.sandbox, self.no_sandbox) {
            (_, true) => SandboxMode::Off,
            (true, false) => SandboxMode::Required,
            (false, false) => SandboxMode::Available,
        }
    }

    fn check_memory(&self) -> Result<(), Exit> {
        let iova_mode = self.iova_mode.as_deref();
        if let Some(mode) = iova_mode.filter(|mode| !matches!(*mode, "pa" | "va")) {
            return Err(Exit::failed(format!("invalid --iova-mode {mode}: expected pa or va")));
        }
        if !self.no_huge {
            return Ok(());
        }
        if self.mem_size.is_none() {
            return Err(Exit::failed("--no-huge requires -s, the size of DPDK's memory"));
        }
        if self.single_file_segments || self.huge_unlink || self.huge_dir.is_some() {
            return Err(Exit::failed("--no-huge cannot be used with -g, -R or --huge-dir"));
        }
        if iova_mode == Some("pa") {
            return Err(Exit::failed("--no-huge cannot be used with --iova-mode pa"));
        }
        Ok(())
    }

    /// Without -u, -R, `--iova-mode va` and a negative -i, which ask for the behaviour that this
    /// program always has.
    fn without_effect(&self) -> Vec<&'static str> {
        let huge_dir = self.huge_dir.as_ref().is_some_and(|dir| !dir.is_empty());
        [
            ("--main-core", self.main_core.is_some()),
            ("--huge-dir (hugepages need no mount)", huge_dir),
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

#[cfg(test)]
mod tests;
