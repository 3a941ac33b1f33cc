//! The transmission phase: a client's requests in, replies out.
//!
//! A state machine over bytes and the I/Os of a [`ThreadChannel`]. The source is the NBD project's
//! protocol specification, "Transmission".

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::sync::Arc;

use bdev::{Bdev, Buffer, EndedRequest, Op, Request, Tag, ThreadChannel};
use nbd::protocol::{self as wire, ChunkHeader, SimpleReply, chunk, command, command_flag};

use crate::negotiation::{ALLOCATION_ID, Chosen, PAYLOAD_MAX};
use crate::properties::Properties;
use crate::status;

/// The maximum number of requests of one client that are worked on at the same time.
pub(crate) const DEPTH: u16 = 64;
/// The maximum of the data that is held for one client, in bytes. A single request may exceed it.
const HELD_MAX: usize = 64 << 20;
/// The length of the I/Os that a long unmap or write of zeroes is done in. Their data has no limit,
/// and a bdev may do such an I/O in one step.
const STEP: u64 = 8 << 20;
/// A part of the output takes no further replies from this length on, in bytes, so that sent parts
/// are freed.
const PART: usize = 64 << 10;
/// The maximum number of parts of the output that one system call sends.
const PARTS_MAX: usize = 32;

/// The client has violated the protocol in a way that leaves the start of its next request unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Violation(pub(crate) &'static str);

/// The transmission with one client.
pub(crate) struct Transmission {
    bdev: Arc<dyn Bdev>,
    properties: Properties,
    chosen: Chosen,
    channel: ThreadChannel,
    receiving: Receiving,
    working: HashMap<Tag, Working>,
    /// Bytes of buffers that are not in the output yet.
    held: usize,
    output: Output,
}

/// What the next bytes of the client are.
enum Receiving {
    Header,
    /// The rest of a write's payload.
    Payload {
        request: wire::Request,
        buffer: Buffer,
        got: usize,
    },
    /// The rest of the payload of a write that has failed with this errno.
    Skip {
        request: wire::Request,
        errno: i32,
        left: usize,
    },
    /// The client has asked for the end.
    Nothing,
}

/// A request whose I/O is under way.
struct Working {
    request: wire::Request,
    /// The end of what is done when the present I/O has ended, relative to the request's offset.
    done: u64,
    /// A flush of the request is under way.
    flushing: bool,
    /// The data of a read while its flush is under way.
    data: Buffer,
}

impl Transmission {
    pub(crate) fn new(
        bdev: Arc<dyn Bdev>,
        properties: Properties,
        chosen: Chosen,
        channel: ThreadChannel,
    ) -> Self {
        let (receiving, working, output) = (Receiving::Header, HashMap::new(), Output::default());
        Self { bdev, properties, chosen, channel, receiving, working, held: 0, output }
    }

    pub(crate) fn channel(&self) -> &ThreadChannel {
        &self.channel
    }

    pub(crate) fn output(&mut self) -> &mut Output {
        &mut self.output
    }

