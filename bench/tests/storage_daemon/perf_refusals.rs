//! `vhost-perf` and unusable sockets: one line, and status 1.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use front_end::features::{PROTOCOL_FEATURES, VERSION_1};

use crate::fixture::Daemon;
use crate::perf::run;

/// What it says, which is one line.
fn refusal(socket: &Path, options: &str) -> String {
    let output = run(socket, options);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(output.stdout.is_empty());
    let line = told.strip_prefix("vhost-perf: ").unwrap().strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "{line}");
    line.replace(&socket.display().to_string(), "SOCKET")
}

#[test]
fn nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let missing = refusal(&socket, "");
    assert_eq!(missing, "cannot connect to SOCKET: No such file or directory (os error 2)");
    drop(UnixListener::bind(&socket).unwrap());
    let refused = refusal(&socket, "");
    assert_eq!(refused, "cannot connect to SOCKET: Connection refused (os error 111)");
}

#[test]
fn nobody_answers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let told = refusal(&socket, "--timeout 0.2");
    assert_eq!(
        told,
        "SOCKET: GET_FEATURES: no reply within 200ms (not a vhost-user server, or see the server's \
         log)"
    );
}

#[test]
fn the_other_side_closes() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || drop(listener.accept()));
    assert!(refusal(&socket, "").starts_with("SOCKET: GET_FEATURES: "));
}

#[test]
fn too_little() {
    let daemon = Daemon::start(2);
    for (options, expected) in [
        ("--numjobs 3", "SOCKET: the back end has 2 queues, but the load needs 3"),
        ("--packed", "SOCKET: the back end does not offer packed rings"),
        (
            "--size 65m",
            "SOCKET: the disk has 67108864 bytes, fewer than offset 0 plus size 68157440",
        ),
        (
            "--offset 64m",
            "SOCKET: 0 of the disk's 67108864 bytes are 0 blocks of 4096 bytes, but the load needs \
             1",
        ),
        (
            "--size 4m --bs 1m --verify --iodepth 4",
            "SOCKET: 4194304 of the disk's 67108864 bytes are 4 blocks of 1048576 bytes, but the \
             load needs 5",
        ),
        (
            "--iodepth 300",
            "SOCKET: 300 requests of 3 descriptors need a ring of 2048 descriptors, but the limit \
             is 1024: reduce the depth or use --indirect",
        ),
        (
            "--mem-size 64k --iodepth 64",
            "guest memory is used up: 4096 bytes requested: --mem-size is too small for this load",
        ),
        ("--cpus_allowed 1000", "cannot run on core 1000: Invalid argument (os error 22)"),
    ] {
        assert_eq!(refusal(&daemon.socket(), options), expected, "{options}");
    }
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let daemon = Daemon::start_with(1, "writable=off");
    for rw in ["randwrite", "randrw", "write"] {
        let told = refusal(&daemon.socket(), &format!("--rw {rw}"));
        assert_eq!(told, "SOCKET: the disk is read-only, but the load writes");
    }
    assert!(run(&daemon.socket(), "--runtime 0.1").status.success());
}

/// Answers every GET_FEATURES with `features`, and the other questions with nought.
fn answer(mut stream: UnixStream, features: u64) {
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().unwrap());
        let mut payload = vec![0; word(8) as usize];
        stream.read_exact(&mut payload).unwrap();
        let answer = match word(0) {
            1 => features,
            15 => 0,
            _ => continue,
        };
        let header = [word(0), 5, 8].map(u32::to_le_bytes).concat();
        stream.write_all(&[&header[..], &answer.to_le_bytes()].concat()).unwrap();
    }
}

#[test]
fn features_that_are_missing_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            answer(stream, VERSION_1 | PROTOCOL_FEATURES);
        }
    });
    for (options, missing) in [
        ("--indirect", "indirect descriptors"),
        ("--event-idx", "EVENT_IDX"),
        ("--packed", "packed rings"),
        ("", "the configuration space, which holds the disk's size"),
    ] {
        let told = refusal(&socket, options);
        assert_eq!(told, format!("SOCKET: the back end does not offer {missing}"));
    }
}

#[test]
fn a_mistake_on_the_command_line_is_status_2() {
    let output = run(Path::new("/nowhere"), "--bs 1000");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("a multiple of 512"));
}
