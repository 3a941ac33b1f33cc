//! Reactors and threads: `framework_get_reactors`, `thread_*`.
//!
//! SPDK runs a thread for each controller, which a reactor schedules. Here, reactors serve queues.
//! To fit SPDK's tools, the answers show one thread for each reactor, with the reactor's times, and
//! one for each controller, which represents its queues: it appears on each reactor that serves one
//! of them, and its mask is the set of cores that may serve them.

use std::collections::HashMap;
use std::fs;
use std::rc::Rc;

use reactor::{read_tsc, ticks_per_second};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;
use vhost_target::{ControllerInfo, Core, QueueInfo};

mod busy;
mod pollers;

pub(super) use busy::BusyTimes;

use super::vhost::controller_mask;
use super::{Answer, App, Methods, mask};
use crate::cli::parse_cores;

/// SPDK's id of the thread that serves RPCs. The reactors' ids follow, then the controllers' ids.
const APP_THREAD_ID: u64 = 1;

/// JSON values of a thread, approximately.
const THREAD_VALUES: usize = 12;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("framework_get_reactors", Phases::Runtime, get_reactors);
    methods.add("thread_get_stats", Phases::Runtime, thread_stats);
    methods.add("thread_set_cpumask", Phases::Runtime, set_cpumask);
    methods.add("thread_get_pollers", Phases::Runtime, pollers::get_pollers);
    methods.add("thread_get_io_channels", Phases::Runtime, pollers::get_io_channels);
    methods.add_plain("framework_monitor_context_switch", Phases::Runtime, pollers::monitor);
}

async fn get_reactors(app: Rc<App>, params: Params) -> Answer {
    params.none("`framework_get_reactors` requires no arguments")?;
    let times = CpuTimes::read();
    let (reactors, controllers) =
        (app.control.target().reactors(), app.control.target().controllers());
    let first = controller_ids(reactors.len());
    let (mut pace, mut shown) = (params.pace(), vec![]);
    for (n, reactor) in reactors.iter().enumerate() {
        let core = reactor.core.0;
        let [user, system, irq] = times.since(&app.cpu_times, core);
        let mut threads = vec![json!({
            "name": format!("reactor_{core}"),
            "id": reactor_id(n),
            "cpumask": mask([core]),
            "elapsed": ticks_since(app.began),
        })];
        for controller in &controllers {
            pace.spend(1 + queues(controller).count()).await;
            if is_on(controller, reactor.core) {
                threads.push(json!({
                    "name": controller.name,
                    "id": first + controller.number,
                    "cpumask": controller_mask(controller),
                    "elapsed": ticks_since(controller.made_ticks),
                }));
                pace.spend(THREAD_VALUES).await;
            }
        }
        shown.push(json!({
            "lcore": core,
            "numa_id": numa_node(core),
            "tid": reactor.tid,
            "busy": reactor.busy_ticks,
            "idle": reactor.idle_ticks,
            "in_interrupt": reactor.in_interrupt,
            "irq": irq,
            "sys": system,
            "usr": user,
            "lw_threads": threads,
        }));
        pace.spend(THREAD_VALUES).await;
    }
    Ok(json!({
        "tick_rate": ticks_per_second(),
        "pid": std::process::id(),
        "reactors": shown,
        // Accounts with an fd whose close blocks.
        "stuck_closes": stuck_closes(),
    }))
}

fn stuck_closes() -> Vec<Value> {
    let stuck = closer::stuck().into_iter();
    stuck.map(|stuck| json!({"name": stuck.name, "waiting": stuck.waiting})).collect()
}

async fn thread_stats(app: Rc<App>, params: Params) -> Answer {
    params.none("'thread_get_stats' requires no arguments")?;
    let elapsed = ticks_since(app.began);
    let busy = own_busy_ticks().min(elapsed);
    let mut threads = vec![json!({
        "name": "app_thread",
        "id": APP_THREAD_ID,
        "cpumask": mask(first_core(&app)),
        "busy": busy,
        "idle": elapsed - busy,
        "active_pollers_count": 0,
        "timed_pollers_count": 1,
        "paused_pollers_count": 0,
    })];
    let mut pace = params.pace();
    let reactors = app.control.target().reactors();
    for (n, reactor) in reactors.iter().enumerate() {
        threads.push(json!({
            "name": format!("reactor_{}", reactor.core.0),
            "id": reactor_id(n),
            "cpumask": mask([reactor.core.0]),
            "busy": reactor.busy_ticks,
            "idle": reactor.idle_ticks,
            "active_pollers_count": reactor.queues,
            "timed_pollers_count": 0,
            "paused_pollers_count": 0,
        }));
    }
    let controllers = app.control.target().controllers();
    app.busy_times.borrow_mut().update(&reactors, &controllers);
    for controller in controllers {
        let elapsed = ticks_since(controller.made_ticks);
        let busy = app.busy_times.borrow().of(controller.number).min(elapsed);
        threads.push(json!({
            "name": controller.name,
            "id": controller_ids(reactors.len()) + controller.number,
            "cpumask": controller_mask(&controller),
            "busy": busy,
            "idle": elapsed - busy,
            "active_pollers_count": queues(&controller).count(),
            "timed_pollers_count": 0,
            "paused_pollers_count": 0,
        }));
        pace.spend(THREAD_VALUES + queues(&controller).count()).await;
    }
    Ok(json!({ "tick_rate": ticks_per_second(), "threads": threads }))
}

