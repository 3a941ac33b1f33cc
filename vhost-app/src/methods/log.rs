//! `log_*`: levels and flags of the log on stderr and in syslog.

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::error;

use super::{Answer, App, Methods};
use crate::logging::{Level, is_flag};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("log_get_level", Phases::Both, |app, params| {
        no_parameters(params)?;
        Ok(app.log.log_level().name().into())
    });
    methods.add_plain("log_set_level", Phases::Both, |app, params| {
        app.log.set_log_level(level(params)?);
        Ok(true.into())
    });
    methods.add_plain("log_get_print_level", Phases::Both, |app, params| {
        no_parameters(params)?;
        Ok(app.log.print_level().name().into())
    });
    methods.add_plain("log_set_print_level", Phases::Both, |app, params| {
        app.log.set_print_level(level(params)?);
        Ok(true.into())
    });
    methods.add_plain("log_get_flags", Phases::Both, |app, params| {
        no_parameters(params)?;
        let flags: Map<String, Value> =
            app.log.flags().map(|(flag, set)| (flag.to_owned(), set.into())).collect();
        Ok(flags.into())
    });
    methods.add_plain("log_set_flag", Phases::Both, |app, params| set_flag(app, params, true));
    methods.add_plain("log_clear_flag", Phases::Both, |app, params| set_flag(app, params, false));
    methods.add_plain("log_enable_timestamps", Phases::Runtime, enable_timestamps);
}

fn no_parameters(params: &Params) -> Result<(), RpcError> {
    params.none(&format!("{} requires no parameters", params.method()))
}

fn level(params: &Params) -> Result<Level, RpcError> {
    #[derive(Deserialize)]
    struct Request {
        level: String,
    }
    let request: Request = params.decode(DecodeFailure::INTERNAL)?;
    Level::from_name(&request.level).ok_or_else(|| {
        error!("{}: unknown log level {:?}", params.method(), request.level);
        DecodeFailure::INTERNAL.error()
    })
}

/// Returns the name or pattern of the flags. Fails if it matches none.
pub(super) fn flag(params: &Params) -> Result<String, RpcError> {
    #[derive(Deserialize)]
    struct Request {
        flag: String,
    }
    let request: Request = params.decode(DecodeFailure::INTERNAL)?;
    if is_flag(&request.flag) {
        return Ok(request.flag);
    }
    let shown: String = request.flag.chars().take(128).collect();
    error!("{}: unknown log flag {shown:?}", params.method());
    Err(RpcError::invalid_params("invalid log flag"))
}

fn set_flag(app: &App, params: &Params, enabled: bool) -> Answer {
    app.log.set_flag(&flag(params)?, enabled);
    Ok(true.into())
}

fn enable_timestamps(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        enabled: bool,
    }
    let request: Request = params.decode(DecodeFailure::PARAMS)?;
    app.log.set_timestamps(request.enabled);
    Ok(true.into())
}
