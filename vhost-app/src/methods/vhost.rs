//! `vhost_*` for controllers of every kind: show, delete and save them, move their queues.

use std::rc::Rc;
use std::time::Duration;

use bdev::{Op, UserCounts};
use reactor::Cause;
use rpc::{DecodeFailure, Pace, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;
use vhost_target::session::Phase;
use vhost_target::{
    ControllerInfo, Core, IOPS_THRESHOLD_DEFAULT, QueueInfo, ReactorInfo, SessionInfo,
};

use super::{Answer, App, Methods, mask};
use crate::cli::parse_cores;
use crate::control::DeleteOptions;
use crate::devices;

/// Default of `timeout_ms` of `vhost_delete_controller`.
const DELETE_TIMEOUT_MS: u64 = 5000;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("vhost_delete_controller", Phases::Runtime, delete);
    methods.add("vhost_get_controllers", Phases::Runtime, |app, params| get(app, params, describe));
    methods.add("vhost_get_controller_stats", Phases::Runtime, |app, params| {
        get(app, params, describe_whole)
    });
    methods.add_plain("vhost_controller_set_coalescing", Phases::Runtime, set_coalescing);
    methods.add_plain("vhost_get_reactor_turns", Phases::Runtime, reactor_turns);
    methods.add("vhost_move_queue", Phases::Runtime, move_queue);
}

/// Logs the reason and returns SPDK's answer: -32602 with the errno's text.
pub(super) fn refused(method: &str, errno: i32, reason: impl std::fmt::Display) -> RpcError {
    error!("{method}: {reason}");
    RpcError::with_strerror(RpcError::INVALID_PARAMS, errno)
}

/// The cores of the parameter `cpumask`, if it is given.
pub(super) fn cores(method: &str, cpumask: Option<&str>) -> Result<Option<Vec<Core>>, RpcError> {
    let Some(text) = cpumask else { return Ok(None) };
    match parse_cores(text) {
        Some(cores) => Ok(Some(cores.into_iter().map(Core).collect())),
        None => Err(refused(method, libc::EINVAL, format_args!("invalid cpumask {text:?}"))),
    }
}

/// A limit on a wait, from a parameter in milliseconds.
pub(super) fn limit(timeout_ms: Option<u64>, default_ms: u64) -> Duration {
    /// A hundred years. Longer times may overflow when they are added to the current time.
    const MAX_MS: u64 = 100 * 365 * 24 * 3600 * 1000;
    Duration::from_millis(timeout_ms.unwrap_or(default_ms).min(MAX_MS))
}

#[derive(Deserialize)]
struct Delete {
    ctrlr: String,
    /// Not in SPDK: limit on the wait for front ends to disconnect; 0 does not wait.
    timeout_ms: Option<u64>,
    /// Not in SPDK: close the connections instead of waiting for front ends to disconnect.
    #[serde(default)]
    force: bool,
}

async fn delete(app: Rc<App>, params: Params) -> Answer {
    let p: Delete = params.decode(DecodeFailure::INVALID_ARGUMENT)?;
    let options = DeleteOptions { timeout: limit(p.timeout_ms, DELETE_TIMEOUT_MS), force: p.force };
    let number = app.control.target().controller(&p.ctrlr).map(|controller| controller.number);
    // Polled only if the deletion has to wait for front ends. Without them, it ends before the
    // client's next request, which may create a controller of this name.
    let waiting_and_gone = async {
        params.let_next_start();
        params.client().gone().await;
    };
    app.control
        .delete_controller(&p.ctrlr, options, waiting_and_gone)
        .await
        .map_err(|e| refused(params.method(), e.errno(), e))?;
    if let Some(number) = number {
        app.served.remove_controller(number);
    }
    Ok(true.into())
}