/// The parameters of `thread_set_cpumask`.
#[derive(Deserialize)]
struct Placement {
    id: u64,
    cpumask: String,
}

impl Placement {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::PARAMS)
    }

    fn cores(&self) -> Result<Vec<usize>, RpcError> {
        let invalid = || RpcError::internal(format!("Invalid cpumask {}", self.cpumask));
        parse_cores(&self.cpumask).ok_or_else(invalid)
    }
}

/// Checks the parameters of `thread_set_cpumask`.
pub(super) fn check_cpumask(params: &Params) -> Result<(), RpcError> {
    Placement::decode(params)?.cores().map(drop)
}

/// Moves a controller's queues to the cores of a mask, and answers after the move.
async fn set_cpumask(app: Rc<App>, params: Params) -> Answer {
    let placement = Placement::decode(&params)?;
    let id = placement.id;
    let reactors = app.control.target().reactors();
    let first = controller_ids(reactors.len());
    let controllers = app.control.target().controllers();
    let found = controllers.into_iter().find(|c| first + c.number == id);
    if found.is_none() && !(APP_THREAD_ID..first).contains(&id) {
        return Err(RpcError::invalid_params(format!("Thread {id} does not exist")));
    }
    let requested = placement.cores()?;
    // As in SPDK, cores without a reactor are ignored.
    let has_reactor = |core: &usize| reactors.iter().any(|reactor| reactor.core.0 == *core);
    let cores: Vec<Core> = requested.into_iter().filter(has_reactor).map(Core).collect();
    if cores.is_empty() {
        let all = mask(reactors.iter().map(|reactor| reactor.core.0));
        return Err(RpcError::internal(format!("No CPU is selected from reactor mask {all}")));
    }
    let Some(controller) = found else {
        if id == APP_THREAD_ID {
            // In SPDK, this sets where the scheduler may put the thread. Here it has no core.
            return Ok(true.into());
        }
        error!("thread_set_cpumask: thread {id} cannot move; only controllers' threads can");
        return Err(RpcError::with_strerror(RpcError::INVALID_PARAMS, libc::EOPNOTSUPP));
    };
    params.let_next_start();
    app.control.set_cores(controller.name, cores).await.map_err(|e| {
        error!("thread_set_cpumask: {e}");
        RpcError::with_strerror(RpcError::INTERNAL, e.errno())
    })?;
    Ok(true.into())
}

fn reactor_id(n: usize) -> u64 {
    APP_THREAD_ID + 1 + n as u64
}

/// The id of the first controller's thread.
pub(super) fn controller_ids(reactors: usize) -> u64 {
    reactor_id(reactors)
}

fn queues(controller: &ControllerInfo) -> impl Iterator<Item = &QueueInfo> {
    controller.sessions.iter().flat_map(|session| &session.queues)
}

/// Whether the reactor serves a queue of the controller. A controller without queues is shown on
/// its first core.
fn is_on(controller: &ControllerInfo, core: Core) -> bool {
    match queues(controller).next() {
        Some(_) => queues(controller).any(|queue| queue.core == core),
        None => controller.cores.first() == Some(&core),
    }
}

fn ticks_since(then: u64) -> u64 {
    read_tsc().saturating_sub(then)
}

/// Jiffies that each processor has spent, by number: user, system, interrupts.
#[derive(Debug, Default)]
pub(crate) struct CpuTimes(HashMap<usize, [u64; 3]>);

impl CpuTimes {
    /// Reads the current times.
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

/// How long this thread has run, in ticks.
fn own_busy_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = stat.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
    let ticks = nanoseconds.unwrap_or(0u128) * u128::from(ticks_per_second()) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The core that SPDK calls the main core, on which its thread for RPCs runs.
fn first_core(app: &App) -> Option<usize> {
    app.control.target().reactors().first().map(|reactor| reactor.core.0)
}

/// The NUMA node of a processor; 0 on a machine with one node.
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
}
