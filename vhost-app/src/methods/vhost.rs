//! `vhost_*` and `virtio_blk_*`: controllers and their sessions.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::{ClaimKind, Op, UserCounts};
use reactor::Cause;
use rpc::{DecodeFailure, Pace, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;
use vhost_blk::Blk;
use vhost_target::IOPS_THRESHOLD_DEFAULT;
use vhost_target::device::Device;
use vhost_target::session::Phase;
use vhost_target::{ControllerInfo, ControllerSpec, Core, QueueInfo, ReactorInfo, SessionInfo};

use super::{Answer, App, Methods, mask};
use crate::cli::parse_cores;
use crate::control::DeleteOptions;

/// The one transport.
const TRANSPORT: &str = "vhost_user_blk";

/// Default of `timeout_ms` of `vhost_delete_controller`.
const DELETE_TIMEOUT_MS: u64 = 5000;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("vhost_create_blk_controller", Phases::Runtime, create);
    methods.add("vhost_delete_controller", Phases::Runtime, delete);
    methods.add("vhost_get_controllers", Phases::Runtime, |app, params| get(app, params, describe));
    methods.add("vhost_get_controller_stats", Phases::Runtime, |app, params| {
        get(app, params, describe_whole)
    });
    methods.add_plain("vhost_controller_set_coalescing", Phases::Runtime, set_coalescing);
    methods.add_plain("vhost_get_reactor_turns", Phases::Runtime, reactor_turns);
    methods.add("vhost_move_queue", Phases::Runtime, move_queue);
    methods.add_plain("virtio_blk_create_transport", Phases::Runtime, |_, params| {
        create_transport(params)
    });
    methods.add_plain("virtio_blk_get_transports", Phases::Runtime, get_transports);
}

/// Logs the reason and returns SPDK's answer: -32602 with the errno's text.
fn refused(method: &str, errno: i32, reason: impl std::fmt::Display) -> RpcError {
    error!("{method}: {reason}");
    RpcError::with_strerror(RpcError::INVALID_PARAMS, errno)
}

#[derive(Deserialize)]
struct Create {
    ctrlr: String,
    dev_name: String,
    cpumask: Option<String>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    packed_ring: bool,
    transport: Option<String>,
}

impl Create {
    fn decode(params: &Params) -> Result<Self, RpcError> {
        params.decode_relaxed(DecodeFailure::INVALID_ARGUMENT)
    }

    fn check_transport(&self, method: &str) -> Result<(), RpcError> {
        match self.transport.as_deref() {
            Some(other) if !other.eq_ignore_ascii_case(TRANSPORT) => {
                Err(refused(method, libc::EINVAL, format_args!("unknown transport {other:?}")))
            }
            _ => Ok(()),
        }
    }

    /// The cores of `cpumask`, if it is given.
    fn cores(&self, method: &str) -> Result<Option<Vec<Core>>, RpcError> {
        let Some(text) = self.cpumask.as_deref() else { return Ok(None) };
        match parse_cores(text) {
            Some(cores) => Ok(Some(cores.into_iter().map(Core).collect())),
            None => Err(refused(method, libc::EINVAL, format_args!("invalid cpumask {text:?}"))),
        }
    }
}

/// Checks those parameters of `vhost_create_blk_controller` that name no other object, as the
/// method does, and the controller's name, as the target does.
pub(super) fn check_create(params: &Params, socket_dir: &Path) -> Result<(), RpcError> {
    let (method, p) = (params.method(), Create::decode(params)?);
    p.check_transport(method)?;
    p.cores(method)?;
    vhost_target::check_name(&p.ctrlr, &socket_dir.join(&p.ctrlr))
        .map_err(|e| refused(method, e.errno(), e))
}

