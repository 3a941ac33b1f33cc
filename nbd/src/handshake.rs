//! The client's side of the handshake: chooses an export, and learns its properties.
//!
//! The fixed newstyle handshake with `NBD_OPT_GO`, or with `NBD_OPT_EXPORT_NAME` for servers that do
//! not know that option. Structured replies are not negotiated: simple replies tell all that a
//! block device needs.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::protocol::{
    INIT_MAGIC, OPTION_MAGIC, OptionHeader, OptionReply, PAYLOAD_DEFAULT, handshake_flag, info,
    option, option_reply, transmission,
};
use crate::resolver::Target;
use crate::stream::Stream;

/// The longest time for connecting and the handshake.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// The magic number of the oldstyle handshake, in the place of [`OPTION_MAGIC`].
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Zeroes that follow the reply to `NBD_OPT_EXPORT_NAME` unless both sides have agreed otherwise.
const ZEROES: usize = 124;
/// The most replies to one option. A server sends one for each property.
const REPLIES_MAX: usize = 64;
/// The longest data of such a reply, in bytes. A string has 4096 bytes at most.
const REPLY_MAX: u32 = 64 << 10;
/// The largest minimum block size of the protocol.
const MIN_BLOCK_MAX: u32 = 64 << 10;

/// The properties of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    /// In bytes.
    pub(crate) size: u64,
    /// [Transmission flags](transmission); 0 if the server has stated none.
    pub(crate) flags: u16,
    /// Offsets and lengths are multiples of so many bytes: a power of two.
    pub(crate) min_block: u32,
    /// The preferred length of an I/O in bytes; 0: unknown.
    pub(crate) preferred_block: u32,
    /// The longest payload in bytes, at most [`PAYLOAD_DEFAULT`].
    pub(crate) payload_max: u32,
}

