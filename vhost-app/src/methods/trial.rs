//! Calls without effect, for `--check`.
//!
//! A trial uses the functions of the methods, so it refuses the same parameters. It does not find
//! what depends on a running program, such as a bdev that does not exist.

use std::path::PathBuf;

use bdev::method::{Method, MethodError};
use rpc::{Params, RpcError};
use serde_json::Value;

use super::bdev_host::Given;
use super::options::{self, SubsystemOptions};
use super::{
    absent, bdev_histogram, bdev_qos, log, scheduler, threads, trace, vhost, vhost_blk, vhost_scsi,
};
use crate::logging;

/// A stand-in for the program, on which calls are tried. It has options, and nothing else.
pub(crate) struct Trial {
    /// The reactors' cores.
    cores: Vec<usize>,
    socket_dir: PathBuf,
    options: SubsystemOptions,
    /// The methods of bdev modules.
    modules: Vec<Method>,
}

impl Trial {
    pub(crate) fn new(cores: Vec<usize>, socket_dir: PathBuf) -> Self {
        let modules = crate::engines::modules(sandbox::Network::Allowed)
            .into_iter()
            .flat_map(|module| module.methods());
        let options = SubsystemOptions::default();
        Self { cores, socket_dir, options, modules: modules.collect() }
    }

    /// Whether new bdevs are examined without `bdev_examine`.
    pub(crate) fn auto_examine(&self) -> bool {
        self.options.bdev.auto_examine()
    }

    /// Tries a call. `None`: a trial cannot check the parameters of this method.
    ///
    /// # Errors
    /// The reason, as the program would log it.
    pub(crate) fn call(
        &mut self,
        method: &'static str,
        params: Option<Value>,
    ) -> Option<Result<(), String>> {
        let params = match Params::local(method, params) {
            Ok(params) => params,
            Err(e) => return Some(Err(e.message)),
        };
        let (result, logged) = logging::errors_of(|| self.call_with(params));
        let prefix = format!("{method}: ");
        Some(result?.map_err(|e| match logged.last() {
            Some(line) => line.strip_prefix(&prefix).unwrap_or(line).to_owned(),
            // Some texts end in a newline, as in SPDK.
            None => e.message.trim_end().to_owned(),
        }))
    }

    fn call_with(&mut self, params: Params) -> Option<Result<(), RpcError>> {
        let name = params.method();
        if let Some((_, change)) = trace::CHANGES.iter().find(|(known, _)| *known == name) {
            return Some(change(&mut self.options.trace, &params));
        }
        if let Some(method) = self.modules.iter().find(|method| method.name == name) {
            let params = bdev::method::Params::new(Given(params));
            let refused = |e: MethodError| RpcError::new(e.code, e.text);
            return method.check(&params).map(|result| result.map_err(refused));
        }
        Some(match name {
            "bdev_enable_histogram" => bdev_histogram::check(&params),
            "bdev_set_options" => options::set_bdev(&mut self.options, &params),
            "bdev_set_qos_limit" => bdev_qos::check(&params),
            "framework_set_scheduler" => scheduler::set(&mut self.options, &params),
            "log_set_flag" | "log_clear_flag" => log::flag(&params).map(drop),
            "scheduler_set_options" => {
                scheduler::set_options(&mut self.options, &self.cores, &params)
            }
            "thread_set_cpumask" => threads::check_cpumask(&params),
            "vhost_controller_set_coalescing" => vhost::check_coalescing(&params),
            "vhost_create_blk_controller" => vhost_blk::check_create(&params, &self.socket_dir),
            "vhost_create_scsi_controller" => vhost_scsi::check_create(&params, &self.socket_dir),
            "vhost_scsi_controller_add_target" => vhost_scsi::check_add(&params),
            "vhost_scsi_controller_remove_target" => vhost_scsi::check_remove(&params),
            "virtio_blk_create_transport" => vhost_blk::create_transport(&params).map(drop),
            _ => return absent::call_on(&mut self.options, &params),
        })
    }
}
