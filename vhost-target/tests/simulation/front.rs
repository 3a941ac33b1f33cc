//! The actions of front ends: connect, set up, submit, reconfigure, stop, die.

use std::os::fd::AsFd;
use std::sync::Arc;

use reactor::EventFd;
use vhost_target::protocol;
use vhost_target::session::VHOST_F_LOG_ALL;
use vhost_target::transport::SharedConnection;
use vhost_target::{Connection, Verdict};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::backend::DeviceKind;
use super::connection::{Front, Pending, Served};
use super::dirty::{LOG_BYTES, LOG_OFFSET};
use super::message::{Message, WRITE_CACHE_AT};
use super::request::Kind;
use super::transport::FakeConnection;
use super::vm::{RINGS, Vm};
use super::world::World;

impl World {
    pub(crate) fn front_end_acts(&mut self) {
        let live: Vec<usize> = (0..self.fronts.len()).filter(|n| !self.fronts[*n].gone).collect();
        // More often if a scenario needs it.
        let rarely = if self.lost.is_empty() { 12 } else { 3 };
        let Some(n) = self.rng.pick(&live).filter(|_| live.len() > 4 || !self.rng.one_in(rarely))
        else {
            return self.connect();
        };
        if self.rng.one_in(3) {
            return self.guest_submits(n);
        }
        if self.fronts[n].fake.is_shut() && self.rng.one_in(2) {
            // The front end notices that the target has closed the connection.
            self.fronts[n].gone = true;
            return;
        }
        if self.fronts[n].pending.is_some() {
            match self.rng.below(24) {
                0 if self.fronts[n].is_well() => self.send(n, Message::GetConfig),
                1 => self.die(n),
                2 => self.fronts[n].fake.become_unresponsive(),
                _ => {}
            }
            return;
        }
        if self.fronts[n].script.is_empty() {
            self.write_script(n);
        }
        for _ in 0..1 + self.rng.below(8) {
            if self.fronts[n].pending.is_none()
                && let Some(message) = self.fronts[n].script.pop_front()
                && self.has_the_time(n, &message)
            {
                self.send(n, message);
            }
        }
    }

    /// Connects a front end: of a new machine, or of one that has lost its connection.
    fn connect(&mut self) {
        let existing: Vec<usize> =
            (0..self.controllers.len()).filter(|c| self.controllers[*c].exists).collect();
        let Some(controller) = self.rng.pick(&existing) else { return };
        let orphan = |vm: &usize| {
            let mine = || self.fronts.iter().filter(|f| f.vm == *vm);
            let Vm { controller: had, packed, device, .. } = self.vms[*vm];
            let known = || (0..RINGS).all(|ring| self.vms[*vm].may_start(ring));
            // A machine whose controller was deleted uses any other controller with such a device,
            // with the same memory and rings.
            let takes = had == controller
                || !self.controllers[had].exists && self.controllers[controller].packed >= packed;
            takes && device == self.kind_of(controller) && mine().all(|f| f.gone) && known()
        };
        let orphans: Vec<usize> = (0..self.vms.len()).filter(orphan).collect();
        let lost = |vm: &usize| self.lost.values().any(|lost| lost.vm == *vm);
        let losers: Vec<usize> = orphans.iter().copied().filter(lost).collect();
        let again = self.rng.pick(&orphans).filter(|_| !self.rng.one_in(4));
        let again = self.rng.pick(&losers).or(again);
        let number = self.fronts.len();
        let fake = FakeConnection::new(number);
        let path = self.controllers[controller].path.clone();
        // The target checks by itself which front ends have disconnected.
        let unreported = |f: &Front| f.controller == controller && !f.closed && f.fake.is_shut();
        let unreported: Vec<usize> =
            (0..self.fronts.len()).filter(|n| unreported(&self.fronts[*n])).collect();
        let id = self.target.connected(&path, Arc::clone(&fake) as SharedConnection);
        unreported.into_iter().for_each(|n| self.is_closed(n));
        assert_eq!(
            id.is_none(),
            self.controllers[controller].deleting,
            "a controller that is being deleted refuses connections"
        );
        let Some(id) = id else { return };
        let vm = again.unwrap_or_else(|| {
            let event_idx = self.rng.one_in(2);
            let packed = self.controllers[controller].packed && !self.rng.one_in(3);
            let tracked = self.rng.one_in(2);
            let device = self.kind_of(controller);
            let mut vm = Vm::new(controller, device, event_idx, packed, tracked);
            vm.slots = self.rng.one_in(2);
            let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
            vm.declined = [0, 0, wce, flush | wce][self.rng.below(4)];
            self.vms.push(vm);
            self.vms.len() - 1
        });
        self.trace.add(format!("front {number}: machine {vm} connects to controller {controller}"));
        let before = |n: &usize| {
            let front = &self.fronts[*n];
            (front.controller == controller || front.vm == vm) && front.closed
        };
        let before: Vec<usize> = (0..number).filter(before).collect();
        if before.iter().any(|before| self.flying_of(*before).is_some()) {
            self.count("connected while an earlier connection's I/O was in flight");
        }
        if again.is_some() {
            self.count("a machine connected again");
            if self.vms[vm].packed {
                self.count("a machine with packed rings connected again");
            }
            if self.vms[vm].device == DeviceKind::Entropy {
                self.count("a machine with an entropy device connected again");
            }
            if std::mem::replace(&mut self.vms[vm].controller, controller) != controller {
                let lost = self.lost.values().any(|lost| lost.vm == vm);
                self.count(if lost {
                    "a machine took another controller while the one before had I/O in flight"
                } else {
                    "a machine took another controller"
                });
            }
        }
        let gated = self.is_gate_closed(controller, vm);
        self.fronts.push(Front {
            id,
            fake,
            controller,
            vm,
            gone: false,
            closed: false,
            features: 0,
            write_cache: self.controllers[controller].write_through.then_some(false),
            was_reset: false,
            memory: vec![],
            area: None,
            log: None,
            rings: Default::default(),
            pending: None,
            script: [].into(),
            before,
            gated,
        });
        self.write_script(number);
    }