    /// Returns whether the client has asked for the end, and everything else is done.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.receiving, Receiving::Nothing)
            && self.working.is_empty()
            && self.output.is_empty()
    }

    /// Returns whether another request would be taken now.
    pub(crate) fn has_room(&self) -> bool {
        let held = self.held + self.output.len;
        !self.channel.is_full() && held < HELD_MAX && !matches!(self.receiving, Receiving::Nothing)
    }

    /// Consumes bytes from the front of `input`, and starts the requests in them. Returns the
    /// number of consumed bytes.
    ///
    /// # Errors
    /// The client has violated the protocol.
    pub(crate) fn advance(&mut self, input: &[u8]) -> Result<usize, Violation> {
        let mut at = 0;
        loop {
            let rest = &input[at..];
            match std::mem::replace(&mut self.receiving, Receiving::Header) {
                Receiving::Header => {
                    let Some(header) = rest.first_chunk().filter(|_| self.has_room()) else {
                        return Ok(at);
                    };
                    let request = wire::Request::decode(header)
                        .ok_or(Violation("a request has a wrong magic number"))?;
                    at += wire::Request::SIZE;
                    self.take(request)?;
                }
                Receiving::Payload { request, mut buffer, mut got } => {
                    let wanted = &mut buffer.bytes_mut()[got..];
                    let n = wanted.len().min(rest.len());
                    wanted[..n].copy_from_slice(&rest[..n]);
                    (at, got) = (at + n, got + n);
                    if got < buffer.bytes().len() {
                        self.receiving = Receiving::Payload { request, buffer, got };
                        return Ok(at);
                    }
                    self.start(request, Request::write(request.offset, buffer));
                }
                Receiving::Skip { request, errno, left } => {
                    let n = left.min(rest.len());
                    at += n;
                    if n < left {
                        self.receiving = Receiving::Skip { request, errno, left: left - n };
                        return Ok(at);
                    }
                    self.fail(request, errno);
                }
                Receiving::Nothing => {
                    self.receiving = Receiving::Nothing;
                    return Ok(input.len());
                }
            }
        }
    }

    /// Takes a request whose header has arrived.
    fn take(&mut self, request: wire::Request) -> Result<(), Violation> {
        let has_payload = request.command == command::WRITE;
        if has_payload && request.len > PAYLOAD_MAX {
            return Err(Violation("a write is longer than the server allows"));
        }
        if request.command == command::DISC {
            self.receiving = Receiving::Nothing;
            return Ok(());
        }
        let len = request.len as usize;
        if let Err(errno) = self.check(&request) {
            if has_payload && len > 0 {
                self.receiving = Receiving::Skip { request, errno, left: len };
            } else {
                self.fail(request, errno);
            }
            return Ok(());
        }
        match request.command {
            command::READ => {
                self.held += len;
                self.start(request, Request::read(request.offset, len));
            }
            command::WRITE => {
                self.held += len;
                self.receiving = Receiving::Payload { request, buffer: Buffer::new(len), got: 0 };
            }
            command::FLUSH => self.start(request, Request::plain(Op::Flush, 0, 0)),
            command::BLOCK_STATUS => self.block_status(request),
            _ => self.start(request, step(&request, 0)),
        }
        Ok(())
    }

    /// Returns the errno with which an invalid request fails.
    fn check(&self, request: &wire::Request) -> Result<(), i32> {
        use command_flag::{DF, FUA, NO_HOLE, REQ_ONE};
        let Properties { size, block_size, read_only, flush, unmap, write_zeroes } =
            self.properties;
        let fua = if flush { FUA } else { 0 };
        let Chosen { structured, allocation } = self.chosen;
        let (supported, writes, flags) = match request.command {
            command::READ => (true, false, if structured { DF | fua } else { fua }),
            command::WRITE => (true, true, fua),
            command::FLUSH => (flush, false, fua),
            command::TRIM => (unmap, true, fua),
            command::WRITE_ZEROES => (write_zeroes, true, fua | NO_HOLE),
            command::BLOCK_STATUS => (structured && allocation, false, REQ_ONE | fua),
            _ => (false, false, 0),
        };
        if !supported || request.flags & !flags != 0 {
            return Err(libc::EINVAL);
        }
        if writes && read_only {
            return Err(libc::EPERM);
        }
        if request.command == command::FLUSH {
            return if request.len == 0 && request.offset == 0 {
                Ok(())
            } else {
                Err(libc::EINVAL)
            };
        }
        let (len, block) = (u64::from(request.len), u64::from(block_size));
        let too_long = request.command == command::READ && request.len > PAYLOAD_MAX;
        let aligned = request.offset.is_multiple_of(block) && len.is_multiple_of(block);
        if len == 0 || too_long || !aligned {
            return Err(libc::EINVAL);
        }
        match request.offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ if writes => Err(libc::ENOSPC),
            _ => Err(libc::EINVAL),
        }
    }

    fn start(&mut self, request: wire::Request, io: Request) {
        let working = Working { request, done: io.len, flushing: false, data: Buffer::default() };
        let tag = self.channel.start(io);
        self.working.insert(tag, working);
    }

    /// Takes some of the I/Os that have ended, and replies to the requests that are done. Returns
    /// whether there were any. A memory disk ends I/Os at once, so the number is limited.
    pub(crate) fn collect(&mut self) -> bool {
        let mut any = false;
        for _ in 0..DEPTH {
            let Some(EndedRequest { tag, request: io, result }) = self.channel.poll() else {
                break;
            };
            any = true;
            let Some(working) = self.working.remove(&tag) else { continue };
            self.go_on(working, io, result);
        }
        any
    }

    /// Starts the next I/O of a request, or replies to it.
    fn go_on(&mut self, mut working: Working, io: Request, result: Result<(), i32>) {
        let request = working.request;
        if !working.flushing {
            working.data = io.buffer;
        }
        if let Err(errno) = result {
            self.held -= working.data.bytes().len();
            return self.fail(request, errno);
        }
        let is_long = matches!(request.command, command::TRIM | command::WRITE_ZEROES);
        let (next, done) = if is_long && working.done < u64::from(request.len) {
            let next = step(&request, working.done);
            let done = working.done + next.len;
            (next, done)
        } else if request.flags & command_flag::FUA != 0
            && !working.flushing
            && !matches!(request.command, command::READ | command::FLUSH)
        {
            working.flushing = true;
            (Request::plain(Op::Flush, 0, 0), working.done)
        } else {
            self.held -= working.data.bytes().len();
            return self.succeed(request, working.data);
        };
        // There is room: the slot of the ended I/O.
        let tag = self.channel.start(next);
        self.working.insert(tag, Working { done, ..working });
    }

    fn succeed(&mut self, request: wire::Request, data: Buffer) {
        let is_read = request.command == command::READ;
        if !(is_read && self.chosen.structured) {
            self.output.push(&SimpleReply { error: 0, cookie: request.cookie }.encode());
        } else {
            let header = ChunkHeader {
                flags: chunk::DONE,
                kind: chunk::OFFSET_DATA,
                cookie: request.cookie,
                len: request.len + 8,
            };
            self.output.push(&header.encode());
            self.output.push(&request.offset.to_be_bytes());
        }
        if is_read {
            self.output.push_buffer(data);
        }
    }

    fn fail(&mut self, request: wire::Request, errno: i32) {
        let (error, cookie) = (wire::errno_to_wire(errno), request.cookie);
        let structured = matches!(request.command, command::READ | command::BLOCK_STATUS);
        if !(structured && self.chosen.structured) {
            return self.output.push(&SimpleReply { error, cookie }.encode());
        }
        let header = ChunkHeader { flags: chunk::DONE, kind: chunk::ERROR, cookie, len: 6 };
        self.output.push(&header.encode());
        self.output.push(&error.to_be_bytes());
        // The length of a message.
        self.output.push(&0_u16.to_be_bytes());
    }

    fn block_status(&mut self, request: wire::Request) {
        let only_one = request.flags & command_flag::REQ_ONE != 0;
        let described = status::describe(&self.bdev, request.offset, request.len, only_one);
        let extents = match described {
            Ok(extents) => extents,
            Err(e) => return self.fail(request, e.errno()),
        };
        let len = u32::try_from(4 + 8 * extents.len()).unwrap_or(u32::MAX);
        let (flags, kind) = (chunk::DONE, chunk::BLOCK_STATUS);
        let header = ChunkHeader { flags, kind, cookie: request.cookie, len };
        self.output.push(&header.encode());
        self.output.push(&ALLOCATION_ID.to_be_bytes());
        for (len, flags) in extents {
            self.output.push(&len.to_be_bytes());
            self.output.push(&flags.to_be_bytes());
        }
    }
}

