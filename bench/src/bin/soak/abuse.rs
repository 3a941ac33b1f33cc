//! Misbehaviour of front ends and RPC clients: half messages, unexpected fds, and unread answers.

use std::io::{BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bench::servers::Process;
use fastrand::Rng;
use front_end::raw::{VERSION, message};
use front_end::{Error, LIMIT, Lingering, RawConnection};
use serde_json::{Value, json};

use crate::heartbeats::Heartbeats;
use crate::vm::memfd;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
/// vhost-user requests with and without fds, and an unknown one.
const REQUESTS: [u32; 12] = [2, 3, 5, 6, 7, 12, 13, 14, 21, 32, 37, 4242];
/// Number of messages whose answers are not read: more than the socket's buffer holds.
const QUESTIONS: usize = 5000;
/// Limit on the fds of a message: more than the 8 of the longest valid message.
const FDS_MAX: usize = 20;
/// RPC methods without side effects.
const METHODS: [&str; 6] = [
    "bdev_get_bdevs",
    "bdev_get_iostat",
    "framework_get_config",
    "framework_get_reactors",
    "rpc_get_methods",
    "vhost_get_controllers",
];

/// Ignores that the server has closed the connection, which it may do at any time.
fn sent(result: front_end::Result<()>) -> Result<()> {
    match result {
        Ok(()) | Err(Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens a connection and sends part of a message.
pub(crate) fn half(socket: &Path, rng: &mut Rng) -> Result<RawConnection> {
    let mut connection = RawConnection::connect(socket)?;
    let whole = message(SET_FEATURES, VERSION, &[0; 8]);
    sent(connection.send(&whole[..rng.usize(1..whole.len())], &[]))?;
    Ok(connection)
}

/// Opens a connection and sends messages until the socket is full.
pub(crate) fn unread(socket: &Path) -> Result<RawConnection> {
    let connection = RawConnection::connect(socket)?;
    connection.flood(&message(GET_FEATURES, VERSION, &[]), QUESTIONS)?;
    Ok(connection)
}

/// Sends a random message with random fds.
pub(crate) fn odd_fds(connection: &mut RawConnection, rng: &mut Rng) -> Result<()> {
    let count = rng.usize(1..=FDS_MAX);
    let fds: Vec<OwnedFd> = (0..count).map(|_| odd_fd(rng)).collect::<Result<_>>()?;
    send(connection, rng, fds.iter().map(AsFd::as_fd).collect())
}

/// Sends a random message with a socket whose close hangs. Only closing the last reference hangs,
/// so the server is stopped until this process has closed its reference.
pub(crate) fn lingering(
    connection: &mut RawConnection,
    rng: &mut Rng,
    process: &mut Process,
    heartbeats: &Heartbeats,
) -> Result<Lingering> {
    let mut lingering = Lingering::new()?;
    heartbeats.without(|| {
        process.pause()?;
        let result = send(connection, rng, vec![lingering.fd()]);
        if result.is_ok() {
            lingering.is_sent();
        }
        process.resume()?;
        result
    })?;
    Ok(lingering)
}

/// Sends a message with fds in the header or in the payload.
fn send(connection: &mut RawConnection, rng: &mut Rng, fds: Vec<BorrowedFd<'_>>) -> Result<()> {
    let request = *rng.choice(&REQUESTS).context("REQUESTS is not empty")?;
    let payload: Vec<u8> = (0..rng.usize(0..300)).map(|_| rng.u8(0..4)).collect();
    let whole = message(request, VERSION, &payload);
    if rng.bool() || payload.is_empty() {
        return sent(connection.send(&whole, &fds));
    }
    sent(connection.send(&whole[..12], &[]))?;
    sent(connection.send(&whole[12..], &fds))
}

fn odd_fd(rng: &mut Rng) -> Result<OwnedFd> {
    Ok(match rng.u8(0..4) {
        0 => memfd(rng.u64(0..8192))?.into(),
        1 => std::io::pipe()?.0.into(),
        2 => UnixStream::pair()?.0.into(),
        _ => std::fs::File::open("/dev/null")?.into(),
    })
}

/// Sends a batch of requests, and randomly reads the answers or leaves them unread.
pub(crate) fn batch(socket: &Path, rng: &mut Rng) -> Result<UnixStream> {
    let mut client = UnixStream::connect(socket)?;
    client.set_read_timeout(Some(LIMIT))?;
    client.set_write_timeout(Some(LIMIT))?;
    let count = rng.usize(1..100);
    let member = |id| json!({"method": rng.choice(&METHODS), "id": id});
    let batch: Vec<Value> = (0..count).map(member).collect();
    client.write_all(serde_json::to_string(&batch)?.as_bytes())?;
    if rng.bool() {
        let reader = BufReader::new(&client);
        let answer = serde_json::Deserializer::from_reader(reader).into_iter::<Value>().next();
        let answer = answer.context("no answer to a batch")??;
        let answers = answer.as_array().map_or(0, Vec::len);
        ensure!(answers == count, "{answers} answers to a batch of {count} requests");
    }
    Ok(client)
}

/// Opens an RPC connection that can send fds.
pub(crate) fn rpc_client(socket: &Path) -> Result<RawConnection> {
    Ok(RawConnection::over(UnixStream::connect(socket)?)?)
}
