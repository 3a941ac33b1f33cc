//! rust-vmm's `vhost` crate, in `bench`'s hands, which brings the rings.

use std::collections::HashMap;
use std::sync::Arc;

use front_end::features::{DRIVER_FEATURES, EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use front_end::{
    AnyQueue, Completion, GuestRam, Options, ProtocolFeatures, QueueOptions, Request, RingLayout,
    STATUS_OK, Tag,
};

use super::{Done, FrontEnd, Io, Messages, RING_SIZE, Setup};

pub(crate) struct RustVmm {
    front_end: front_end::FrontEnd,
    ram: Arc<GuestRam>,
    queues: Vec<(AnyQueue, HashMap<Tag, usize>)>,
}

impl FrontEnd for RustVmm {
    const NAME: &'static str = "rust-vmm";

    fn start(setup: Setup<'_>) -> Self {
        let packed = setup.rings == RingLayout::Packed;
        let mut features = DRIVER_FEATURES & !(EVENT_IDX | INDIRECT_DESC);
        let mut needed = 0;
        for (wanted, bit) in
            [(packed, RING_PACKED), (setup.event_idx, EVENT_IDX), (setup.indirect, INDIRECT_DESC)]
        {
            needed |= if wanted { bit } else { 0 };
        }
        features |= needed;
        let mut options = Options { features, inflight: setup.inflight, ..Options::default() };
        if setup.slots {
            options.protocol |= ProtocolFeatures::CONFIGURE_MEM_SLOTS;
        }
        let ram = setup.ram.clone();
        let mut front_end =
            front_end::FrontEnd::connect(setup.socket, ram.clone(), options).unwrap();
        assert_eq!(front_end.features() & needed, needed, "the features are offered");
        assert!(!setup.slots || front_end.memory_slots().unwrap() >= 8);

        let options = QueueOptions { size: RING_SIZE, indirect: setup.indirect, segments_max: 126 };
        let queues = front_end.start_any(setup.queues, options).unwrap();
        let queues = queues.into_iter().map(|queue| (queue, HashMap::new())).collect();
        Self { front_end, ram, queues }
    }

    fn config(&mut self) -> (u64, u64) {
        let config = self.front_end.config().unwrap();
        assert_eq!(self.front_end.queues_offered(), u64::from(config.num_queues));
        (config.capacity * 512, config.num_queues.into())
    }

    fn add_memory(&mut self, ram: &Arc<GuestRam>) {
        self.front_end.add_memory(&ram.table()[0]).unwrap();
    }

    fn remove_memory(&mut self, ram: &Arc<GuestRam>) {
        self.front_end.remove_memory(&ram.table()[0]).unwrap();
    }

    fn submit(&mut self, queue: usize, io: Io<'_>, tag: usize) {
        let range = |sector, sectors, flags| {
            let segment = self.ram.alloc(16, 16).unwrap();
            let bytes = front_end::request::range(sector, sectors, flags);
            self.ram.write(segment.gpa, &bytes).unwrap();
            [segment]
        };
        let ranges;
        let request = match io {
            Io::Read { sector, data } => Request::read(sector, data),
            Io::Write { sector, data } => Request::write(sector, data),
            Io::Flush => Request::flush(),
            Io::Discard { sector, sectors } => {
                ranges = range(sector, sectors, 0);
                Request::discard(&ranges)
            }
            Io::WriteZeroes { sector, sectors, unmap } => {
                ranges = range(sector, sectors, unmap.into());
                Request::write_zeroes(&ranges)
            }
            Io::Id { data } => Request::id(data),
        };
        let (queue, tags) = &mut self.queues[queue];
        let known_as = queue.submit(&request).unwrap();
        queue.kick().unwrap();
        assert_eq!(tags.insert(known_as, tag), None);
    }

    fn wait(&mut self, queue: usize) -> Done {
        let (queue, tags) = &mut self.queues[queue];
        let Completion { tag, status, .. } = queue.wait().unwrap();
        Done { tag: tags.remove(&tag).unwrap(), ok: status == STATUS_OK }
    }
}

impl Messages for RustVmm {
    fn front_end(&mut self) -> &mut front_end::FrontEnd {
        &mut self.front_end
    }

    fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].0.in_flight()
    }
}