/// Returns the I/O that does the part of an unmap or a write of zeroes after `done` bytes.
fn step(request: &wire::Request, done: u64) -> Request {
    let len = (u64::from(request.len) - done).min(STEP);
    let (op, may_unmap) = match request.command {
        command::TRIM => (Op::Unmap, false),
        _ => (Op::WriteZeroes, request.flags & command_flag::NO_HOLE == 0),
    };
    Request { may_unmap, ..Request::plain(op, request.offset + done, len) }
}

/// Bytes for the client.
#[derive(Default)]
pub(crate) struct Output {
    parts: VecDeque<Part>,
    /// The bytes of the first part that were sent.
    sent: usize,
    len: usize,
}

enum Part {
    Headers(Vec<u8>),
    Data(Buffer),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Headers(bytes) => bytes,
            Self::Data(buffer) => buffer.bytes(),
        }
    }
}

impl Output {
    fn push(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        match self.parts.back_mut() {
            Some(Part::Headers(last)) if last.len() < PART => last.extend_from_slice(bytes),
            _ => self.parts.push_back(Part::Headers(bytes.to_vec())),
        }
    }

    fn push_buffer(&mut self, buffer: Buffer) {
        self.len += buffer.bytes().len();
        self.parts.push_back(Part::Data(buffer));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the first bytes to send.
    pub(crate) fn front(&self) -> Vec<IoSlice<'_>> {
        let mut sent = self.sent;
        let slice = |part| IoSlice::new(&Part::bytes(part)[std::mem::take(&mut sent)..]);
        self.parts.iter().take(PARTS_MAX).map(slice).collect()
    }

