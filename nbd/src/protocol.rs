//! The numbers and headers of the NBD protocol, for clients and servers.
//!
//! The source is the protocol document of the NBD project. All numbers on the wire are big-endian.

/// The first 8 bytes that a server sends: "NBDMAGIC".
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Follows [`INIT_MAGIC`] in the newstyle handshake, and begins each option of the client:
/// "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The TCP port of NBD.
pub const PORT: u16 = 10809;
/// The longest string in the protocol (export names, messages), in bytes.
pub const STRING_MAX: usize = 4096;
/// The payload that a server must accept if it has not stated another limit, in bytes.
pub const PAYLOAD_DEFAULT: u32 = 32 << 20;

/// Flags of the handshake: the server's are 16 bits, the client's 32 bits.
pub mod handshake_flag {
    /// The fixed newstyle handshake.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes after the reply to [`EXPORT_NAME`](super::option::EXPORT_NAME).
    pub const NO_ZEROES: u16 = 2;
}

/// The client's options.
pub mod option {
    /// Chooses an export and ends the handshake. Its reply cannot be an error.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the handshake without an export.
    pub const ABORT: u32 = 2;
    /// Asks for the names of the exports.
    pub const LIST: u32 = 3;
    /// Asks for TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks for the properties of an export.
    pub const INFO: u32 = 6;
    /// As [`INFO`], and ends the handshake if the server agrees.
    pub const GO: u32 = 7;
    /// Asks for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks for the names of metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Asks for 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// The types of the server's replies to options.
pub mod option_reply {
    /// The option is done. No data.
    pub const ACK: u32 = 1;
    /// The name of an export.
    pub const SERVER: u32 = 2;
    /// A property of an export, of one of the types in [`info`](super::info).
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in the types of errors.
    pub const ERROR: u32 = 1 << 31;
    /// The server does not know the option.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// The server's policy forbids the option.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The option's data is invalid.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// The server's platform does not support the option.
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    /// The server wants TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// The export needs a client that respects its block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// The client has to ask for extended headers first.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// The types of the properties in [`option_reply::INFO`].
pub mod info {
    /// Size in bytes (64 bits) and [transmission flags](super::transmission) (16 bits).
    pub const EXPORT: u16 = 0;
    /// The export's name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size (32 bits each).
    pub const BLOCK_SIZE: u16 = 3;
}

/// The transmission flags of an export.
pub mod transmission {
    /// The other flags are valid.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// The server supports [`FLUSH`](super::command::FLUSH).
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The server supports [`FUA`](super::command_flag::FUA).
    pub const SEND_FUA: u16 = 1 << 3;
    /// The export is on a rotating disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// The server supports [`TRIM`](super::command::TRIM).
    pub const SEND_TRIM: u16 = 1 << 5;
    /// The server supports [`WRITE_ZEROES`](super::command::WRITE_ZEROES).
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The server supports [`DF`](super::command_flag::DF).
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one disk: a flush on one of them covers the completed writes of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// The server supports `NBD_CMD_RESIZE` (an experiment of the protocol).
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// The server supports [`CACHE`](super::command::CACHE).
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The server supports [`FAST_ZERO`](super::command_flag::FAST_ZERO).
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// The types of requests.
pub mod command {
    /// Reads.
    pub const READ: u16 = 0;
    /// Writes. The payload follows the request.
    pub const WRITE: u16 = 1;
    /// Ends the connection. It has no reply.
    pub const DISC: u16 = 2;
    /// Makes completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Tells the server that a range is unused.
    pub const TRIM: u16 = 4;
    /// Asks the server to read ahead.
    pub const CACHE: u16 = 5;
    /// Makes a range read as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Asks for metadata of a range. Needs structured replies.
    pub const BLOCK_STATUS: u16 = 7;
}

/// The flags of requests.
pub mod command_flag {
    /// The result is durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Write zeroes: keep the space of the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Read: reply with one chunk of data.
    pub const DF: u16 = 1 << 2;
    /// Block status: reply with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Write zeroes: fail if it is not faster than a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// The types and flags of the chunks of structured replies.
pub mod chunk {
    /// A flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
    /// No data.
    pub const NONE: u16 = 0;
    /// An offset (64 bits) and the data from there.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset (64 bits) and a length (32 bits) of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// The id of a metadata context (32 bits) and extents: length and status (32 bits each).
    pub const BLOCK_STATUS: u16 = 5;
    /// An errno (32 bits), the length of a message (16 bits), and the message.
    pub const ERROR: u16 = 0x8001;
    /// As [`ERROR`], followed by an offset (64 bits).
    pub const ERROR_OFFSET: u16 = 0x8002;
}

/// The metadata context that tells which ranges are allocated, and its status flags.
pub mod allocation {
    /// The context's name.
    pub const CONTEXT: &str = "base:allocation";
    /// The range has no space allocated.
    pub const HOLE: u32 = 1;
    /// The range reads as zeroes.
    pub const ZERO: u32 = 2;
}

/// Pairs of an errno on the wire and of Linux. Other errnos have no number on the wire.
const ERRNOS: [(u32, i32); 8] = [
    (1, libc::EPERM),
    (5, libc::EIO),
    (12, libc::ENOMEM),
    (22, libc::EINVAL),
    (28, libc::ENOSPC),
    (75, libc::EOVERFLOW),
    (95, libc::EOPNOTSUPP),
    (108, libc::ESHUTDOWN),
];

/// Returns the Linux errno for a nonzero error on the wire. The protocol requires that unknown
/// values count as EINVAL.
#[must_use]
pub fn errno_from_wire(error: u32) -> i32 {
    ERRNOS.iter().find(|(wire, _)| *wire == error).map_or(libc::EINVAL, |(_, errno)| *errno)
}

/// Returns the error on the wire for a Linux errno. Errnos without a number there become EIO, but
/// those that the protocol suggests a replacement for: EROFS is EPERM, EDQUOT and EFBIG are ENOSPC.
#[must_use]
pub fn errno_to_wire(errno: i32) -> u32 {
    let errno = match errno {
        libc::EROFS => libc::EPERM,
        libc::EDQUOT | libc::EFBIG => libc::ENOSPC,
        other => other,
    };
    ERRNOS.iter().find(|(_, linux)| *linux == errno).map_or(5, |(wire, _)| *wire)
}

/// The header of a request. A write's payload of `len` bytes follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// [Flags](command_flag).
    pub flags: u16,
    /// The [type](command).
    pub command: u16,
    /// Chosen by the client. The reply has the same.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

impl Request {
    /// The length on the wire, in bytes.
    pub const SIZE: usize = 28;

