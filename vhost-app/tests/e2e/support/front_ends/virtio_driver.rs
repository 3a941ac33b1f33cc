//! The crate `virtio-driver`: its vhost-user transport, its rings, its virtio-blk.
#![expect(clippy::cast_possible_truncation, reason = "sizes in memory, and small counts")]
#![expect(unsafe_code, reason = "its scattered reads and writes take pointers")]

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use front_end::{GuestRam, RawConnection, RingLayout, Segment};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags, iovec,
};

use super::{Done, FrontEnd, Io, RING_SIZE, Setup};

use crate::support::harness::LIMIT;

pub(crate) struct VirtioDriver {
    /// Before the transport, which owns the memory that they lie in.
    queues: Vec<(VirtioBlkQueue<'static, usize>, Box<dyn QueueNotifier>)>,
    transport: Box<VirtioBlkTransport>,
    memory: Vec<Arc<GuestRam>>,
}

impl FrontEnd for VirtioDriver {
    const NAME: &'static str = "virtio-driver";

    fn start(setup: Setup<'_>) -> Self {
        let packed = setup.rings == RingLayout::Packed;
        let mut needed = VirtioFeatureFlags::VERSION_1;
        needed.set(VirtioFeatureFlags::RING_EVENT_IDX, setup.event_idx);
        needed.set(VirtioFeatureFlags::RING_PACKED, packed);
        let blk = VirtioBlkFeatureFlags::SEG_MAX
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES;
        let needed = needed.bits() | blk.bits();
        let socket = if packed { corrected(setup.socket) } else { setup.socket.to_owned() };
        let transport = VhostUser::new(socket.to_str().unwrap(), needed).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        assert_eq!(transport.get_features() & needed, needed, "the features are offered");

        let queues =
            VirtioBlkQueue::setup_queues(&mut *transport, setup.queues, RING_SIZE).unwrap();
        let with_notifier = |(i, mut queue): (usize, VirtioBlkQueue<'static, usize>)| {
            queue.set_used_notif_enabled(true);
            (queue, transport.get_submission_notifier(i))
        };
        let queues = queues.into_iter().enumerate().map(with_notifier).collect();
        let mut front_end = Self { queues, transport, memory: vec![] };
        front_end.add_memory(setup.ram);
        front_end
    }

    fn config(&mut self) -> (u64, u64) {
        let config = self.transport.get_config().unwrap();
        let queues = u16::from(config.num_queues);
        assert_eq!(self.transport.max_queues(), Some(queues.into()));
        (u64::from(config.capacity) * 512, queues.into())
    }

    fn add_memory(&mut self, ram: &Arc<GuestRam>) {
        let region = &ram.table()[0];
        let (addr, len) = (region.userspace_addr as usize, region.memory_size as usize);
        self.transport.map_mem_region(addr, len, region.mmap_handle, 0).unwrap();
        self.memory.push(ram.clone());
    }

    fn remove_memory(&mut self, ram: &Arc<GuestRam>) {
        let region = &ram.table()[0];
        let (addr, len) = (region.userspace_addr as usize, region.memory_size as usize);
        self.transport.unmap_mem_region(addr, len).unwrap();
    }

    fn submit(&mut self, queue: usize, io: Io<'_>, tag: usize) {
        let memory = &self.memory;
        let (queue, notifier) = &mut self.queues[queue];
        match io {
            Io::Read { sector, data } => {
                let data = iovecs(memory, data);
                // SAFETY: the array is whole, and only the device accesses what it names, in memory
                // that lives as long as `memory`.
                unsafe { queue.readv(sector * 512, data.as_ptr(), data.len(), tag) }
            }
            Io::Write { sector, data } => {
                let data = iovecs(memory, data);
                // SAFETY: as for reads.
                unsafe { queue.writev(sector * 512, data.as_ptr(), data.len(), tag) }
            }
            Io::Flush => queue.flush(tag),
            Io::Discard { sector, sectors } => {
                queue.discard(sector * 512, u64::from(sectors) * 512, tag)
            }
            Io::WriteZeroes { sector, sectors, unmap } => {
                queue.write_zeroes(sector * 512, u64::from(sectors) * 512, unmap, tag)
            }
            Io::Id { .. } => panic!("it has no such request"),
        }
        .unwrap();
        if queue.avail_notif_needed() {
            notifier.notify().unwrap();
        }
    }

    fn wait(&mut self, queue: usize) -> Done {
        let call = self.transport.get_completion_fd(queue);
        let (queue, _) = &mut self.queues[queue];
        loop {
            if let Some(done) = queue.completions().next() {
                return Done { tag: done.context, ok: done.ret == 0 };
            }
            let mut wait = [PollFd::from_borrowed_fd(call.as_fd(), PollFlags::IN)];
            let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
            assert_eq!(poll(&mut wait, Some(&limit)), Ok(1), "the device calls");
            call.read().unwrap();
        }
    }
}

/// Where `segments` of one of `memory` lie in this process.
pub(super) fn iovecs(memory: &[Arc<GuestRam>], segments: &[Segment]) -> Vec<iovec> {
    let addr = |gpa| memory.iter().find_map(|ram| ram.user_addr(gpa).ok()).unwrap();
    let one = |segment: &Segment| iovec {
        iov_base: addr(segment.gpa) as *mut c_void,
        iov_len: segment.len as usize,
    };
    segments.iter().map(one).collect()
}

/// A socket that leads to `socket` and sets right what virtio-driver 0.6 says wrong: that a packed
/// ring begins at base 0, which means wrap counter 0, though its driver begins with 1.
fn corrected(socket: &Path) -> PathBuf {
    const SET_VRING_BASE: u32 = 10;
    /// Those before REPLY_ACK is agreed on that have an answer.
    const GETS: [u32; 2] = [1, 15];
    const NEED_REPLY: u32 = 1 << 3;
    let corrected = socket.with_extension("corrected");
    let _ = std::fs::remove_file(&corrected);
    let listener = UnixListener::bind(&corrected).unwrap();
    let mut back = RawConnection::connect(socket).unwrap();
    thread::spawn(move || {
        let mut front = RawConnection::over(listener.accept().unwrap().0).unwrap();
        // Up to the front end's end.
        while let Ok(mut message) = front.receive() {
            if message.request == SET_VRING_BASE {
                message.payload[5] |= 0x80;
            }
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            back.send_message(message.request, message.flags, &message.payload, &fds).unwrap();
            if message.flags & NEED_REPLY != 0 || GETS.contains(&message.request) {
                let answer = back.receive().unwrap();
                front.send_message(answer.request, answer.flags, &answer.payload, &[]).unwrap();
            }
        }
    });
    corrected
}
