//! The requests of a machine: their form, and the answers that its driver expects.

use bdev::Status;
use guest_memory::RegionSpec;
use virtqueue::Buffer;

use super::backend::DeviceKind;
use super::disk::{REQUEST_SECTORS, pattern};
use super::vm::{Vm, status_gpa};
use crate::entropy::FILL;

/// The initial value of a status byte.
const UNTOUCHED: u8 = 0xee;
/// The failure message for a request that is completed while its I/O is in flight.
const TOO_EARLY: &str = "it was completed before the disk was done";

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Zeroes,
    GetId,
    Unknown,
    ShortHeader,
    /// Of an entropy device: three buffers to fill.
    Fill,
    /// Of an entropy device: a buffer that it ignores, and two to fill.
    FillBehind,
    /// Of an entropy device: no buffer to fill.
    Nothing,
}

impl Kind {
    /// Returns a kind of request to `device`. `choice` is below 12.
    pub(crate) fn of(device: DeviceKind, choice: usize) -> Self {
        match (device, choice) {
            (DeviceKind::Block, 0) => Self::GetId,
            (DeviceKind::Block, 1) => Self::Unknown,
            (DeviceKind::Block, 2) => Self::ShortHeader,
            (DeviceKind::Block, 3) => Self::Zeroes,
            (DeviceKind::Block, 4..8) => Self::Write,
            (DeviceKind::Block, _) => Self::Read,
            (DeviceKind::Entropy, 0) => Self::Nothing,
            (DeviceKind::Entropy, 1..6) => Self::FillBehind,
            (DeviceKind::Entropy, _) => Self::Fill,
        }
    }

    /// Returns the length of the data of request `id`.
    pub(crate) fn bytes(self, id: u64) -> u32 {
        if self == Self::GetId { 20 } else { 512 * (1 + (id % 2) as u32) }
    }
}

/// The addresses of a request's parts.
pub(crate) struct Place {
    pub(crate) header: u64,
    pub(crate) data: u64,
    pub(crate) status: u64,
}

/// The progress of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Offered,
    /// On the disk, fetched by this connection.
    Flying(usize),
    /// Written and not flushed yet. The flush has to come before the completion.
    Written(usize),
    Done(Status),
}

impl Progress {
    /// Returns whether it is on the disk, fetched by this connection.
    pub(crate) fn is_flying_for(self, front: usize) -> bool {
        matches!(self, Self::Flying(n) | Self::Written(n) if n == front)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) progress: Progress,
    /// The memory table that it was fetched under.
    pub(crate) table: Option<usize>,
    /// It has to be durable when it completes.
    pub(crate) durable: bool,
    pub(crate) kind: Kind,
    /// A request that a back end fetched and did not complete. The next back end resubmits it.
    pub(crate) again: bool,
    /// Its position in the available ring, if that is split.
    pub(super) position: u16,
    pub(super) data: u64,
    pub(super) len: u32,
}

impl Request {
    /// Returns whether its data is in `memory`.
    pub(crate) fn has_data_in(&self, memory: &[RegionSpec]) -> bool {
        let inside = |s: &RegionSpec| self.data.wrapping_sub(s.gpa) < s.size;
        memory.iter().any(inside)
    }

    /// Returns the address and the length of the data that the disk has read for it.
    pub(super) fn read(&self) -> Option<(u64, u32)> {
        let read = self.kind == Kind::Read && self.progress == Progress::Done(Status::Ok);
        read.then_some((self.data, self.len))
    }
}

impl Vm {
    /// Writes a request to its place. Returns its buffers.
    pub(super) fn prepare(&self, id: u64, kind: Kind, place: &Place) -> [Buffer; 3] {
        let &Place { header, data, status } = place;
        self.put(data, &vec![0; kind.bytes(id) as usize]);
        self.put(status, &[UNTOUCHED]);
        let buffer = |gpa, len, write| Buffer { gpa, len, write };
        let (len, status) = (kind.bytes(id), buffer(status, 1, true));
        match kind {
            Kind::Fill => {
                // The source identifies the request by the number at its beginning.
                self.put(data, &id.to_le_bytes());
                let half = len / 2;
                [buffer(data, half, true), buffer(data + u64::from(half), half, true), status]
            }
            Kind::FillBehind => {
                self.put(data, &id.to_le_bytes());
                [buffer(header, 16, false), buffer(data, len, true), status]
            }
            Kind::Nothing => {
                let status = Buffer { write: false, ..status };
                [buffer(header, 16, false), buffer(data, len, false), status]
            }
            _ => {
                let (header, data) = self.prepare_io(id, kind, place);
                [header, data, status]
            }
        }
    }