    /// Removes the first `n` bytes, which were sent.
    pub(crate) fn advance(&mut self, n: usize) {
        self.len -= n;
        self.sent += n;
        while let Some(first) = self.parts.front()
            && self.sent >= first.bytes().len()
        {
            self.sent -= first.bytes().len();
            self.parts.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use bdev::{Malloc, MallocOptions, Rights};

    use super::*;

    const SIZE: u64 = 32 << 20;

    fn transmission(structured: bool, change: impl Fn(&mut Properties)) -> Transmission {
        let num_blocks = SIZE / 512;
        let options = MallocOptions { name: "m".into(), num_blocks, block_size: 512, uuid: None };
        let bdev: Arc<dyn Bdev> = Malloc::create(options).unwrap();
        let mut properties = Properties::of(&*bdev, false);
        change(&mut properties);
        let channel = ThreadChannel::open(&bdev, DEPTH, Rights::Write).unwrap();
        let chosen = Chosen { structured, allocation: structured };
        Transmission::new(bdev, properties, chosen, channel)
    }

    fn request(command: u16, flags: u16, offset: u64, len: u32) -> wire::Request {
        wire::Request { flags, command, cookie: 7, offset, len }
    }

    /// Sends bytes in pieces, waits for the end of all I/O, and returns the output.
    fn talk(transmission: &mut Transmission, bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut input, mut output) = (vec![], vec![]);
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            let n = transmission.advance(&input).unwrap();
            input.drain(..n);
            while !transmission.working.is_empty() {
                if !transmission.collect() {
                    transmission.channel().sleep(&mut []).unwrap();
                }
            }
            while !transmission.output().is_empty() {
                let front: Vec<u8> =
                    transmission.output().front().iter().flat_map(|s| s.to_vec()).collect();
                // Not all at once, as a socket might.
                let n = front.len().div_ceil(2);
                output.extend_from_slice(&front[..n]);
                transmission.output().advance(n);
            }
        }
        assert_eq!((input.len(), transmission.held), (0, 0));
        output
    }

    fn error_of(transmission: &mut Transmission, request: wire::Request) -> u32 {
        let payload = if request.command == command::WRITE { request.len as usize } else { 0 };
        let bytes = [&request.encode()[..], &vec![0; payload]].concat();
        let output = talk(transmission, &bytes, bytes.len());
        SimpleReply::decode(output.first_chunk().unwrap()).unwrap().error
    }

