//! The crate `blkio`, libblkio's inside: its driver `virtio-blk-vhost-user`.
#![expect(clippy::cast_possible_truncation, reason = "sizes in memory, and small counts")]
#![expect(unsafe_code, reason = "it fills in completions where it is told to")]

use std::mem::MaybeUninit;
use std::sync::Arc;

use blkio::{Blkioq, MemoryRegion, ReqFlags, iovec};
use front_end::{GuestRam, RingLayout};

use super::virtio_driver::iovecs;
use super::{Done, FrontEnd, Io, RING_SIZE, Setup};

use crate::support::harness::LIMIT;

pub(crate) struct Blkio {
    queues: Vec<Blkioq>,
    blkio: blkio::Blkio,
    memory: Vec<Arc<GuestRam>>,
    /// It may look at a request's array until the request has completed.
    iovecs: Vec<Vec<iovec>>,
}

impl FrontEnd for Blkio {
    const NAME: &'static str = "blkio";

    fn start(setup: Setup<'_>) -> Self {
        assert_eq!(setup.rings, RingLayout::Split, "it knows no other");
        let mut blkio = blkio::Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", setup.socket.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", setup.queues as i32).unwrap();
        blkio.set_i32("queue-size", RING_SIZE.into()).unwrap();
        let queues = blkio.start().unwrap().queues;
        let mut front_end = Self { queues, blkio, memory: vec![], iovecs: vec![] };
        front_end.add_memory(setup.ram);
        front_end
    }

    fn config(&mut self) -> (u64, u64) {
        let queues = self.blkio.get_i32("max-queues").unwrap();
        (self.blkio.get_u64("capacity").unwrap(), queues as u64)
    }

    fn add_memory(&mut self, ram: &Arc<GuestRam>) {
        self.blkio.map_mem_region(&region(ram)).unwrap();
        self.memory.push(ram.clone());
    }

    fn remove_memory(&mut self, ram: &Arc<GuestRam>) {
        self.blkio.unmap_mem_region(&region(ram));
    }

    fn submit(&mut self, queue: usize, io: Io<'_>, tag: usize) {
        let queue = &mut self.queues[queue];
        let none = ReqFlags::empty();
        match io {
            Io::Read { sector, data } => {
                let data = iovecs(&self.memory, data);
                queue.readv(sector * 512, data.as_ptr(), data.len() as u32, tag, none);
                self.iovecs.push(data);
            }
            Io::Write { sector, data } => {
                let data = iovecs(&self.memory, data);
                queue.writev(sector * 512, data.as_ptr(), data.len() as u32, tag, none);
                self.iovecs.push(data);
            }
            Io::Flush => queue.flush(tag, none),
            Io::Discard { sector, sectors } => {
                queue.discard(sector * 512, u64::from(sectors) * 512, tag, none);
            }
            Io::WriteZeroes { sector, sectors, unmap } => {
                let flags = if unmap { none } else { ReqFlags::NO_UNMAP };
                queue.write_zeroes(sector * 512, u64::from(sectors) * 512, tag, flags);
            }
            Io::Id { .. } => panic!("it has no such request"),
        }
        assert_eq!(queue.do_io(&mut [], 0, None, None).unwrap(), 0);
    }

    fn wait(&mut self, queue: usize) -> Done {
        let mut done = [MaybeUninit::uninit()];
        let mut limit = LIMIT;
        assert_eq!(self.queues[queue].do_io(&mut done, 1, Some(&mut limit), None).unwrap(), 1);
        // SAFETY: it says that it has filled in one.
        let done = unsafe { done[0].assume_init_ref() };
        Done { tag: done.user_data, ok: done.ret == 0 }
    }
}

fn region(ram: &GuestRam) -> MemoryRegion {
    let region = &ram.table()[0];
    MemoryRegion {
        addr: region.userspace_addr as usize,
        iova: 0,
        len: region.memory_size as usize,
        fd: region.mmap_handle,
        fd_offset: 0,
        flags: 0,
    }
}
