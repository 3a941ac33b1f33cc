//! A request queue, and the layout of commands in it.

use std::sync::Arc;

use super::cdb::{CDB_BYTES, Cdb};
use super::frame::{Frame, front, pieces};
use super::requests::{Kind, Requests, Used};
use super::response::{RESPONSE_BYTES, Response};
use crate::descriptor::Buffer;
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment};
use crate::request::{QueueOptions, Tag};

/// Bytes of a command's header, without the fields of T10_PI.
pub(crate) const HEADER_BYTES: u32 = 51;
const _: () = assert!(HEADER_BYTES as usize == 19 + CDB_BYTES);

/// A command.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// The address of the logical unit: see [`super::lun`].
    pub lun: [u8; 8],
    /// Identifies the command to task management functions, and to the caller.
    pub tag: u64,
    /// The command descriptor block.
    pub cdb: Cdb,
    /// What the device reads.
    pub data_out: &'a [Segment],
    /// What the device writes.
    pub data_in: &'a [Segment],
}

impl<'a> Command<'a> {
    /// Makes a command without data.
    #[must_use]
    pub fn new(lun: [u8; 8], tag: u64, cdb: Cdb) -> Self {
        Self { lun, tag, cdb, data_out: &[], data_in: &[] }
    }

    /// The same, with data that the device reads.
    #[must_use]
    pub fn with_data_out(self, data_out: &'a [Segment]) -> Self {
        Self { data_out, ..self }
    }

    /// The same, with data that the device writes.
    #[must_use]
    pub fn with_data_in(self, data_in: &'a [Segment]) -> Self {
        Self { data_in, ..self }
    }

    /// Returns its header: attribute SIMPLE, no priority, no CRN.
    pub(crate) fn header(&self) -> [u8; HEADER_BYTES as usize] {
        let mut header = [0; HEADER_BYTES as usize];
        header[..8].copy_from_slice(&self.lun);
        header[8..16].copy_from_slice(&self.tag.to_le_bytes());
        header[19..].copy_from_slice(&self.cdb);
        header
    }
}

/// How the parts of a command are placed in descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// As Linux and Windows do: header, data-out, response and data-in begin in descriptors of
    /// their own.
    #[default]
    Separate,
    /// Header and response are cut into descriptors of at most this many bytes. The data is in
    /// descriptors of its own.
    Cut(u32),
    /// Header and data-out are contiguous, and so are response and data-in. Both are cut into
    /// descriptors of at most this many bytes, which therefore hold parts of both. The data is
    /// copied, so its length is limited by [`CommandQueue::new`].
    Stream(u32),
}

/// A command that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The command's tag.
    pub tag: u64,
    /// The answer; see [`Response::is_written`].
    pub response: Response,
    /// The number of bytes that the device reports as written.
    pub used_len: u32,
}

/// A command in flight.
#[derive(Debug)]
pub struct Sent {
    tag: u64,
    /// The places of data-in that is behind the response, to be copied there.
    copied: Vec<Segment>,
}

/// Drives a queue of commands.
pub type CommandQueue = Requests<Commands>;

/// The kind of the requests in a queue of commands.
#[derive(Debug)]
pub struct Commands;

impl CommandQueue {
    /// Makes a queue on a ring of its own. `features`: whether EVENT_IDX and RING_PACKED are
    /// negotiated. `stream_bytes`: the longest data of a command with [`Layout::Stream`].
    ///
    /// # Errors
    /// No memory is left, the eventfd cannot be created, or the size is invalid.
    pub fn new(
        ram: &Arc<GuestRam>,
        index: usize,
        options: QueueOptions,
        features: (bool, bool),
        stream_bytes: u32,
    ) -> Result<Self> {
        let bytes = (HEADER_BYTES + stream_bytes, RESPONSE_BYTES + stream_bytes);
        Self::with(ram, index, options, features, bytes)
    }

    /// Submits a command to the device, without a kick.
    ///
    /// # Errors
    /// As [`crate::Queue::submit`]. The data is too long for [`Layout::Stream`].
    pub fn submit(&mut self, command: &Command<'_>, layout: Layout) -> Result<Tag> {
        let frame = self.frames().take(&command.header(), RESPONSE_BYTES)?;
        let chain = match self.lay(command, layout, frame) {
            Ok(chain) => chain,
            Err(error) => {
                self.frames().give_back(frame);
                return Err(error);
            }
        };
        let copied = match layout {
            Layout::Stream(_) => command.data_in.to_vec(),
            Layout::Separate | Layout::Cut(_) => vec![],
        };
        self.send(&chain, frame, Sent { tag: command.tag, copied })
    }

    /// Submits a chain that is no valid command. Its completion is that of tag `tag`, and its
    /// response is what the memory at its first writable buffer has then.
    ///
    /// # Errors
    /// As [`crate::Queue::submit_chain`].
    pub fn submit_raw(&mut self, tag: u64, chain: &[Buffer]) -> Result<Tag> {
        let mut frame = self.frames().take(&[], RESPONSE_BYTES)?;
        if let Some(first) = chain.iter().find(|buffer| buffer.write) {
            self.frames().give_back(frame);
            frame = Frame { readable: Segment::new(0, 0), writable: first.segment };
        }
        self.send(chain, frame, Sent { tag, copied: vec![] })
    }

