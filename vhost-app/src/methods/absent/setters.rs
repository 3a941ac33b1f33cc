//! Options that are checked, kept and saved, but have no effect.

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde_json::{Map, Value, json};
use tracing::{error, info};

use super::super::schema::{self, Kind};
use super::super::{Methods, SubsystemOptions};
use super::decode;

/// A method that sets options.
pub(super) struct Setter {
    method: &'static str,
    /// The section of a saved configuration that holds it.
    subsystem: &'static str,
    phases: Phases,
    /// The answer to invalid parameters.
    failure: DecodeFailure,
    /// The values of parameters that were never given, if they are saved.
    defaults: fn() -> Value,
    /// The parameter whose values have options of their own.
    key: Option<&'static str>,
    /// Checks the kept parameters together with the new ones.
    check: fn(&Map<String, Value>) -> Result<(), RpcError>,
}

const SETTER: Setter = Setter {
    method: "",
    subsystem: "",
    phases: Phases::Startup,
    failure: DecodeFailure::PARSE,
    defaults: || json!({}),
    key: None,
    check: |_| Ok(()),
};

/// The methods. Phases, defaults and failures are SPDK's. Their parameters are in the table of
/// methods.
const SETTERS: [Setter; 19] = [
    Setter {
        method: "sock_set_default_impl",
        subsystem: "sock",
        failure: DecodeFailure::INVALID_PARAMETERS,
        ..SETTER
    },
    Setter {
        method: "sock_impl_set_options",
        subsystem: "sock",
        failure: DecodeFailure::INVALID_PARAMETERS,
        key: Some("impl_name"),
        ..SETTER
    },
    Setter { method: "vmd_enable", subsystem: "vmd", ..SETTER },
    Setter {
        method: "fsdev_set_opts",
        subsystem: "fsdev",
        phases: Phases::Runtime,
        failure: DecodeFailure::PARAMS,
        check: |opts| {
            let size = |name| opts.get(name).and_then(Value::as_u64).unwrap_or(0);
            // As for bdev_set_options: a cache for each of two threads.
            if size("fsdev_io_pool_size") < 2 * size("fsdev_io_cache_size") {
                return Err(RpcError::invalid_params("spdk_fsdev_set_opts failed with -22"));
            }
            Ok(())
        },
        ..SETTER
    },
    Setter {
        method: "iobuf_set_options",
        subsystem: "iobuf",
        failure: DecodeFailure::PARAMS,
        defaults: || {
            json!({
                "small_pool_count": 8192,
                "large_pool_count": 1024,
                "small_bufsize": 8192,
                "large_bufsize": 135_168,
                "enable_numa": false,
            })
        },
        check: check_iobuf,
        ..SETTER
    },
    Setter {
        method: "accel_set_options",
        subsystem: "accel",
        defaults: || {
            json!({
                "small_cache_size": 128,
                "large_cache_size": 16,
                "task_count": 2048,
                "sequence_count": 2048,
                "buf_count": 2048,
            })
        },
        ..SETTER
    },
    Setter {
        method: "accel_assign_opc",
        subsystem: "accel",
        key: Some("opname"),
        check: |assigned| {
            let opname = assigned.get("opname").and_then(Value::as_str).unwrap_or_default();
            if !OPERATIONS.contains(&opname) {
                return Err(RpcError::invalid_params("error assigning opcode"));
            }
            Ok(())
        },
        ..SETTER
    },
    Setter { method: "accel_set_driver", subsystem: "accel", ..SETTER },
    // These ask for hardware. SPDK answers true without such hardware too.
    Setter { method: "ioat_scan_accel_module", subsystem: "accel", ..SETTER },
    Setter { method: "ae4dma_scan_accel_module", subsystem: "accel", ..SETTER },
    Setter { method: "iaa_scan_accel_module", subsystem: "accel", ..SETTER },
    Setter { method: "dpdk_cryptodev_scan_accel_module", subsystem: "accel", ..SETTER },
    Setter { method: "dsa_scan_accel_module", subsystem: "accel", ..SETTER },
    Setter { method: "keyring_linux_set_options", subsystem: "keyring", ..SETTER },
    Setter {
        method: "bdev_raid_set_options",
        subsystem: "bdev",
        phases: Phases::Both,
        check: |options| match options.get("process_window_size_kb").and_then(Value::as_u64) {
            Some(0) => Err(RpcError::errno(libc::EINVAL)),
            _ => Ok(()),
        },
        ..SETTER
    },
    Setter {
        method: "bdev_iscsi_set_options",
        subsystem: "bdev",
        phases: Phases::Both,
        failure: DecodeFailure::INTERNAL,
        ..SETTER
    },
    Setter {
        method: "bdev_nvme_set_options",
        subsystem: "bdev",
        phases: Phases::Both,
        failure: DecodeFailure::INTERNAL,
        check: check_nvme,
        ..SETTER
    },
    Setter {
        method: "bdev_nvme_set_hotplug",
        subsystem: "bdev",
        phases: Phases::Runtime,
        failure: DecodeFailure::INVALID_ARGUMENT,
        ..SETTER
    },
    Setter {
        method: "bdev_virtio_blk_set_hotplug",
        subsystem: "bdev",
        phases: Phases::Runtime,
        failure: DecodeFailure::INVALID_ARGUMENT,
        ..SETTER
    },
];