    #[test]
    fn what_is_written_is_read_back_however_the_bytes_arrive() {
        let data: Vec<u8> = (0..8192_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let write = request(command::WRITE, command_flag::FUA, 4096, 8192).encode();
        let requests = [
            [&write[..], &data].concat(),
            request(command::FLUSH, 0, 0, 0).encode().to_vec(),
            request(command::READ, 0, 4096, 8192).encode().to_vec(),
            request(command::WRITE_ZEROES, 0, 0, 20 << 20).encode().to_vec(),
            request(command::TRIM, 0, 0, 9 << 20).encode().to_vec(),
            request(command::READ, 0, 4096, 512).encode().to_vec(),
        ];
        let ok = SimpleReply { error: 0, cookie: 7 }.encode();
        let zeroes = [0; 512];
        let expected = [&ok[..], &ok, &ok, &data, &ok, &ok, &ok, &zeroes].concat();
        for piece in [1, 27, 28, 29, 4096, 10_000] {
            let mut transmission = transmission(false, |_| {});
            let talk = |bytes: &Vec<u8>| talk(&mut transmission, bytes, piece);
            let output: Vec<u8> = requests.iter().flat_map(talk).collect();
            assert!(output == expected, "{piece}");
        }
    }

    #[test]
    fn structured_reads_have_one_chunk_and_status_covers_the_range() {
        let mut transmission = transmission(true, |_| {});
        let bytes = [
            request(command::READ, command_flag::DF, 512, 512).encode(),
            request(command::BLOCK_STATUS, 0, 0, SIZE.try_into().unwrap()).encode(),
            request(command::READ, 0, SIZE, 512).encode(),
        ]
        .concat();
        let output = talk(&mut transmission, &bytes, bytes.len());
        let mut kinds = vec![];
        let mut rest = &output[..];
        while let Some(header) = rest.first_chunk().and_then(ChunkHeader::decode) {
            let (payload, after) = rest[ChunkHeader::SIZE..].split_at(header.len as usize);
            kinds.push((header.flags, header.kind, payload.len()));
            rest = after;
        }
        let done = chunk::DONE;
        let mut expected = [
            (done, chunk::OFFSET_DATA, 520),
            (done, chunk::BLOCK_STATUS, 12),
            (done, chunk::ERROR, 6),
        ];
        kinds.sort_unstable();
        expected.sort_unstable();
        assert_eq!(kinds, expected);
    }

    #[test]
    fn invalid_requests_fail_and_the_stream_goes_on() {
        let mut simple = transmission(false, |_| {});
        const EINVAL: u32 = 22;
        for (one, error) in [
            (request(99, 0, 0, 512), EINVAL),
            (request(command::READ, 0, 1, 512), EINVAL),
            (request(command::READ, 0, 0, 0), EINVAL),
            (request(command::READ, 0, 0, PAYLOAD_MAX + 512), EINVAL),
            (request(command::READ, command_flag::DF, 0, 512), EINVAL),
            (request(command::READ, 0, u64::MAX - 511, 512), EINVAL),
            (request(command::WRITE, 0, SIZE, 512), 28),
            (request(command::WRITE, 0, u64::MAX - 511, 1024), 28),
            (request(command::WRITE, 0x8000, 0, 512), EINVAL),
            (request(command::FLUSH, 0, 0, 512), EINVAL),
            (request(command::BLOCK_STATUS, 0, 0, 512), EINVAL),
            (request(command::WRITE_ZEROES, 0, 0, u32::MAX - 511), 28),
            (request(command::READ, 0, 0, 512), 0),
        ] {
            assert_eq!(error_of(&mut simple, one), error, "{one:?}");
        }
        let mut read_only = transmission(false, |properties| properties.read_only = true);
        assert_eq!(error_of(&mut read_only, request(command::WRITE, 0, 0, 512)), 1);
        assert_eq!(error_of(&mut read_only, request(command::WRITE_ZEROES, 0, 0, 512)), 1);
        let mut bare = transmission(false, |properties| {
            (properties.flush, properties.unmap) = (false, false);
        });
        assert_eq!(error_of(&mut bare, request(command::FLUSH, 0, 0, 0)), EINVAL);
        assert_eq!(error_of(&mut bare, request(command::TRIM, 0, 0, 512)), EINVAL);
    }

    #[test]
    fn a_client_that_violates_the_protocol_is_detected() {
        let mut one = transmission(false, |_| {});
        assert!(one.advance(&[0; 28]).is_err());
        let long = request(command::WRITE, 0, 0, PAYLOAD_MAX + 1);
        assert!(one.advance(&long.encode()).is_err());
    }

    #[test]
    fn a_client_that_reads_no_replies_stops_being_served() {
        let mut transmission = transmission(false, |_| {});
        let bytes = request(command::READ, 0, 0, 16 << 20).encode().repeat(100);
        let mut consumed = 0;
        loop {
            let n = transmission.advance(&bytes[consumed..]).unwrap();
            consumed += n;
            while !transmission.working.is_empty() {
                transmission.collect();
            }
            if n == 0 {
                break;
            }
        }
        let held = transmission.output.len;
        assert!((HELD_MAX..HELD_MAX + (33 << 20)).contains(&held), "{held}");
    }

    #[test]
    fn a_client_that_reads_replies_slowly_makes_the_output_keep_what_is_unsent_only() {
        let mut output = Output::default();
        for _ in 0..1000 {
            output.push(&[0; 4096]);
            // There is always something left to send.
            let all_but_one = output.len - 1;
            output.advance(all_but_one);
        }
        let kept: usize = output.parts.iter().map(|part| part.bytes().len()).sum();
        assert!(kept <= PART + 4096, "{kept}");
    }

    #[test]
    fn a_disconnect_ends_it_after_the_requests_before_it() {
        let mut transmission = transmission(false, |_| {});
        let bytes = [
            request(command::READ, 0, 0, 512).encode(),
            request(command::DISC, 0, 0, 0).encode(),
            [0xff; 28],
        ]
        .concat();
        assert_eq!(transmission.advance(&bytes).unwrap(), bytes.len());
        assert!(!transmission.is_over());
        while !transmission.working.is_empty() {
            transmission.collect();
        }
        let left = transmission.output().len;
        transmission.output().advance(left);
        assert!(transmission.is_over());
    }
}
