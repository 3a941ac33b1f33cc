//! The start and the end of the real binary: options, files, phases, exit codes.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost, core_mask};

fn entry(subsystem: &str, entries: &[Value]) -> String {
    json!({"subsystems": [{"subsystem": subsystem, "config": entries}]}).to_string()
}

fn disk(name: &str) -> Value {
    json!({"method": "bdev_null_create",
        "params": {"name": name, "num_blocks": 8, "block_size": 512}})
}

#[test]
fn exit_codes_of_the_command_line() {
    for (args, code) in [
        (&["-x"][..], 2),
        (&["--help"], 0),
        (&["-v"], 0),
        (&["-s", "nonsense"], 2),
        (&["--lcores", "0"], 2),
        (&["-p", "99"], 1),
        (&["-f", "/no/such/dir/pid"], 1),
        (&["-c", "/no/such/config"], 1),
    ] {
        let ended = Launch::new().args(args).run_to_end();
        assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.log);
        if code != 0 {
            // The option or its value.
            let named = args.iter().any(|arg| ended.log.contains(arg));
            assert!(named, "{args:?} is named: {}", ended.log);
        }
    }
    let ended = Launch::new().mask("0x80000000000000000000000000").run_to_end();
    assert_eq!(ended.code, Some(1), "{}", ended.log);
    assert!(ended.log.contains("core 103"), "{}", ended.log);
}

/// As in `vhost -h | head -1`, whose reader exits before it has read the whole text.
#[test]
fn help_into_a_closed_pipe_is_no_error() {
    for option in ["-h", "-v"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost"));
        let ended = command.arg(option).stdout(writer).output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{option}");
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{option}");
    }
}

#[test]
fn the_first_lines_are_spdks() {
    let vhost = Vhost::start(&["-n", "4", "--env-context", "x", "--enforce-numa", "extra"]);
    vhost.wait_for_log("Reactor started on core");
    let log = vhost.log();
    let mut lines = log.lines();
    let first = lines.next().unwrap();
    assert!(first.contains("*NOTICE*: Starting SPDK v26.09-pre"), "{first}");
    assert!(first.contains(" / DPDK ") && first.ends_with("initialization..."), "{first}");
    let ignored: Vec<&str> = log.lines().filter(|line| line.contains("have no effect")).collect();
    assert_eq!(ignored.len(), 1);
    for option in ["--mem-channels", "--env-context", "--enforce-numa"] {
        assert!(ignored[0].contains(option), "{}", ignored[0]);
    }
    assert!(log.contains("*WARNING*: ignoring arguments that are not options: extra"), "{log}");
    let core = core_mask().trim_start_matches("0x").parse::<u32>().unwrap().trailing_zeros();
    assert!(log.contains("Total cores available: 1"));
    assert!(log.contains(&format!("Reactor started on core {core}")));
}

#[test]
fn memory_without_hugepages_and_with_one_null_controller() {
    let vhost = Vhost::start(&["--no-huge", "-s", "256"]);
    vhost.ok("bdev_null_create", json!({"name": "N", "num_blocks": 8, "block_size": 512}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "N"}));
    assert!(vhost.rss_kib() < 16 << 10, "{} kB", vhost.rss_kib());
}

#[test]
fn rpc_socket_taken_too_long_or_stale() {
    let vhost = Vhost::start(&[]);
    let taken = vhost.rpc_socket();
    let ended = Launch::new().args(&["-r", taken.to_str().unwrap()]).run_to_end();
    assert_eq!(ended.code, Some(234));
    assert!(ended.log.contains(taken.to_str().unwrap()), "{}", ended.log);
    // It goes on as if nothing had been.
    vhost.ok("spdk_get_version", Value::Null);
    let long = format!("/tmp/{}", "r".repeat(120));
    let ended = Launch::new().args(&["-r", &long]).run_to_end();
    assert_eq!(ended.code, Some(234));
    assert!(ended.log.contains(&long));

    let launch = Launch::new();
    fs::write(launch.dir().join("rpc.sock"), "").unwrap();
    fs::write(launch.dir().join("rpc.sock.lock"), "").unwrap();
    let vhost = launch.start();
    let dir = vhost.dir().to_owned();
    vhost.ok("bdev_null_create", json!({"name": "N", "num_blocks": 8, "block_size": 512}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "N"}));
    // What is not among the sockets stays.
    fs::write(dir.join("other"), "").unwrap();
    let kept = fs::read_dir(&dir).unwrap().count();
    let mut vhost = vhost;
    vhost.signal("INT");
    assert_eq!(vhost.wait(), Some(0));
    let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), kept - 3, "{left:?}");
    assert!(left.contains(&"other".into()));
}

