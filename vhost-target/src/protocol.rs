//! vhost-user messages (QEMU's `docs/interop/vhost-user.rst`): parses bytes and fds into values.

use closer::ForeignFd;
use guest_memory::{REGIONS_MAX, RegionSpec};
use virtqueue::inflight::AreaSpec;

/// Bytes of the header: request, flags, size of the payload.
pub const HEADER_BYTES: usize = 12;
/// Header flags of a reply: version 1, reply.
const FLAGS_REPLY: u32 = 0x1 | 0x4;
/// Header flags of a message that the target starts: version 1.
const FLAGS_MESSAGE: u32 = 0x1;
/// Bit of the u64 in SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: the message has no fd.
const NO_FD: u64 = 1 << 8;

/// Largest config space that a message carries.
pub const CONFIG_BYTES_MAX: usize = 256;

/// Returns whether the transport handles a request: negotiation, which uses no memory and no fd.
/// The target replies to all other requests, or refuses those that it does not offer.
///
/// SET_STATUS is included, even with status 0: QEMU 7.2 sends 0 before it stops the rings of a
/// guest that is only paused, and relies on the positions at which they stop.
#[must_use]
pub fn is_negotiation(request: u32) -> bool {
    use request::{
        GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_STATUS, SET_OWNER,
        SET_PROTOCOL_FEATURES, SET_STATUS,
    };
    matches!(
        request,
        GET_FEATURES
            | SET_OWNER
            | GET_PROTOCOL_FEATURES
            | SET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | SET_STATUS
            | GET_STATUS
    )
}

/// Protocol feature: the back end has the configuration space.
pub const CONFIG: u64 = 1 << 9;

/// Protocol feature: the back end creates the area of in-flight tracking.
pub const INFLIGHT_SHMFD: u64 = 1 << 12;

/// Offered protocol features: all of SPDK's, so that a front end that has negotiated with SPDK may
/// reconnect to this target with them, and two more. RARP, NET_MTU, CRYPTO and HOST_NOTIFIER are
/// for other devices: no front end uses them with a disk.
pub const PROTOCOL_FEATURES: u64 = {
    const MQ: u64 = 1 << 0;
    const LOG_SHMFD: u64 = 1 << 1;
    const RARP: u64 = 1 << 2;
    const REPLY_ACK: u64 = 1 << 3;
    const NET_MTU: u64 = 1 << 4;
    const BACKEND_REQ: u64 = 1 << 5;
    const CRYPTO: u64 = 1 << 7;
    const BACKEND_SEND_FD: u64 = 1 << 10;
    const HOST_NOTIFIER: u64 = 1 << 11;
    const RESET_DEVICE: u64 = 1 << 13;
    const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    const STATUS: u64 = 1 << 16;
    let spdk = MQ
        | LOG_SHMFD
        | RARP
        | REPLY_ACK
        | NET_MTU
        | BACKEND_REQ
        | CRYPTO
        | CONFIG
        | BACKEND_SEND_FD
        | HOST_NOTIFIER
        | INFLIGHT_SHMFD
        | STATUS;
    spdk | RESET_DEVICE | CONFIGURE_MEM_SLOTS
};

/// Requests of the front end that the target supports.
#[expect(missing_docs, reason = "the names are the protocol's")]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// A request of a front end.
#[derive(Debug)]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub enum Message {
    SetFeatures(u64),
    SetMemTable(Vec<(RegionSpec, ForeignFd)>),
    GetMaxMemSlots,
    AddMemReg(RegionSpec, ForeignFd),
    /// The region's offset is ignored.
    RemMemReg(RegionSpec),
    SetLogBase {
        size: u64,
        offset: u64,
        fd: ForeignFd,
    },
    /// The front end sets only the two counts.
    GetInflightFd(AreaSpec),
    SetInflightFd(AreaSpec, ForeignFd),
    SetVringNum {
        ring: usize,
        num: u32,
    },
    /// Addresses are in the front end's address space.
    SetVringAddr {
        ring: usize,
        desc: u64,
        avail: u64,
        used: u64,
    },
    SetVringBase {
        ring: usize,
        base: u32,
    },
    GetVringBase {
        ring: usize,
    },
    SetVringKick {
        ring: usize,
        fd: Option<ForeignFd>,
    },
    SetVringCall {
        ring: usize,
        fd: Option<ForeignFd>,
    },
    SetBackendReqFd(ForeignFd),
    GetConfig(ConfigHead),
    SetConfig {
        offset: u32,
        contents: Vec<u8>,
    },
    ResetOwner,
    ResetDevice,
    /// The target ignores the message: SET_VRING_ERR and SET_LOG_FD, because it does not signal
    /// these fds; SET_VRING_ENABLE, because SPDK ignores it too; and messages for network devices.
    Ignored,
    /// See [`is_negotiation`].
    Negotiation,
}

