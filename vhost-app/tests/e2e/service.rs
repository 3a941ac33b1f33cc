//! What a service manager and other users see of the real binary: the sockets' rights, and the
//! messages of sd_notify(3).
//!
//! That a reactor without progress withholds the watchdog's report is a unit test of `notify`: no
//! operator can stop a single thread of a process.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use rustix::process::{getegid, geteuid, getgroups};
use serde_json::{Value, json};

use crate::support::harness::{LIMIT, Launch, Vhost};

/// A user and a group that nobody has.
const UNUSED_ID: u32 = 54_321;

/// Mode, owner and group of a file.
fn access(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mode() & 0o7777, meta.uid(), meta.gid())
}

fn is_root() -> bool {
    geteuid().is_root()
}

/// A group that this process may give files to, if possible not the one that they get anyway.
fn group() -> u32 {
    let own = getegid();
    let other = getgroups().unwrap().into_iter().find(|group| *group != own);
    if is_root() { UNUSED_ID } else { other.unwrap_or(own).as_raw() }
}

fn create_controller(vhost: &Vhost) {
    vhost.null("N");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "N"}));
}

/// The configuration of a controller "c" on a null disk.
fn one_controller() -> String {
    let disk = json!({"method": "bdev_null_create",
        "params": {"name": "N", "num_blocks": 8, "block_size": 512}});
    let controller = json!({"method": "vhost_create_blk_controller",
        "params": {"ctrlr": "c", "dev_name": "N"}});
    json!({"subsystems": [{"subsystem": "bdev", "config": [disk]},
        {"subsystem": "vhost_blk", "config": [controller]}]})
    .to_string()
}

