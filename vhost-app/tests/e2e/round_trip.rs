//! Whatever operators have done to a target, its saved configuration recreates it.
//!
//! Targets are changed at random. `VHOST_ROUND_TRIP_SEED` runs only one seed; a failure prints its
//! seed.

use std::collections::BTreeSet;

use Effect::{Engine, Read, Saved, Unsaved};
use serde_json::{Value, json};

use crate::support::harness::{Launch, Vhost, two_cores};

/// A method's effect on the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It changes the saved configuration. [`Operator::act`] calls it.
    Saved,
    /// It changes state that is not saved, as in SPDK: log levels, counters, injected errors, the
    /// core that serves a queue, and the end of the process.
    Unsaved,
    /// It is saved, and the end-to-end tests of its crate save and load it.
    Engine,
    /// It changes nothing.
    Read,
}

/// Every method. A new method needs a line here, and if its effect is saved, a call in
/// [`Operator::act`] or [`Operator::keep`].
const METHODS: [(&str, Effect); 165] = [
    ("accel_assign_opc", Saved),
    ("accel_crypto_key_create", Engine),
    ("accel_crypto_key_destroy", Engine),
    ("accel_crypto_keys_get", Read),
    ("accel_get_module_info", Read),
    ("accel_get_opc_assignments", Read),
    ("accel_get_stats", Read),
    ("accel_set_driver", Saved),
    ("accel_set_options", Saved),
    ("ae4dma_scan_accel_module", Saved),
    ("bdev_aio_create", Saved),
    ("bdev_aio_delete", Saved),
    ("bdev_aio_rescan", Unsaved),
    ("bdev_crypto_create", Engine),
    ("bdev_crypto_delete", Engine),
    ("bdev_delay_create", Saved),
    ("bdev_delay_delete", Saved),
    ("bdev_delay_update_latency", Saved),
    ("bdev_enable_histogram", Saved),
    ("bdev_error_create", Saved),
    ("bdev_error_delete", Saved),
    ("bdev_error_inject_error", Unsaved),
    ("bdev_error_resume_pending", Unsaved),
    ("bdev_examine", Saved),
    ("bdev_get_bdevs", Read),
    ("bdev_get_histogram", Read),
    ("bdev_get_histogram_borders", Read),
    ("bdev_get_iostat", Unsaved),
    ("bdev_iscsi_set_options", Saved),
    ("bdev_lvol_check_shallow_copy", Read),
    ("bdev_lvol_clone", Unsaved),
    ("bdev_lvol_clone_bdev", Unsaved),
    ("bdev_lvol_create", Unsaved),
    ("bdev_lvol_create_lvstore", Unsaved),
    ("bdev_lvol_decouple_parent", Unsaved),
    ("bdev_lvol_delete", Unsaved),
    ("bdev_lvol_delete_lvstore", Unsaved),
    ("bdev_lvol_get_lvols", Read),
    ("bdev_lvol_get_lvstores", Read),
    ("bdev_lvol_grow_lvstore", Unsaved),
    ("bdev_lvol_inflate", Unsaved),
    ("bdev_lvol_rename", Unsaved),
    ("bdev_lvol_rename_lvstore", Unsaved),
    ("bdev_lvol_resize", Unsaved),
    ("bdev_lvol_set_parent", Unsaved),
    ("bdev_lvol_set_parent_bdev", Unsaved),
    ("bdev_lvol_set_read_only", Unsaved),
    ("bdev_lvol_snapshot", Unsaved),
    ("bdev_lvol_start_shallow_copy", Unsaved),
    ("bdev_malloc_create", Saved),
    ("bdev_malloc_delete", Saved),
    ("bdev_nbd_create", Engine),
    ("bdev_nbd_delete", Engine),
    ("bdev_null_create", Saved),
    ("bdev_null_delete", Saved),
    ("bdev_null_resize", Saved),
    ("bdev_nvme_attach_controller", Engine),
    ("bdev_nvme_detach_controller", Engine),
    ("bdev_nvme_get_controller_health_info", Read),
    ("bdev_nvme_get_controllers", Read),
    ("bdev_nvme_get_discovery_info", Read),
    ("bdev_nvme_get_io_paths", Read),
    ("bdev_nvme_get_mdns_discovery_info", Read),
    ("bdev_nvme_get_path_iostat", Read),
    ("bdev_nvme_get_transport_statistics", Read),
    ("bdev_nvme_reset_controller", Unsaved),
    ("bdev_nvme_set_hotplug", Saved),
    ("bdev_nvme_set_options", Saved),
    ("bdev_passthru_create", Saved),
    ("bdev_passthru_delete", Saved),
    ("bdev_raid_add_base_bdev", Engine),
    ("bdev_raid_create", Engine),
    ("bdev_raid_delete", Engine),
    ("bdev_raid_get_bdevs", Read),
    ("bdev_raid_remove_base_bdev", Engine),
    ("bdev_raid_set_options", Saved),
    ("bdev_rbd_create", Engine),
    ("bdev_rbd_delete", Engine),
    ("bdev_rbd_get_clusters_info", Read),
    ("bdev_rbd_register_cluster", Engine),
    ("bdev_rbd_resize", Engine),
    ("bdev_rbd_unregister_cluster", Engine),
    ("bdev_reset_iostat", Unsaved),
    ("bdev_set_options", Saved),
    ("bdev_set_qd_sampling_period", Unsaved),
    ("bdev_set_qos_limit", Saved),
    ("bdev_split_create", Saved),
    ("bdev_split_delete", Saved),
    ("bdev_uring_create", Saved),
    ("bdev_uring_delete", Saved),
    ("bdev_uring_rescan", Unsaved),
    ("bdev_virtio_attach_controller", Engine),
    ("bdev_virtio_blk_set_hotplug", Saved),
    ("bdev_virtio_detach_controller", Engine),
    ("bdev_virtio_scsi_get_devices", Read),
    ("bdev_wait_for_examine", Read),
    ("dpdk_cryptodev_scan_accel_module", Saved),
    ("dsa_scan_accel_module", Saved),
    ("framework_disable_cpumask_locks", Unsaved),
    ("framework_enable_cpumask_locks", Unsaved),
    ("framework_get_config", Read),
    ("framework_get_governor", Read),
    ("framework_get_pci_devices", Read),
    ("framework_get_reactors", Read),
    ("framework_get_scheduler", Read),
    ("framework_get_subsystems", Read),
    ("framework_monitor_context_switch", Unsaved),
    ("framework_set_scheduler", Saved),
    ("framework_start_init", Unsaved),
    ("framework_wait_init", Read),
    ("fsdev_get_opts", Read),
    ("fsdev_set_opts", Saved),
    ("iaa_scan_accel_module", Saved),
    ("ioat_scan_accel_module", Saved),
    ("iobuf_get_stats", Read),
    ("iobuf_set_options", Saved),
    ("keyring_get_keys", Read),
    ("keyring_linux_set_options", Saved),
    ("log_clear_flag", Unsaved),
    ("log_enable_timestamps", Unsaved),
    ("log_get_flags", Read),
    ("log_get_level", Read),
    ("log_get_print_level", Read),
    ("log_set_flag", Unsaved),
    ("log_set_level", Unsaved),
    ("log_set_print_level", Unsaved),
    ("nbd_get_disks", Read),
    ("nbd_start_disk", Engine),
    ("nbd_stop_disk", Read),
    ("notify_get_notifications", Read),
    ("notify_get_types", Read),
    ("rpc_get_methods", Read),
    ("scheduler_set_options", Saved),
    ("scsi_get_devices", Read),
    ("sock_get_default_impl", Read),
    ("sock_impl_get_options", Read),
    ("sock_impl_set_options", Saved),
    ("sock_set_default_impl", Saved),
    ("spdk_get_version", Read),
    ("spdk_kill_instance", Unsaved),
    ("thread_get_io_channels", Read),
    ("thread_get_pollers", Read),
    ("thread_get_stats", Read),
    ("thread_set_cpumask", Saved),
    ("trace_clear", Unsaved),
    ("trace_clear_tpoint_mask", Unsaved),
    ("trace_disable_tpoint_group", Unsaved),
    ("trace_enable_tpoint_group", Unsaved),
    ("trace_get_info", Read),
    ("trace_get_tpoint_group_mask", Read),
    ("trace_set_tpoint_mask", Unsaved),
    ("vhost_controller_set_coalescing", Saved),
    ("vhost_create_blk_controller", Saved),
    ("vhost_create_scsi_controller", Saved),
    ("vhost_delete_controller", Saved),
    ("vhost_get_controller_stats", Read),
    ("vhost_get_controllers", Read),
    ("vhost_get_reactor_turns", Unsaved),
    ("vhost_move_queue", Unsaved),
    ("vhost_scsi_controller_add_target", Saved),
    ("vhost_scsi_controller_remove_target", Saved),
    ("vhost_start_scsi_controller", Saved),
    ("virtio_blk_create_transport", Read),
    ("virtio_blk_get_transports", Read),
    ("vmd_enable", Saved),
];

