//! The receive buffer of a connection, from which requests are parsed.

use std::io;

use crate::request::Request;
use crate::scan::{self, Scan, Scanner};
use crate::stream::Stream;

/// Limit on the bytes of one request, as in SPDK. A longer request is refused.
pub const REQUEST_MAX: usize = 256 * 1024;

/// Bytes requested from the socket in one read.
pub(crate) const READ_SIZE: usize = 16 << 10;

/// Received bytes that are not yet parsed.
pub(crate) struct Input {
    bytes: Vec<u8>,
    /// Start of the value that is being scanned.
    start: usize,
    /// End of the bytes that have been scanned.
    scanned: usize,
    scanner: Scanner,
}

/// The result of [`Input::next`].
pub(crate) enum Next {
    /// A request.
    Request(Request),
    /// The next request is incomplete.
    Incomplete,
    /// The buffer holds [`REQUEST_MAX`] bytes without a complete request.
    TooLong,
    /// The bytes are not JSON.
    Invalid,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), start: 0, scanned: 0, scanner: Scanner::new() }
    }

    /// Parses the next request. After [`Next::Incomplete`], the buffer has room to read more.
    pub(crate) fn next(&mut self) -> Next {
        if self.scanner.is_idle() {
            // White space before a request does not count towards its length.
            let space = self.bytes[self.scanned..].iter().take_while(|b| scan::is_space(**b));
            self.scanned += space.count();
            self.start = self.scanned;
        }
        match self.scanner.feed(&self.bytes[self.scanned..]) {
            Scan::Incomplete => {
                self.scanned = self.bytes.len();
                match self.bytes.len() - self.start {
                    REQUEST_MAX.. => Next::TooLong,
                    _ => Next::Incomplete,
                }
            }
            Scan::Invalid => Next::Invalid,
            Scan::Complete(count) => {
                let value = self.start..self.scanned + count;
                self.scanner = Scanner::new();
                self.start = value.end;
                self.scanned = value.end;
                let text = std::str::from_utf8(&self.bytes[value]).ok();
                match text.map(Request::parse) {
                    Some(Ok(request)) => Next::Request(request),
                    _ => Next::Invalid,
                }
            }
        }
    }

    /// Reads once. Call it after [`Next::Incomplete`]. 0 means end of file.
    pub(crate) fn read(&mut self, stream: &mut Stream) -> io::Result<usize> {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        let filled = self.bytes.len();
        if filled == 0 {
            // Frees the buffer of an idle client.
            self.bytes = Vec::new();
        }
        self.bytes.resize(filled + READ_SIZE.min(REQUEST_MAX - filled), 0);
        let read = stream.try_read(&mut self.bytes[filled..]);
        self.bytes.truncate(filled + *read.as_ref().unwrap_or(&0));
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        read
    }
}