#[test]
fn both_sockets_have_the_mode_and_the_group_of_the_options() {
    let group = group();
    let vhost = Vhost::start(&["--socket-mode", "0604", "--socket-group", &group.to_string()]);
    create_controller(&vhost);
    let expected = (0o604, geteuid().as_raw(), group);
    assert_eq!(access(&vhost.rpc_socket()), expected);
    assert_eq!(access(&vhost.socket("c")), expected);
    // The socket of a second one too, and the lock of the RPC socket stays private.
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "d", "dev_name": "N"}));
    assert_eq!(access(&vhost.socket("d")), expected);
    assert_eq!(access(&vhost.dir().join("rpc.sock.lock")).0, 0o600);
    // No capability was kept for it.
    let status = fs::read_to_string(format!("/proc/{}/status", vhost.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    assert_eq!(u64::from_str_radix(line.trim(), 16).unwrap() & 1, 0, "CAP_CHOWN: {line}");
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn without_the_options_the_umask_decides() {
    let vhost = Launch::new().through(&["sh", "-c", "umask 027; exec \"$@\"", "sh"]).start();
    create_controller(&vhost);
    let expected = (0o750, geteuid().as_raw(), getegid().as_raw());
    assert_eq!(access(&vhost.rpc_socket()), expected);
    assert_eq!(access(&vhost.socket("c")), expected);
}

#[test]
fn the_owner_of_both_sockets_is_that_of_the_option() {
    let unused = UNUSED_ID.to_string();
    let args = ["--socket-owner", &unused, "--socket-group", &unused, "--socket-mode", "600"];
    let launch = Launch::new().args(&args);
    if !is_root() {
        let ended = launch.run_to_end();
        assert_eq!(ended.code, Some(234), "{}", ended.log);
        assert!(ended.log.contains("vhost needs CAP_CHOWN for it"), "{}", ended.log);
        return;
    }
    let vhost = launch.start();
    create_controller(&vhost);
    assert_eq!(access(&vhost.rpc_socket()), (0o600, UNUSED_ID, UNUSED_ID));
    assert_eq!(access(&vhost.socket("c")), (0o600, UNUSED_ID, UNUSED_ID));
    let dir = vhost.dir().to_owned();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    assert!(!fs::exists(dir.join("c")).unwrap());
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_mode_a_user_or_a_group_that_does_not_exist_ends_the_start() {
    for (args, code, text) in [
        (["--socket-mode", "rw"], 2, "expected permissions as an octal number"),
        (["--socket-mode", "4755"], 2, "expected permissions as an octal number"),
        (["--socket-owner", "no-such-user"], 1, "--socket-owner: unknown user \"no-such-user\""),
        (["--socket-group", "no-such-group"], 1, "--socket-group: unknown group \"no-such-group\""),
        (["--socket-group", "4294967295"], 1, "--socket-group: unknown group \"4294967295\""),
    ] {
        let launch = Launch::new().args(&args);
        let ended = launch.run_to_end();
        assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.log);
        assert!(ended.log.contains(text), "{args:?}: {}", ended.log);
    }
}

/// A launch that may neither give files away nor join groups, and asks for a group that it is not in.
fn without_rights() -> Launch {
    let args = ["--socket-group", &UNUSED_ID.to_string()];
    let launch = Launch::new().args(&args);
    if is_root() {
        launch.through(&["setpriv", "--bounding-set", "-chown,-setgid"])
    } else {
        launch
    }
}

#[test]
fn a_group_that_the_process_is_not_in_is_refused_and_no_socket_is_left() {
    const REASON: &str = "cannot change the group to 54321: Operation not permitted";
    let launch = without_rights();
    let vhost = launch.spawn();
    let dir = vhost.dir().to_owned();
    let mut vhost = vhost;
    assert_eq!(vhost.wait(), Some(234));
    assert!(vhost.log().contains(&format!("rpc.sock: {REASON}")), "{}", vhost.log());
    for name in ["rpc.sock", "rpc.sock.lock"] {
        assert!(!fs::exists(dir.join(name)).unwrap(), "{name}");
    }
    // With no RPC socket, a controller of the configuration is refused in the same way.
    let launch = without_rights().config(&one_controller());
    let mut vhost = launch.args(&["--no-rpc-server", "--json-ignore-init-errors"]).spawn();
    let socket = vhost.socket("c");
    let text = format!("cannot listen on {}: {REASON}", socket.display());
    vhost.wait_for_log(&text);
    vhost.wait_for_log("vhost_create_blk_controller");
    assert!(!fs::exists(&socket).unwrap());
    vhost.signal("TERM");
    assert_eq!(vhost.wait(), Some(0));
    let launch = without_rights().config(&one_controller()).args(&["--no-rpc-server"]);
    let ended = launch.run_to_end();
    assert!(ended.log.contains(REASON), "{}", ended.log);
    assert!(ended.code.is_some_and(|code| code != 0), "{}", ended.log);
}

/// A controller that is refused leaves nothing: it can be created when the reason is gone.
#[test]
fn a_refused_controller_can_be_created_later() {
    let vhost = Vhost::start(&["--socket-mode", "600"]);
    vhost.null("N");
    let params = json!({"ctrlr": "c", "dev_name": "N"});
    fs::write(vhost.socket("c"), "not a socket").unwrap();
    assert_eq!(vhost.err("vhost_create_blk_controller", params.clone()).code, -32602);
    assert_eq!(vhost.ok("vhost_get_controllers", Value::Null), json!([]));
    fs::remove_file(vhost.socket("c")).unwrap();
    vhost.ok("vhost_create_blk_controller", params);
    assert_eq!(access(&vhost.socket("c")).0, 0o600);
}

/// The socket of a service manager.
struct Manager(UnixDatagram);

impl Manager {
    fn new(launch: Launch) -> (Self, Launch) {
        let path = launch.dir().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(LIMIT)).unwrap();
        (Self(manager), launch.env("NOTIFY_SOCKET", path.to_str().unwrap()))
    }

    fn receive(&self) -> String {
        let mut bytes = [0; 1024];
        let len = self.0.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    /// Receives messages up to one that begins with `first`, which is returned.
    fn until(&self, first: &str) -> String {
        loop {
            let message = self.receive();
            if message.starts_with(first) {
                return message;
            }
        }
    }

    /// All messages that have arrived.
    fn arrived(&self) -> Vec<String> {
        self.0.set_nonblocking(true).unwrap();
        let mut bytes = [0; 1024];
        let mut messages = vec![];
        while let Ok(len) = self.0.recv(&mut bytes) {
            messages.push(String::from_utf8(bytes[..len].to_vec()).unwrap());
        }
        self.0.set_nonblocking(false).unwrap();
        messages
    }
}

#[test]
fn it_is_ready_when_the_configuration_is_loaded_and_says_when_it_stops() {
    let (manager, launch) = Manager::new(Launch::new().config(&one_controller()));
    let vhost = launch.spawn();
    assert_eq!(manager.receive(), "READY=1\nSTATUS=Serving with 1 reactor");
    // Nothing is waited for.
    assert_eq!(vhost.bdev_names(), ["N"]);
    assert!(fs::exists(vhost.socket("c")).unwrap());
    let mut vhost = vhost;
    vhost.signal("TERM");
    assert_eq!(manager.receive(), "STOPPING=1\nSTATUS=Shutting down");
    assert_eq!(vhost.wait(), Some(0));
    assert_eq!(manager.arrived(), [] as [&str; 0]);
}

#[test]
fn with_wait_for_rpc_it_is_ready_after_framework_start_init() {
    let launch = Launch::new().config(&one_controller()).args(&["--wait-for-rpc"]);
    let (manager, launch) = Manager::new(launch);
    let vhost = launch.start();
    assert_eq!(manager.receive(), "STATUS=Waiting for framework_start_init");
    vhost.ok("spdk_get_version", Value::Null);
    assert_eq!(manager.arrived(), [] as [&str; 0]);
    vhost.ok("framework_start_init", Value::Null);
    assert!(manager.receive().starts_with("READY=1\n"));
    assert_eq!(vhost.bdev_names(), ["N"]);
}

#[test]
fn a_start_that_fails_is_never_ready() {
    let (manager, launch) = Manager::new(Launch::new().args(&["-c", "/no/such/config"]));
    let mut vhost = launch.spawn();
    assert_eq!(vhost.wait(), Some(1));
    let ready = manager.arrived().into_iter().find(|message| message.contains("READY"));
    assert_eq!(ready, None);
}

#[test]
fn the_watchdog_is_fed_while_reactors_poll_and_while_they_sleep() {
    for args in [&[][..], &["--interrupt-mode"]] {
        let launch = Launch::new().args(args).env("WATCHDOG_USEC", "200000");
        let (manager, launch) = Manager::new(launch);
        let vhost = launch.spawn();
        manager.until("READY=1\n");
        // Without queues, the reactor sleeps.
        manager.until("WATCHDOG=1");
        create_controller(&vhost);
        let ram = GuestRam::new(&[32 << 20]).unwrap();
        let mut front_end = FrontEnd::connect(&vhost.socket("c"), ram, Options::default()).unwrap();
        front_end.start_new(1, QueueOptions::default()).unwrap();
        // What was sent before the ring was started does not count.
        manager.arrived();
        manager.until("WATCHDOG=1");
        manager.until("WATCHDOG=1");
        assert_eq!(vhost.stop(), 0);
    }
}

#[test]
fn the_watchdog_of_another_process_and_an_absent_manager_are_ignored() {
    let launch = Launch::new().env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    let (manager, launch) = Manager::new(launch);
    let vhost = launch.spawn();
    manager.until("READY=1\n");
    vhost.ok("spdk_get_version", Value::Null);
    assert_eq!(vhost.stop(), 0);
    assert!(manager.receive().starts_with("STOPPING=1"));
    let vhost = Launch::new().env("NOTIFY_SOCKET", "/no/such/socket").start();
    vhost.wait_for_log("cannot connect to the service manager (NOTIFY_SOCKET)");
    assert_eq!(vhost.stop(), 0);
}

/// The sandbox refuses connections to abstract sockets of other processes, so the connection must
/// be older.
#[test]
fn an_abstract_socket_of_the_manager_is_reached_from_the_sandbox() {
    let name = format!("vhost-e2e-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = Manager(UnixDatagram::bind_addr(&address).unwrap());
    manager.0.set_read_timeout(Some(LIMIT)).unwrap();
    let vhost = Launch::new().env("NOTIFY_SOCKET", &format!("@{name}")).spawn();
    assert!(manager.receive().starts_with("READY=1\n"));
    assert_eq!(vhost.stop(), 0);
    assert!(manager.receive().starts_with("STOPPING=1\n"));
}

#[test]
fn in_the_journal_a_line_has_a_priority_and_no_time() {
    let script = "export JOURNAL_STREAM=$(stat -Lc %d:%i /dev/stderr); exec \"$@\"";
    let vhost = Launch::new().through(&["sh", "-c", script, "sh"]).start();
    vhost.err("vhost_delete_controller", json!({"ctrlr": "none"}));
    vhost.wait_for_log("\n<3>");
    assert!(vhost.log().starts_with("<5>main.rs"), "{}", vhost.log());
    let vhost = Launch::new().env("JOURNAL_STREAM", "1:1").start();
    vhost.wait_for_log("Starting SPDK");
    assert!(vhost.log().starts_with('['), "{}", vhost.log());
}
