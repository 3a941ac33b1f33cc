//! State that a connection's task shares with the requests that it has started.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::rc::Rc;

use tokio::io::Interest;
use tokio::sync::watch;

use crate::answer::{ANSWER_MAX, Pieces};
use crate::client::Client;
use crate::hang_up::HangUp;
use crate::load::Load;
use crate::stream::Stream;

/// Limit on the running requests of one connection, and on the running members of one batch.
/// Further requests stay unread until one ends. SPDK has no limit. A client that waits for each
/// answer needs 1, and scripts that pipeline use tens.
pub const OUTSTANDING_MAX: usize = 128;

/// Bytes of answers, unsent or in unfinished batches, from which on no further request starts. This
/// bounds the memory of a client that does not read its answers.
const UNSENT_HIGH: usize = 1024 * 1024;

/// Bytes of unsent answers above which the connection is closed: twice the longest answer. Only
/// requests that run at the same time can exceed it.
const UNSENT_MAX: usize = 2 * ANSWER_MAX;

/// Limit on the bytes that one iteration sends.
const SEND_MAX: usize = 256 * 1024;

/// How much [`Link::flush`] has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Everything, or as much as the socket takes.
    Everything,
    /// [`SEND_MAX`] bytes; the socket may take more.
    Some,
}

/// The unsent answers of a connection, and the count of its running requests.
pub(crate) struct Link {
    unsent: RefCell<Pieces>,
    /// Bytes of the first piece that are sent.
    sent: Cell<usize>,
    /// Running requests.
    outstanding: Cell<usize>,
    /// No further answers are accepted.
    closed: Cell<bool>,
    gone: watch::Sender<bool>,
    pub(crate) load: Rc<Load>,
}

impl Link {
    pub(crate) fn new() -> Self {
        Self {
            unsent: RefCell::default(),
            sent: Cell::new(0),
            outstanding: Cell::new(0),
            closed: Cell::new(false),
            gone: watch::Sender::new(false),
            load: Rc::default(),
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::remote(self.gone.subscribe(), &self.load)
    }

    pub(crate) fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Records that the client has disconnected. Drops the unsent answers, and tells the running
    /// requests.
    pub(crate) fn set_gone(&self) {
        self.close();
        self.unsent.take();
        self.sent.set(0);
        self.gone.send_replace(true);
    }

    /// Stops accepting answers.
    pub(crate) fn close(&self) {
        self.closed.set(true);
    }

    fn unsent_len(&self) -> usize {
        self.unsent.borrow().len() - self.sent.get()
    }

    /// Whether the next request may start: none holds the connection, and the limits allow
    /// another.
    pub(crate) fn may_start(&self) -> bool {
        !self.load.is_held() && self.has_room()
    }

    /// Whether the limits allow another request.
    pub(crate) fn has_room(&self) -> bool {
        self.outstanding.get() < OUTSTANDING_MAX
            && self.unsent_len() + self.load.buffered() < UNSENT_HIGH
    }

    /// Whether the connection must be closed because of its unsent answers.
    pub(crate) fn is_overfull(&self) -> bool {
        self.unsent_len() > UNSENT_MAX
    }

    /// Whether all answers are sent.
    pub(crate) fn is_done_sending(&self) -> bool {
        self.unsent_len() == 0
    }

    /// Whether no request of this client runs and all answers are sent.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_done_sending() && self.outstanding.get() == 0
    }

    /// Whether all answers are sent, and no request runs or its client has disconnected.
    pub(crate) fn is_done(&self) -> bool {
        self.is_idle() || (self.is_done_sending() && self.is_gone())
    }

    /// Queues an answer, unless the link is closed or overfull.
    pub(crate) fn push(&self, answer: Pieces) {
        if self.closed.get() || self.is_overfull() {
            return;
        }
        let mut unsent = self.unsent.borrow_mut();
        unsent.append(answer);
        unsent.push(b"\n");
        self.load.changed.notify_one();
    }