/// The header before the contents in GET_CONFIG: offset, size and flags.
#[derive(Clone, Copy, Debug)]
pub struct ConfigHead([u8; 12]);

impl ConfigHead {
    /// Returns the bytes that the front end sent.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 12] {
        &self.0
    }

    /// Returns the offset of the first requested byte of the config space.
    ///
    /// No message reaches beyond [`CONFIG_BYTES_MAX`]. A larger or equal offset is taken as 0: old
    /// versions of cloud-hypervisor send the offset of the config space on PCI, 0x100. That works
    /// with SPDK, which ignores all offsets.
    #[must_use]
    pub fn offset(&self) -> usize {
        let [a, b, c, d, ..] = self.0;
        let offset = u32::from_le_bytes([a, b, c, d]) as usize;
        if offset < CONFIG_BYTES_MAX { offset } else { 0 }
    }

    /// Returns the number of requested bytes of the config space.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a length in a message, not a container's")]
    pub fn len(&self) -> usize {
        let [_, _, _, _, a, b, c, d, ..] = self.0;
        u32::from_le_bytes([a, b, c, d]) as usize
    }
}

/// The reason why a message is malformed or not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// the size of the payload is invalid for the request
    #[error("request {0} has an invalid payload size: {1} bytes")]
    Size(u32, usize),
    /// the number of fds is invalid for the request
    #[error("request {0} has an invalid number of fds: {1}")]
    Fds(u32, usize),
    /// a count or a size in the payload is out of range
    #[error("request {0} has a value that is out of range")]
    Value(u32),
    /// a request that is not offered, such as those for postcopy
    #[error("request {0} is not supported")]
    NotOffered(u32),
}

/// Reads little-endian numbers from the front of a payload.
struct Payload<'a>(&'a [u8]);

impl Payload<'_> {
    fn u16(&mut self) -> Option<u16> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_le_bytes(*number))
    }

    fn u32(&mut self) -> Option<u32> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*number))
    }

    fn u64(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }
}

impl Message {
    /// Creates a message from a request's number, payload and fds. Fds that it does not use are
    /// closed.
    ///
    /// # Errors
    /// The message is malformed.
    pub fn parse(request: u32, payload: &[u8], fds: Vec<ForeignFd>) -> Result<Self, ParseError> {
        let size = ParseError::Size(request, payload.len());
        let mut p = Payload(payload);
        let message = match request {
            request::SET_FEATURES => Self::SetFeatures(p.u64().ok_or(size)?),
            request::SET_MEM_TABLE => return mem_table(p, fds, size),
            request::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            request::ADD_MEM_REG => Self::AddMemReg(one_region(p).ok_or(size)?, one(request, fds)?),
            request::REM_MEM_REG if fds.len() > 1 => {
                return Err(ParseError::Fds(request, fds.len()));
            }
            // Some front ends send an fd with it. That fd is closed.
            request::REM_MEM_REG => Self::RemMemReg(one_region(p).ok_or(size)?),
            request::SET_LOG_BASE => {
                let (bytes, offset) = (p.u64().ok_or(size)?, p.u64().ok_or(size)?);
                Self::SetLogBase { size: bytes, offset, fd: one(request, fds)? }
            }
            request::GET_INFLIGHT_FD => Self::GetInflightFd(area(p).ok_or(size)?),
            request::SET_INFLIGHT_FD => {
                Self::SetInflightFd(area(p).ok_or(size)?, one(request, fds)?)
            }
            request::SET_VRING_NUM
            | request::SET_VRING_ADDR
            | request::SET_VRING_BASE
            | request::GET_VRING_BASE => return vring(request, p, size),
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                return vring_fd(request, p, fds, size);
            }
            request::SET_BACKEND_REQ_FD => Self::SetBackendReqFd(one(request, fds)?),
            request::GET_CONFIG => Self::GetConfig(config_head(payload, size)?),
            request::SET_CONFIG => return set_config(p, size),
            request::RESET_OWNER => Self::ResetOwner,
            request::RESET_DEVICE => Self::ResetDevice,
            request::SET_VRING_ENABLE
            | request::SET_LOG_FD
            | request::SEND_RARP
            | request::NET_SET_MTU => Self::Ignored,
            _ if is_negotiation(request) => Self::Negotiation,
            _ => return Err(ParseError::NotOffered(request)),
        };
        Ok(message)
    }
}