    fn guest_submits(&mut self, n: usize) {
        let (front, vm) = (&self.fronts[n], self.fronts[n].vm);
        let served = |ring: &usize| front.rings[*ring].served == Served::Yes;
        let served: Vec<usize> = (0..RINGS).filter(served).collect();
        let any = self.rng.below(RINGS);
        let ring = self.rng.pick(&served).filter(|_| !self.rng.one_in(8)).unwrap_or(any);
        if self.vms[vm].rings[ring].size == 0 {
            return;
        }
        for _ in 0..1 + self.rng.below(5) {
            let Some(slot) = self.vms[vm].free_slot(ring) else { return };
            let kind = Kind::of(self.vms[vm].device, self.rng.below(12));
            self.request_ids += 1;
            let id = self.request_ids;
            let far = self.rng.one_in(3);
            self.vms[vm].offer(id, kind, ring, slot, far);
            self.requests.insert(id, (vm, ring));
            if self.vms[vm].packed {
                self.count("requests in packed rings");
            }
            self.trace.add(format!("machine {vm}: request {id} on ring {ring}: {kind:?}"));
        }
    }

    pub(crate) fn die(&mut self, n: usize) {
        self.trace.add(format!("front {n}: dies"));
        let front = &mut self.fronts[n];
        front.gone = true;
        front.script.clear();
        front.fake.shut_down();
    }

    /// Chooses the next messages of a front end.
    fn write_script(&mut self, n: usize) {
        let ring = self.rng.below(RINGS);
        let served = self.fronts[n].rings[ring].served;
        let none_served = self.fronts[n].rings.iter().all(|r| r.served != Served::Yes);
        let script = match self.rng.below(37) {
            0..14 if served != Served::Yes => self.start(n, ring),
            14..24 if none_served => self.start(n, ring),
            14..17 => self.new_memory(n),
            17..20 => vec![Message::Call(ring, self.call())],
            20 if served == Served::Yes => vec![Message::Kick(ring, self.call())],
            21..25 if self.may_stop(n, ring) => vec![Message::GetBase(ring)],
            25 | 26 => {
                let rings = (0..RINGS).filter(|ring| self.may_stop(n, *ring));
                rings.map(Message::GetBase).collect()
            }
            27 => vec![self.reset()],
            28 => vec![Message::GetConfig],
            29 if self.rng.one_in(8) => vec![Message::Nonsense],
            30 if self.rng.one_in(2) => return self.die(n),
            31..34 => self.switch_logging(n),
            34 | 35 => vec![Message::WriteCache(self.rng.one_in(2))],
            _ => vec![],
        };
        self.fronts[n].script = script.into();
    }

    pub(crate) fn reset(&mut self) -> Message {
        match self.rng.below(4) {
            0 | 1 => Message::ResetOwner,
            2 => Message::ResetDevice,
            _ => Message::ResetDeviceAndWait,
        }
    }