    /// Sends answers until the socket is full or [`SEND_MAX`] bytes are sent.
    ///
    /// # Errors
    /// The client has disconnected.
    pub(crate) fn flush(&self, stream: &Stream) -> io::Result<Flushed> {
        let mut unsent = self.unsent.borrow_mut();
        let mut left = SEND_MAX;
        while let Some(piece) = unsent.front() {
            if left == 0 {
                return Ok(Flushed::Some);
            }
            let rest = &piece[self.sent.get()..];
            match stream.try_write(&rest[..rest.len().min(left)]) {
                Ok(count) => {
                    left -= count;
                    self.sent.update(|sent| sent + count);
                    if self.sent.get() == piece.len() {
                        unsent.pop_front();
                        self.sent.set(0);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Flushed::Everything)
    }

    /// Waits until the client can be read, if `wants_read`; or can be written, if there are unsent
    /// answers; or has disconnected. After that, this still waits for reads: the client's last
    /// bytes may become readable after the second handle has reported the hang-up.
    pub(crate) async fn ready(&self, stream: &Stream, hang_up: &HangUp, wants_read: bool) {
        if self.is_gone() {
            return if wants_read {
                stream.ready(Interest::READABLE).await
            } else {
                std::future::pending().await
            };
        }
        let read = wants_read.then_some(Interest::READABLE);
        let write = (!self.is_done_sending()).then_some(Interest::WRITABLE);
        let interest = match (read, write) {
            (Some(read), Some(write)) => Some(read | write),
            (read, write) => read.or(write),
        };
        tokio::select! {
            () = hang_up.wait() => self.set_gone(),
            () = stream.ready(interest.unwrap_or(Interest::READABLE)), if interest.is_some() => {}
        }
    }
}

/// Calls [`Link::set_gone`] when the connection's task ends.
pub(crate) struct GoneOnDrop(pub(crate) Rc<Link>);

impl Drop for GoneOnDrop {
    fn drop(&mut self) {
        self.0.set_gone();
    }
}

/// Counts a running request until it is dropped.
pub(crate) struct Running(pub(crate) Rc<Link>);

impl Running {
    pub(crate) fn new(link: Rc<Link>) -> Self {
        link.outstanding.update(|count| count + 1);
        Self(link)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.outstanding.update(|count| count - 1);
        self.0.load.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use rustix::net::sockopt::set_socket_send_buffer_size;

    fn text(len: usize) -> Pieces {
        let mut text = Pieces::default();
        text.push(&vec![b'x'; len]);
        text
    }

    /// The number of bytes that the client can read now.
    fn read(client: &mut UnixStream) -> usize {
        client.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        match client.read_to_end(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => bytes.len(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_link_holds_twice_the_longest_answer_and_drops_further_ones() {
        let link = Link::new();
        // Each has the maximum length with its newline.
        link.push(text(ANSWER_MAX - 1));
        link.push(text(ANSWER_MAX - 1));
        assert!(!link.is_overfull());
        link.push(text(0));
        assert!(link.is_overfull());
        link.push(text(1));
        assert_eq!(link.unsent_len(), 2 * ANSWER_MAX + 1);
    }

    #[test]
    fn no_request_starts_while_a_megabyte_is_unsent_or_in_unfinished_batches() {
        let link = Link::new();
        link.load.add_buffered(UNSENT_HIGH / 2);
        link.push(text(UNSENT_HIGH / 2 - 2));
        assert!(link.may_start());
        link.push(text(0));
        assert!(!link.may_start());
        link.load.remove_buffered(1);
        assert!(link.may_start());
    }

    #[test]
    fn a_link_is_idle_without_requests_and_answers_and_done_without_a_client() {
        let link = Rc::new(Link::new());
        assert!(link.is_idle() && link.is_done());
        let running = Running::new(Rc::clone(&link));
        assert!(!link.is_idle() && !link.is_done());
        link.set_gone();
        assert!(!link.is_idle() && link.is_done());
        drop(running);
        assert!(link.is_idle());

        let link = Link::new();
        link.push(text(1));
        assert!(!link.is_idle() && !link.is_done());
        link.set_gone();
        link.push(text(1));
        assert!(link.is_idle(), "no answers are kept for a client that has disconnected");
    }

    #[tokio::test]
    async fn a_flush_sends_a_bounded_number_of_bytes() {
        let (stream, mut client) = Stream::pair();
        // Room for more than a flush sends.
        set_socket_send_buffer_size(stream.as_fd(), 2 * SEND_MAX).unwrap();
        let link = Link::new();
        let all = 2 * SEND_MAX + 1000;
        link.push(text(all - 1));
        for left in [SEND_MAX + 1000, 1000, 0] {
            stream.ready(Interest::WRITABLE).await;
            let sent = link.unsent_len() - left;
            let expected = if left > 0 { Flushed::Some } else { Flushed::Everything };
            assert_eq!(link.flush(&stream).unwrap(), expected);
            assert_eq!(read(&mut client), sent);
            assert_eq!(link.unsent_len(), left);
        }
        assert!(link.is_done_sending());
    }

    #[tokio::test]
    async fn flushing_to_a_client_that_has_disconnected_is_an_error() {
        let (stream, client) = Stream::pair();
        drop(client);
        let link = Link::new();
        link.push(text(1));
        stream.ready(Interest::WRITABLE).await;
        assert_eq!(link.flush(&stream).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    /// The second handle may report the hang-up before the first has read the client's last bytes.
    #[tokio::test]
    async fn a_client_that_has_disconnected_is_read_to_its_end() {
        let (mut stream, client) = Stream::pair();
        let link = Link::new();
        let hang_up = HangUp::new(&stream).unwrap();
        assert_eq!(stream.try_read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        link.set_gone();
        drop(client);
        link.ready(&stream, &hang_up, true).await;
        assert_eq!(stream.try_read(&mut [0]).unwrap(), 0);
    }
}