async fn create(app: Rc<App>, params: Params) -> Answer {
    let (method, p) = (params.method(), Create::decode(&params)?);
    p.check_transport(method)?;
    let Some(bdev) = app.bdevs.bdev(&p.dev_name) else {
        return Err(refused(method, libc::ENODEV, format_args!("unknown bdev {:?}", p.dev_name)));
    };
    let claim = app.bdevs.claim(&bdev, ClaimKind::Served, &p.ctrlr).map_err(|_| {
        let reason = format_args!("bdev {} is claimed by a bdev on top of it", bdev.name());
        refused(method, libc::EPERM, reason)
    })?;
    let cores = p.cores(method)?;
    let device: Arc<dyn Device> = Blk::new(Arc::clone(&bdev), p.readonly);
    let spec = ControllerSpec {
        socket: app.control.socket_path(&p.ctrlr),
        device: Arc::clone(&device),
        name: p.ctrlr.clone(),
        cores,
        packed_ring: p.packed_ring,
    };
    let created = app.control.create_controller(spec).await;
    if !app.bdevs.holds(&bdev) {
        // The bdev was deleted before the controller existed, so the deletion did not remove it
        // from the controller.
        vhost_blk::remove_bdev(app.control.target(), &bdev);
    }
    drop(bdev);
    app.control.notify();
    created.map_err(|e| refused(method, e.errno(), e))?;
    // Another client may have deleted it since.
    let exists = app.control.target().controllers().iter().any(|c| Arc::ptr_eq(&c.device, &device));
    if exists {
        app.served.borrow_mut().insert(p.ctrlr, claim);
    }
    Ok(true.into())
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
    let timeout = Duration::from_millis(p.timeout_ms.unwrap_or(DELETE_TIMEOUT_MS).min(MAX_MS));
    let options = DeleteOptions { timeout, force: p.force };
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
    // A controller that was created anew meanwhile has a claim of its own.
    if app.control.target().controller_id(&p.ctrlr).is_none() {
        app.served.borrow_mut().remove(&p.ctrlr);
    }
    Ok(true.into())
}

/// A hundred years. Longer times may overflow when they are added to the current time.
const MAX_MS: u64 = 100 * 365 * 24 * 3600 * 1000;

/// Describes all controllers, or the one of a name.
async fn get(app: Rc<App>, params: Params, describe: fn(&ControllerInfo) -> Value) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: Option<String>,
    }
    let request: Request = params.decode(DecodeFailure::INTERNAL_ARGUMENT)?;
    let all = app.control.target().controllers();
    let Some(name) = request.name else {
        let mut pace = params.pace();
        let mut described = vec![];
        for controller in all {
            described.push(describe(&controller));
            pace.spend(values(&controller)).await;
        }
        return Ok(described.into());
    };
    match all.iter().find(|controller| controller.name == name) {
        Some(controller) => Ok(json!([describe(controller)])),
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
    let blk = Blk::of(&controller.device);
    json!({
        "ctrlr": controller.name,
        "cpumask": format!("0x{}", controller_mask(controller)),
        "delay_base_us": controller.delay_base_us,
        "iops_threshold": controller.iops_threshold,
        "socket": controller.socket.display().to_string(),
        "sessions": controller.sessions.iter().map(session).collect::<Vec<_>>(),
        "backend_specific": {
            "block": {
                "readonly": blk.is_some_and(Blk::read_only),
                "bdev": blk.and_then(Blk::bdev),
                "transport": TRANSPORT,
            }
        },
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
    let counts = Blk::of(&controller.device).map(Blk::counts).unwrap_or_default();
    shown["io"] = describe_counts(&counts);
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
fn values(controller: &ControllerInfo) -> usize {
    let of_session = |session: &SessionInfo| 12 + 4 * session.queues.len();
    35 + controller.sessions.iter().map(of_session).sum::<usize>()
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

pub(super) fn create_transport(params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: String,
    }
    let p: Request = params.decode_relaxed(DecodeFailure::EINVAL)?;
    let is_ours = p.name.eq_ignore_ascii_case(TRANSPORT);
    Err(RpcError::errno(if is_ours { libc::EEXIST } else { libc::ENOENT }))
}

fn get_transports(_: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        name: Option<String>,
    }
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    if request.name.is_some_and(|name| !name.eq_ignore_ascii_case(TRANSPORT)) {
        return Err(RpcError::errno(libc::ENODEV));
    }
    Ok(json!([{ "name": TRANSPORT }]))
}

/// JSON values in a controller's part of a configuration, approximately.
const CONFIG_VALUES: usize = 16;

/// The entries of a saved configuration that recreate the controllers. A controller whose bdev was
/// removed is left out, as in SPDK.
pub(super) async fn config(app: &App, pace: &mut Pace) -> Vec<Value> {
    let mut entries = vec![];
    for controller in app.control.target().controllers() {
        pace.spend(CONFIG_VALUES).await;
        let Some(blk) = Blk::of(&controller.device).filter(|_| !controller.deleting) else {
            continue;
        };
        let Some(bdev) = blk.bdev() else { continue };
        entries.push(json!({
            "method": "vhost_create_blk_controller",
            "params": {
                "ctrlr": controller.name,
                "dev_name": bdev,
                "cpumask": controller_mask(&controller),
                "readonly": blk.read_only(),
                // Not in SPDK, whose saved configurations lose it.
                "packed_ring": controller.packed_ring,
                "transport": TRANSPORT,
            }
        }));
        let (delay, threshold) = (controller.delay_base_us, controller.iops_threshold);
        if (delay, threshold) != (0, IOPS_THRESHOLD_DEFAULT) {
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