fn saved_methods() -> BTreeSet<&'static str> {
    METHODS.into_iter().filter(|(_, effect)| *effect == Saved).map(|(name, _)| name).collect()
}

/// Changes a target at random.
struct Operator<'a> {
    vhost: &'a Vhost,
    state: u64,
    /// Methods that succeeded.
    done: BTreeSet<&'static str>,
}

impl<'a> Operator<'a> {
    fn new(vhost: &'a Vhost, seed: u64) -> Self {
        let state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { vhost, state, done: BTreeSet::new() }
    }

    /// A number below `end`: xorshift64*.
    fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }

    fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()].clone()
    }

    /// Often refused, as there are few names.
    fn call(&mut self, method: &'static str, params: Value) {
        if self.vhost.rpc(method, params).is_ok() {
            self.done.insert(method);
        }
    }

    fn base(&mut self) -> Value {
        let names =
            ["A", "B", "C", "F", "G", "D0", "D1", "EE_A", "EE_D0", "P0", "Fp1", UUIDS[0], UUIDS[1]];
        self.one_of(&names).into()
    }

    fn uuid(&mut self, params: &mut Value) {
        if self.below(3) == 0 {
            params["uuid"] = self.one_of(&UUIDS).into();
        }
    }

    fn latency(&mut self) -> Value {
        self.one_of(&[json!(0), json!(7), json!(20.0), json!(1_000_000)])
    }

    /// Methods that are allowed only before initialisation.
    fn prepare(&mut self) {
        let cache = self.one_of(&[json!(16), json!(256.0)]);
        let params = json!({"bdev_auto_examine": self.below(2) == 0, "bdev_io_cache_size": cache});
        self.call("bdev_set_options", params);
        if self.below(2) == 0 {
            self.call("iobuf_set_options", json!({"small_pool_count": 100 + self.state % 7}));
        }
        if self.below(2) == 0 {
            self.call("accel_set_options", json!({"task_count": self.state % 1000}));
        }
    }

    /// Sets options that have no effect, before the start.
    fn keep_at_start(&mut self) {
        let socket = json!({"impl_name": "ssl", "recv_buf_size": self.state % 1000});
        let calls = [
            ("accel_assign_opc", json!({"opname": "crc32c", "module": "software"})),
            ("accel_set_driver", json!({"name": "x"})),
            ("ae4dma_scan_accel_module", json!({})),
            ("bdev_iscsi_set_options", json!({"timeout_sec": 30.0})),
            ("dpdk_cryptodev_scan_accel_module", json!({})),
            ("dsa_scan_accel_module", json!({"config_kernel_mode": false})),
            ("iaa_scan_accel_module", json!({})),
            ("ioat_scan_accel_module", json!({})),
            ("keyring_linux_set_options", json!({"enable": true})),
            ("scheduler_set_options", json!({"isolated_core_mask": "8"})),
            ("sock_impl_set_options", socket),
            ("sock_set_default_impl", json!({"impl_name": "posix"})),
            ("vmd_enable", json!({})),
        ];
        calls.into_iter().for_each(|(method, params)| self.call(method, params));
    }

    /// Sets options that have no effect, and enables a histogram.
    fn keep(&mut self) {
        let count = self.done.len();
        let scheduler = ["static", "dynamic"][count % 2];
        let calls = [
            ("framework_set_scheduler", json!({ "name": scheduler })),
            ("bdev_nvme_set_hotplug", json!({"enable": count.is_multiple_of(2)})),
            ("bdev_nvme_set_options", json!({"bdev_retry_count": -1, "timeout_us": count})),
            ("bdev_raid_set_options", json!({"process_window_size_kb": count + 1})),
            ("bdev_virtio_blk_set_hotplug", json!({"enable": true, "period_us": count})),
            ("fsdev_set_opts", json!({"fsdev_io_pool_size": 999, "fsdev_io_cache_size": count})),
        ];
        calls.into_iter().for_each(|(method, params)| self.call(method, params));
        for name in self.vhost.bdev_names().iter().take(2) {
            let params = json!({"name": name, "enable": true, "min_nsec": count});
            self.call("bdev_enable_histogram", params);
        }
    }

    /// Sets a limit of each disk, or removes it.
    fn limit_some(&mut self) {
        for (n, name) in ["A", "B", "C", "F", "G", "D0", "P0", "Fp1"].into_iter().enumerate() {
            let kinds = ["rw_ios_per_sec", "rw_mbytes_per_sec", "w_mbytes_per_sec"];
            let kind = kinds[n % kinds.len()];
            let limit = [json!(0), json!(5), json!(2000.0)][(self.done.len() + n) % 3].clone();
            self.call("bdev_set_qos_limit", json!({ "name": name, kind: limit }));
        }
    }

    fn act(&mut self) {
        match self.below(15) {
            0 | 1 => self.make_memory_disk(),
            2 => self.make_file_disk(),
            3 | 4 => self.make_wrapper(),
            5 => self.delete_disk(),
            6 => {
                let name = self.one_of(&["A", "B", "C"]);
                let size = self.one_of(&[json!(0), json!(1), json!(3.0), json!(1u64 << 43)]);
                self.call("bdev_null_resize", json!({"name": name, "new_size": size}));
            }
            7 => {
                let kind = self.one_of(&["avg_read", "p99_read", "avg_write", "p99_write"]);
                let name = self.one_of(&["D0", "D1", "D2"]);
                let us = self.latency();
                let params =
                    json!({"delay_bdev_name": name, "latency_type": kind, "latency_us": us});
                self.call("bdev_delay_update_latency", params);
                self.limit_some();
            }
            8 => {
                let name = self.base();
                self.call("bdev_examine", json!({ "name": name }));
            }
            9 => self.make_controller(),
            10 => self.change_controller(),
            11 => self.make_scsi_controller(),
            12 | 13 => self.change_targets(),
            _ => {
                let name = self.one_of(&["c0", "c1", "c2", "s0", "s1"]);
                self.call("vhost_delete_controller", json!({ "ctrlr": name }));
            }
        }
    }

    fn make_memory_disk(&mut self) {
        let block_size = self.one_of(&[json!(512), json!(4096), json!(4.096e3)]);
        let blocks = self.one_of(&[json!(2048), json!(64.0), json!(1e3)]);
        let name = self.one_of(&["A", "B", "C"]);
        let mut params = json!({"name": name, "num_blocks": blocks, "block_size": block_size});
        self.uuid(&mut params);
        match self.below(4) {
            0 => {
                params["physical_block_size"] = self.one_of(&[0, 512, 4096, 16384]).into();
                params["optimal_io_boundary"] = self.one_of(&[0, 3, 8]).into();
            }
            1 => {
                params.as_object_mut().unwrap().remove("name");
            }
            _ => {
                params["preferred_write_granularity"] = self.one_of(&[0, 8, 64]).into();
                self.call("bdev_null_create", params);
                return;
            }
        }
        self.call("bdev_malloc_create", params);
    }

    fn make_file_disk(&mut self) {
        let file = self.one_of(&["f", "g"]);
        let path = self.vhost.dir().join(file);
        let name = self.one_of(&["F", "G"]);
        let mut params = json!({"name": name, "filename": path, "block_size": 512});
        self.uuid(&mut params);
        if self.below(2) == 0 {
            self.call("bdev_uring_create", params);
        } else {
            params["readonly"] = (self.below(2) == 0).into();
            params["fallocate"] = (self.below(2) == 0).into();
            self.call("bdev_aio_create", params);
        }
    }

    fn make_wrapper(&mut self) {
        if self.below(4) == 0 {
            // Bdevs that keep their size: parts that were made before it changed are others
            // afterwards, as in SPDK.
            let (base, count) = (self.one_of(&["F", "G"]), self.one_of(&[1, 2, 3]));
            let params = json!({ "base_bdev": base, "split_count": count });
            self.call("bdev_split_create", params);
            return;
        }
        let base = self.base();
        if self.below(3) == 0 {
            let mut params = json!({ "base_name": base });
            self.uuid(&mut params);
            self.call("bdev_error_create", params);
            return;
        }
        if self.below(3) == 0 {
            let name = self.one_of(&["P0", "P1"]);
            let mut params = json!({ "name": name, "base_bdev_name": base });
            self.uuid(&mut params);
            self.call("bdev_passthru_create", params);
            return;
        }
        let name = self.one_of(&["D0", "D1", "D2"]);
        let mut params = json!({
            "name": name,
            "base_bdev_name": base,
            "avg_read_latency": self.latency(),
            "p99_read_latency": self.latency(),
            "avg_write_latency": self.latency(),
            "p99_write_latency": self.latency(),
        });
        self.uuid(&mut params);
        self.call("bdev_delay_create", params);
    }

    fn delete_disk(&mut self) {
        let (method, names): (_, &[&str]) = self.one_of(&[
            ("bdev_null_delete", &["A", "B", "C"][..]),
            ("bdev_malloc_delete", &["A", "B", "C", "Malloc0", "Malloc1"][..]),
            ("bdev_aio_delete", &["F", "G"][..]),
            ("bdev_uring_delete", &["F", "G"][..]),
            ("bdev_delay_delete", &["D0", "D1", "D2"][..]),
            ("bdev_error_delete", &["EE_A", "EE_B", "EE_D0"][..]),
            ("bdev_passthru_delete", &["P0", "P1"][..]),
            ("bdev_split_delete", &["F", "G"][..]),
        ]);
        let parameter = if method == "bdev_split_delete" { "base_bdev" } else { "name" };
        // There are few error bdevs: a random name rarely is that of one.
        let tried = if method == "bdev_error_delete" { names } else { &[self.one_of(names)] };
        for name in tried {
            self.call(method, json!({ parameter: name }));
        }
    }

    fn make_controller(&mut self) {
        let name = self.one_of(&["c0", "c1", "c2"]);
        let mut params = json!({
            "ctrlr": name,
            "dev_name": self.base(),
            "readonly": self.below(2) == 0,
            "packed_ring": self.below(2) == 0,
        });
        if self.below(2) == 0 {
            params["cpumask"] = self.one_of(&["0x1", "[0-1]", "2"]).into();
        }
        self.call("vhost_create_blk_controller", params);
    }

    fn make_scsi_controller(&mut self) {
        // Names of both kinds are in one list.
        let name = self.one_of(&["s0", "s1", "c2"]);
        let delay = self.below(2) == 0;
        let mut params = json!({"ctrlr": name, "delay": delay});
        if self.below(2) == 0 {
            params["cpumask"] = self.one_of(&["0x1", "[0-1]", "2"]).into();
            params["packed_ring"] = true.into();
        }
        self.call("vhost_create_scsi_controller", params);
    }

    fn change_targets(&mut self) {
        let name = self.one_of(&["s0", "s1", "c2"]);
        for _ in 0..3 {
            let number = self.one_of(&[json!(-1), json!(0), json!(3.0), json!(7)]);
            let (bdev, params) = (self.base(), json!({"ctrlr": name, "scsi_target_num": number}));
            if self.below(4) == 0 {
                self.call("vhost_scsi_controller_remove_target", params);
                continue;
            }
            let mut params = params;
            params["bdev_name"] = bdev;
            self.call("vhost_scsi_controller_add_target", params);
        }
        if self.below(3) == 0 {
            self.call("vhost_start_scsi_controller", json!({ "ctrlr": name }));
        }
    }

    fn change_controller(&mut self) {
        if self.below(2) == 0 {
            let name = self.one_of(&["c0", "c1", "c2", "s0"]);
            let (delay, threshold) =
                (self.one_of(&[json!(0), json!(20.0)]), self.one_of(&[1000, 60_000]));
            let params =
                json!({"ctrlr": name, "delay_base_us": delay, "iops_threshold": threshold});
            self.call("vhost_controller_set_coalescing", params);
            return;
        }
        let stats = self.vhost.ok("thread_get_stats", Value::Null);
        let threads = stats["threads"].as_array().unwrap().clone();
        let id = self.one_of(&threads)["id"].clone();
        let mask = self.one_of(&["1", "2", "3"]);
        self.call("thread_set_cpumask", json!({"id": id, "cpumask": mask}));
    }
}

