//! Bytes that were received and not yet parsed.

use std::io;

use crate::request::Request;
use crate::scan::{self, Scan, Scanner};
use crate::stream::Stream;

/// Limit on the bytes of one request; a longer one is refused. SPDK's number.
pub const REQUEST_MAX: usize = 256 * 1024;

/// Bytes requested from the socket in one read.
pub(crate) const READ_SIZE: usize = 16 << 10;

/// Bytes that were received and not yet parsed.
pub(crate) struct Input {
    bytes: Vec<u8>,
    /// Start of the value that is being scanned.
    start: usize,
    /// How far it has been scanned.
    scanned: usize,
    scanner: Scanner,
}

/// What the next bytes are.
pub(crate) enum Next {
    Request(Request),
    /// The request is not complete yet.
    Incomplete,
    /// [`REQUEST_MAX`] bytes without a complete request.
    TooLong,
    /// Not JSON.
    Invalid,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), start: 0, scanned: 0, scanner: Scanner::new() }
    }

    /// The next request. [`Next::Incomplete`] means that there is room to read more.
    pub(crate) fn next(&mut self) -> Next {
        if self.scanner.is_idle() {
            // Whitespace before a request does not count towards it.
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

    /// Reads once, after [`Next::Incomplete`]; 0 is the end of the stream.
    pub(crate) fn read(&mut self, stream: &mut Stream) -> io::Result<usize> {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        let filled = self.bytes.len();
        if filled == 0 {
            // An idle client keeps no buffer.
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