#[test]
fn pid_file_and_core_locks() {
    let launch = Launch::new();
    let pid_file = launch.dir().join("pid");
    let vhost = launch.core_locks().args(&["-f", pid_file.to_str().unwrap()]).start();
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), vhost.pid().to_string());
    let core = core_mask().trim_start_matches("0x").parse::<u32>().unwrap().trailing_zeros();
    let lock = format!("/var/tmp/spdk_cpu_lock_{core:03}");
    assert_eq!(fs::read(&lock).unwrap(), vhost.pid().to_ne_bytes());
    let ended = Launch::new().core_locks().run_to_end();
    assert_eq!(ended.code, Some(1));
    let text = format!(
        "Cannot create lock on core {core}, probably process {} has claimed it.",
        vhost.pid()
    );
    assert!(ended.log.contains(&text), "{}", ended.log);
    assert_eq!(vhost.stop(), 0);
    assert!(!fs::exists(&lock).unwrap());
}

#[test]
fn a_configuration_is_replayed_in_two_passes() {
    let text = r#"
    // What SPDK allows here.
    {"other": [], "subsystems": [
        {"subsystem": "vhost_blk", "config": null},
        {"subsystem": "bdev", "config": [
            {"method": "bdev_null_create",
             "params": {"name": "N0", "num_blocks": 8, "block_size": 512}}, /* and
            later: */
            {"method": "bdev_set_options", "params": {"bdev_io_pool_size": 9999}},
            [{"method": "log_set_print_level", "params": {"level": "WARNING"}},
             {"method": "bdev_wait_for_examine"}]]},
        {"subsystem": "nvmf", "config": [{"method": "nvmf_set_config", "params": {}}]}]}"#;
    let vhost = Launch::new().config(text).start();
    let bdev = vhost.ok("framework_get_config", json!({"name": "bdev"}));
    assert_eq!(bdev[0]["params"]["bdev_io_pool_size"], 9999);
    assert_eq!(bdev[1]["params"]["name"], "N0");
    assert_eq!(vhost.ok("log_get_print_level", Value::Null), "WARNING");
}

/// As SPDK's `save_config` writes it for a target like ours, shortened.
#[test]
fn a_configuration_that_spdk_saved_is_taken() {
    let mask = &core_mask()[2..];
    let text = json!({"subsystems": [
        {"subsystem": "scheduler", "config": [
            {"method": "framework_set_scheduler", "params": {"name": "static"}}]},
        {"subsystem": "sock", "config": [
            {"method": "sock_set_default_impl", "params": {"impl_name": "posix"}},
            {"method": "sock_impl_set_options", "params": {"impl_name": "ssl", "tls_version": 0}}]},
        {"subsystem": "iobuf", "config": [{"method": "iobuf_set_options", "params":
            {"small_pool_count": 8192, "large_pool_count": 1024, "small_bufsize": 8192,
             "large_bufsize": 135168, "enable_numa": false}}]},
        {"subsystem": "keyring", "config": []},
        {"subsystem": "vmd", "config": []},
        {"subsystem": "fsdev", "config": [{"method": "fsdev_set_opts", "params":
            {"fsdev_io_pool_size": 65535, "fsdev_io_cache_size": 256}}]},
        {"subsystem": "accel", "config": [{"method": "accel_set_options", "params":
            {"small_cache_size": 128, "large_cache_size": 16, "task_count": 2048,
             "sequence_count": 2048, "buf_count": 2048}}]},
        {"subsystem": "bdev", "config": [
            {"method": "bdev_set_options", "params": {"bdev_io_pool_size": 65535,
             "bdev_io_cache_size": 256, "bdev_auto_examine": true, "iobuf_small_cache_size": 128,
             "iobuf_large_cache_size": 16}},
            {"method": "bdev_raid_set_options", "params": {"process_window_size_kb": 1024}},
            {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 2048,
             "block_size": 512, "physical_block_size": 512,
             "uuid": "b3a1f1d0-7c41-4b4e-9d4b-0a4c1c0f6a11", "optimal_io_boundary": 0,
             "md_size": 0, "dif_type": 0, "dif_is_head_of_md": false, "dif_pi_format": 0}},
            {"method": "bdev_nvme_set_options", "params": {"action_on_timeout": "none"}},
            {"method": "bdev_nvme_set_hotplug", "params": {"period_us": 100000, "enable": false}},
            {"method": "bdev_wait_for_examine"}]},
        {"subsystem": "vhost_blk", "config": [
            {"method": "vhost_create_blk_controller", "params": {"ctrlr": "vhost.0",
             "dev_name": "Malloc0", "cpumask": mask, "readonly": false,
             "transport": "vhost_user_blk"}},
            {"method": "vhost_controller_set_coalescing", "params": {"ctrlr": "vhost.0",
             "delay_base_us": 1, "iops_threshold": 100}}]},
        {"subsystem": "scsi", "config": null},
        {"subsystem": "nbd", "config": []},
        {"subsystem": "vhost_scsi", "config": []}]});
    let vhost = Launch::new().config(&text.to_string()).start();
    let shown = vhost.ok("vhost_get_controllers", Value::Null);
    assert_eq!(shown[0]["iops_threshold"], 100);
    assert_eq!(
        vhost.ok("framework_get_config", json!({"name": "iobuf"})).as_array().unwrap().len(),
        1
    );
    for method in ["framework_set_scheduler", "fsdev_set_opts"] {
        vhost.wait_for_log(method);
        assert_eq!(vhost.log().matches(method).count(), 1, "{method}");
    }
}