impl Export {
    /// Whether all of these flags are set.
    pub(crate) fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

/// Connects to the server of an export. Blocks until the deadline at most.
///
/// # Errors
/// The error of `connect`; ENOENT if the server has no such export; ETIMEDOUT; EIO if the server
/// violates the protocol or needs TLS.
pub(crate) fn connect(
    target: &Target,
    export: &str,
    deadline: Instant,
) -> io::Result<(OwnedFd, Export)> {
    let stream = Stream::connect(target, deadline)?;
    let export = negotiate(&stream, export)?;
    Ok((stream.into_socket(), export))
}

/// An error with EIO: the server does not follow the protocol, or cannot be used.
fn unusable(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

fn negotiate(stream: &Stream, export: &str) -> io::Result<Export> {
    if u64::from_be_bytes(stream.read_array()?) != INIT_MAGIC {
        return Err(unusable("not an NBD server: wrong magic number"));
    }
    match u64::from_be_bytes(stream.read_array()?) {
        OPTION_MAGIC => {}
        OLDSTYLE_MAGIC => return Err(unusable("the server's oldstyle handshake is not supported")),
        _ => return Err(unusable("not an NBD server: wrong magic number")),
    }
    let theirs = u16::from_be_bytes(stream.read_array()?);
    let ours = theirs & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    stream.write(&u32::from(ours).to_be_bytes())?;
    let go = match ours & handshake_flag::FIXED_NEWSTYLE {
        0 => None,
        _ => go(stream, export)?,
    };
    let found = match go {
        Some(found) => found,
        None => export_name(stream, export, ours & handshake_flag::NO_ZEROES == 0)?,
    };
    found.checked()
}

/// What the server has told of an export.
#[derive(Default)]
struct Found {
    size: Option<u64>,
    flags: u16,
    /// Minimum, preferred and maximum.
    block_sizes: Option<[u32; 3]>,
}

impl Found {
    fn checked(self) -> io::Result<Export> {
        let Some(size) = self.size else {
            return Err(unusable("the server has not stated the size of the export"));
        };
        let flags = if self.flags & transmission::HAS_FLAGS == 0 { 0 } else { self.flags };
        let [min_block, preferred_block, max] = self.block_sizes.unwrap_or([1, 0, u32::MAX]);
        let payload_max = max.min(PAYLOAD_DEFAULT);
        if !min_block.is_power_of_two() || min_block > MIN_BLOCK_MAX || max < min_block {
            return Err(unusable(format!(
                "the server has stated invalid block sizes: minimum {min_block}, preferred \
                 {preferred_block}, maximum {max}"
            )));
        }
        Ok(Export { size, flags, min_block, preferred_block, payload_max })
    }
}

/// Sends `NBD_OPT_GO`. `None`: the server does not know the option.
fn go(stream: &Stream, export: &str) -> io::Result<Option<Found>> {
    let name_len = u32::try_from(export.len()).map_err(io::Error::other)?;
    let mut data = name_len.to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(1_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    send_option(stream, option::GO, &data)?;
    let mut found = Found::default();
    for _ in 0..REPLIES_MAX {
        let Some(reply) = OptionReply::decode(&stream.read_array()?) else {
            return Err(unusable("wrong magic number in a reply to NBD_OPT_GO"));
        };
        if reply.option != option::GO || reply.len > REPLY_MAX {
            return Err(unusable("invalid reply to NBD_OPT_GO"));
        }
        let mut data = vec![0; usize::try_from(reply.len).map_err(io::Error::other)?];
        stream.read(&mut data)?;
        match reply.kind {
            option_reply::ACK => return Ok(Some(found)),
            option_reply::INFO => found.add(&data)?,
            option_reply::ERR_UNSUP => return Ok(None),
            kind => return Err(refusal(kind, &data)),
        }
    }
    Err(unusable("too many replies to NBD_OPT_GO"))
}

impl Found {
    fn add(&mut self, data: &[u8]) -> io::Result<()> {
        let Some((kind, data)) = data.split_first_chunk() else {
            return Err(unusable("a reply to NBD_OPT_GO is too short"));
        };
        let wrong = |_| unusable("a reply to NBD_OPT_GO has the wrong length");
        match u16::from_be_bytes(*kind) {
            info::EXPORT => {
                let [size @ .., high, low]: [u8; 10] = data.try_into().map_err(wrong)?;
                self.size = Some(u64::from_be_bytes(size));
                self.flags = u16::from_be_bytes([high, low]);
            }
            info::BLOCK_SIZE => {
                let bytes: [u8; 12] = data.try_into().map_err(wrong)?;
                let (words, _) = bytes.as_chunks();
                let mut sizes = words.iter().map(|word| u32::from_be_bytes(*word));
                let mut next = || sizes.next().unwrap_or(0);
                self.block_sizes = Some([next(), next(), next()]);
            }
            // Properties that were not asked for may be sent.
            _ => {}
        }
        Ok(())
    }
}

/// The error for a server's refusal of an option.
fn refusal(kind: u32, message: &[u8]) -> io::Error {
    let reason = match kind {
        option_reply::ERR_UNKNOWN => return io::Error::from_raw_os_error(libc::ENOENT),
        option_reply::ERR_TLS_REQD => "the server needs TLS, which is not supported",
        option_reply::ERR_POLICY => "the server's policy forbids the export",
        option_reply::ERR_SHUTDOWN => "the server is shutting down",
        option_reply::ERR_BLOCK_SIZE_REQD => "the server needs other block sizes",
        _ => "the server refuses the export",
    };
    let message = String::from_utf8_lossy(message);
    if message.is_empty() {
        return unusable(reason);
    }
    let message: String = message.chars().take(200).flat_map(char::escape_debug).collect();
    unusable(format!("{reason}: {message}"))
}

/// Sends `NBD_OPT_EXPORT_NAME`, whose answer ends the handshake.
fn export_name(stream: &Stream, export: &str, zeroes: bool) -> io::Result<Found> {
    send_option(stream, option::EXPORT_NAME, export.as_bytes())?;
    let size = u64::from_be_bytes(stream.read_array()?);
    let flags = u16::from_be_bytes(stream.read_array()?);
    if zeroes {
        stream.read_array::<ZEROES>()?;
    }
    Ok(Found { size: Some(size), flags, block_sizes: None })
}

fn send_option(stream: &Stream, option: u32, data: &[u8]) -> io::Result<()> {
    let len = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut bytes = OptionHeader { option, len }.encode().to_vec();
    bytes.extend(data);
    stream.write(&bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Negotiates with a server that sends these bytes and then nothing, or closes the connection.
    fn with_server(bytes: &[u8], closes: bool, limit: Duration) -> io::Result<Export> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        if closes {
            theirs.shutdown(Shutdown::Write).unwrap();
        }
        negotiate(&Stream::of(ours.into(), Instant::now() + limit), "disk")
    }

    const MINUTE: Duration = Duration::from_secs(60);

    fn hello(flags: u16) -> Vec<u8> {
        let mut bytes = INIT_MAGIC.to_be_bytes().to_vec();
        bytes.extend(OPTION_MAGIC.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).unwrap();
        let mut bytes = OptionReply { option: option::GO, kind, len }.encode().to_vec();
        bytes.extend(data);
        bytes
    }

    fn export_info(size: u64, flags: u16) -> Vec<u8> {
        let mut data = info::EXPORT.to_be_bytes().to_vec();
        data.extend(size.to_be_bytes());
        data.extend(flags.to_be_bytes());
        reply(option_reply::INFO, &data)
    }

    fn block_info(sizes: [u32; 3]) -> Vec<u8> {
        let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
        data.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
        reply(option_reply::INFO, &data)
    }

    fn whole() -> Vec<u8> {
        let mut bytes = hello(3);
        bytes.extend(block_info([512, 4096, 1 << 20]));
        bytes.extend(reply(option_reply::INFO, &[0, 2, b'x']));
        bytes.extend(export_info(1 << 30, 0x0d));
        bytes.extend(reply(option_reply::ACK, &[]));
        bytes
    }

    #[test]
    fn properties_are_learned() {
        let export = Export {
            size: 1 << 30,
            flags: 0x0d,
            min_block: 512,
            preferred_block: 4096,
            payload_max: 1 << 20,
        };
        assert_eq!(with_server(&whole(), false, MINUTE).unwrap(), export);
    }

    #[test]
    fn a_server_that_closes_or_stops_at_any_byte_is_an_error() {
        let whole = whole();
        for len in 0..whole.len() {
            let e = with_server(&whole[..len], true, MINUTE).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof, "{len}");
            let e = with_server(&whole[..len], false, Duration::from_millis(1)).unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::ETIMEDOUT), "{len}");
        }
    }