/// Describes all controllers, or the one of a name.
async fn get(app: Rc<App>, params: Params, describe: fn(&ControllerInfo) -> Value) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: Option<String>,
    }
    let request: Request = params.decode(DecodeFailure::INTERNAL_ARGUMENT)?;
    let target = app.control.target();
    let Some(name) = request.name else {
        let mut pace = params.pace();
        let mut described = vec![];
        for controller in target.controllers() {
            let shown = describe(&controller);
            let work = values(&controller, &shown);
            described.push(shown);
            pace.spend(work).await;
        }
        return Ok(described.into());
    };
    match target.controller(&name) {
        Some(controller) => Ok(json!([describe(&controller)])),
        None => Err(RpcError::with_strerror(RpcError::INTERNAL, libc::ENODEV)),
    }
}

/// Not in SPDK: each reactor's longest poll iteration, and what the reactor did in it.
fn reactor_turns(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        /// Restrict the next answer to the iterations after this one.
        #[serde(default)]
        reset: bool,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let reactors = app.control.target().longest_iterations(request.reset).into_iter();
    let describe = |(reactor, longest_us, causes): (ReactorInfo, f64, Vec<Cause>)| {
        json!({
            "lcore": reactor.core.0,
            "turns": reactor.iterations,
            "sleeps": reactor.sleeps,
            "longest_turn_us": longest_us,
            "causes": causes.into_iter().map(Cause::as_str).collect::<Vec<_>>(),
        })
    };
    Ok(reactors.map(describe).collect())
}

/// Not in SPDK: moves a queue to another core, and answers after the move.
async fn move_queue(app: Rc<App>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Move {
        ctrlr: String,
        /// The session's `id`; required if the controller has several.
        session: Option<u32>,
        queue: usize,
        core: usize,
    }
    let p: Move = params.decode(DecodeFailure::INVALID_ARGUMENT)?;
    params.let_next_start();
    app.control
        .move_queue(p.ctrlr, p.session, p.queue, Core(p.core))
        .await
        .map_err(|e| refused(params.method(), e.errno(), e))?;
    Ok(true.into())
}

/// With SPDK's keys only: some clients read no more than 8 KiB of the answer.
fn describe(controller: &ControllerInfo) -> Value {
    let session = |s| describe_session(&controller.name, s);
    json!({
        "ctrlr": controller.name,
        "cpumask": format!("0x{}", controller_mask(controller)),
        "delay_base_us": controller.delay_base_us,
        "iops_threshold": controller.iops_threshold,
        "socket": controller.socket.display().to_string(),
        "sessions": controller.sessions.iter().map(session).collect::<Vec<_>>(),
        "backend_specific": devices::describe(&controller.device),
    })
}

/// Not in SPDK: the same, with the state of each session and its queues, counters, and the file
/// descriptors that the front ends have sent.
fn describe_whole(controller: &ControllerInfo) -> Value {
    let mut shown = describe(controller);
    shown["fds"] = json!({
        "open": controller.fds,
        "closing": controller.fds_closing,
        "stuck": controller.fds_stuck,
    });
    shown["io"] = describe_counts(&devices::counts(&controller.device));
    shown["started"] = (!controller.delayed).into();
    // `IndexMut` would add the key to a controller of another kind.
    let targets = shown["backend_specific"].get_mut("scsi").and_then(Value::as_array_mut);
    let targets = targets.into_iter().flatten();
    for (shown, disk) in targets.zip(devices::disks(&controller.device)) {
        shown["io"] = describe_counts(&disk.counts);
    }
    let described = shown["sessions"].as_array_mut().into_iter().flatten();
    for (shown, session) in described.zip(&controller.sessions) {
        shown["state"] = session.phase.as_str().into();
        shown["quarantined_bytes"] = session.quarantined_bytes.into();
        shown["requests"] = session.requests.into();
        shown["errors"] = session.errors.into();
        shown["queues"] = session.queues.iter().map(describe_queue).collect();
    }
    shown
}

