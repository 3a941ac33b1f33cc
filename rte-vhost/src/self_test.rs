//! Tests at start the behaviour of rte_vhost that this program uses and DPDK does not document:
//! deferred replies, and fds that arrive in this program's `recvmsg`.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use closer::ForeignFd;
use vhost_target::protocol::{self, HEADER_BYTES};
use vhost_target::{Connection, Verdict};

use crate::connection::DpdkConnection;
use crate::event_thread;
use crate::shared::shared;
use crate::socket::send_with_fd;

/// The limit for a reply, long enough for a busy machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The ring position in the self-test's reply. No ring has this position by itself.
const SELF_TEST_BASE: u32 = 0x5a5a;

/// Sends GET_VRING_BASE with an fd to the anchor socket. Succeeds if exactly one reply arrives,
/// which is the deferred one, and the connection then still works.
pub(crate) fn run(anchor: &Path) -> io::Result<()> {
    let mut client = UnixStream::connect(anchor)?;
    let message = |request: u32, payload: &[u8]| {
        let size = u32::try_from(payload.len()).expect("eight bytes or none");
        let header = [request, 1, size].map(u32::to_le_bytes).concat();
        [header.as_slice(), payload].concat()
    };
    let with_fd = message(protocol::request::GET_VRING_BASE, &[0; 8]);
    // The client's own socket serves as the fd to send.
    send_with_fd(client.as_fd(), &with_fd, client.as_fd(), libc::MSG_NOSIGNAL)?;
    if read_answer(&mut client)? != *deferred_answer() {
        return Err(io::Error::other("rte_vhost sent a reply of its own to GET_VRING_BASE"));
    }
    client.write_all(&message(protocol::request::GET_FEATURES, &[]))?;
    let request = read_answer(&mut client)?;
    let request = u32::from_le_bytes(std::array::from_fn(|i| request[i]));
    if request != protocol::request::GET_FEATURES {
        return Err(io::Error::other("rte_vhost sent a second reply to GET_VRING_BASE"));
    }
    Ok(())
}

/// Reads a reply of the self-test: a header and eight bytes.
///
/// In DPDK releases that use poll(), the event thread notices its first listener only after a
/// second, unless its poll is interrupted. No VM is connected yet that the interruption could
/// disturb.
fn read_answer(client: &mut UnixStream) -> io::Result<[u8; HEADER_BYTES + 8]> {
    const NUDGE_EVERY: Duration = Duration::from_millis(1);
    client.set_read_timeout(Some(NUDGE_EVERY))?;
    let mut answer = [0; HEADER_BYTES + 8];
    let mut got = 0;
    let deadline = Instant::now() + ANSWER_LIMIT;
    while got < answer.len() {
        match client.read(&mut answer[got..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                if event_thread::POLLS {
                    event_thread::interrupt();
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(answer)
}

fn deferred_answer() -> &'static [u8; HEADER_BYTES + 8] {
    static ANSWER: OnceLock<[u8; HEADER_BYTES + 8]> = OnceLock::new();
    ANSWER.get_or_init(|| {
        let payload = protocol::vring_base(0, SELF_TEST_BASE);
        let answer = protocol::reply(protocol::request::GET_VRING_BASE, &payload);
        answer.try_into().expect("the reply has a header and eight bytes")
    })
}

/// The self-test's handler on the event thread.
pub(crate) fn answer(request: u32, fds: &[ForeignFd], conn: &Arc<DpdkConnection>) -> Verdict {
    if request != protocol::request::GET_VRING_BASE {
        return Verdict::Reject;
    }
    shared().set_fds_arrive(fds.len() == 1);
    let conn = Arc::clone(conn);
    let answer = move || conn.send(deferred_answer());
    match std::thread::Builder::new().name("vhost-selftest".into()).spawn(answer) {
        Ok(_) => Verdict::Deferred,
        Err(_) => Verdict::Reject,
    }
}