    /// Writes header and data of a request to a block device.
    fn prepare_io(&self, id: u64, kind: Kind, place: &Place) -> (Buffer, Buffer) {
        let &Place { header, data, .. } = place;
        let number: u32 = match kind {
            Kind::Write => 1,
            Kind::Zeroes => 13,
            Kind::GetId => 8,
            Kind::Unknown => 99,
            _ => 0,
        };
        let sector = id * REQUEST_SECTORS;
        self.put(header, &number.to_le_bytes());
        self.put(header + 8, &sector.to_le_bytes());
        let mut len = kind.bytes(id);
        match kind {
            Kind::Write => self.put(data, &vec![pattern(id); len as usize]),
            Kind::Zeroes => {
                len = 16;
                self.put(data, &sector.to_le_bytes());
                self.put(data + 8, &1_u32.to_le_bytes());
                self.put(data + 12, &0_u32.to_le_bytes());
            }
            _ => {}
        }
        let header_len = if kind == Kind::ShortHeader { 15 } else { 16 };
        let to_guest = matches!(kind, Kind::Read | Kind::GetId | Kind::ShortHeader);
        let header = Buffer { gpa: header, len: header_len, write: false };
        (header, Buffer { gpa: data, len, write: to_guest })
    }

    /// Checks the answer to a request. `may_fail`: the disk may have been removed, or the data is
    /// not in memory.
    pub(super) fn check_answer(
        &self,
        ring: usize,
        slot: usize,
        request: &Request,
        written: u32,
        may_fail: bool,
    ) {
        if self.device == DeviceKind::Entropy {
            return self.check_entropy(status_gpa(ring, slot), request, written, may_fail);
        }
        let status = self.get(status_gpa(ring, slot), 1)[0];
        let expected = match (request.kind, request.progress) {
            (_, Progress::Flying(_) | Progress::Written(_)) => panic!("{request:?}: {TOO_EARLY}"),
            (_, Progress::Done(Status::Ok)) => 0,
            (_, Progress::Done(Status::IoError)) | (Kind::ShortHeader, _) => 1,
            (_, Progress::Done(Status::Unsupported)) => 2,
            (Kind::GetId | Kind::Unknown, _) if status == 1 && may_fail => 1,
            (Kind::GetId, _) => 0,
            (Kind::Unknown, _) => 2,
            (_, Progress::Offered) => {
                assert!(may_fail, "{request:?} was completed but never was on the disk");
                1
            }
        };
        assert_eq!(status, expected, "the status of {request:?}");
        let with_data = match request.kind {
            Kind::Read => matches!(request.progress, Progress::Done(_)),
            Kind::GetId => expected == 0,
            _ => false,
        };
        let expected = if with_data { request.len + 1 } else { 1 };
        assert_eq!(written, expected, "the length written for {request:?}");
        if let Some((data, len)) = request.read() {
            self.check_read_marked(request, data, len);
            let data = self.get(data, len as usize);
            assert!(data.iter().all(|b| *b == pattern(request.id)), "the data of {request:?}");
        }
    }

    /// As [`Vm::check_answer`], for an entropy device: it fills all writable bytes or none.
    fn check_entropy(&self, status: u64, request: &Request, written: u32, may_fail: bool) {
        let filled = match (request.kind, request.progress) {
            (_, Progress::Flying(_) | Progress::Written(_)) => panic!("{request:?}: {TOO_EARLY}"),
            (Kind::Nothing, progress) => {
                assert_eq!(progress, Progress::Offered, "{request:?} has reached the source");
                false
            }
            (_, Progress::Done(status)) => status == Status::Ok,
            (_, Progress::Offered) => {
                assert!(may_fail, "{request:?} was completed but never has reached the source");
                false
            }
        };
        let expected = if filled { request.len + 1 } else { 0 };
        assert_eq!(written, expected, "the length written for {request:?}");
        let mut untouched = vec![0; request.len as usize];
        if request.kind != Kind::Nothing {
            untouched[..8].copy_from_slice(&request.id.to_le_bytes());
        }
        untouched.push(UNTOUCHED);
        let expected = if filled { vec![FILL; untouched.len()] } else { untouched };
        let bytes = [self.get(request.data, request.len as usize), self.get(status, 1)].concat();
        assert!(bytes == expected, "the buffers of {request:?}");
        if filled {
            self.check_read_marked(request, request.data, request.len);
            self.check_read_marked(request, status, 1);
        }
    }
}
