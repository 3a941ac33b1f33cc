//! `trace_*`: SPDK records trace points to a file in /dev/shm. This program records none, but keeps
//! and shows the masks, so that scripts and `spdk_trace` find what they ask for. `spdk_trace` reports
//! the missing file by its name.

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::info;

use super::{App, Methods};
use crate::cli::TPOINT_GROUPS as GROUPS;

/// The mask of enabled trace points, for each group.
#[derive(Debug, Default)]
pub(super) struct Trace([u64; GROUPS.len()]);

impl Trace {
    /// Changes the masks of the group of this name, or of `all`. Returns false if there is no such
    /// group.
    fn change(&mut self, name: &str, change: impl Fn(u64) -> u64) -> bool {
        let mut found = false;
        for ((group, _), mask) in GROUPS.iter().zip(&mut self.0) {
            if *group == name || name == "all" {
                *mask = change(*mask);
                found = true;
            }
        }
        found
    }

    /// The bits of the groups with enabled trace points.
    fn group_mask(&self) -> u64 {
        let enabled = GROUPS.iter().zip(self.0).filter(|(_, mask)| *mask != 0);
        enabled.map(|((_, bit), _)| 1 << bit).sum()
    }
}

type Change = fn(&mut Trace, &Params) -> Result<(), RpcError>;

/// The methods that change masks.
pub(super) const CHANGES: [(&str, Change); 4] = [
    ("trace_enable_tpoint_group", |trace, params| change_group(trace, params, u64::MAX)),
    ("trace_disable_tpoint_group", |trace, params| change_group(trace, params, 0)),
    ("trace_set_tpoint_mask", |trace, params| change_mask(trace, params, |old, mask| old | mask)),
    ("trace_clear_tpoint_mask", |trace, params| {
        change_mask(trace, params, |old, mask| old & !mask)
    }),
];

pub(super) fn register(methods: &mut Methods<'_>) {
    for (name, change) in CHANGES {
        methods.add_plain(name, Phases::Both, move |app, params| {
            change(&mut app.options.borrow_mut().trace, params)?;
            Ok(true.into())
        });
    }
    methods.add_plain("trace_clear", Phases::Runtime, |_, params| {
        params.none("trace_clear requires no parameters")?;
        Ok(true.into())
    });
    methods.add_plain("trace_get_tpoint_group_mask", Phases::Both, |app, params| {
        params.none("trace_get_tpoint_group_mask requires no parameters")?;
        Ok(show(
            app,
            None,
            |bit, mask| json!({ "enabled": mask != 0, "mask": hex(1 << bit), "tpoints": [] }),
        ))
    });
    methods.add_plain("trace_get_info", Phases::Both, |app, params| {
        params.none("trace_get_info requires no parameters")?;
        let path = format!("/dev/shm/vhost_trace.pid{}", std::process::id());
        Ok(show(
            app,
            Some(path),
            |bit, mask| json!({ "mask": hex(1 << bit), "tpoint_mask": hex(mask) }),
        ))
    });
}

fn hex(mask: u64) -> String {
    format!("{mask:#x}")
}

/// The answer of a getter, with an object for each group.
fn show(app: &App, path: Option<String>, group: impl Fn(u32, u64) -> Value) -> Value {
    let options = app.options.borrow();
    let mut shown = Map::new();
    shown.extend(path.map(|path| ("tpoint_shm_path".to_owned(), path.into())));
    shown.insert("tpoint_group_mask".into(), hex(options.trace.group_mask()).into());
    for ((name, bit), mask) in GROUPS.into_iter().zip(options.trace.0) {
        shown.insert(name.into(), group(bit, mask));
    }
    shown.into()
}

fn change_group(trace: &mut Trace, params: &Params, mask: u64) -> Result<(), RpcError> {
    #[derive(Deserialize)]
    struct Request {
        name: String,
    }
    let p: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    change(trace, params, &p.name, |_| mask)
}

fn change_mask(
    trace: &mut Trace,
    params: &Params,
    new: fn(u64, u64) -> u64,
) -> Result<(), RpcError> {
    #[derive(Deserialize)]
    struct Request {
        name: String,
        tpoint_mask: u64,
    }
    let p: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    change(trace, params, &p.name, |old| new(old, p.tpoint_mask))
}

fn change(
    trace: &mut Trace,
    params: &Params,
    name: &str,
    new: impl Fn(u64) -> u64,
) -> Result<(), RpcError> {
    if !trace.change(name, new) {
        tracing::error!("{}: no trace point group {name:?}", params.method());
        return Err(DecodeFailure::INVALID_PARAMETERS.error());
    }
    info!("{}: masks kept, but without effect: vhost records no trace points", params.method());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_change_for_one_group_or_for_all() {
        let mut trace = Trace::default();
        assert!(trace.change("bdev", |old| old | 0b101));
        assert_eq!(trace.group_mask(), 0x8);
        assert!(trace.change("all", |old| old & !0b100));
        assert_eq!(trace.0[1], 1);
        assert!(!trace.change("nope", |_| 1) && !trace.change("BDEV", |_| 1));
        assert!(trace.change("all", |_| u64::MAX));
        assert_eq!(hex(trace.group_mask()), "0x7ec0c");
    }
}
