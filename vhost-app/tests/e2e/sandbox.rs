//! The sandbox as seen from outside: each thread's status, and the process that opens disks.
//!
//! That each kind of thread is refused what it must not do is tested in the crate `sandbox`, with
//! the same filters: the product has no interface to make it try.

use std::collections::BTreeMap;
use std::fs;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::support::harness::{Launch, Vhost, wait_until};
use crate::support::isolation::Form;

/// CAP_DAC_OVERRIDE.
const OVERRIDE: u64 = 1 << 1;
const OVERRIDE_AND_SEARCH: u64 = OVERRIDE | 1 << 2;

/// What making io_urings needs: CAP_IPC_LOCK, and CAP_SYS_ADMIN where the system requires it.
fn rings() -> u64 {
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    1 << 14 | if disabled.trim() == "1" { 1 << 21 } else { 0 }
}

/// The kernel's status of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Given {
    /// Number of seccomp filters; `None` if there are none, or the thread may gain privileges.
    filters: Option<u64>,
    capabilities: u64,
}

fn status(path: &str) -> (String, Given) {
    given(&fs::read_to_string(path).unwrap())
}

fn given(text: &str) -> (String, Given) {
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in {text}")).trim()
    };
    let confined = (of("Seccomp:"), of("NoNewPrivs:")) == ("2", "1");
    let filters = confined.then(|| of("Seccomp_filters:").parse().unwrap());
    let capabilities = u64::from_str_radix(of("CapEff:"), 16).unwrap();
    (of("Name:").into(), Given { filters, capabilities })
}

/// The threads of a process by name; one of several with the same name.
fn threads(pid: u32) -> BTreeMap<String, Given> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // A thread may end meanwhile: a deleted disk's do.
    let texts = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    texts.map(|text| given(&text)).collect()
}

/// The process that opens disks for this one.
fn opener(vhost: &Vhost) -> Option<Pid> {
    let children = format!("/proc/{0}/task/{0}/children", vhost.pid());
    let children = fs::read_to_string(children).unwrap();
    let pid: i32 = children.split_whitespace().next()?.parse().unwrap();
    assert_eq!(children.split_whitespace().count(), 1, "{children}");
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    assert_eq!(name.trim(), "vhost-open");
    Pid::from_raw(pid)
}

/// Waits for the end of a process that is not our child.
fn wait_for_end(pidfd: &impl std::os::fd::AsFd) {
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None).unwrap();
}

fn aio(name: &str, filename: &str) -> serde_json::Value {
    json!({"name": name, "filename": filename, "block_size": 512})
}

#[test]
fn every_thread_has_given_up_what_its_kind_does_without() {
    let form = Form::Full;
    let vhost = form.start();
    vhost.wait_for_log("sandbox: no new privileges");
    let neighbour = vhost.neighbour();
    // Starts a thread of the blocking pool, and one that closes files.
    let file = vhost.file("disk", 1 << 20);
    vhost.ok("bdev_aio_create", aio("A", &file));
    vhost.ok("bdev_aio_delete", json!({"name": "A"}));

    // The tests may run without root.
    let (_, own) = status("/proc/self/status");
    let kept = |capabilities: u64| own.capabilities & capabilities;
    let threads = threads(vhost.pid());
    for (name, filters, capabilities) in [
        ("vhost", 4, kept(OVERRIDE | rings())),
        ("vhost-log", 3, kept(OVERRIDE | rings())),
        ("vhost-dpdk", 4, kept(OVERRIDE | rings())),
        ("vhost-events", 5, kept(rings())),
        ("vhost-reclaim", 5, kept(rings())),
        ("vhost-unmap", 5, kept(rings())),
    ] {
        let given = threads.get(name).unwrap_or_else(|| panic!("{name}: {threads:?}"));
        assert_eq!(*given, Given { filters: Some(filters), capabilities }, "{name}");
    }
    let reactors = threads.iter().filter(|(name, _)| name.starts_with("reactor_"));
    let confined = Given { filters: Some(6), capabilities: 0 };
    assert_eq!(reactors.filter(|(_, given)| **given == confined).count(), 2, "{threads:?}");
    // All other threads.
    for (name, given) in &threads {
        assert!(given.filters >= Some(3), "{name}: {given:?}");
        assert_eq!(given.capabilities & !(OVERRIDE | rings()), 0, "{name}");
    }
    let pid = opener(&vhost).unwrap().as_raw_nonzero();
    let (_, given) = status(&format!("/proc/{pid}/status"));
    assert_eq!(given, Given { filters: Some(4), capabilities: kept(OVERRIDE_AND_SEARCH) });

    neighbour.goes_on();
    neighbour.end();
    assert_eq!(vhost.process.log().matches("*ERROR*").count(), 0);
}

