//! Messages of front ends, and their form on the socket.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use closer::ForeignFd;
use guest_memory::RegionSpec;
use reactor::EventFd;
use vhost_target::protocol::{self, request};
use virtqueue::inflight::AreaSpec;

use super::dirty::{LOG_BYTES, LOG_OFFSET};
use super::vm::user_addrs;

/// The offset of the write cache in the config space (virtio 1.2, section 5.2.4).
pub(crate) const WRITE_CACHE_AT: u32 = 32;

/// A message that can be sent.
#[derive(Debug)]
pub(crate) enum Message {
    Features(u64),
    /// A memory table, and whether it is valid.
    Table(Vec<(RegionSpec, OwnedFd)>, bool),
    /// Adds a memory region.
    AddRegion(RegionSpec, OwnedFd),
    /// Removes a memory region, and whether that is valid.
    RemRegion(RegionSpec, bool),
    /// The number of a dirty log, and its file.
    Log(usize, File),
    /// Whether the guest flushes for itself.
    WriteCache(bool),
    /// The number of an in-flight area, its parameters and its file.
    Inflight(usize, AreaSpec, OwnedFd),
    Num(usize, u16),
    Base(usize, u16),
    Addr(usize),
    /// With or without an fd.
    Call(usize, Option<EventFd>),
    Enable(usize),
    /// With or without an fd. Without one, the ring has to be polled.
    Kick(usize, Option<EventFd>),
    GetBase(usize),
    GetConfig,
    ResetOwner,
    ResetDevice,
    /// As `ResetDevice`, by a front end that waits for the acknowledgement.
    ResetDeviceAndWait,
    /// A message that is refused.
    Nonsense,
}

impl Message {
    pub(crate) fn needs_reply(&self) -> bool {
        matches!(self, Self::ResetDeviceAndWait)
    }

    pub(crate) fn encode(&self) -> (u32, Vec<u8>, Vec<ForeignFd>) {
        let (request, payload, fds) = self.plainly();
        (request, payload, fds.into_iter().map(ForeignFd::alone).collect())
    }

    fn plainly(&self) -> (u32, Vec<u8>, Vec<OwnedFd>) {
        let words = |a: usize, b: u32| {
            [u32::try_from(a).expect("a small number").to_le_bytes(), b.to_le_bytes()].concat()
        };
        let plain = |request: u32, payload: Vec<u8>| (request, payload, vec![]);
        match self {
            Self::Features(features) => {
                plain(request::SET_FEATURES, features.to_le_bytes().to_vec())
            }
            Self::Table(table, _) => {
                let mut payload = words(table.len(), 0);
                table.iter().for_each(|(spec, _)| payload.extend(region(spec)));
                let fds = table.iter().map(|(_, fd)| fd.try_clone().expect("an fd")).collect();
                (request::SET_MEM_TABLE, payload, fds)
            }
            Self::AddRegion(spec, fd) => {
                let payload = [words(0, 0), region(spec)].concat();
                (request::ADD_MEM_REG, payload, vec![fd.try_clone().expect("an fd")])
            }
            Self::RemRegion(spec, _) => {
                plain(request::REM_MEM_REG, [words(0, 0), region(spec)].concat())
            }
            Self::Log(_, log) => {
                let payload = [LOG_BYTES, LOG_OFFSET].map(u64::to_le_bytes).concat();
                (request::SET_LOG_BASE, payload, vec![log.try_clone().expect("an fd").into()])
            }
            Self::WriteCache(on) => {
                let mut payload = [WRITE_CACHE_AT, 1, 0].map(u32::to_le_bytes).concat();
                payload.push((*on).into());
                plain(request::SET_CONFIG, payload)
            }
            Self::Inflight(_, spec, fd) => {
                let fd = fd.try_clone().expect("an fd");
                (request::SET_INFLIGHT_FD, protocol::inflight(*spec).into(), vec![fd])
            }
            Self::Num(ring, num) => plain(request::SET_VRING_NUM, words(*ring, (*num).into())),
            Self::Base(ring, base) => plain(request::SET_VRING_BASE, words(*ring, (*base).into())),
            Self::Addr(ring) => {
                let (desc, avail, used) = user_addrs(*ring);
                let mut payload = words(*ring, 0);
                for address in [desc, used, avail, 0] {
                    payload.extend(address.to_le_bytes());
                }
                plain(request::SET_VRING_ADDR, payload)
            }
            Self::Call(ring, Some(call)) => {
                let fd = call.as_fd().try_clone_to_owned().expect("an fd");
                (request::SET_VRING_CALL, (*ring as u64).to_le_bytes().to_vec(), vec![fd])
            }
            Self::Call(ring, None) => {
                plain(request::SET_VRING_CALL, (*ring as u64 | 1 << 8).to_le_bytes().to_vec())
            }
            Self::Enable(ring) => plain(request::SET_VRING_ENABLE, words(*ring, 1)),
            Self::Kick(ring, Some(kick)) => {
                let fd = kick.as_fd().try_clone_to_owned().expect("an fd");
                (request::SET_VRING_KICK, (*ring as u64).to_le_bytes().to_vec(), vec![fd])
            }
            Self::Kick(ring, None) => {
                plain(request::SET_VRING_KICK, (*ring as u64 | 1 << 8).to_le_bytes().to_vec())
            }
            Self::GetBase(ring) => plain(request::GET_VRING_BASE, words(*ring, 0)),
            Self::GetConfig => {
                let mut payload = [0_u32, 60, 0].map(u32::to_le_bytes).concat();
                payload.resize(12 + 60, 0);
                plain(request::GET_CONFIG, payload)
            }
            Self::ResetOwner => plain(request::RESET_OWNER, vec![]),
            Self::ResetDevice | Self::ResetDeviceAndWait => plain(request::RESET_DEVICE, vec![]),
            Self::Nonsense => plain(request::SET_VRING_NUM, words(0, 0)),
        }
    }
}

fn region(spec: &RegionSpec) -> Vec<u8> {
    [spec.gpa, spec.size, spec.user_addr, spec.offset].map(u64::to_le_bytes).concat()
}