    pub(crate) fn may_stop(&self, n: usize, ring: usize) -> bool {
        let front = &self.fronts[n];
        front.rings[ring].served != Served::Not
    }

    pub(crate) fn call(&mut self) -> Option<EventFd> {
        (!self.rng.one_in(4)).then(|| EventFd::new().expect("an fd"))
    }

    /// Returns the messages that start a ring.
    fn start(&mut self, n: usize, ring: usize) -> Vec<Message> {
        let (vm, event_idx) = (self.fronts[n].vm, self.vms[self.fronts[n].vm].event_idx);
        if !self.vms[vm].may_start(ring) {
            return vec![];
        }
        let packed = self.vms[vm].packed;
        let fresh = self.vms[vm].rings[ring].size == 0;
        let lossy = self.vms[vm].rings[ring].lossy;
        if fresh || lossy || (self.vms[vm].may_reset(ring) && self.rng.one_in(3)) {
            let sizes = if packed { [3, 7, 16] } else { [4, 8, 16] };
            let size = sizes[self.rng.below(3)];
            let base = if self.rng.one_in(2) {
                0
            } else {
                65530 + u16::try_from(self.rng.below(6)).expect("below 6")
            };
            for id in self.vms[vm].reset_ring(ring, size, base) {
                self.requests.remove(&id);
            }
        }
        let mut script = vec![];
        let area = self.vms[vm].area().filter(|area| self.fronts[n].area != Some(area.0));
        let mut area = area.map(|(number, spec, fd)| Message::Inflight(number, spec, fd));
        if self.rng.one_in(4) {
            // It may come before the layout of the rings is negotiated.
            script.extend(area.take());
        }
        if self.fronts[n].features == 0 {
            let controller = &self.controllers[self.fronts[n].controller];
            let state = &self.disks[controller.disk];
            let no_event_idx = if event_idx { 0 } else { 1 << VIRTIO_RING_F_EVENT_IDX };
            // The offered features do not change when the disk is removed.
            let features = state.backend.as_ref().map(|backend| backend.device().features());
            let features = features.unwrap_or(1 << 32 | 1 << VIRTIO_RING_F_EVENT_IDX);
            let packed = if packed { 1 << VIRTIO_F_RING_PACKED } else { 0 };
            let mut declined = no_event_idx | self.vms[vm].declined;
            if self.rng.one_in(8) {
                let (number, log) = self.vms[vm].new_log();
                script.push(Message::Log(number, log));
            } else {
                declined |= 1 << VHOST_F_LOG_ALL;
            }
            script.push(Message::Features(features & !declined | packed));
        }
        if self.fronts[n].table().is_none() || self.rng.one_in(8) {
            script.extend(self.new_memory(n));
        }
        script.extend(area);
        let base = self.vms[vm].base(ring);
        script.push(Message::Num(ring, self.vms[vm].rings[ring].size));
        script.push(Message::Base(ring, base));
        script.push(Message::Addr(ring));
        if self.rng.one_in(2) {
            script.push(Message::Call(ring, self.call()));
        }
        let kick = self.call();
        script.push(Message::Kick(ring, kick));
        script.push(Message::Enable(ring));
        script
    }

    /// Sends a message, which the target handles on the event thread.
    pub(crate) fn send(&mut self, n: usize, message: Message) {
        let (request, payload, fds) = message.encode();
        self.before_message(n, &message);
        let planned = self.plan_for_event_thread();
        let (id, need_reply) = (self.fronts[n].id, message.needs_reply());
        let verdict = self.target.message(id, request, need_reply, &payload, fds);
        self.after_message(n, message, verdict);
        self.finish_plan(planned);
    }

    /// Records what the driver has done before a message is sent.
    fn before_message(&mut self, n: usize, message: &Message) {
        if let Message::Kick(ring, kick) = message {
            let ring = &mut self.vms[self.fronts[n].vm].rings[*ring];
            ring.quiet = None;
            ring.started = true;
            // From now on the driver kicks there, whether or not the target has noticed.
            let dup = |kick: &EventFd| kick.as_fd().try_clone_to_owned().expect("an fd").into();
            ring.kick = kick.as_ref().map(dup);
        }
    }