/// The operations of SPDK's acceleration framework.
pub(super) const OPERATIONS: [&str; 17] = [
    "copy",
    "fill",
    "dualcast",
    "compare",
    "crc32c",
    "copy_crc32c",
    "compress",
    "decompress",
    "encrypt",
    "decrypt",
    "xor",
    "dif_verify",
    "dif_verify_copy",
    "dif_generate",
    "dif_generate_copy",
    "dix_generate",
    "dix_verify",
];

/// SPDK's minima of the pools.
fn check_iobuf(options: &Map<String, Value>) -> Result<(), RpcError> {
    let minima = [
        ("small_pool_count", 64),
        ("large_pool_count", 8),
        ("small_bufsize", 4096),
        ("large_bufsize", 8192),
    ];
    let too_small = |(name, min): &(&str, u64)| options[*name].as_u64().is_some_and(|n| n < *min);
    if let Some((name, min)) = minima.into_iter().find(too_small) {
        let value = &options[name];
        error!("iobuf_set_options: {name} is {value}, but must be at least {min}");
        return Err(RpcError::errno(libc::EINVAL));
    }
    Ok(())
}

/// SPDK's rules for the time-outs of a controller.
fn check_nvme(options: &Map<String, Value>) -> Result<(), RpcError> {
    let number = |name| options.get(name).and_then(Value::as_i64).unwrap_or(0);
    let (loss, reconnect) = (number("ctrlr_loss_timeout_sec"), number("reconnect_delay_sec"));
    let fast_fail = number("fast_io_fail_timeout_sec");
    let timeouts_fit = match loss {
        0 => reconnect == 0 && fast_fail == 0,
        -1 => reconnect > 0 && (fast_fail == 0 || reconnect <= fast_fail),
        1.. => {
            (1..=loss).contains(&reconnect)
                && (fast_fail == 0 || (reconnect..=loss).contains(&fast_fail))
        }
        _ => false,
    };
    // A time-out of 2^63 µs or more counts as set.
    let is_set = |name| options.get(name).and_then(Value::as_u64).is_some_and(|us| us > 0);
    let admin_fits = !is_set("timeout_admin_us") || is_set("timeout_us");
    let retries_fit = options.get("bdev_retry_count").and_then(Value::as_i64).unwrap_or(0) >= -1;
    if timeouts_fit && admin_fits && retries_fit {
        return Ok(());
    }
    error!("bdev_nvme_set_options: time-outs that contradict, or bdev_retry_count below -1");
    Err(RpcError::errno(libc::EINVAL))
}

/// The options that clients have set.
#[derive(Debug, Default)]
pub(crate) struct Kept(Vec<KeptCall>);

#[derive(Debug)]
struct KeptCall {
    method: &'static str,
    params: Map<String, Value>,
}

impl Kept {
    /// Keeps the parameters of a method, in place of those that it has of this key.
    fn keep(&mut self, method: &'static str, params: Map<String, Value>, key: Option<&str>) {
        let same = |kept: &&mut KeptCall| {
            kept.method == method && key.is_none_or(|key| kept.params[key] == params[key])
        };
        match self.0.iter_mut().find(same) {
            Some(kept) => kept.params = params,
            None => self.0.push(KeptCall { method, params }),
        }
    }

    /// The kept parameters of a method; with a key, of this value of the parameter.
    pub(in super::super) fn params(
        &self,
        method: &str,
        key: Option<(&str, &Value)>,
    ) -> Option<&Map<String, Value>> {
        let is_it = |kept: &&KeptCall| {
            kept.method == method
                && key.is_none_or(|(name, value)| kept.params.get(name) == Some(value))
        };
        self.0.iter().find(is_it).map(|kept| &kept.params)
    }

