//! The suite of bdevs, on disks that other projects' servers serve.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod server;

use std::sync::Arc;

use bdev::{Bdev, Op, Status};
use bdev_conformance::{Driver, Fixture, SIZE, conformance, pattern};
use nbd::{NbdDisk, NbdUri};
use server::{Program, Server, options};

fn disk(program: Program, export: &str) -> Option<Fixture> {
    let server = Server::new(program)?;
    Some(Fixture::on(server.connect(export), server))
}

/// With blocks of 4096 bytes, and a limit of the server that cuts most I/Os into pieces.
fn small_pieces() -> Option<Fixture> {
    let limits = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=8192"];
    let filter = ["--filter=blocksize-policy"];
    let server = Server::new(Program::nbdkit(&filter, &limits))?;
    let disk = server.connect("");
    assert_eq!(disk.block_size(), 4096);
    Some(Fixture::on(disk, server))
}

fn one_connection() -> Option<Fixture> {
    let program = Program::nbdkit(&["--filter=multi-conn"], &["multi-conn-mode=disable"]);
    let server = Server::new(program)?;
    let disk = server.connect("");
    assert_eq!(disk.connections(), 1);
    Some(Fixture::on(disk, server))
}

conformance! {
    nbdkit => disk(Program::nbdkit(&[], &[]), "");
    nbdkit_with_one_connection => one_connection();
    nbdkit_with_small_pieces => small_pieces();
    nbdkit_in_disorder => disk(
        Program::nbdkit(&["--filter=delay"], &["rdelay=1ms", "delay-write=0"]), ""
    );
    qemu_nbd => disk(Program::qemu_nbd(&["-e", "4"]), "");
    storage_daemon => disk(Program::storage_daemon(), "disk");
}

#[test]
fn several_connections_are_used_if_the_server_allows_them() {
    let Some(server) = Server::new(Program::nbdkit(&[], &[])) else { return };
    let connected = server.connect("");
    assert_eq!(connected.connections(), 3);
    let disk: Arc<dyn Bdev> = connected;
    let mut drivers: Vec<_> = (0..5).map(|_| Driver::new(&disk, 4)).collect();
    for (n, driver) in (0..).zip(&mut drivers) {
        assert_eq!(driver.write(n * 4096, &pattern(n, 4096)), Status::Ok);
    }
    for (n, driver) in (0..).zip(drivers.iter_mut().rev()) {
        assert_eq!(driver.read(n * 4096, 4096), (pattern(n, 4096), Status::Ok));
        assert_eq!(driver.plain(Op::Flush, 0, 0), Status::Ok);
    }
}

#[test]
fn a_read_only_export_refuses_writes() {
    let Some(server) = Server::new(Program::nbdkit(&["-r"], &[])) else { return };
    let disk: Arc<dyn Bdev> = server.connect("");
    assert!(disk.features().read_only && !disk.features().unmap);
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.write(0, &[1; 512]), Status::IoError);
    assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::IoError);
    assert_eq!(driver.read(0, 512), (vec![0; 512], Status::Ok));
}

#[test]
fn options_of_a_disk_are_applied() {
    let Some(server) = Server::new(Program::nbdkit(&[], &[])) else { return };
    let mut options = options(&server.socket(), "");
    options.readonly = true;
    options.block_size = Some(8192);
    let disk = NbdDisk::connect(options.clone()).unwrap();
    assert!(disk.features().read_only);
    assert_eq!((disk.block_size(), disk.num_blocks()), (8192, SIZE / 8192));
    options.block_size = Some(1 << 31);
    assert_eq!(NbdDisk::connect(options.clone()).unwrap_err().errno(), libc::EINVAL);
    options.block_size = Some(100);
    assert_eq!(NbdDisk::connect(options.clone()).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn what_is_no_server_has_an_error() {
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("socket");
    let errno = |options| NbdDisk::connect(options).unwrap_err().errno();
    assert_eq!(errno(options(&socket, "")), libc::ENOENT);
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let closes = std::thread::spawn(move || drop(listener.accept().unwrap()));
    assert_eq!(errno(options(&socket, "")), libc::EIO);
    closes.join().unwrap();
    assert_eq!(errno(options(&socket, "")), libc::ECONNREFUSED);
    // A port that nobody listens on.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}", listener.local_addr().unwrap());
    drop(listener);
    let refused = nbd::NbdOptions { uri: NbdUri::parse(&uri).unwrap(), ..options(&socket, "") };
    assert_eq!(errno(refused), libc::ECONNREFUSED);
    if let Some(server) = Server::new(Program::storage_daemon()) {
        assert_eq!(errno(options(&server.socket(), "other")), libc::ENOENT);
    }
}