    pub(crate) fn after_message(&mut self, n: usize, message: Message, verdict: Verdict) {
        self.trace.add(format!("front {n}: {message:?}: {verdict:?}"));
        let rejected = matches!(verdict, Verdict::Reject);
        let in_vain = self.is_in_vain(n, &message, rejected);
        let front = &mut self.fronts[n];
        let refused = in_vain
            || front.pending.is_some()
            || matches!(
                message,
                Message::Nonsense | Message::Table(_, false) | Message::RemRegion(_, false)
            );
        if refused || rejected {
            // If the target has closed the connection, its rings may be stopped already.
            let given_up = front.fake.is_shut();
            assert!(given_up || refused == rejected, "front {n}: {message:?}: {verdict:?}");
            if in_vain || !rejected {
                self.take_effect(n, &message);
            }
            let front = &mut self.fronts[n];
            // No promise of the target holds any more.
            front.log = None;
            // The transport closes the connection.
            front.fake.shut_down();
            front.gone = true;
            front.pending = None;
            front.script.clear();
            return;
        }
        let (logging, view) = (self.fronts[n].logging(), self.fronts[n].view());
        self.take_effect(n, &message);
        self.logging_acknowledged(n, logging);
        let front = &mut self.fronts[n];
        match message {
            Message::Inflight(number, ..) => front.area = Some(number),
            Message::Table(..) => {
                self.count("memory tables");
                return;
            }
            Message::AddRegion(..) => {
                self.count("memory slots");
                return;
            }
            Message::Log(..) => {
                let Verdict::Reply(payload) = &verdict else { panic!("front {n}: {verdict:?}") };
                assert_eq!(*payload, [LOG_BYTES, LOG_OFFSET].map(u64::to_le_bytes).concat());
                return;
            }
            Message::Call(ring, call) => {
                front.rings[ring].uncalled &= call.is_some();
                front.rings[ring].call = call;
            }
            Message::Kick(ring, _) => {
                if front.rings[ring].served != Served::Yes {
                    let closed = |n: &usize| self.fronts[*n].closed;
                    let behind = (0..self.fronts.len()).filter(closed).collect();
                    self.fronts[n].rings[ring].behind = behind;
                }
                self.fronts[n].rings[ring].served = Served::Yes;
            }
            Message::ResetOwner | Message::ResetDevice | Message::ResetDeviceAndWait => {
                *self.counts.entry("resets").or_default() += 1;
                if matches!(message, Message::ResetOwner) {
                    (front.features, front.log) = (0, None);
                }
                front.area = None;
                front.was_reset = true;
                for ring in &mut front.rings {
                    ring.drains = true;
                    if !matches!(message, Message::ResetOwner) {
                        ring.kept = None;
                    } else if ring.served == Served::Yes && ring.kept.is_none() {
                        ring.kept = Some(view.clone());
                    }
                    if ring.served == Served::Yes {
                        ring.served = Served::Reset;
                    }
                }
                self.notice_drains();
                if message.needs_reply() {
                    return self.after_reset(n, &verdict);
                }
            }
            Message::GetBase(ring) => {
                if let Verdict::Reply(payload) = &verdict {
                    let base = u16::from_le_bytes([payload[4], payload[5]]);
                    assert_eq!(*payload, protocol::vring_base(ring, self.both(n, base)));
                    self.take_immediate_answer(n, ring, base);
                } else {
                    assert!(matches!(verdict, Verdict::Deferred), "front {n}: {verdict:?}");
                    front.pending = Some(Pending::Base(ring));
                }
                return;
            }
            Message::GetConfig => {
                let Verdict::Reply(payload) = &verdict else { panic!("front {n}: {verdict:?}") };
                assert_eq!(payload.len(), 12 + 60);
                let disk = &self.disks[self.controllers[front.controller].disk];
                let cached = front.write_cache() && disk.backend.is_some();
                let write_cache = u8::from(cached && disk.kind == DeviceKind::Block);
                assert_eq!(payload[12 + WRITE_CACHE_AT as usize], write_cache, "the write cache");
                return;
            }
            _ => {}
        }
        assert!(matches!(verdict, Verdict::Done | Verdict::Pass), "front {n}: {verdict:?}");
    }

    fn after_reset(&mut self, n: usize, verdict: &Verdict) {
        if let Verdict::Reply(payload) = verdict {
            assert_eq!(*payload, protocol::SUCCESS);
            // Requests that were completed before it have to be counted.
            self.check();
            self.is_reset(n);
        } else {
            assert!(matches!(verdict, Verdict::Deferred), "front {n}: {verdict:?}");
            self.fronts[n].pending = Some(Pending::Reset);
        }
    }

    fn take_immediate_answer(&mut self, n: usize, ring: usize, base: u16) {
        if self.fronts[n].fake.is_shut() {
            return; // It does not arrive.
        }
        // Requests that were completed before it have to be counted.
        self.check();
        self.count("GET_VRING_BASE answered at once");
        self.answered(n, ring, base);
    }
}
