//! `framework_*`, `spdk_*` and `thread_*`: the program itself, its start and its threads.

use std::collections::HashMap;
use std::fs;
use std::rc::Rc;

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use vhost_blk::reactor::{read_tsc, ticks_per_second};

use super::{Answer, App, Methods, bdev, mask, vhost};
use crate::cli::{SPDK_VERSION, VERSION};
use crate::process;

/// How far the start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Startup {
    /// For `framework_start_init`, or for the first pass over the configuration.
    Waiting,
    /// `framework_start_init` has been called.
    Requested,
    /// All methods may be called.
    Running,
    /// The configuration could not be carried out; the process ends.
    Failed,
}

/// SPDK's subsystems in the order of their initialisation, and what each depends on. Those without
/// a counterpart here have an empty configuration.
pub(crate) const SUBSYSTEMS: [(&str, &[&str]); 12] = [
    ("scheduler", &[]),
    ("sock", &[]),
    ("iobuf", &[]),
    ("keyring", &[]),
    ("vmd", &[]),
    ("fsdev", &[]),
    ("accel", &["iobuf"]),
    ("bdev", &["accel", "vmd", "sock", "iobuf", "keyring"]),
    ("vhost_blk", &["bdev"]),
    ("scsi", &["bdev"]),
    ("nbd", &["bdev"]),
    ("vhost_scsi", &["scsi"]),
];

/// SPDK's number for the thread that serves the RPCs; the reactors' follow.
const APP_THREAD_ID: usize = 1;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("spdk_get_version", Phases::Both, |_, params| {
        params.none("spdk_get_version method requires no parameters")?;
        Ok(version())
    });
    methods.add_plain("spdk_kill_instance", Phases::Runtime, kill_instance);
    methods.add("framework_start_init", Phases::Startup, start_init);
    methods.add("framework_wait_init", Phases::Both, wait_init);
    methods.add_plain("framework_get_subsystems", Phases::Runtime, |_, params| {
        params.none("'framework_get_subsystems' requires no arguments")?;
        let show =
            |(name, needs): &(&str, &[&str])| json!({"subsystem": name, "depends_on": needs});
        Ok(SUBSYSTEMS.iter().map(show).collect())
    });
    methods.add_plain("framework_get_config", Phases::Runtime, get_config);
    methods.add_plain("framework_get_reactors", Phases::Runtime, get_reactors);
    methods.add_plain("thread_get_stats", Phases::Runtime, thread_stats);
}

fn version() -> Value {
    let numbers = SPDK_VERSION.trim_start_matches('v');
    let (numbers, suffix) = numbers.split_once('-').unwrap_or((numbers, ""));
    let mut numbers = numbers.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let suffix = if suffix.is_empty() { String::new() } else { format!("-{suffix}") };
    let mut next = || numbers.next().unwrap_or(0);
    json!({
        "version": VERSION,
        "fields": {
            "major": next(),
            "minor": next(),
            "patch": next(),
            "suffix": suffix,
        }
    })
}

fn kill_instance(_: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Kill {
        sig_name: Signal,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "UPPERCASE")]
    enum Signal {
        SigInt,
        SigTerm,
        SigQuit,
        SigHup,
        SigKill,
        SigUsr1,
    }
    let kill: Kill = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    process::raise(match kill.sig_name {
        Signal::SigInt => libc::SIGINT,
        Signal::SigTerm => libc::SIGTERM,
        Signal::SigQuit => libc::SIGQUIT,
        Signal::SigHup => libc::SIGHUP,
        Signal::SigKill => libc::SIGKILL,
        Signal::SigUsr1 => libc::SIGUSR1,
    });
    Ok(true.into())
}

async fn start_init(app: Rc<App>, params: Params) -> Answer {
    params.none("framework_start_init requires no parameters")?;
    app.startup.send_if_modified(|startup| {
        let first = *startup == Startup::Waiting;
        if first {
            *startup = Startup::Requested;
        }
        first
    });
    until_running(&app).await
}

async fn wait_init(app: Rc<App>, _: Params) -> Answer {
    until_running(&app).await
}

async fn until_running(app: &App) -> Answer {
    let mut startup = app.startup.subscribe();
    let ended = startup.wait_for(|s| matches!(s, Startup::Running | Startup::Failed)).await;
    match ended.map(|startup| *startup) {
        Ok(Startup::Running) => Ok(true.into()),
        _ => Err(RpcError::internal("framework_initialization failed")),
    }
}

fn get_config(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "there are no batches to keep")]
    struct Wanted {
        name: String,
        with_batches: Option<bool>,
    }
    let wanted: Wanted = params.decode(DecodeFailure::INVALID_ARGUMENTS)?;
    let options = app.options.borrow();
    let entries = match wanted.name.as_str() {
        "bdev" => bdev::config(app),
        "vhost_blk" => vhost::config(app),
        "iobuf" => options.iobuf.iter().map(|iobuf| iobuf.config()).collect(),
        "accel" => options.accel.iter().map(|accel| accel.config()).collect(),
        name if SUBSYSTEMS.iter().any(|(known, _)| *known == name) => vec![],
        name => {
            return Err(RpcError::invalid_params(format!("Subsystem '{name}' not found")));
        }
    };
    Ok(entries.into())
}

