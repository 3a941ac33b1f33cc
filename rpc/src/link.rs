//! State that a connection's task shares with the requests that it has started.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::rc::Rc;

use tokio::io::Interest;
use tokio::sync::watch;

use crate::answer::{ANSWER_MAX, Pieces};
use crate::hang_up::HangUp;
use crate::pace::Load;
use crate::params::Client;
use crate::stream::Stream;

/// Requests of one connection (and members of one batch) that may run at a time; further ones stay
/// unread until one of them ends. SPDK has no limit. A client that waits for each answer needs one,
/// and scripts that pipeline use tens.
pub const OUTSTANDING_MAX: usize = 128;

/// Bytes of answers, unsent or of unfinished batches, above which no further request is started, so
/// that a client that does not read its answers gets no more of them.
const UNSENT_HIGH: usize = 1024 * 1024;

/// Bytes of unsent answers above which the connection is closed. Only requests that ran at the same
/// time can reach it; twice the longest answer.
const UNSENT_MAX: usize = 2 * ANSWER_MAX;

/// Bytes sent in one turn.
const SEND_MAX: usize = 256 * 1024;

/// The answers that are not sent yet, and the requests that are still running.
pub(crate) struct Link {
    unsent: RefCell<Pieces>,
    /// Bytes of the first piece that are sent.
    sent: Cell<usize>,
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

    /// The client cannot read answers any more.
    pub(crate) fn set_gone(&self) {
        self.close();
        self.unsent.take();
        self.sent.set(0);
        self.gone.send_replace(true);
    }

    /// Accepts no further answers.
    pub(crate) fn close(&self) {
        self.closed.set(true);
    }

    fn unsent_len(&self) -> usize {
        self.unsent.borrow().len() - self.sent.get()
    }

    pub(crate) fn may_start(&self) -> bool {
        self.outstanding.get() < OUTSTANDING_MAX
            && self.unsent_len() + self.load.held() < UNSENT_HIGH
    }

    pub(crate) fn is_overfull(&self) -> bool {
        self.unsent_len() > UNSENT_MAX
    }

    pub(crate) fn is_done_sending(&self) -> bool {
        self.unsent_len() == 0
    }

    /// No request of this client runs, and all answers are sent.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_done_sending() && self.outstanding.get() == 0
    }

    /// No request of this client runs or is waited for, and all answers are sent.
    pub(crate) fn is_done(&self) -> bool {
        self.is_idle() || (self.is_done_sending() && self.is_gone())
    }

    pub(crate) fn push(&self, answer: Pieces) {
        if self.closed.get() || self.is_overfull() {
            return;
        }
        let mut unsent = self.unsent.borrow_mut();
        unsent.append(answer);
        unsent.push(b"\n");
        self.load.changed.notify_one();
    }

    /// Sends what the socket takes in one turn; true if it may take more at once.
    ///
    /// # Errors
    /// The client cannot be written to any more.
    pub(crate) fn flush(&self, stream: &Stream) -> io::Result<bool> {
        let mut unsent = self.unsent.borrow_mut();
        let mut left = SEND_MAX;
        while let Some(piece) = unsent.front() {
            if left == 0 {
                return Ok(true);
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
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Waits until the client can be read if `wants_read`, can be written if there is something to
    /// write, or is gone. What a client has sent before it left can still be read: the two handles
    /// of its socket may report the hang-up at different times.
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

/// Marks the link as gone when its task ends.
pub(crate) struct EndOfLink(pub(crate) Rc<Link>);

impl Drop for EndOfLink {
    fn drop(&mut self) {
        self.0.set_gone();
    }
}

/// Counts a request while it runs, however it ends.
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

    /// What the client can read now.
    fn read(client: &mut UnixStream) -> usize {
        client.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        match client.read_to_end(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => bytes.len(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_link_holds_twice_the_longest_answer_and_takes_nothing_beyond() {
        let link = Link::new();
        // With its newline, each is as long as an answer may be.
        link.push(text(ANSWER_MAX - 1));
        link.push(text(ANSWER_MAX - 1));
        assert!(!link.is_overfull());
        link.push(text(0));
        assert!(link.is_overfull());
        link.push(text(1));
        assert_eq!(link.unsent_len(), 2 * ANSWER_MAX + 1);
    }

    #[test]
    fn no_request_starts_while_a_megabyte_waits_to_be_sent_or_for_its_batch() {
        let link = Link::new();
        link.load.hold(UNSENT_HIGH / 2);
        link.push(text(UNSENT_HIGH / 2 - 2));
        assert!(link.may_start());
        link.push(text(0));
        assert!(!link.may_start());
        link.load.let_go(1);
        assert!(link.may_start());
    }

    #[test]
    fn a_link_is_idle_with_nothing_to_run_or_send_and_done_if_nobody_waits() {
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
        assert!(link.is_idle(), "nothing is kept for a client that is gone");
    }

    #[tokio::test]
    async fn a_turn_sends_so_much_and_what_is_sent_is_not_unsent() {
        let (stream, mut client) = Stream::pair();
        // Room for more than a turn sends.
        set_socket_send_buffer_size(stream.as_fd(), 2 * SEND_MAX).unwrap();
        let link = Link::new();
        let all = 2 * SEND_MAX + 1000;
        link.push(text(all - 1));
        for left in [SEND_MAX + 1000, 1000, 0] {
            stream.ready(Interest::WRITABLE).await;
            let sent = link.unsent_len() - left;
            assert_eq!(link.flush(&stream).unwrap(), left > 0, "whether the socket may take more");
            assert_eq!(read(&mut client), sent);
            assert_eq!(link.unsent_len(), left);
        }
        assert!(link.is_done_sending());
    }

    #[tokio::test]
    async fn a_client_that_cannot_be_written_to_is_an_error() {
        let (stream, client) = Stream::pair();
        drop(client);
        let link = Link::new();
        link.push(text(1));
        stream.ready(Interest::WRITABLE).await;
        assert_eq!(link.flush(&stream).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    /// The second handle may report that a client is gone before the first has read its last bytes.
    #[tokio::test]
    async fn a_client_that_is_gone_is_read_to_its_end() {
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
