//! `framework_*_scheduler`, `scheduler_set_options`: SPDK's schedulers move controllers' threads
//! between cores. Here a queue stays where it is until an operator moves it, so these options are
//! kept and shown, as scripts and `spdk_top` expect, but move nothing.

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{error, info};

use super::options::SubsystemOptions;
use super::{Answer, App, Methods, mask};
use crate::cli::parse_cores;

/// The period that SPDK sets if none is given, in microseconds.
const PERIOD_DEFAULT: u64 = 1_000_000;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("framework_set_scheduler", Phases::Both, |app, params| {
        set(&mut app.options.borrow_mut(), params)?;
        Ok(true.into())
    });
    methods.add_plain("framework_get_scheduler", Phases::Both, get);
    methods.add_plain("framework_get_governor", Phases::Runtime, |_, params| {
        params.none("'rpc_get_governor' requires no arguments")?;
        Ok(json!({}))
    });
    methods.add_plain("scheduler_set_options", Phases::Startup, |app, params| {
        let reactors = app.control.target().reactors();
        let cores: Vec<usize> = reactors.iter().map(|reactor| reactor.core.0).collect();
        set_options(&mut app.options.borrow_mut(), &cores, params)?;
        Ok(true.into())
    });
}

/// The kept options.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    current: Current,
    /// The parameters of `scheduler_set_options`, if it was called.
    options: Option<Options>,
}

/// The scheduler that `framework_set_scheduler` chose.
#[derive(Clone, Debug, Default)]
enum Current {
    #[default]
    Static,
    Dynamic(Dynamic),
}

/// Options of the scheduler `dynamic`. Limits are in percent.
#[derive(Clone, Debug)]
struct Dynamic {
    /// In microseconds.
    period: u64,
    load_limit: u8,
    core_limit: u8,
    core_busy: u8,
}

impl Default for Dynamic {
    fn default() -> Self {
        Self { period: PERIOD_DEFAULT, load_limit: 20, core_limit: 80, core_busy: 95 }
    }
}