/// Jiffies that each processor has spent, by number: user, system, interrupts.
#[derive(Debug, Default)]
pub(crate) struct CpuTimes(HashMap<usize, [u64; 3]>);

impl CpuTimes {
    /// As they are now.
    pub(crate) fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    fn parse(stat: &str) -> Self {
        let parse = |line: &str| {
            let mut words = line.strip_prefix("cpu")?.split_ascii_whitespace();
            let cpu = words.next()?.parse().ok()?;
            let times: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
            Some((cpu, [*times.first()?, *times.get(2)?, *times.get(5)?]))
        };
        Self(stat.lines().filter_map(parse).collect())
    }

    fn since(&self, before: &Self, cpu: usize) -> [u64; 3] {
        let zero = [0; 3];
        let (now, before) =
            (self.0.get(&cpu).unwrap_or(&zero), before.0.get(&cpu).unwrap_or(&zero));
        std::array::from_fn(|i| now[i].saturating_sub(before[i]))
    }
}

fn get_reactors(app: &App, params: &Params) -> Answer {
    params.none("`framework_get_reactors` requires no arguments")?;
    let times = CpuTimes::read();
    let elapsed = ticks_since_start(app);
    let show = |(n, reactor): (usize, vhost_blk::ReactorInfo)| {
        let core = reactor.core.0;
        let [user, system, irq] = times.since(&app.cpu_times, core);
        json!({
            "lcore": core,
            "numa_id": numa_node(core),
            "tid": reactor.tid,
            "busy": reactor.busy_ticks,
            "idle": reactor.idle_ticks,
            "in_interrupt": reactor.in_interrupt,
            "irq": irq,
            "sys": system,
            "usr": user,
            "lw_threads": [{
                "name": format!("reactor_{core}"),
                "id": APP_THREAD_ID + 1 + n,
                "cpumask": mask([core]),
                "elapsed": elapsed,
            }],
        })
    };
    let reactors = app.control.target().reactors();
    Ok(json!({
        "tick_rate": ticks_per_second(),
        "pid": std::process::id(),
        "reactors": reactors.into_iter().enumerate().map(show).collect::<Vec<_>>(),
    }))
}

/// The thread that serves the RPCs, and one per reactor: queues are assigned to reactors, so a
/// controller has no thread of its own.
fn thread_stats(app: &App, params: &Params) -> Answer {
    params.none("'thread_get_stats' requires no arguments")?;
    let elapsed = ticks_since_start(app);
    let busy = own_busy_ticks().min(elapsed);
    let mut threads = vec![json!({
        "name": "app_thread",
        "id": APP_THREAD_ID,
        "cpumask": mask(allowed_cpus()),
        "busy": busy,
        "idle": elapsed - busy,
        "active_pollers_count": 0,
        "timed_pollers_count": 1,
        "paused_pollers_count": 0,
    })];
    for (n, reactor) in app.control.target().reactors().into_iter().enumerate() {
        threads.push(json!({
            "name": format!("reactor_{}", reactor.core.0),
            "id": APP_THREAD_ID + 1 + n,
            "cpumask": mask([reactor.core.0]),
            "busy": reactor.busy_ticks,
            "idle": reactor.idle_ticks,
            "active_pollers_count": reactor.queues,
            "timed_pollers_count": 0,
            "paused_pollers_count": 0,
        }));
    }
    Ok(json!({ "tick_rate": ticks_per_second(), "threads": threads }))
}

fn ticks_since_start(app: &App) -> u64 {
    read_tsc().saturating_sub(app.began)
}

/// How long this thread has run, in ticks.
fn own_busy_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = stat.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
    let ticks = nanoseconds.unwrap_or(0u128) * u128::from(ticks_per_second()) / 1_000_000_000;
    ticks as u64
}

/// The processors that this thread may run on.
fn allowed_cpus() -> Vec<usize> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.and_then(|list| crate::cli::parse_cores(&format!("[{}]", list.trim()))).unwrap_or_default()
}

/// The memory node of a processor; 0 where there is only one.
fn numa_node(cpu: usize) -> u32 {
    let entries = fs::read_dir(format!("/sys/devices/system/cpu/cpu{cpu}"));
    let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix("node")?.parse().ok()).next().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_processors_are_differences() {
        let before = CpuTimes::parse("cpu  9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7\ncpu12 1 1 1 1 1 1\n");
        let now = CpuTimes::parse("cpu0 11 2 33 4 5 66 7 8 9\ncpu12 0 0 0 0 0 9\nintr 5\ncpu3\n");
        assert_eq!(now.since(&before, 0), [10, 30, 60]);
        assert_eq!(now.since(&before, 12), [0, 0, 8]);
        assert_eq!(now.since(&before, 3), [0, 0, 0]);
    }

    #[test]
    fn the_version_is_that_of_the_spdk_it_stands_in_for() {
        let version = version();
        assert_eq!(version["fields"]["major"], 26);
        assert_eq!(version["fields"]["minor"], 9);
        assert_eq!(version["fields"]["patch"], 0);
        assert_eq!(version["fields"]["suffix"], "-pre");
    }

    #[test]
    fn subsystems_come_after_what_they_depend_on() {
        for (n, (name, needs)) in SUBSYSTEMS.iter().enumerate() {
            for need in *needs {
                assert!(SUBSYSTEMS[..n].iter().any(|(earlier, _)| earlier == need), "{name}");
            }
        }
    }
}
