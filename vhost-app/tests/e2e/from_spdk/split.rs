//! A split ring's life: rte_vhost records one request at a time, by `last_inflight_io`, and links
//! nothing.

use std::fs::File;
use std::sync::Arc;

use front_end::ring::Ring;
use front_end::{GuestRam, Queue, QueueOptions, Request, STATUS_OK, Segment};

use super::area::Part;
use super::life::{End, Life, SIZE};

#[derive(Debug)]
pub(crate) struct Split {
    queue: Queue,
    part: Part,
    last_avail: u16,
    used: u16,
    counter: u64,
    held: Vec<u16>,
}

impl Split {
    fn ram(&self) -> &Arc<GuestRam> {
        self.queue.ring().ram()
    }
}

impl Life for Split {
    fn new(ram: &Arc<GuestRam>, queue: u16, area: &File) -> Self {
        let options = QueueOptions { size: SIZE, ..QueueOptions::default() };
        Self {
            queue: Queue::new(ram, queue.into(), options, false).unwrap(),
            part: Part::new(area, queue, SIZE, false),
            last_avail: 0,
            used: 0,
            counter: 0,
            held: vec![],
        }
    }

    fn ring(&self) -> &Arc<Ring> {
        self.queue.ring()
    }

    fn base(&self) -> u16 {
        self.ring().used_index()
    }

    fn end(&self) -> u16 {
        self.ring().available_index()
    }

    fn submit(&mut self, write: bool, sector: u64, data: Segment) -> Option<u16> {
        let data = [data];
        let request =
            if write { Request::write(sector, &data) } else { Request::read(sector, &data) };
        self.queue.submit(&request).ok().map(|tag| tag.0)
    }

    fn kick(&mut self) {
        self.queue.kick().unwrap();
    }

    fn poll(&mut self) -> Option<(u16, u8)> {
        let done = self.queue.poll().expect("it is with the device")?;
        Some((done.tag.0, done.status))
    }

    fn take(&mut self) -> bool {
        if self.last_avail == self.ring().available_index() {
            return false;
        }
        let at = self.ring().addrs()[1] + 4 + 2 * u64::from(self.last_avail % SIZE);
        let mut head = [0; 2];
        self.ram().read(at, &mut head).unwrap();
        let head = u16::from_le_bytes(head);
        self.last_avail = self.last_avail.wrapping_add(1);
        // rte_vhost_set_inflight_desc_split
        self.part.put(self.part.entry(head) + 8, self.counter.to_le_bytes());
        self.counter += 1;
        self.part.put(self.part.entry(head), [1]);
        self.held.push(head);
        true
    }

    fn held(&self) -> Vec<u16> {
        self.held.clone()
    }

    fn finish(&mut self, nth: usize, end: End) {
        let head = self.held.remove(nth);
        let (_, status) = self.queue.head_addrs(head);
        self.ram().write(status, &[STATUS_OK]).unwrap();
        let used_ring = self.ring().addrs()[2];
        let at = used_ring + 4 + 8 * u64::from(self.used % SIZE);
        self.ram().write(at, &u32::from(head).to_le_bytes()).unwrap();
        self.ram().write(at + 4, &1_u32.to_le_bytes()).unwrap();
        // rte_vhost_set_last_inflight_io_split
        self.part.put(12, head.to_le_bytes());
        if end == End::Announced {
            return;
        }
        self.used = self.used.wrapping_add(1);
        self.ram().write(used_ring + 2, &self.used.to_le_bytes()).unwrap();
        if end == End::Whole {
            // rte_vhost_clr_inflight_desc_split
            self.part.put(self.part.entry(head), [0]);
            self.part.put(14, self.used.to_le_bytes());
        }
    }
}
