//! The suite of bdevs, on disks that `qemu-storage-daemon` serves.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod server;

use std::path::PathBuf;
use std::sync::Arc;

use bdev::{Bdev, Op, Status};
use bdev_conformance::{Driver, Fixture, conformance, pattern};
use server::Server;
use tempfile::TempDir;
use virtio_user::{VirtioDisk, VirtioOptions};

fn disk(format: &'static str, options: &'static str, size: u16) -> Option<Fixture> {
    let server = Server::new(format, options)?;
    Some(Fixture::on(server.connect(4, size), server))
}

conformance! {
    qcow2_512 => disk("qcow2", ",writable=on", 256);
    raw_4096_of_two_queues => disk("raw", ",writable=on,logical-block-size=4096,num-queues=2", 512);
    raw_in_a_ring_of_one_request => disk("raw", ",writable=on", 4);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let Some(server) = Server::new("raw", "") else { return };
    let disk: Arc<dyn Bdev> = server.connect(1, 64);
    assert!(disk.features().read_only && !disk.features().unmap);
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.write(0, &[1; 512]), Status::IoError);
    assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::IoError);
    assert_eq!(driver.read(0, 512), (vec![0; 512], Status::Ok));
}

/// The next server does the requests that were in flight, and those that came without a server.
#[test]
fn io_goes_on_with_the_next_server() {
    let Some(mut server) = Server::new("raw", ",writable=on") else { return };
    let connected = server.connect(1, 64);
    let disk: Arc<dyn Bdev> = Arc::clone(&connected) as _;
    let mut driver = Driver::new(&disk, 16);
    let block = |n: u64| pattern(n, 4096);
    for n in 0..8 {
        assert_eq!(driver.write(n * 4096, &block(n)), Status::Ok);
    }
    server.stop();
    while connected.is_connected() {
        std::thread::yield_now();
    }
    for n in 8..16 {
        let mut memory = bdev_conformance::Memory::plain(4096);
        memory.fill(&block(n));
        let write = bdev_conformance::Request::rw(Op::Write, n * 4096, memory);
        let tag = driver.free_tag().unwrap();
        assert!(matches!(driver.submit(tag, write), Ok(None)));
    }
    assert!(driver.visit().is_empty());
    server.serve();
    let mut ended = 0;
    while ended < 8 {
        let done = driver.visit();
        assert!(done.iter().all(|(_, status)| *status == Status::Ok));
        ended += done.len();
    }
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::IoError, "unflushed writes may be lost");
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
    server.restart();
    assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok, "all writes were flushed");
    for n in 0..16 {
        assert_eq!(driver.read(n * 4096, 4096), (block(n), Status::Ok), "{n}");
    }
}

#[test]
fn what_is_no_server_has_an_error() {
    let dir = TempDir::new().unwrap();
    let errno = |socket: PathBuf, queue_size| {
        let options = VirtioOptions { name: "d".into(), socket, queues: 1, queue_size };
        VirtioDisk::connect(options).unwrap_err().errno()
    };
    assert_eq!(errno(dir.path().join("nope"), 64), libc::ENOENT);
    assert_eq!(errno(dir.path().join("nope"), 65), libc::EINVAL);
    let silent = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let closes = std::thread::spawn(move || drop(silent.accept().unwrap()));
    assert_eq!(errno(dir.path().join("socket"), 64), libc::EIO);
    closes.join().unwrap();
}