    #[test]
    fn old_servers_get_the_name_only() {
        let mut unsupported = hello(3);
        unsupported.extend(reply(option_reply::ERR_UNSUP, b"?"));
        unsupported.extend((1_u64 << 20).to_be_bytes());
        unsupported.extend([0, 3]);
        let export = with_server(&unsupported, true, MINUTE).unwrap();
        assert_eq!((export.size, export.flags, export.min_block), (1 << 20, 3, 1));
        assert_eq!(export.payload_max, PAYLOAD_DEFAULT);
        let mut newstyle = hello(0);
        newstyle.extend((1_u64 << 20).to_be_bytes());
        // Without the first flag, the others are invalid.
        newstyle.extend([0, 2]);
        assert!(with_server(&newstyle, true, MINUTE).is_err(), "124 bytes are missing");
        newstyle.extend([0; ZEROES]);
        assert_eq!(with_server(&newstyle, true, MINUTE).unwrap().flags, 0);
    }

    #[test]
    fn invalid_replies_are_errors() {
        let after_hello = |bytes: Vec<u8>| [hello(3), bytes].concat();
        let ack = || reply(option_reply::ACK, &[]);
        let mut oldstyle = INIT_MAGIC.to_be_bytes().to_vec();
        oldstyle.extend(OLDSTYLE_MAGIC.to_be_bytes());
        let mut other_option = ack();
        other_option[11] = 6;
        let mut long = reply(option_reply::INFO, &[]);
        long[16] = 0xff;
        for (bytes, text) in [
            (b"HTTP/1.1 400 Bad".to_vec(), "wrong magic number"),
            (oldstyle, "oldstyle"),
            (after_hello(vec![0; 20]), "wrong magic number in a reply"),
            (after_hello(other_option), "invalid reply"),
            (after_hello(long), "invalid reply"),
            (after_hello(ack()), "not stated the size"),
            (after_hello(reply(option_reply::INFO, &[0])), "too short"),
            (after_hello(reply(option_reply::INFO, &[0, 0, 1])), "wrong length"),
            (after_hello(reply(option_reply::INFO, &[0, 3, 1])), "wrong length"),
            (after_hello(reply(option_reply::ERR_TLS_REQD, &[])), "needs TLS"),
            (after_hello(reply(option_reply::ERR_POLICY, b"no\n\xff")), "export: no\\n"),
            (after_hello(reply(0xffff_ffff, &[])), "refuses the export"),
            (after_hello(reply(option_reply::INFO, &[0, 9]).repeat(99)), "too many replies"),
            ([hello(3), block_info([3, 0, 9]), export_info(1, 1), ack()].concat(), "block sizes"),
            ([hello(3), block_info([0, 0, 0]), export_info(1, 1), ack()].concat(), "block sizes"),
        ] {
            let e = with_server(&bytes, true, MINUTE).unwrap_err();
            assert!(e.to_string().contains(text), "expected {text:?}: {e}");
            assert_eq!(e.raw_os_error(), None);
        }
        let unknown = after_hello(reply(option_reply::ERR_UNKNOWN, b"none"));
        let e = with_server(&unknown, true, MINUTE).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOENT));
    }
}