fn mem_table(
    mut p: Payload<'_>,
    fds: Vec<ForeignFd>,
    size: ParseError,
) -> Result<Message, ParseError> {
    let (count, _padding) = (p.u32().ok_or(size)? as usize, p.u32().ok_or(size)?);
    if count == 0 || count > REGIONS_MAX {
        return Err(ParseError::Value(request::SET_MEM_TABLE));
    }
    if count != fds.len() {
        return Err(ParseError::Fds(request::SET_MEM_TABLE, fds.len()));
    }
    let table = fds.into_iter().map(|fd| Some((region(&mut p)?, fd)));
    Ok(Message::SetMemTable(table.collect::<Option<_>>().ok_or(size)?))
}

fn region(p: &mut Payload<'_>) -> Option<RegionSpec> {
    let (gpa, size, user_addr, offset) = (p.u64()?, p.u64()?, p.u64()?, p.u64()?);
    Some(RegionSpec { gpa, size, user_addr, offset })
}

fn one_region(mut p: Payload<'_>) -> Option<RegionSpec> {
    let _padding = p.u64()?;
    region(&mut p)
}

fn area(mut p: Payload<'_>) -> Option<AreaSpec> {
    let (mmap_size, mmap_offset) = (p.u64()?, p.u64()?);
    Some(AreaSpec { mmap_size, mmap_offset, num_queues: p.u16()?, queue_size: p.u16()? })
}

/// Returns the one fd that a message must have.
fn one(request: u32, fds: Vec<ForeignFd>) -> Result<ForeignFd, ParseError> {
    let n = fds.len();
    let [fd] = <[ForeignFd; 1]>::try_from(fds).map_err(|_| ParseError::Fds(request, n))?;
    Ok(fd)
}

/// Parses a message with a ring's number and a value.
fn vring(request: u32, mut p: Payload<'_>, size: ParseError) -> Result<Message, ParseError> {
    let (ring, value) = (p.u32().ok_or(size)? as usize, p.u32().ok_or(size)?);
    Ok(match request {
        request::SET_VRING_NUM => Message::SetVringNum { ring, num: value },
        request::SET_VRING_BASE => Message::SetVringBase { ring, base: value },
        request::GET_VRING_BASE => Message::GetVringBase { ring },
        // SET_VRING_ADDR. The value has the flags, and the addresses follow.
        _ => vring_addr(ring, p).ok_or(size)?,
    })
}

fn vring_addr(ring: usize, mut p: Payload<'_>) -> Option<Message> {
    let (desc, used, avail) = (p.u64()?, p.u64()?, p.u64()?);
    Some(Message::SetVringAddr { ring, desc, avail, used })
}

/// Parses a message with an eventfd of a ring.
fn vring_fd(
    request: u32,
    mut p: Payload<'_>,
    fds: Vec<ForeignFd>,
    size: ParseError,
) -> Result<Message, ParseError> {
    let value = p.u64().ok_or(size)?;
    let (ring, n) = ((value & 0xff) as usize, fds.len());
    if n != usize::from(value & NO_FD == 0) {
        return Err(ParseError::Fds(request, n));
    }
    let fd = fds.into_iter().next();
    Ok(match request {
        request::SET_VRING_KICK => Message::SetVringKick { ring, fd },
        request::SET_VRING_CALL => Message::SetVringCall { ring, fd },
        // SET_VRING_ERR.
        _ => Message::Ignored,
    })
}