    fn lay(&self, command: &Command<'_>, layout: Layout, frame: Frame) -> Result<Vec<Buffer>> {
        let Frame { readable, writable } = frame;
        let (header, response) = (front(readable, HEADER_BYTES), front(writable, RESPONSE_BYTES));
        let (out, data) = (command.data_out.iter().copied(), command.data_in.iter().copied());
        let chain = |most| {
            let out = pieces(header, most).chain(out).map(Buffer::readable);
            out.chain(pieces(response, most).chain(data).map(Buffer::writable)).collect()
        };
        match layout {
            Layout::Separate => Ok(chain(u32::MAX)),
            Layout::Cut(most) => Ok(chain(most)),
            Layout::Stream(most) => {
                let readable = self.append(readable, HEADER_BYTES, command.data_out, true)?;
                let writable = self.append(writable, RESPONSE_BYTES, command.data_in, false)?;
                let readable = pieces(readable, most).map(Buffer::readable);
                Ok(readable.chain(pieces(writable, most).map(Buffer::writable)).collect())
            }
        }
    }

    /// Returns `whole`, shortened to `at` bytes and the data behind them. Copies the data there, if
    /// `copy`.
    fn append(&self, whole: Segment, at: u32, data: &[Segment], copy: bool) -> Result<Segment> {
        let mut end = at;
        for segment in data {
            let next = end.checked_add(segment.len).filter(|next| *next <= whole.len);
            let next = next.ok_or(Error::NoRam(segment.len.into()))?;
            if copy {
                let mut bytes = vec![0; segment.len as usize];
                self.ram().read(segment.gpa, &mut bytes)?;
                self.ram().write(whole.gpa + u64::from(end), &bytes)?;
            }
            end = next;
        }
        Ok(front(whole, end))
    }

    /// Submits `command`, kicks, and waits for the next completion. It is the command's own if no
    /// other is in flight.
    ///
    /// # Errors
    /// As [`CommandQueue::submit`] and [`CommandQueue::wait`].
    pub fn run(&mut self, command: &Command<'_>) -> Result<Done> {
        self.submit(command, Layout::Separate)?;
        self.kick()?;
        self.wait()
    }
}

impl Kind for Commands {
    type Kept = Sent;
    type Answer = Done;

    fn answer(ram: &GuestRam, used: Used<Sent>) -> Result<Done> {
        let Used { frame, kept: Sent { tag, copied }, used_len, .. } = used;
        let mut bytes = [super::code::UNWRITTEN; RESPONSE_BYTES as usize];
        let len = frame.writable.len.min(RESPONSE_BYTES) as usize;
        ram.read(frame.writable.gpa, &mut bytes[..len])?;
        let mut from = frame.writable.gpa + u64::from(RESPONSE_BYTES);
        for segment in copied {
            let mut bytes = vec![0; segment.len as usize];
            ram.read(from, &mut bytes)?;
            ram.write(segment.gpa, &bytes)?;
            from += u64::from(segment.len);
        }
        Ok(Done { tag, response: Response::of(&bytes), used_len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{cdb, lun};

    fn queue(ram: &Arc<GuestRam>) -> CommandQueue {
        let options = QueueOptions { size: 16, segments_max: 200, indirect: true };
        CommandQueue::new(ram, 2, options, (false, false), 1024).unwrap()
    }

    #[test]
    fn all_layouts_have_the_same_bytes() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let queue = queue(&ram);
        let data = [ram.alloc(30, 1).unwrap(), ram.alloc(70, 1).unwrap()];
        ram.write(data[0].gpa, &[1; 30]).unwrap();
        ram.write(data[1].gpa, &[2; 70]).unwrap();
        let command = Command::new(lun(3, 0), 0x0102, cdb::write(1, 2)).with_data_out(&data);
        let command = command.with_data_in(&data[..1]);
        let expected = [&command.header()[..], &[1; 30], &[2; 70]].concat();
        assert_eq!(expected[..10], [1, 3, 0x40, 0, 0, 0, 0, 0, 2, 1]);
        assert_eq!(expected[19..28], [0x2a, 0, 0, 0, 0, 1, 0, 0, 2]);
        for (layout, count) in [
            (Layout::Separate, 5),
            (Layout::Cut(1), 51 + 2 + 108 + 1),
            (Layout::Stream(40), 4 + 4),
            (Layout::Stream(u32::MAX), 2),
        ] {
            let (readable, writable) = (ram.alloc(2048, 1).unwrap(), ram.alloc(2048, 1).unwrap());
            ram.write(readable.gpa, &command.header()).unwrap();
            let chain = queue.lay(&command, layout, Frame { readable, writable }).unwrap();
            assert_eq!(chain.len(), count, "{layout:?}");
            let mut bytes = vec![];
            for buffer in chain.iter().filter(|buffer| !buffer.write) {
                let at = bytes.len();
                bytes.resize(at + buffer.segment.len as usize, 0);
                ram.read(buffer.segment.gpa, &mut bytes[at..]).unwrap();
            }
            assert!(bytes == expected, "{layout:?}");
            let writable = chain.iter().filter(|buffer| buffer.write);
            assert_eq!(writable.map(|buffer| buffer.segment.len).sum::<u32>(), 108 + 30);
        }
        let long = [Segment::new(0, 1025)];
        let command = Command::new(lun(3, 0), 1, cdb::write(1, 2)).with_data_out(&long);
        assert!(matches!(
            self::queue(&ram).submit(&command, Layout::Stream(9)),
            Err(Error::NoRam(_))
        ));
    }
}