const UUIDS: [&str; 3] = [
    "00000000-1111-4222-8333-444444444444",
    "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
    "12345678-1234-4234-8234-123456789abc",
];

/// What `save_config` of SPDK's client writes.
fn save(vhost: &Vhost) -> Value {
    let subsystems = vhost.ok("framework_get_subsystems", Value::Null);
    let config = |subsystem: &Value| {
        let name = subsystem["subsystem"].clone();
        let config = vhost.ok("framework_get_config", json!({ "name": name }));
        json!({"subsystem": name, "config": config})
    };
    let subsystems: Vec<_> = subsystems.as_array().unwrap().iter().map(config).collect();
    json!({ "subsystems": subsystems })
}

/// The operator's view of a configuration: all bdevs, and the controllers that still have a bdev.
fn seen(vhost: &Vhost) -> String {
    let bdevs = vhost.ok("bdev_get_bdevs", Value::Null);
    let controllers = vhost.ok("vhost_get_controllers", Value::Null);
    let has_bdev = |c: &&Value| !c["backend_specific"]["block"]["bdev"].is_null();
    let controllers: Vec<_> = controllers.as_array().unwrap().iter().filter(has_bdev).collect();
    let controllers = json!(controllers).to_string();
    format!("{bdevs} {}", controllers.replace(vhost.dir().to_str().unwrap(), "DIR"))
}