impl Dynamic {
    fn limits(&self) -> [(&'static str, u8); 3] {
        [
            ("load_limit", self.load_limit),
            ("core_limit", self.core_limit),
            ("core_busy", self.core_busy),
        ]
    }
}

#[derive(Clone, Debug, Deserialize)]
struct Options {
    scheduling_core: Option<u32>,
    isolated_core_mask: Option<String>,
}

impl Scheduler {
    /// The calls that set the options again. Unlike SPDK's, they include the limits.
    pub(super) fn config(&self) -> Vec<Value> {
        let mut calls = vec![];
        if let Some(options) = &self.options {
            let mut params = Map::new();
            let given = options.scheduling_core.map(Value::from);
            params.extend(given.map(|core| ("scheduling_core".to_owned(), core)));
            let given = options.isolated_core_mask.clone().map(Value::from);
            params.extend(given.map(|mask| ("isolated_core_mask".to_owned(), mask)));
            calls.push(json!({ "method": "scheduler_set_options", "params": params }));
        }
        let mut params = Map::new();
        match &self.current {
            Current::Static => drop(params.insert("name".into(), "static".into())),
            Current::Dynamic(dynamic) => {
                params.insert("name".into(), "dynamic".into());
                params.insert("period".into(), dynamic.period.into());
                let defaults = Dynamic::default().limits();
                for (limit, default) in dynamic.limits().into_iter().zip(defaults) {
                    if limit != default {
                        params.insert(limit.0.into(), limit.1.into());
                    }
                }
            }
        }
        calls.push(json!({ "method": "framework_set_scheduler", "params": params }));
        calls
    }
}

pub(super) fn set(options: &mut SubsystemOptions, params: &Params) -> Result<(), RpcError> {
    #[derive(Deserialize)]
    struct Request {
        name: String,
        period: Option<u64>,
        load_limit: Option<u8>,
        core_limit: Option<u8>,
        core_busy: Option<u8>,
        mappings: Option<String>,
    }
    let p: Request = params.decode_relaxed(DecodeFailure::INVALID_PARAMETERS)?;
    let has_limits = p.load_limit.or(p.core_limit).or(p.core_busy).is_some();
    let current = match p.name.as_str() {
        "static" if !has_limits => Current::Static,
        "dynamic" if p.mappings.is_none() => {
            let before = match &options.scheduler.current {
                Current::Dynamic(before) => before.clone(),
                Current::Static => Dynamic::default(),
            };
            Current::Dynamic(Dynamic {
                period: p.period.unwrap_or(before.period),
                load_limit: p.load_limit.unwrap_or(before.load_limit),
                core_limit: p.core_limit.unwrap_or(before.core_limit),
                core_busy: p.core_busy.unwrap_or(before.core_busy),
            })
        }
        name => {
            error!("framework_set_scheduler: unknown scheduler {name:?}, or invalid options");
            return Err(RpcError::with_strerror(RpcError::INTERNAL, libc::EINVAL));
        }
    };
    options.scheduler.current = current;
    info!("framework_set_scheduler: saved, but without effect: queues stay on their cores");
    Ok(())
}

fn get(app: &App, params: &Params) -> Answer {
    params.none("'rpc_get_scheduler' requires no arguments")?;
    let options = app.options.borrow();
    let scheduler = &options.scheduler;
    let (name, period) = match &scheduler.current {
        Current::Static => ("static", 0),
        Current::Dynamic(dynamic) => ("dynamic", dynamic.period),
    };
    let first_core = app.control.target().reactors().first().map_or(0, |reactor| reactor.core.0);
    let set = scheduler.options.as_ref();
    let isolated = set.and_then(|set| set.isolated_core_mask.as_deref()).and_then(parse_cores);
    let core = set.and_then(|set| set.scheduling_core).map_or(json!(first_core), Value::from);
    let mut shown = json!({
        "scheduler_name": name,
        "scheduler_period": period,
        "isolated_core_mask": mask(isolated.unwrap_or_default()),
        "scheduling_core": core,
    });
    if let Current::Dynamic(dynamic) = &scheduler.current {
        for (limit, value) in dynamic.limits() {
            shown[limit] = value.into();
        }
    }
    Ok(shown)
}

/// `cores` are those of the reactors. SPDK's texts end in a newline.
pub(super) fn set_options(
    all: &mut SubsystemOptions,
    cores: &[usize],
    params: &Params,
) -> Result<(), RpcError> {
    let options: Options = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let isolated = match options.isolated_core_mask.as_deref().map(parse_cores) {
        None => vec![],
        Some(Some(cores)) => cores,
        Some(None) => return Err(RpcError::invalid_params("Invalid isolated core mask\n")),
    };
    if let Some(core) = options.scheduling_core {
        let core = usize::try_from(core).unwrap_or(usize::MAX);
        if isolated.contains(&core) {
            let text = "Scheduling core cannot be included in isolated core mask.\n";
            return Err(RpcError::invalid_params(text));
        }
        if !cores.contains(&core) {
            return Err(RpcError::invalid_params("Invalid scheduling core.\n"));
        }
    }
    all.scheduler.options = Some(options);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_holds_what_differs_from_the_defaults() {
        let mut scheduler = Scheduler::default();
        let call = |params: Value| json!({"method": "framework_set_scheduler", "params": params});
        assert_eq!(scheduler.config(), [call(json!({"name": "static"}))]);
        scheduler.current = Current::Dynamic(Dynamic { core_busy: 90, ..Dynamic::default() });
        scheduler.options = Some(Options { scheduling_core: Some(1), isolated_core_mask: None });
        let options = json!({"method": "scheduler_set_options", "params": {"scheduling_core": 1}});
        let dynamic = json!({"name": "dynamic", "period": 1_000_000, "core_busy": 90});
        assert_eq!(scheduler.config(), [options, call(dynamic)]);
    }
}
