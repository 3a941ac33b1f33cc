//! What `spdk_top` shows of each thread: pollers and I/O channels.
//!
//! SPDK registers functions that a thread calls in a loop. Here, a reactor polls the queues that it
//! serves, so each queue is shown as a poller of its controller's thread, and each reactor has one
//! poller. Runs are not counted for each queue: a reactor's poller shows the reactor's iterations.

use std::rc::Rc;

use reactor::ticks_per_second;
use rpc::{DecodeFailure, Params};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{Answer, App};
use super::{APP_THREAD_ID, THREAD_VALUES, controller_ids, queues, reactor_id};
use crate::devices;

/// The period at which SPDK polls its RPC sockets.
const RPC_PERIOD_MS: u64 = 4;

pub(super) async fn get_pollers(app: Rc<App>, params: Params) -> Answer {
    params.none("'thread_get_pollers' requires no arguments")?;
    let thread = |name: &str, id: u64, active: Vec<Value>, timed: Vec<Value>| {
        json!({
            "name": name,
            "id": id,
            "active_pollers": active,
            "timed_pollers": timed,
            "paused_pollers": [],
        })
    };
    let rpc = json!({
        "name": "rpc_subsystem_poll_servers",
        "id": 1,
        "state": "waiting",
        "run_count": 0,
        "busy_count": 0,
        "period_ticks": ticks_per_second() * RPC_PERIOD_MS / 1000,
    });
    let mut threads = vec![thread("app_thread", APP_THREAD_ID, vec![], vec![rpc])];
    let mut pace = params.pace();
    let reactors = app.control.target().reactors();
    for (n, reactor) in reactors.iter().enumerate() {
        let poller = poller("reactor_poll", 1, reactor.iterations);
        let name = format!("reactor_{}", reactor.core.0);
        threads.push(thread(&name, reactor_id(n), vec![poller], vec![]));
    }
    for controller in app.control.target().controllers() {
        let queue_pollers = (1..).zip(queues(&controller));
        let of = |(id, queue): (u64, &vhost_target::QueueInfo)| {
            poller(&format!("vdev_worker_{}", queue.ring), id, 0)
        };
        let id = controller_ids(reactors.len()) + controller.number;
        pace.spend(THREAD_VALUES * (1 + queues(&controller).count())).await;
        threads.push(thread(&controller.name, id, queue_pollers.map(of).collect(), vec![]));
    }
    Ok(json!({ "tick_rate": ticks_per_second(), "threads": threads }))
}

fn poller(name: &str, id: u64, runs: u64) -> Value {
    json!({
        "name": name,
        "id": id,
        "state": "waiting",
        "run_count": runs,
        "busy_count": 0,
    })
}

pub(super) async fn get_io_channels(app: Rc<App>, params: Params) -> Answer {
    params.none("'thread_get_io_channels' requires no arguments")?;
    let mut threads = vec![json!({ "name": "app_thread", "io_channels": [] })];
    let mut pace = params.pace();
    for controller in app.control.target().controllers() {
        // Each queue has channels of its own.
        let channels = devices::channels(&controller.device, queues(&controller)).into_iter();
        let channels: Vec<Value> = channels
            .map(|(bdev, count)| json!({ "name": format!("bdev_{bdev}"), "ref": count }))
            .collect();
        pace.spend(THREAD_VALUES + channels.len()).await;
        threads.push(json!({ "name": controller.name, "io_channels": channels }));
    }
    Ok(json!({ "tick_rate": ticks_per_second(), "threads": threads }))
}

/// SPDK reports when a reactor's thread is preempted. `framework_get_reactors` shows the times that
/// tell this here.
pub(super) fn monitor(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        enabled: Option<bool>,
    }
    let p: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let mut options = app.options.borrow_mut();
    // As in SPDK, an empty object disables it.
    if params.json().is_some() {
        options.monitors_context_switches = p.enabled.unwrap_or(false);
    }
    Ok(json!({ "enabled": options.monitors_context_switches }))
}