    /// Returns the header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut to = Writer::<{ Self::SIZE }>::new();
        to.put(REQUEST_MAGIC.to_be_bytes());
        to.put(self.flags.to_be_bytes());
        to.put(self.command.to_be_bytes());
        to.put(self.cookie.to_be_bytes());
        to.put(self.offset.to_be_bytes());
        to.put(self.len.to_be_bytes());
        to.bytes
    }

    /// Decodes a header. Returns `None` if its magic number is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut from = Reader::new(bytes);
        (u32::from_be_bytes(from.take()) == REQUEST_MAGIC).then(|| Self {
            flags: u16::from_be_bytes(from.take()),
            command: u16::from_be_bytes(from.take()),
            cookie: u64::from_be_bytes(from.take()),
            offset: u64::from_be_bytes(from.take()),
            len: u32::from_be_bytes(from.take()),
        })
    }
}

/// A simple reply. A read's data follows it if `error` is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an [error on the wire](errno_from_wire).
    pub error: u32,
    /// The request's cookie.
    pub cookie: u64,
}

impl SimpleReply {
    /// The length on the wire, in bytes.
    pub const SIZE: usize = 16;

    /// Returns the reply's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut to = Writer::<{ Self::SIZE }>::new();
        to.put(SIMPLE_REPLY_MAGIC.to_be_bytes());
        to.put(self.error.to_be_bytes());
        to.put(self.cookie.to_be_bytes());
        to.bytes
    }

    /// Decodes a reply. Returns `None` if its magic number is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut from = Reader::new(bytes);
        (u32::from_be_bytes(from.take()) == SIMPLE_REPLY_MAGIC).then(|| Self {
            error: u32::from_be_bytes(from.take()),
            cookie: u64::from_be_bytes(from.take()),
        })
    }
}

/// The header of a chunk of a structured reply. `len` bytes of payload follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`chunk::DONE`] or 0.
    pub flags: u16,
    /// The [type](chunk).
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// The length of the payload in bytes.
    pub len: u32,
}

impl ChunkHeader {
    /// The length on the wire, in bytes.
    pub const SIZE: usize = 20;

    /// Returns the header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut to = Writer::<{ Self::SIZE }>::new();
        to.put(CHUNK_MAGIC.to_be_bytes());
        to.put(self.flags.to_be_bytes());
        to.put(self.kind.to_be_bytes());
        to.put(self.cookie.to_be_bytes());
        to.put(self.len.to_be_bytes());
        to.bytes
    }

    /// Decodes a header. Returns `None` if its magic number is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut from = Reader::new(bytes);
        (u32::from_be_bytes(from.take()) == CHUNK_MAGIC).then(|| Self {
            flags: u16::from_be_bytes(from.take()),
            kind: u16::from_be_bytes(from.take()),
            cookie: u64::from_be_bytes(from.take()),
            len: u32::from_be_bytes(from.take()),
        })
    }
}

/// The header of a client's option. `len` bytes of data follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// The [option](mod@option).
    pub option: u32,
    /// The length of the data in bytes.
    pub len: u32,
}

impl OptionHeader {
    /// The length on the wire, in bytes.
    pub const SIZE: usize = 16;

    /// Returns the header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut to = Writer::<{ Self::SIZE }>::new();
        to.put(OPTION_MAGIC.to_be_bytes());
        to.put(self.option.to_be_bytes());
        to.put(self.len.to_be_bytes());
        to.bytes
    }

    /// Decodes a header. Returns `None` if its magic number is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut from = Reader::new(bytes);
        (u64::from_be_bytes(from.take()) == OPTION_MAGIC).then(|| Self {
            option: u32::from_be_bytes(from.take()),
            len: u32::from_be_bytes(from.take()),
        })
    }
}

