//! Changes while rings run: memory, the dirty log, the guest's write cache.
//!
//! A change of the last two has to be in effect when it is acknowledged. The target waits for that
//! until no reactor uses the previous views. In a simulation it cannot wait: the change is refused
//! unless all reactors sleep.

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

use vhost_target::SessionInfo;
use vhost_target::session::VHOST_F_LOG_ALL;

use super::connection::{Front, Served};
use super::message::Message;
use super::vm::{Layout, RINGS};
use super::world::World;

const LOG_ALL: u64 = 1 << VHOST_F_LOG_ALL;

/// Poll iterations after which a reactor without work sleeps.
const ITERATIONS: usize = 4;

impl World {
    /// Returns the messages that change memory.
    pub(crate) fn new_memory(&mut self, n: usize) -> Vec<Message> {
        // If memory is set up in slots, the slot with the rings stays.
        let slots = [Layout::Split, Layout::SplitAndExtra, Layout::Small];
        let tables = [
            Layout::Whole,
            Layout::Split,
            Layout::WholeAndExtra,
            Layout::SplitAndExtra,
            Layout::Small,
        ];
        let in_slots = self.vms[self.fronts[n].vm].slots;
        let layouts = if in_slots { &slots[..] } else { &tables[..] };
        let refused = self.has_served_ring(n) && self.rng.one_in(20);
        let layout = if refused { Layout::NoRings } else { layouts[self.rng.below(layouts.len())] };
        let front = &self.fronts[n];
        let table = self.vms[front.vm].table(layout);
        if !in_slots {
            return vec![Message::Table(table, !refused)];
        }
        let gone = front.memory.iter().filter(|had| table.iter().all(|(spec, _)| spec != *had));
        // The rings' memory begins at address 0.
        let gone: Vec<_> =
            gone.map(|spec| Message::RemRegion(*spec, !refused || spec.gpa != 0)).collect();
        let new = table.into_iter().filter(|(spec, _)| !front.memory.contains(spec));
        new.map(|(spec, fd)| Message::AddRegion(spec, fd)).chain(gone).collect()
    }

    /// Returns the messages that begin or end the logging of writes.
    pub(crate) fn switch_logging(&mut self, n: usize) -> Vec<Message> {
        let front = &self.fronts[n];
        let features = front.features;
        if features == 0 {
            return vec![];
        }
        if front.logging().is_some() && self.rng.one_in(2) {
            return vec![Message::Features(features & !LOG_ALL)];
        }
        let (number, log) = self.vms[front.vm].new_log();
        let mut script = vec![Message::Log(number, log), Message::Features(features | LOG_ALL)];
        // QEMU sends the addresses again to change a flag.
        let served = (0..RINGS).filter(|ring| front.rings[*ring].served == Served::Yes);
        script.extend(served.map(Message::Addr));
        script
    }

    fn has_served_ring(&self, n: usize) -> bool {
        self.fronts[n].rings.iter().any(|ring| ring.served == Served::Yes)
    }

    /// Returns whether a message changes what has to be in effect at once, while reactors may use
    /// the previous views.
    pub(crate) fn comes_too_early(&self, n: usize, message: &Message) -> bool {
        let front = &self.fronts[n];
        let changes = match message {
            Message::Features(features) => *features != front.features,
            Message::Log(..) => front.has_accepted(VHOST_F_LOG_ALL),
            Message::WriteCache(on) => {
                front.has_accepted(VIRTIO_BLK_F_CONFIG_WCE) && *on != front.write_cache()
            }
            _ => false,
        };
        changes && self.has_served_ring(n) && self.asleep.contains(&false)
    }

    /// Lets reactors fall asleep, if that makes a difference for a message. Returns whether the
    /// message has to be sent.
    pub(crate) fn has_the_time(&mut self, n: usize, message: &Message) -> bool {
        for _ in 0..ITERATIONS {
            if !self.comes_too_early(n, message) {
                return true;
            }
            for reactor in 0..self.reactors.len() {
                if !self.asleep[reactor] {
                    self.step(reactor);
                    self.check();
                }
            }
        }
        !self.comes_too_early(n, message) || self.rng.one_in(8)
    }