#[test]
fn bad_configurations_end_the_start_with_spdks_codes() {
    let twice = entry("bdev", &[disk("N"), disk("N")]);
    let unknown = entry("bdev", &[disk("N"), json!({"method": "bdev_iscsi_create", "params": {}})]);
    let startup_only = json!({"method": "iobuf_set_options", "params": {"small_pool_count": 1}});
    for (text, code, named) in [
        (String::new(), 234, "config.json"),
        ("[]".into(), 234, "expected an object"),
        ("{\"subsystems\": [".into(), 234, "line 1"),
        (r#"{"subsystems": [{"subsystem": "bdev"}]}"#.into(), 234, "bdev"),
        (twice, 234, "bdev_null_create (subsystem bdev, entry 2) failed: File exists"),
        (unknown, 254, "bdev_iscsi_create (subsystem bdev, entry 2)"),
        (entry("iobuf", &[startup_only]), 234, "iobuf_set_options"),
    ] {
        let ended = Launch::new().config(&text).run_to_end();
        assert_eq!(ended.code, Some(code), "{text}: {}", ended.log);
        assert!(ended.log.contains(named), "{text}: {}", ended.log);
    }
    let launch = Launch::new().config("");
    fs::write(launch.dir().join("config.json"), b"{\"a\": \"\xff\"}").unwrap();
    let ended = launch.run_to_end();
    assert_eq!(ended.code, Some(234));
    assert!(ended.log.contains("utf-8"), "{}", ended.log);
    // Without "subsystems" there is nothing to do, which is worth a warning.
    let vhost = Launch::new().config("{}").start();
    vhost.wait_for_log("*WARNING*: the configuration has no");
}

#[test]
fn errors_of_a_configuration_can_be_ignored() {
    let entries = [disk("A"), disk("A"), json!({"method": "no_such"}), disk("B")];
    let text = entry("bdev", &entries);
    let vhost = Launch::new().config(&text).args(&["--json-ignore-init-errors"]).start();
    let names = vhost.ok("bdev_get_bdevs", Value::Null);
    assert_eq!((&names[0]["name"], &names[1]["name"]), (&json!("A"), &json!("B")));
    vhost.wait_for_log("entry 2) failed");
    vhost.wait_for_log("no_such (subsystem bdev, entry 3)");
    let ended = Launch::new().config("{").args(&["--json-ignore-init-errors"]).run_to_end();
    assert_eq!(ended.code, Some(234));
}

#[test]
fn phases_with_wait_for_rpc() {
    let config = entry("bdev", &[disk("N")]);
    let vhost = Launch::new().config(&config).args(&["--wait-for-rpc"]).start();
    let refusal = vhost.err("bdev_get_bdevs", Value::Null);
    assert_eq!(refusal.code, -1);
    assert!(refusal.message.starts_with("Method may only be called after framework"));
    let current = vhost.ok("rpc_get_methods", json!({"current": true}));
    let has = |name: &str| current.as_array().unwrap().contains(&json!(name));
    assert!(has("framework_start_init") && has("iobuf_set_options") && has("log_set_flag"));
    assert!(!has("vhost_get_controllers") && !has("framework_get_subsystems"));
    // As SPDK's test scripts do.
    let pools = json!({"small_pool_count": 16383, "large_pool_count": 2047});
    assert_eq!(vhost.ok("iobuf_set_options", pools), true);
    assert_eq!(vhost.err("iobuf_set_options", json!({"small_pool_count": 63})).code, -22);
    let options = json!({"bdev_io_pool_size": 100, "bdev_io_cache_size": 100});
    let refusal = vhost.err("bdev_set_options", options);
    assert_eq!(refusal, Refusal::new(-32602, "Pool size 100 too small for cache size 100"));
    assert_eq!(vhost.ok("bdev_set_options", json!({"bdev_auto_examine": false})), true);
    let mut waiting = vhost.connect();
    waiting.send("framework_wait_init", json!({"anything": 1}));
    vhost.ok("spdk_get_version", Value::Null);
    assert!(!waiting.has_answer());
    assert_eq!(vhost.ok("framework_start_init", Value::Null), true);
    assert_eq!(waiting.receive().1, Ok(json!(true)));
    assert_eq!(vhost.ok("bdev_get_bdevs", Value::Null)[0]["name"], "N");

    // Wrappers wait to be examined, as that was asked for.
    vhost.ok("bdev_error_create", json!({"base_name": "M"}));
    vhost.ok("bdev_null_create", json!({"name": "M", "num_blocks": 8, "block_size": 512}));
    assert_eq!(vhost.err("bdev_get_bdevs", json!({"name": "EE_M"})).code, -19);
    vhost.ok("bdev_examine", json!({"name": "M"}));
    vhost.ok("bdev_get_bdevs", json!({"name": "EE_M"}));
}

#[test]
fn a_start_that_fails_is_answered_before_the_process_ends() {
    let config = entry("bdev", &[disk("N"), disk("N")]);
    let mut vhost = Launch::new().config(&config).args(&["--wait-for-rpc"]).start();
    let refusal = vhost.err("framework_start_init", Value::Null);
    assert_eq!(refusal, Refusal::new(-32603, "framework_initialization failed"));
    assert_eq!(vhost.wait(), Some(234));
}

#[test]
fn a_waiting_target_ends_by_signal() {
    let vhost = Launch::new().args(&["--wait-for-rpc"]).start();
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_configuration_may_come_through_a_pipe_and_a_signal_gets_past_it() {
    let launch = Launch::new().config("");
    let path = launch.dir().join("config.json");
    fs::remove_file(&path).unwrap();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let mut vhost = launch.spawn();
    vhost.wait_for_log("Reactor started");
    vhost.signal("TERM");
    assert_eq!(vhost.wait(), Some(0));

    let launch = Launch::new().config("");
    let path = launch.dir().join("config.json");
    fs::remove_file(&path).unwrap();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let vhost = launch.spawn();
    fs::write(&path, entry("bdev", &[disk("N")])).unwrap();
    let vhost = vhost.until_it_listens();
    assert_eq!(vhost.bdev_names(), ["N"]);
}

#[test]
fn only_allowed_methods_exist() {
    let allowed = "rpc_get_methods,bdev_null_create";
    let config = entry("bdev", &[disk("N")]);
    let vhost = Launch::new().args(&["--rpcs-allowed", allowed]).config(&config).start();
    assert_eq!(
        vhost.ok("rpc_get_methods", json!({})),
        json!(["bdev_null_create", "rpc_get_methods"])
    );
    assert_eq!(vhost.err("bdev_get_bdevs", Value::Null), Refusal::new(-32601, "Method not found"));
    let config = entry("bdev", &[json!({"method": "bdev_wait_for_examine"})]);
    let ended = Launch::new().args(&["--rpcs-allowed", allowed]).config(&config).run_to_end();
    assert_eq!(ended.code, Some(254));
}

#[test]
fn signals_that_spdk_leaves_alone_end_the_process() {
    for signal in ["SIGHUP", "SIGUSR1", "SIGKILL"] {
        let mut vhost = Vhost::start(&[]);
        // The answer may or may not make it.
        vhost.connect().send("spdk_kill_instance", json!({"sig_name": signal}));
        assert_eq!(vhost.wait(), None, "{signal}");
    }
    let mut vhost = Vhost::start(&[]);
    vhost.signal("PIPE");
    vhost.ok("spdk_get_version", Value::Null);
    vhost.signal("INT");
    assert_eq!(vhost.wait(), Some(0));
}