#[test]
fn every_method_is_known_here() {
    let vhost = Launch::new().args(&["--wait-for-rpc"]).start();
    let names = vhost.ok("rpc_get_methods", json!({"current": false}));
    let names: BTreeSet<_> =
        names.as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    let known = METHODS.into_iter().map(|(name, _)| name);
    assert_eq!(names, known.collect(), "classify the method in METHODS");
}

fn start(seed: u64) -> Vhost {
    println!("VHOST_ROUND_TRIP_SEED={seed}");
    let vhost = Launch::new().mask(two_cores()).args(&["--wait-for-rpc"]).start();
    vhost.file("f", 1 << 20);
    vhost.file("g", 2 << 20);
    vhost
}

/// Checks that a saved configuration recreates the target, with `-c` and with `load_config`.
fn check(vhost: &Vhost) {
    let (saved, before) = (save(vhost), seen(vhost));
    let text = serde_json::to_string_pretty(&saved).unwrap();
    let restarted = Launch::new().mask(two_cores()).config(&text).start();
    restarted.ok("framework_wait_init", Value::Null);
    let again = serde_json::to_string_pretty(&save(&restarted)).unwrap();
    assert_eq!(again, text, "-c");
    assert_eq!(seen(&restarted), before, "-c");
    drop(restarted);
    let loaded = Launch::new().mask(two_cores()).args(&["--wait-for-rpc"]).start();
    loaded.spdk_rpc_with_input(&["load_config"], &text).unwrap();
    let again = serde_json::to_string_pretty(&save(&loaded)).unwrap();
    assert_eq!(again, text, "load_config");
    assert_eq!(seen(&loaded), before, "load_config");
}

