//! The state of components that this program does not have: what SPDK answers without their objects.

use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde_json::{Map, Value, json};

use super::super::{Answer, App, Methods};
use super::decode;
use super::setters::OPERATIONS;

/// A method on objects of which there are none.
struct Getter {
    method: &'static str,
    failure: DecodeFailure,
    /// The answer to these parameters.
    answer: fn(&Map<String, Value>) -> Answer,
}

impl Getter {
    fn call(&self, params: &Params) -> Answer {
        (self.answer)(&decode(params, self.failure)?)
    }
}

/// Calls a method whose answer depends only on its parameters; `None` if its method is not in the
/// table.
pub(super) fn call(params: &Params) -> Option<Answer> {
    let getter = GETTERS.iter().find(|getter| getter.method == params.method())?;
    Some(getter.call(params))
}

const fn getter(method: &'static str, answer: fn(&Map<String, Value>) -> Answer) -> Getter {
    Getter { method, failure: DecodeFailure::INTERNAL, answer }
}

const GETTERS: &[Getter] = &[
    getter("bdev_nvme_get_controllers", |given| match text(given, "name") {
        None => no_objects(),
        Some(name) => {
            let text = format!("Controller {name} does not exist");
            Err(RpcError::new(-i64::from(libc::EINVAL), text))
        }
    }),
    getter("bdev_nvme_get_discovery_info", |_| no_objects()),
    getter("bdev_nvme_get_mdns_discovery_info", |_| Err(RpcError::errno(libc::EOPNOTSUPP))),
    getter("bdev_nvme_get_io_paths", |_| no_poll_groups()),
    getter("bdev_nvme_get_transport_statistics", |_| no_poll_groups()),
    getter("bdev_nvme_get_path_iostat", |_| {
        let text = "RPC not enabled if enable_io_path_stat is false";
        Err(RpcError::new(-i64::from(libc::EPERM), text))
    }),
    getter("bdev_nvme_get_controller_health_info", |_| Err(RpcError::internal("Device not found"))),
    getter("bdev_virtio_scsi_get_devices", |_| no_objects()),
    getter("framework_get_pci_devices", |_| no_objects()),
    getter("bdev_lvol_get_lvstores", |given| {
        match ["uuid", "lvs_name"].map(|name| text(given, name)) {
            [None, None] => no_objects(),
            _ => no_device(),
        }
    }),
    getter("bdev_lvol_get_lvols", |given| {
        match ["lvs_uuid", "lvs_name"].map(|name| text(given, name)) {
            [None, None] => no_objects(),
            _ => no_device(),
        }
    }),
    Getter {
        failure: DecodeFailure::PARSE,
        ..getter("accel_crypto_keys_get", |given| match text(given, "key_name") {
            None => no_objects(),
            Some(_) => Err(RpcError::invalid_params("key was not found")),
        })
    },
    // Scripts destroy and detach what may be gone already, and expect these answers.
    Getter {
        failure: DecodeFailure::PARSE,
        ..getter("accel_crypto_key_destroy", |_| {
            Err(RpcError::invalid_params("No key object found"))
        })
    },
    getter("bdev_nvme_detach_controller", |_| no_device()),
    getter("bdev_lvol_delete", |_| no_device()),
    getter("bdev_lvol_delete_lvstore", |given| {
        match ["uuid", "lvs_name"].map(|name| text(given, name)) {
            [None, None] => Err(DecodeFailure::INTERNAL.error()),
            _ => no_device(),
        }
    }),
];

fn text<'a>(given: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    given.get(name).and_then(Value::as_str)
}

fn no_objects() -> Answer {
    Ok(json!([]))
}

fn no_poll_groups() -> Answer {
    Ok(json!({ "poll_groups": [] }))
}

fn no_device() -> Answer {
    Err(RpcError::errno(libc::ENODEV))
}