    /// The calls of a subsystem that set the options again. Their order does not depend on when
    /// they were made: a configuration that is loaded makes those that are allowed during the start
    /// first.
    pub(in super::super) fn config(&self, subsystem: &str) -> Vec<Value> {
        let setters = SETTERS.iter().filter(|setter| setter.subsystem == subsystem);
        let kept =
            setters.flat_map(|setter| self.0.iter().filter(|kept| kept.method == setter.method));
        kept.map(|kept| call(kept.method, &kept.params)).collect()
    }
}

fn call(method: &str, params: &Map<String, Value>) -> Value {
    // As SPDK does it, a call without parameters has no member for them.
    if params.is_empty() {
        return json!({ "method": method });
    }
    json!({ "method": method, "params": params })
}

pub(super) fn register(methods: &mut Methods<'_>) {
    for setter in &SETTERS {
        // A build without the module keeps the options.
        if methods.has_module(setter.method) {
            continue;
        }
        methods.add_plain(setter.method, setter.phases, |app, params| {
            set(&mut app.options.borrow_mut(), params, setter)?;
            Ok(true.into())
        });
    }
}

/// Makes the call on these options; `None` if its method is not in the table.
pub(super) fn call_on(
    options: &mut SubsystemOptions,
    params: &Params,
) -> Option<Result<(), RpcError>> {
    let setter = SETTERS.iter().find(|setter| setter.method == params.method())?;
    Some(set(options, params, setter))
}

impl Setter {
    fn initial(&self) -> Map<String, Value> {
        (self.defaults)().as_object().cloned().unwrap_or_default()
    }
}

/// Options with these changes.
fn with(mut options: Map<String, Value>, given: &Map<String, Value>) -> Map<String, Value> {
    options.extend(given.clone());
    options
}

fn set(options: &mut SubsystemOptions, params: &Params, setter: &Setter) -> Result<(), RpcError> {
    let given = decode(params, setter.failure)?;
    let key = setter.key.map(|key| (key, &given[key]));
    let kept = options.kept.params(setter.method, key).cloned();
    let all = with(kept.unwrap_or_else(|| setter.initial()), &given);
    (setter.check)(&all)?;
    options.kept.keep(setter.method, all, setter.key);
    if schema::method(setter.method).is_some_and(|method| method.kind == Kind::Kept) {
        info!("{}: saved, but without effect: vhost has no such component", setter.method);
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SETTERS.iter().map(|setter| setter.method)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(params: Value) -> Map<String, Value> {
        params.as_object().unwrap().clone()
    }

    #[test]
    fn calls_have_a_fixed_order_and_replace_those_of_the_same_key() {
        let mut all = Kept::default();
        let options = |name: &str, size: u32| json!({"impl_name": name, "recv_buf_size": size});
        let mut keep = |name: &str, size: u32| {
            all.keep("sock_impl_set_options", object(options(name, size)), Some("impl_name"));
        };
        keep("ssl", 1);
        keep("posix", 2);
        keep("ssl", 3);
        all.keep("sock_set_default_impl", object(json!({"impl_name": "ssl"})), None);
        all.keep("vmd_enable", Map::new(), None);
        let call =
            |name, size| json!({"method": "sock_impl_set_options", "params": options(name, size)});
        let default = json!({"method": "sock_set_default_impl", "params": {"impl_name": "ssl"}});
        assert_eq!(all.config("sock"), [default, call("ssl", 3), call("posix", 2)]);
        assert_eq!(all.config("vmd"), [json!({"method": "vmd_enable"})]);
        assert!(all.config("bdev").is_empty());
    }

    #[test]
    fn nvme_time_outs_must_fit_together() {
        let fits = |loss: i64, reconnect: u64, fast: u64| {
            let options = json!({
                "ctrlr_loss_timeout_sec": loss, "reconnect_delay_sec": reconnect,
                "fast_io_fail_timeout_sec": fast,
            });
            check_nvme(options.as_object().unwrap()).is_ok()
        };
        assert!(fits(0, 0, 0) && !fits(0, 1, 0) && !fits(0, 0, 1));
        assert!(fits(-1, 1, 0) && fits(-1, 2, 2) && !fits(-1, 0, 0) && !fits(-1, 2, 1));
        assert!(fits(5, 5, 0) && fits(5, 2, 5) && !fits(5, 6, 0) && !fits(5, 2, 1));
        assert!(!fits(5, 2, 6) && !fits(-2, 1, 0));
        let other = |options: Value| check_nvme(options.as_object().unwrap()).is_ok();
        assert!(other(json!({"timeout_us": 1, "timeout_admin_us": u64::MAX})));
        assert!(!other(json!({"timeout_admin_us": 1})));
        assert!(other(json!({"bdev_retry_count": -1})) && !other(json!({"bdev_retry_count": -2})));
    }
}
