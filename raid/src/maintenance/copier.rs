//! The thread of a rebuild: it reads from the members and writes to the new one, so that a member
//! that hangs does not hold up the array's thread, for which guests' writes may wait.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Buffer, Op, Request, Rights};

use crate::array::lane::xor;
use crate::array::{Array, bit, slots_of};
use crate::level::Level;
use crate::member_channel::MemberChannel;

/// The time in which a member must do an I/O of a rebuild.
const LIMIT: Duration = Duration::from_secs(10);

/// What the thread is asked for, one after the other.
pub(super) enum Job {
    /// Copies a window, in bytes.
    Copy(Range<u64>),
    /// Flushes the new member.
    Flush,
}

enum Message {
    Job(Job),
    /// Closes the channels to these members.
    Forget(u64),
}

/// The thread, which ends after its job when this is dropped.
pub(super) struct Copier {
    messages: Sender<Message>,
    results: Receiver<Result<(), String>>,
    is_busy: bool,
}

/// The thread's channels.
struct Copying {
    slot: usize,
    target: MemberChannel,
    /// The members to read from, opened when they are needed.
    sources: Vec<(usize, MemberChannel)>,
}

impl Copier {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn start(
        array: &Arc<Array>,
        slot: usize,
        target: MemberChannel,
    ) -> std::io::Result<Self> {
        let (messages, asked) = mpsc::channel();
        let (sender, results) = mpsc::channel();
        let array = Arc::clone(array);
        let mut copying = Copying { slot, target, sources: vec![] };
        let work = move || {
            while let Ok(message) = asked.recv() {
                let result = match message {
                    Message::Job(Job::Copy(window)) => copy(&array, &mut copying, &window),
                    Message::Job(Job::Flush) => flush(&mut copying),
                    Message::Forget(slots) => {
                        copying.sources.retain(|(slot, _)| bit(*slot) & slots == 0);
                        continue;
                    }
                };
                let _ = sender.send(result);
            }
        };
        thread::Builder::new().name("vhost-raid-copy".into()).spawn(work)?;
        Ok(Self { messages, results, is_busy: false })
    }

    /// Whether a job is under way, or its result was not taken.
    pub(super) fn is_busy(&self) -> bool {
        self.is_busy
    }

    pub(super) fn begin(&mut self, job: Job) {
        // `poll` notices if the thread has ended.
        let _ = self.messages.send(Message::Job(job));
        self.is_busy = true;
    }

    /// Returns the result of a job that has ended.
    pub(super) fn poll(&mut self) -> Option<Result<(), String>> {
        let result = match self.results.try_recv() {
            Ok(result) => result,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err("its thread has ended".into()),
        };
        self.is_busy = false;
        Some(result)
    }

    /// Lets go of members to read from, after the job under way.
    pub(super) fn forget(&self, slots: u64) {
        let _ = self.messages.send(Message::Forget(slots));
    }
}

fn deadline() -> Instant {
    Instant::now() + LIMIT
}

fn flush(copying: &mut Copying) -> Result<(), String> {
    let flushed = copying.target.run(Request::plain(Op::Flush, 0, 0), deadline());
    let reason = |errno| format!("flush: {}", std::io::Error::from_raw_os_error(errno));
    flushed.map(drop).map_err(reason)
}

/// Copies a window to the target.
fn copy(array: &Array, copying: &mut Copying, window: &Range<u64>) -> Result<(), String> {
    let reason = |errno| std::io::Error::from_raw_os_error(errno).to_string();
    if array.layout.level == Level::Raid5f {
        return compute(array, copying, window);
    }
    let len = usize::try_from(window.end - window.start).map_err(|e| e.to_string())?;
    let mut last = "no member to read from".to_owned();
    let live: Vec<usize> = slots_of(array.live.load(Ordering::Acquire)).collect();
    for slot in live {
        let offset = array.layout.extents[slot].offset + window.start;
        let source = match source(array, &mut copying.sources, slot) {
            Ok(source) => source,
            Err(e) => {
                last = e;
                continue;
            }
        };
        let buffer = match source.run(Request::read(offset, len), deadline()) {
            Ok(buffer) => buffer,
            Err(errno) => {
                last = format!("read of member {slot}: {}", reason(errno));
                continue;
            }
        };
        let offset = array.layout.extents[copying.slot].offset + window.start;
        let written = copying.target.run(Request::write(offset, buffer), deadline());
        return written.map(drop).map_err(|errno| format!("write: {}", reason(errno)));
    }
    Err(last)
}

/// Computes the target's part of the stripes in a window, data and parity alike, from all other
/// members.
fn compute(array: &Array, copying: &mut Copying, window: &Range<u64>) -> Result<(), String> {
    let reason = |errno| std::io::Error::from_raw_os_error(errno).to_string();
    let layout = &array.layout;
    let strips = |bytes: u64| bytes / layout.stripe() * layout.strip;
    let (from, len) = (strips(window.start), strips(window.end - window.start));
    let len = usize::try_from(len).map_err(|e| e.to_string())?;
    let mut sum: Option<Buffer> = None;
    for slot in (0..layout.members()).filter(|slot| *slot != copying.slot) {
        let read = Request::read(layout.extents[slot].offset + from, len);
        let source = source(array, &mut copying.sources, slot)?;
        let read = source.run(read, deadline());
        let buffer = read.map_err(|errno| format!("read of member {slot}: {}", reason(errno)))?;
        match &mut sum {
            None => sum = Some(buffer),
            Some(sum) => xor(sum.bytes_mut(), buffer.bytes()),
        }
    }
    let offset = layout.extents[copying.slot].offset + from;
    let write = Request::write(offset, sum.ok_or("no member to read from")?);
    let written = copying.target.run(write, deadline());
    written.map(drop).map_err(|errno| format!("write: {}", reason(errno)))
}

/// Returns the channel to read from a member.
fn source<'a>(
    array: &Array,
    sources: &'a mut Vec<(usize, MemberChannel)>,
    slot: usize,
) -> Result<&'a mut MemberChannel, String> {
    if !sources.iter().any(|(other, _)| *other == slot) {
        let bdev = array.state().slots[slot].bdev.clone().ok_or("a member is gone")?;
        let channel = MemberChannel::open(&bdev, Rights::Read).map_err(|e| e.to_string())?;
        sources.push((slot, channel));
    }
    let found = sources.iter_mut().find(|(other, _)| *other == slot);
    found.map(|(_, channel)| channel).ok_or_else(|| "a member is gone".to_owned())
}