    /// Returns whether a message that came too early was refused for that reason.
    pub(crate) fn is_in_vain(&mut self, n: usize, message: &Message, rejected: bool) -> bool {
        if !self.comes_too_early(n, message) {
            return false;
        }
        // A ring that a reactor certainly serves.
        let served = self.flying_of(n).is_some() && !self.fronts[n].was_reset;
        assert!(rejected || !served, "front {n}: {message:?}: acknowledged before its effect");
        if rejected {
            self.count("refused as it could not be in effect at once");
        }
        rejected
    }

    /// Records the change that a message has made.
    pub(crate) fn take_effect(&mut self, n: usize, message: &Message) {
        let front = &mut self.fronts[n];
        match message {
            Message::Features(features) => {
                let by_driver = (front.features ^ features) & !(1 << VHOST_F_LOG_ALL) != 0;
                front.features = *features;
                if by_driver && front.cannot_flush() {
                    front.write_cache = None;
                }
            }
            Message::Log(number, _) => front.log = Some(*number),
            Message::WriteCache(on) => {
                front.write_cache = Some(*on);
                self.controllers[front.controller].write_through |= !on;
            }
            Message::Table(table, _) => {
                front.memory = table.iter().map(|(spec, _)| *spec).collect()
            }
            Message::AddRegion(spec, _) => front.memory.push(*spec),
            Message::RemRegion(spec, _) => front.memory.retain(|region| region != spec),
            _ => {}
        }
    }

    /// Records in which log the target has acknowledged to mark its writes.
    pub(crate) fn logging_acknowledged(&mut self, n: usize, before: Option<usize>) {
        let front = &self.fronts[n];
        let (vm, now) = (front.vm, front.logging());
        if now == before {
            return;
        }
        // I/O that a reset left in flight uses the log that it had.
        let in_use = front.rings.iter().any(|ring| ring.drains);
        let on = now.is_some() && self.has_served_ring(n);
        self.vms[vm].change_logs(before, now, in_use);
        self.count(if on { "logging begun while rings run" } else { "logging begun or ended" });
    }

    /// Checks what the target has written to a machine while it logs.
    pub(crate) fn check_marks(&mut self, vm: usize) {
        let logs = |f: &&Front| f.vm == vm && !f.closed;
        let front = self.fronts.iter().find(logs);
        let log = front.and_then(Front::logging);
        let memory = front.map_or(&[][..], |front| &front.memory);
        let drains = front.is_some_and(Front::has_older_io);
        let (pages, late) = self.vms[vm].check_marks(log, drains, memory);
        if pages > 0 {
            self.count("looks that found pages written and marked");
        }
        if late > 0 {
            self.count("looks that found pages of earlier I/O marked after its end");
        }
    }

    /// Records which earlier I/O has ended.
    pub(crate) fn notice_drains(&mut self) {
        for n in 0..self.fronts.len() {
            let front = &self.fronts[n];
            if front.closed || !front.has_older_io() {
                continue;
            }
            let gate_closed = self.is_gate_closed(front.controller, front.vm);
            let session = self.sessions().find(|s| s.vid as usize == n);
            let queues = session.map_or_else(Vec::new, |s| s.queues);
            let front = &mut self.fronts[n];
            front.gated &= gate_closed;
            for (ring, state) in front.rings.iter_mut().enumerate() {
                state.drains &= queues.iter().any(|queue| queue.ring == ring);
                state.kept = state.kept.take().filter(|_| state.drains);
            }
        }
    }

    /// Returns whether I/O of closed connections may use the memory of a machine on this
    /// controller.
    pub(crate) fn is_gate_closed(&self, controller: usize, vm: usize) -> bool {
        self.target.left_behind().iter().any(|s| {
            let front = &self.fronts[s.vid as usize];
            front.controller == controller || front.vm == vm
        })
    }

    fn sessions(&self) -> impl Iterator<Item = SessionInfo> + use<> {
        self.target.controllers().into_iter().flat_map(|c| c.sessions)
    }
}

impl Front {
    /// Returns whether I/O may be in flight that does not mark pages in the current log: of earlier
    /// connections, or from before a reset.
    fn has_older_io(&self) -> bool {
        self.gated || self.rings.iter().any(|ring| ring.drains)
    }
}
