//! What a front end or an RPC client should not send: half messages, odd fds, and no ears.

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

use crate::beats::Beats;
use crate::vm::memfd;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
/// Requests with fds or without, known or not.
const REQUESTS: [u32; 12] = [2, 3, 5, 6, 7, 12, 13, 14, 21, 32, 37, 4242];
/// Questions whose answers nobody reads: more than a socket takes.
const QUESTIONS: usize = 5000;
/// Fds of one message: more than the longest has (8), and what [`RawConnection`] sends.
const FDS_MAX: usize = 20;
/// RPC methods that change nothing.
const METHODS: [&str; 6] = [
    "bdev_get_bdevs",
    "bdev_get_iostat",
    "framework_get_config",
    "framework_get_reactors",
    "rpc_get_methods",
    "vhost_get_controllers",
];

/// The server may close a connection at any time.
fn sent(result: front_end::Result<()>) -> Result<()> {
    match result {
        Ok(()) | Err(Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A connection with the beginning of a message.
pub(crate) fn half(socket: &Path, rng: &mut Rng) -> Result<RawConnection> {
    let mut connection = RawConnection::connect(socket)?;
    let whole = message(SET_FEATURES, VERSION, &[0; 8]);
    sent(connection.send(&whole[..rng.usize(1..whole.len())], &[]))?;
    Ok(connection)
}

/// A connection with questions until there is no room for further ones.
pub(crate) fn unread(socket: &Path) -> Result<RawConnection> {
    let connection = RawConnection::connect(socket)?;
    connection.flood(&message(GET_FEATURES, VERSION, &[]), QUESTIONS)?;
    Ok(connection)
}

/// A message of any kind with fds of any kind.
pub(crate) fn odd_fds(connection: &mut RawConnection, rng: &mut Rng) -> Result<()> {
    let count = rng.usize(1..=FDS_MAX);
    let fds: Vec<OwnedFd> = (0..count).map(|_| odd_fd(rng)).collect::<Result<_>>()?;
    send(connection, rng, fds.iter().map(AsFd::as_fd).collect())
}

/// A message of any kind with a socket whose close hangs. The server is stopped until our own
/// reference is gone: only the last one hangs.
pub(crate) fn lingering(
    connection: &mut RawConnection,
    rng: &mut Rng,
    process: &mut Process,
    beats: &Beats,
) -> Result<Lingering> {
    let mut lingering = Lingering::new()?;
    beats.without(|| {
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

/// The fds come with the header, or with the payload.
fn send(connection: &mut RawConnection, rng: &mut Rng, fds: Vec<BorrowedFd<'_>>) -> Result<()> {
    let request = *rng.choice(&REQUESTS).context("there are some")?;
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

/// A batch of requests, the answers to which are read, or left to whoever sends them.
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
        let answer = answer.context("a batch without an answer")??;
        let answers = answer.as_array().map_or(0, Vec::len);
        ensure!(answers == count, "{answers} answers to a batch of {count}");
    }
    Ok(client)
}

/// An RPC client to send fds with.
pub(crate) fn rpc_client(socket: &Path) -> Result<RawConnection> {
    Ok(RawConnection::over(UnixStream::connect(socket)?)?)
}