#[test]
fn disks_come_from_anywhere_and_their_errors_are_spdks() {
    let elsewhere = tempfile::tempdir().unwrap();
    let vhost = Vhost::start(&[]);
    let [disk, other] = ["disk", "other"].map(|name| elsewhere.path().join(name));
    for file in [&disk, &other] {
        fs::File::create(file).unwrap().set_len(1 << 20).unwrap();
    }
    let path = |name: &str| elsewhere.path().join(name).to_str().unwrap().to_owned();
    vhost.ok("bdev_aio_create", aio("A", &path("disk")));
    vhost.ok("bdev_uring_create", aio("U", &path("other")));
    fs::File::options().write(true).open(&disk).unwrap().set_len(2 << 20).unwrap();
    vhost.ok("bdev_aio_rescan", json!({"name": "A"}));
    let bdev = vhost.bdev("A");
    assert_eq!(bdev["num_blocks"], 4096);
    assert_eq!(vhost.err("bdev_aio_create", aio("B", &path("none"))).code, -2);
    assert_eq!(vhost.err("bdev_aio_create", aio("B", &path(""))).code, -21);
    assert_eq!(vhost.err("bdev_aio_create", aio("B", "/dev/null")).code, -22);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn with_disk_dir_disks_come_from_there_only() {
    let [inside, outside] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let path = |dir: &tempfile::TempDir| {
        let path = dir.path().join("disk");
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let vhost = Vhost::start(&["--disk-dir", inside.path().to_str().unwrap()]);
    vhost.ok("bdev_aio_create", aio("A", &path(&inside)));
    assert_eq!(vhost.err("bdev_aio_create", aio("B", &path(&outside))).code, -13);
    assert_eq!(vhost.stop(), 0);

    let ended = Launch::new().args(&["--disk-dir", "/nowhere/at/all"]).run_to_end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.log.contains("--disk-dir: /nowhere/at/all does not exist"), "{}", ended.log);
}

#[test]
fn without_the_process_that_opens_disks_those_that_are_there_go_on() {
    let vhost = Form::Small.start();
    let file = vhost.file("disk", 16 << 20);
    vhost.ok("bdev_aio_create", aio("A", &file));
    let vm = vhost.vm(&vhost.controller_on("c", "A"));
    vm.goes_on();
    let pid = opener(&vhost.process).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    wait_for_end(&pidfd);
    vm.goes_on();
    let refusal = vhost.err("bdev_aio_create", aio("B", &file));
    assert!([-libc_epipe(), -libc_econnreset()].contains(&refusal.code), "{refusal:?}");
    vhost.wait_for_log("the process that opens disks has ended; restart vhost to add disks");
    vhost.malloc("M");
    vhost.ok("bdev_aio_rescan", json!({"name": "A"}));
    vm.goes_on();
    vm.end();
    assert_eq!(vhost.process.stop(), 0);
}

fn libc_epipe() -> i64 {
    i64::from(rustix::io::Errno::PIPE.raw_os_error())
}

fn libc_econnreset() -> i64 {
    i64::from(rustix::io::Errno::CONNRESET.raw_os_error())
}

#[test]
fn no_end_leaves_a_process_behind() {
    for signal in ["TERM", "KILL", "ABRT"] {
        let mut vhost = Vhost::start(&["-d"]);
        let pidfd = pidfd_open(opener(&vhost).unwrap(), PidfdFlags::empty()).unwrap();
        vhost.signal(signal);
        vhost.wait();
        wait_for_end(&pidfd);
    }
}

#[test]
fn the_process_that_opens_disks_ends_though_it_was_stopped() {
    let mut vhost = Vhost::start(&[]);
    let pid = opener(&vhost).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    vhost.signal("KILL");
    vhost.wait();
    pidfd_send_signal(&pidfd, Signal::CONT).unwrap();
    wait_for_end(&pidfd);
}

#[test]
fn it_can_be_left_out_and_asked_for() {
    let vhost = Vhost::start(&["--no-sandbox"]);
    vhost.wait_for_log("sandbox: none");
    assert!(opener(&vhost).is_none());
    assert!(threads(vhost.pid()).values().all(|given| given.filters.is_none()));
    vhost.ok("bdev_aio_create", aio("A", &vhost.file("disk", 1 << 20)));
    assert_eq!(vhost.stop(), 0);

    let vhost = Vhost::start(&["--no-sandbox", "--sandbox"]);
    vhost.wait_for_log("sandbox: no new privileges");
    assert!(opener(&vhost).is_some());
    assert_eq!(vhost.stop(), 0);

    let ended = Launch::new().args(&["--no-sandbox", "--disk-dir", "/"]).run_to_end();
    let text = "--disk-dir cannot be used with --no-sandbox";
    assert_eq!((ended.code, ended.log.trim()), (Some(1), text));
}

#[test]
fn a_socket_directory_that_is_not_there_is_named() {
    let elsewhere = tempfile::tempdir().unwrap();
    let dir = elsewhere.path().join("later");
    // Sockets are made in the RPC socket's directory and in the directory for temporary files.
    let launch = Launch::new();
    let own = launch.dir().to_str().unwrap().to_owned();
    let vhost = launch.env("TMPDIR", &own).args(&["-S", dir.to_str().unwrap()]).start();
    vhost.wait_for_log("later does not exist; if it is created later, restart vhost");
    vhost.malloc("M");
    fs::create_dir(&dir).unwrap();
    vhost.err("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "M"}));
    assert_eq!(vhost.stop(), 0);
}

/// `-S` belongs to the user of the VMs, and the server runs as root.
#[test]
fn root_makes_sockets_in_others_directories() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let launch = Launch::new();
    let dir = launch.dir().join("qemu");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    if let Err(e) = chown(&dir, Some(12345), Some(12345)) {
        return test_report::skipped("root", &format!("cannot give a directory away: {e}"));
    }
    let vhost = launch.args(&["-S", dir.to_str().unwrap()]).start();
    let disk = dir.join("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    chown(&disk, Some(12345), Some(12345)).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o600)).unwrap();
    vhost.ok("bdev_aio_create", aio("A", disk.to_str().unwrap()));
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "A"}));
    wait_until("the socket", || dir.join("c").exists());
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "c"}));
    assert!(!dir.join("c").exists());
    assert_eq!(vhost.stop(), 0);
}
