//! Calls of RPC methods with typical parameters: existing names, devices that may exist, numbers
//! near valid ones.

use serde_json::{Map, Value, json};

use crate::input::Input;

/// Left out, as these end what the test needs.
const SPARED: [&str; 2] = ["spdk_kill_instance", "framework_start_init"];

/// Parameter names that belong together, by part of a method's name; others are picked from all.
const PARAMETERS: [(&str, &[&str]); 16] = [
    ("malloc_create", &["name", "num_blocks", "block_size"]),
    ("null_create", &["name", "num_blocks", "block_size"]),
    ("null_resize", &["name", "new_size"]),
    ("aio_create", &["name", "filename", "block_size"]),
    ("uring_create", &["name", "filename", "block_size"]),
    (
        "delay_create",
        &[
            "name",
            "base_bdev_name",
            "avg_read_latency",
            "p99_read_latency",
            "avg_write_latency",
            "p99_write_latency",
        ],
    ),
    ("delay_update", &["delay_bdev_name", "latency_type", "latency_us"]),
    ("error_create", &["base_name"]),
    ("inject_error", &["name", "io_type", "error_type", "num"]),
    ("create_blk", &["ctrlr", "dev_name"]),
    ("delete_controller", &["ctrlr", "force"]),
    ("coalescing", &["ctrlr", "delay_base_us", "iops_threshold"]),
    ("move_queue", &["ctrlr", "ring", "core"]),
    ("delete", &["name"]),
    ("log_set", &["level"]),
    ("flag", &["flag"]),
];

const OTHERS: [&str; 26] = [
    "uuid",
    "readonly",
    "cpumask",
    "packed_ring",
    "physical_block_size",
    "optimal_io_boundary",
    "md_size",
    "md_interleave",
    "dif_type",
    "transport",
    "name",
    "timeout_ms",
    "fallocate",
    "numa_id",
    "nowait",
    "queue_depth",
    "corrupt_offset",
    "corrupt_value",
    "id",
    "per_channel",
    "reset_mode",
    "size",
    "ctrlr",
    "bdev_io_pool_size",
    "bdev_auto_examine",
    "unheard_of",
];

/// A method and its parameters.
pub(crate) fn call(input: &mut Input<'_>, methods: &[&str]) -> (String, Value) {
    let method = match input.u16() {
        0 => "no_such_method",
        n => methods[usize::from(n) % methods.len()],
    };
    let method = if SPARED.contains(&method) { "bdev_get_bdevs" } else { method };
    let known = PARAMETERS.iter().find(|(part, _)| method.contains(part));
    let mut names: Vec<&str> = known.map(|(_, names)| names.to_vec()).unwrap_or_default();
    match input.u8() {
        0..32 => drop(names.pop()),
        32..96 => names.push(input.pick(&OTHERS)),
        96..100 => names.extend(OTHERS),
        _ => {}
    }
    let params: Map<String, Value> =
        names.into_iter().map(|name| (name.into(), value(input, name))).collect();
    (method.into(), if params.is_empty() { Value::Null } else { params.into() })
}

fn value(input: &mut Input<'_>, name: &str) -> Value {
    if input.u8() < 16 {
        return odd(input);
    }
    match name {
        "name" | "base_bdev_name" | "dev_name" | "base_name" | "delay_bdev_name" => {
            input.pick(&["x", "y", "z", "EE_x", "x0", "EE_y", "nope"]).into()
        }
        "ctrlr" => input.pick(&["c", "d", "e", "nope", ".."]).into(),
        "filename" => {
            input.pick(&["x.img", "/dev/null", "/dev/zero", "/proc/self/exe", "."]).into()
        }
        "num_blocks" | "new_size" => u64::from(input.u8()).into(),
        "block_size" | "physical_block_size" => input.pick(&[512, 4096, 513, 0]).into(),
        "io_type" => input.pick(&["read", "write", "flush", "all", "clear", "reset"]).into(),
        "error_type" => input.pick(&["failure", "pending", "corrupt_data", "nomem"]).into(),
        "latency_type" => input.pick(&["avg_read", "p99_read", "avg_write", "p99_write"]).into(),
        "level" => input.pick(&["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG", "x"]).into(),
        "flag" => input.pick(&["all", "vhost", "bdev", "rpc", "x"]).into(),
        "uuid" => "9f1ee7ae-3c8d-4a6a-8f0b-6a3c1b0d9a5e".into(),
        "cpumask" => input.pick(&["0x1", "0x2", "0x3", "[0]", "[0-1]", "x", "0"]).into(),
        "force" | "readonly" | "packed_ring" | "fallocate" | "nowait" => input.flag().into(),
        "transport" => "vhost_user_blk".into(),
        _ => u64::from(input.u8() % 9).into(),
    }
}

/// A value that is hardly ever valid.
fn odd(input: &mut Input<'_>) -> Value {
    let long = "x".repeat(300);
    match input.u8() % 12 {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(u64::MAX),
        3 => json!(1.5),
        4 => json!({}),
        5 => json!([]),
        6 => json!(""),
        7 => json!("\u{e9}\n\u{1f600}"),
        8 => json!(long),
        9 => json!([[["x"]]]),
        10 => json!(true),
        _ => json!("a/b"),
    }
}