fn config_head(payload: &[u8], size: ParseError) -> Result<ConfigHead, ParseError> {
    let head = ConfigHead(*payload.first_chunk().ok_or(size)?);
    if head.len() > CONFIG_BYTES_MAX || payload.len() < head.0.len() + head.len() {
        return Err(ParseError::Value(request::GET_CONFIG));
    }
    Ok(head)
}

fn set_config(mut p: Payload<'_>, size: ParseError) -> Result<Message, ParseError> {
    let (offset, len) = (p.u32().ok_or(size)?, p.u32().ok_or(size)? as usize);
    let _flags = p.u32().ok_or(size)?;
    let contents = p.0.get(..len).filter(|_| len <= CONFIG_BYTES_MAX);
    let contents = contents.ok_or(ParseError::Value(request::SET_CONFIG))?.to_vec();
    Ok(Message::SetConfig { offset, contents })
}

/// Returns the message that replies to `request`.
#[must_use]
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, FLAGS_REPLY, payload)
}

/// The payload of an acknowledgement of success.
pub const SUCCESS: [u8; 8] = [0; 8];

/// The payload of a reply to GET_VRING_BASE.
#[must_use]
pub fn vring_base(ring: usize, base: u32) -> [u8; 8] {
    let mut payload = [0; 8];
    let ring = u32::try_from(ring).expect("a device has at most 65,535 rings");
    payload[..4].copy_from_slice(&ring.to_le_bytes());
    payload[4..].copy_from_slice(&base.to_le_bytes());
    payload
}

/// The payload of a reply to GET_INFLIGHT_FD, and of SET_INFLIGHT_FD: QEMU's structure, whose last
/// four bytes are padding.
#[must_use]
pub fn inflight(area: AreaSpec) -> [u8; 24] {
    let mut payload = [0; 24];
    payload[..8].copy_from_slice(&area.mmap_size.to_le_bytes());
    payload[8..16].copy_from_slice(&area.mmap_offset.to_le_bytes());
    payload[16..18].copy_from_slice(&area.num_queues.to_le_bytes());
    payload[18..20].copy_from_slice(&area.queue_size.to_le_bytes());
    payload
}

/// Returns the message for the backend channel that tells a front end to read the config space
/// again.
#[must_use]
pub fn config_change() -> Vec<u8> {
    /// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
    const CONFIG_CHANGE: u32 = 2;
    message(CONFIG_CHANGE, FLAGS_MESSAGE, &[])
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
    let size = payload.len().try_into().expect("at most a config space and its header");
    for word in [request, flags, size] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    message.extend_from_slice(payload);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_payloads_and_wrong_fds_are_refused() {
        for request in 0..=50 {
            if let Ok(message) = Message::parse(request, &[], vec![]) {
                assert!(matches!(
                    message,
                    Message::Negotiation
                        | Message::Ignored
                        | Message::GetMaxMemSlots
                        | Message::ResetOwner
                        | Message::ResetDevice
                ));
            }
        }
        let two = 2_u64.to_le_bytes();
        assert_eq!(
            Message::parse(request::SET_MEM_TABLE, &two, vec![]).unwrap_err(),
            ParseError::Fds(request::SET_MEM_TABLE, 0)
        );
        let many = 9_u64.to_le_bytes();
        assert!(Message::parse(request::SET_MEM_TABLE, &many, vec![]).is_err());
        assert!(
            Message::parse(request::SET_VRING_KICK, &two, vec![]).is_err(),
            "the fd is missing"
        );
        let none = (2 | NO_FD).to_le_bytes();
        let message = Message::parse(request::SET_VRING_KICK, &none, vec![]).unwrap();
        assert!(matches!(message, Message::SetVringKick { ring: 2, fd: None }));
    }

    /// A front end that reconnects after SPDK does not negotiate the features again.
    #[test]
    fn every_protocol_feature_of_spdk_is_offered() {
        assert_eq!(PROTOCOL_FEATURES & 0x1_1ebf, 0x1_1ebf);
        assert_eq!(PROTOCOL_FEATURES & !0x1_1ebf, 1 << 13 | 1 << 15);
    }

    #[test]
    fn replies_have_the_layout_of_the_protocol() {
        let reply = reply(request::GET_VRING_BASE, &vring_base(1, 0x1234));
        let words: Vec<u32> =
            reply.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [11, 5, 8, 1, 0x1234]);
    }
}