pub(super) fn register(methods: &mut Methods<'_>) {
    for getter in GETTERS {
        // A build without the module has the getter.
        if methods.has_module(getter.method) {
            continue;
        }
        methods.add_plain(getter.method, Phases::Runtime, |_, params| getter.call(params));
    }
    methods.add_plain("sock_get_default_impl", Phases::Both, default_socket);
    methods.add_plain("sock_impl_get_options", Phases::Both, socket_options);
    methods.add_plain("fsdev_get_opts", Phases::Runtime, fsdev_options);
    methods.add_plain("keyring_get_keys", Phases::Runtime, |_, _| no_objects());
    methods.add_plain("accel_get_opc_assignments", Phases::Runtime, assignments);
    methods.add_plain("accel_get_module_info", Phases::Runtime, |_, params| {
        params.none("accel_get_module_info requires no parameters")?;
        Ok(json!([
            { "module": "error", "supported ops": ["crc32c"] },
            { "module": "software", "supported ops": OPERATIONS },
        ]))
    });
    methods.add_plain("accel_get_stats", Phases::Runtime, |_, _| Ok(accel_stats()));
    methods.add_plain("iobuf_get_stats", Phases::Runtime, |_, _| Ok(iobuf_stats()));
}

fn default_socket(app: &App, params: &Params) -> Answer {
    params.none("sock_get_default_impl requires no parameters")?;
    let options = app.options.borrow();
    let name =
        options.kept.params("sock_set_default_impl", None).and_then(|set| text(set, "impl_name"));
    Ok(json!({ "impl_name": name.unwrap_or("posix") }))
}

fn socket_options(app: &App, params: &Params) -> Answer {
    let given = decode(params, DecodeFailure::INVALID_PARAMETERS)?;
    let buffer = if text(&given, "impl_name") == Some("ssl") { 4096 } else { 2_097_152 };
    let mut shown = Map::from_iter(
        [
            ("recv_buf_size", json!(buffer)),
            ("send_buf_size", json!(buffer)),
            ("enable_recv_pipe", json!(true)),
            ("enable_quickack", json!(false)),
            ("enable_placement_id", json!(0)),
            ("enable_zerocopy_send_server", json!(true)),
            ("enable_zerocopy_send_client", json!(false)),
            ("zerocopy_threshold", json!(0)),
            ("tls_version", json!(0)),
            ("enable_ktls", json!(false)),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let options = app.options.borrow();
    let key = Some(("impl_name", &given["impl_name"]));
    if let Some(set) = options.kept.params("sock_impl_set_options", key) {
        shown.extend(set.clone().into_iter().filter(|(name, _)| name != "impl_name"));
    }
    Ok(shown.into())
}

fn fsdev_options(app: &App, params: &Params) -> Answer {
    params.none("'fsdev_get_opts' requires no arguments")?;
    let options = app.options.borrow();
    let set = options.kept.params("fsdev_set_opts", None).cloned().map(Value::from);
    Ok(set.unwrap_or_else(|| json!({ "fsdev_io_pool_size": 65535, "fsdev_io_cache_size": 256 })))
}

fn assignments(app: &App, params: &Params) -> Answer {
    params.none("accel_get_opc_assignments requires no parameters")?;
    let options = app.options.borrow();
    let module = |operation: &str| {
        let key = Some(("opname", &Value::from(operation)));
        let set = options.kept.params("accel_assign_opc", key);
        set.and_then(|set| text(set, "module")).unwrap_or("software").to_owned()
    };
    Ok(OPERATIONS.iter().map(|of| ((*of).to_owned(), Value::from(module(of)))).collect())
}

fn accel_stats() -> Value {
    json!({
        "sequence_executed": 0,
        "sequence_failed": 0,
        "sequence_outstanding": 0,
        "task_outstanding": 0,
        "operations": [],
        "retry_task": 0,
        "retry_sequence": 0,
        "retry_iobuf": 0,
        "retry_bufdesc": 0,
    })
}

fn iobuf_stats() -> Value {
    let pool = json!({ "cache": 0, "main": 0, "retry": 0, "cache_size": 0 });
    let module = |name| json!({ "module": name, "small_pool": pool, "large_pool": pool });
    json!([module("accel"), module("bdev")])
}

#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    GETTERS.iter().map(|getter| getter.method).chain(["sock_impl_get_options"])
}