/// What a controller's queues have done since it was created, also those that have stopped.
fn describe_counts(counts: &UserCounts) -> Value {
    let of = |op: Op| counts.ops[op as usize];
    let (read, write) = (of(Op::Read), of(Op::Write));
    json!({
        "num_read_ops": read.count.saturating_sub(read.errors),
        "bytes_read": read.bytes,
        "read_latency_ticks": read.ticks,
        "num_write_ops": write.count.saturating_sub(write.errors),
        "bytes_written": write.bytes,
        "write_latency_ticks": write.ticks,
        "num_unmap_ops": of(Op::Unmap).count.saturating_sub(of(Op::Unmap).errors),
        "num_write_zeroes_ops": of(Op::WriteZeroes).count.saturating_sub(of(Op::WriteZeroes).errors),
        "num_flush_ops": of(Op::Flush).count.saturating_sub(of(Op::Flush).errors),
        "failed": counts.ops.iter().map(|op| op.errors).sum::<u64>(),
        "throttled": counts.throttled,
    })
}

/// JSON values in a controller's description, approximately.
fn values(controller: &ControllerInfo, shown: &Value) -> usize {
    let of_session = |session: &SessionInfo| 12 + 4 * session.queues.len();
    let targets = shown["backend_specific"]["scsi"].as_array().map_or(0, Vec::len);
    35 + 15 * targets + controller.sessions.iter().map(of_session).sum::<usize>()
}

pub(super) fn controller_mask(controller: &ControllerInfo) -> String {
    mask(controller.cores.iter().map(|core| core.0))
}

fn describe_session(controller: &str, session: &SessionInfo) -> Value {
    json!({
        "vid": session.vid,
        "id": session.id,
        "name": format!("{controller}s{}", session.vid),
        "started": matches!(session.phase, Phase::Running | Phase::Quiescing),
        "max_queues": session.rings,
        "inflight_task_cnt": session.inflight,
    })
}

fn describe_queue(queue: &QueueInfo) -> Value {
    json!({ "queue": queue.ring, "core": queue.core.0, "inflight": queue.inflight })
}

#[derive(Deserialize)]
struct Coalescing {
    ctrlr: String,
    delay_base_us: u32,
    iops_threshold: u32,
}

impl Coalescing {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode(DecodeFailure::INVALID_ARGUMENT)
    }
}

/// Checks the parameters of `vhost_controller_set_coalescing`, as the target does.
pub(super) fn check_coalescing(params: &Params) -> Result<(), RpcError> {
    let p = Coalescing::decode(params)?;
    vhost_target::check_coalescing(p.delay_base_us, p.iops_threshold)
        .map_err(|e| refused(params.method(), e.errno(), e))
}

fn set_coalescing(app: &App, params: &Params) -> Answer {
    let p = Coalescing::decode(params)?;
    app.control
        .target()
        .set_coalescing(&p.ctrlr, p.delay_base_us, p.iops_threshold)
        .map_err(|e| refused(params.method(), e.errno(), e))?;
    Ok(true.into())
}

/// JSON values in a controller's part of a configuration, approximately.
const CONFIG_VALUES: usize = 16;

/// The entries of a saved configuration that recreate the controllers. `create`: the calls that
/// create one of them, none if it belongs to another section or cannot be created again.
pub(super) async fn config(
    app: &App,
    pace: &mut Pace,
    create: fn(&ControllerInfo) -> Vec<Value>,
) -> Vec<Value> {
    let mut entries = vec![];
    for controller in app.control.target().controllers() {
        pace.spend(CONFIG_VALUES).await;
        let calls = if controller.deleting { vec![] } else { create(&controller) };
        let (delay, threshold) = (controller.delay_base_us, controller.iops_threshold);
        let coalesces = !calls.is_empty() && (delay, threshold) != (0, IOPS_THRESHOLD_DEFAULT);
        pace.spend(calls.len() * CONFIG_VALUES / 2).await;
        entries.extend(calls);
        if coalesces {
            entries.push(json!({
                "method": "vhost_controller_set_coalescing",
                "params": {
                    "ctrlr": controller.name,
                    "delay_base_us": delay,
                    "iops_threshold": threshold,
                }
            }));
        }
    }
    entries
}