#[test]
fn any_sequence_of_methods_can_be_saved_and_loaded() {
    let only = std::env::var("VHOST_ROUND_TRIP_SEED").ok().map(|seed| seed.parse().unwrap());
    let seeds = only.map_or(1..13, |seed: u64| seed..seed + 1);
    let mut done = BTreeSet::new();
    for seed in seeds {
        let vhost = start(seed);
        let mut operator = Operator::new(&vhost, seed);
        operator.prepare();
        operator.keep_at_start();
        vhost.ok("framework_start_init", Value::Null);
        for _ in 0..4 {
            (0..25).for_each(|_| operator.act());
            operator.keep();
            check(&vhost);
        }
        done.append(&mut operator.done);
    }
    if only.is_none() {
        let all = saved_methods();
        let missing: Vec<_> = all.difference(&done).collect();
        assert!(missing.is_empty(), "never called with success: {missing:?}");
    }
}

#[test]
fn a_p99_latency_below_its_average_is_saved() {
    let vhost = start(0);
    vhost.ok("framework_start_init", Value::Null);
    vhost.null("A");
    for (name, base) in [("live", "A"), ("waiting", "nope")] {
        let params = json!({
            "name": name, "base_bdev_name": base, "avg_read_latency": 5, "p99_read_latency": 6,
            "avg_write_latency": 7, "p99_write_latency": 8,
        });
        vhost.ok("bdev_delay_create", params);
        for (kind, us) in [("avg_read", 1000), ("p99_write", 1)] {
            let params = json!({"delay_bdev_name": name, "latency_type": kind, "latency_us": us});
            vhost.ok("bdev_delay_update_latency", params);
        }
    }
    check(&vhost);
    assert!(seen(&vhost).contains(r#""avg_read_latency":1000,"p99_read_latency":6,"#));
}

/// A wrapper that waits while another has its base is not saved: loaded, it would be the first.
#[test]
fn a_wrapper_whose_base_is_taken_is_not_saved() {
    let vhost = start(0);
    vhost.ok("bdev_set_options", json!({"bdev_auto_examine": false}));
    vhost.ok("framework_start_init", Value::Null);
    vhost.ok("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "A"}));
    vhost.null("A");
    vhost.ok("bdev_split_create", json!({"base_bdev": "A", "split_count": 2}));
    vhost.ok("bdev_examine", json!({"name": "A"}));
    assert_eq!(vhost.bdev_names(), ["A", "Ap0", "Ap1"]);
    check(&vhost);
    // It is saved again once it waits for nothing but its base.
    vhost.ok("bdev_null_delete", json!({"name": "A"}));
    assert!(save(&vhost).to_string().contains("bdev_passthru_create"));
}

#[test]
fn what_was_examined_is_examined_again() {
    let vhost = start(0);
    vhost.ok("bdev_set_options", json!({"bdev_auto_examine": false}));
    vhost.ok("framework_start_init", Value::Null);
    for base in ["A", "B", "C"] {
        vhost.ok("bdev_error_create", json!({"base_name": base}));
    }
    vhost.ok("bdev_examine", json!({"name": "A"}));
    assert_eq!(vhost.err("bdev_examine", json!({"name": "A"})).code, -17);
    ["A", "B", "C"].iter().for_each(|name| vhost.null(name));
    assert_eq!(vhost.bdev_names(), ["EE_A", "A", "B", "C"]);
    vhost.ok("bdev_examine", json!({"name": "B"}));
    assert_eq!(vhost.bdev_names(), ["EE_A", "EE_B", "A", "B", "C"]);
    check(&vhost);
    // No bdev can be made on one that a controller serves: a configuration with both could not be
    // loaded.
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "C"}));
    assert_eq!(vhost.err("bdev_examine", json!({"name": "C"})).code, -1);
    vhost.ok("bdev_error_delete", json!({"name": "EE_C"}));
    assert_eq!(vhost.err("bdev_error_create", json!({"base_name": "C"})).code, -1);
    check(&vhost);
}