/// The header of a server's reply to an option. `len` bytes of data follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The client's [option](mod@option).
    pub option: u32,
    /// The [type](option_reply) of the reply.
    pub kind: u32,
    /// The length of the data in bytes.
    pub len: u32,
}

impl OptionReply {
    /// The length on the wire, in bytes.
    pub const SIZE: usize = 20;

    /// Returns the header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut to = Writer::<{ Self::SIZE }>::new();
        to.put(OPTION_REPLY_MAGIC.to_be_bytes());
        to.put(self.option.to_be_bytes());
        to.put(self.kind.to_be_bytes());
        to.put(self.len.to_be_bytes());
        to.bytes
    }

    /// Decodes a header. Returns `None` if its magic number is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut from = Reader::new(bytes);
        (u64::from_be_bytes(from.take()) == OPTION_REPLY_MAGIC).then(|| Self {
            option: u32::from_be_bytes(from.take()),
            kind: u32::from_be_bytes(from.take()),
            len: u32::from_be_bytes(from.take()),
        })
    }
}

/// Fills an array from the front.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put<const M: usize>(&mut self, field: [u8; M]) {
        self.bytes[self.at..self.at + M].copy_from_slice(&field);
        self.at += M;
    }
}

/// Takes fields from the front of an array that holds all of them.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take<const M: usize>(&mut self) -> [u8; M] {
        let (field, rest) = self.0.split_first_chunk().expect("the array holds all fields");
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_bytes_of_the_specification() {
        let request = Request {
            flags: command_flag::NO_HOLE,
            command: command::WRITE_ZEROES,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1122_3344_5566_7788,
            len: 0x99aa_bbcc,
        };
        let bytes = [
            0x25, 0x60, 0x95, 0x13, 0, 2, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x22, 0x33, 0x44,
            0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc,
        ];
        assert_eq!(request.encode(), bytes);
        assert_eq!(Request::decode(&bytes), Some(request));

        let reply = SimpleReply { error: 28, cookie: 0x0102_0304_0506_0708 };
        let bytes = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(reply.encode(), bytes);
        assert_eq!(SimpleReply::decode(&bytes), Some(reply));

        let chunk =
            ChunkHeader { flags: chunk::DONE, kind: chunk::ERROR_OFFSET, cookie: 9, len: 7 };
        let bytes = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 2, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 7];
        assert_eq!(chunk.encode(), bytes);
        assert_eq!(ChunkHeader::decode(&bytes), Some(chunk));

        let go = OptionHeader { option: option::GO, len: 6 };
        assert_eq!(&go.encode(), b"IHAVEOPT\0\0\0\x07\0\0\0\x06");
        assert_eq!(OptionHeader::decode(&go.encode()), Some(go));

        let unknown = OptionReply { option: option::GO, kind: option_reply::ERR_UNKNOWN, len: 3 };
        let bytes = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x03";
        assert_eq!(&unknown.encode(), bytes);
        assert_eq!(OptionReply::decode(bytes), Some(unknown));
        assert_eq!(&INIT_MAGIC.to_be_bytes(), b"NBDMAGIC");
    }

    #[test]
    fn a_wrong_bit_of_a_magic_number_is_detected() {
        for bit in 0..32 {
            let flip = |bytes: &mut [u8]| bytes[bit / 8] ^= 1 << (bit % 8);
            let mut reply = SimpleReply { error: 0, cookie: 1 }.encode();
            flip(&mut reply);
            assert_eq!(SimpleReply::decode(&reply), None);
            let mut chunk = ChunkHeader { flags: 0, kind: 0, cookie: 1, len: 0 }.encode();
            flip(&mut chunk);
            assert_eq!(ChunkHeader::decode(&chunk), None);
            let mut request = Request { flags: 0, command: 0, cookie: 1, offset: 0, len: 0 };
            request.len = 512;
            let mut request = request.encode();
            flip(&mut request);
            assert_eq!(Request::decode(&request), None);
            let mut header = OptionHeader { option: 1, len: 0 }.encode();
            flip(&mut header);
            assert_eq!(OptionHeader::decode(&header), None);
            let mut header = OptionReply { option: 1, kind: 1, len: 0 }.encode();
            flip(&mut header);
            assert_eq!(OptionReply::decode(&header), None);
        }
    }

    #[test]
    fn errnos_are_converted_both_ways() {
        for (wire, errno) in ERRNOS {
            assert_eq!((errno_to_wire(errno), errno_from_wire(wire)), (wire, errno));
        }
        assert_eq!(errno_to_wire(libc::EROFS), 1);
        assert_eq!(errno_to_wire(libc::EDQUOT), 28);
        assert_eq!(errno_to_wire(libc::ETIMEDOUT), 5);
        assert_eq!(errno_from_wire(u32::MAX), libc::EINVAL);
    }
}
