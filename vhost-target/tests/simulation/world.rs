//! The state of a simulation, and the conditions that hold after every step.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use bdev::Status;
use vhost_target::Moving;
use vhost_target::SteppedReactor;
use vhost_target::protocol::{self, request};
use vhost_target::session::DRAIN_LIMIT_S;
use vhost_target::{Connection, Mode, Target};

use super::backend::{Backend, DeviceKind};
use super::connection::{Front, Lost, Pending, Served};
use super::disk::{Meanwhile, Part, Seen, State, lock};
use super::operator::Deletion;
use super::request::{Progress, Request};
use super::rng::Rng;
use super::trace::Trace;
use super::transport::FakeTransport;
use super::vm::{RINGS, Vm};

/// A disk, or a source of entropy.
pub(crate) struct Disk {
    pub(crate) kind: DeviceKind,
    /// `None` if it was removed.
    pub(crate) backend: Option<Backend>,
    pub(crate) weak: Weak<dyn Any + Send + Sync>,
    pub(crate) state: Arc<Mutex<State>>,
}

/// A controller, from its creation to its deletion. The next one of the same name is another value.
pub(crate) struct Controller {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) disk: usize,
    /// Whether it offers packed rings.
    pub(crate) packed: bool,
    /// One of its guests has switched the write cache off.
    pub(crate) write_through: bool,
    pub(crate) exists: bool,
    pub(crate) deleting: bool,
}

/// How often each kind of event was reached, over all simulations: a test that reaches nothing
/// finds nothing.
pub(crate) type Counts = BTreeMap<&'static str, u64>;

pub(crate) struct World {
    pub(crate) trace: Trace,
    pub(crate) counts: Counts,
    pub(crate) rng: Rng,
    pub(crate) reactors: Vec<SteppedReactor>,
    pub(crate) asleep: Vec<bool>,
    pub(crate) target: Arc<Target>,
    pub(crate) transport: Arc<FakeTransport>,
    pub(crate) meanwhile: Meanwhile,
    pub(crate) disks: Vec<Disk>,
    pub(crate) controllers: Vec<Controller>,
    pub(crate) vms: Vec<Vm>,
    pub(crate) fronts: Vec<Front>,
    pub(crate) deletions: Vec<Deletion>,
    pub(crate) moves: Vec<Moving>,
    /// The machine and the ring of each request.
    pub(crate) requests: BTreeMap<u64, (usize, usize)>,
    pub(crate) lost: BTreeMap<u64, Lost>,
    pub(crate) request_ids: u64,
}

impl World {
    /// With `loud`, every action is printed at once.
    pub(crate) fn new(seed: u64, loud: bool) -> Self {
        let mut rng = Rng::new(seed);
        let count = 1 + rng.below(3);
        let mode = if rng.one_in(2) { Mode::Poll } else { Mode::Sleep { after_us: 0 } };
        let (target, reactors) = Target::in_steps(count, mode, Arc::new(|| {})).expect("a target");
        Self {
            trace: Trace::new(seed, loud),
            counts: Counts::new(),
            rng,
            asleep: vec![false; reactors.len()],
            reactors,
            target,
            transport: Arc::default(),
            meanwhile: Meanwhile::default(),
            disks: vec![],
            controllers: vec![],
            vms: vec![],
            fronts: vec![],
            deletions: vec![],
            moves: vec![],
            requests: BTreeMap::new(),
            lost: BTreeMap::new(),
            request_ids: 0,
        }
    }

    /// Performs `steps` steps and then ends all activity.
    pub(crate) fn run(mut self, steps: usize) -> Counts {
        self.create();
        for step in 0..steps {
            self.trace.step = step;
            self.act();
            self.check();
        }
        self.trace.step = steps;
        self.settle();
        self.counts
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn act(&mut self) {
        match self.rng.below(100) {
            0..20 => self.step_a_reactor(),
            20..24 => self.leases_are_granted(2),
            24..34 => self.process_events(),
            34..48 => self.complete_some(),
            48..86 => self.front_end_acts(),
            86..90 => self.event_thread_notices(),
            90..93 => self.operator_acts(),
            93..97 => self.queues_move(),
            97..99 => self.disk_changes(),
            _ => self.tick(),
        }
    }

    fn step_a_reactor(&mut self) {
        let n = self.rng.below(self.reactors.len());
        self.trace.add(format!("reactor {n}"));
        self.step(n);
        if self.asleep[n] {
            self.count("sleeps");
        }
    }

    pub(crate) fn step(&mut self, reactor: usize) {
        self.asleep[reactor] = self.reactors[reactor].step();
    }

    pub(crate) fn process_events(&mut self) {
        self.trace.add("process events".into());
        let planned = self.plan_for_control_thread();
        self.target.process_events();
        self.finish_plan(planned);
    }

    /// Other processes release one in `part` of the leases that the target waits for.
    pub(crate) fn leases_are_granted(&mut self, part: usize) {
        for disk in 0..self.disks.len() {
            if !lock(&self.disks[disk].state).waits() || !self.rng.one_in(part) {
                continue;
            }
            self.trace.add(format!("disk {disk}: the lease is granted"));
            self.count("leases granted");
            let granted = lock(&self.disks[disk].state).grant();
            let planned = self.plan_for_control_thread();
            granted.iter().for_each(|granted| granted());
            self.finish_plan(planned);
        }
    }

    fn complete_some(&mut self) {
        let Some(disk) = self.pick_disk() else { return };
        let flying: Vec<usize> = {
            let mut state = lock(&self.disks[disk].state);
            if let Some(last) = state.flying.last_mut() {
                last.stuck |= self.rng.one_in(16);
            }
            let all = state.flying.iter().enumerate();
            all.filter(|(_, f)| !f.stuck).map(|(n, _)| n).collect()
        };
        for _ in 0..1 + self.rng.below(4) {
            if let Some(n) = self.rng.pick(&flying)
                && n < lock(&self.disks[disk].state).flying.len()
            {
                self.complete(disk, n);
            }
        }
    }

    fn pick_disk(&mut self) -> Option<usize> {
        (!self.disks.is_empty()).then(|| self.rng.below(self.disks.len()))
    }

    /// Completes an I/O. Its memory must still be mapped.
    pub(crate) fn complete(&mut self, disk: usize, n: usize) {
        let status = match self.rng.below(8) {
            0 => Status::IoError,
            1 => Status::Unsupported,
            _ => Status::Ok,
        };
        let part = lock(&self.disks[disk].state).flying[n].part;
        if let Some(lost) = self.lost.remove(&part.request) {
            return self.complete_lost(disk, n, &lost);
        }
        self.trace.add(format!("disk {disk} completes {part:?}: {status:?}"));
        let (vm, _) = self.requests[&part.request];
        let table = self.request(part.request).table.expect("a request in flight has a table");
        assert!(
            self.vms[vm].is_mapped(table),
            "machine {vm}: table {table} was unmapped too early"
        );
        lock(&self.disks[disk].state).complete(n, status);
        self.ended(part, status);
        self.count("I/O completed");
    }

    /// Completes an I/O of a deleted controller. Its memory must still be mapped.
    fn complete_lost(&mut self, disk: usize, n: usize, lost: &Lost) {
        let part = lock(&self.disks[disk].state).flying[n].part;
        self.trace.add(format!("disk {disk} completes {part:?}, which is lost: {lost:?}"));
        let Lost { vm, table, .. } = *lost;
        assert!(
            self.vms[vm].is_mapped(table),
            "machine {vm}: table {table} was unmapped too early"
        );
        // The driver may use its memory for something else by now.
        let known = self.requests.contains_key(&part.request);
        let status = if known { Status::Ok } else { Status::IoError };
        lock(&self.disks[disk].state).complete(n, status);
        self.count("I/O of a deleted controller completed");
    }

    /// Records the I/O that a deleted controller has left in flight.
    pub(crate) fn abandon(&mut self, controller: usize) {
        let disk = self.controllers[controller].disk;
        for vm in 0..self.vms.len() {
            if self.vms[vm].controller != controller {
                continue;
            }
            for (id, ring, request) in self.vms[vm].abandon() {
                let mut state = lock(&self.disks[disk].state);
                let front = match request.progress {
                    Progress::Flying(front) | Progress::Written(front) => Some(front),
                    _ => None,
                };
                match front.filter(|_| state.flying.iter().any(|f| f.part.request == id)) {
                    Some(front) => {
                        let table = request.table.expect("a request in flight has a table");
                        self.lost.insert(id, Lost { front, vm, ring, table });
                    }
                    None => state.forget(id),
                }
            }
        }
    }

    /// Returns an outstanding request.
    pub(crate) fn request(&mut self, id: u64) -> &mut Request {
        let place = self.requests.get(&id);
        let (vm, ring) = *place.unwrap_or_else(|| panic!("request {id} was completed already"));
        let slots = self.vms[vm].rings[ring].slots.iter_mut().flatten();
        let request = slots.into_iter().find(|r| r.id == id);
        request.unwrap_or_else(|| panic!("request {id} was completed already"))
    }

    /// Records that the disk has completed a part of a request.
    fn ended(&mut self, part: Part, status: Status) {
        let request = self.request(part.request);
        request.progress = match request.progress {
            Progress::Flying(front) if request.durable && !part.flush && status == Status::Ok => {
                Progress::Written(front)
            }
            _ => Progress::Done(status),
        };
    }

    fn disk_changes(&mut self) {
        let Some(disk) = self.pick_disk() else { return };
        let what = self.rng.below(6);
        let mut state = lock(&self.disks[disk].state);
        match what {
            0 | 1 => state.full = !state.full,
            2 => state.at_once = !state.at_once,
            3 => state.open_fails = !state.open_fails,
            _ => {
                state.full = false;
                state.open_fails = false;
            }
        }
        let now = (state.full, state.at_once, state.open_fails);
        drop(state);
        self.trace.add(format!("disk {disk}: full, at once, open fails: {now:?}"));
    }

    fn tick(&mut self) {
        let late = self.rng.one_in(6);
        let seconds = if late { DRAIN_LIMIT_S + 1 } else { 1 };
        self.trace.add(format!("{seconds} s pass"));
        // A drain that the target has processed before the check does not count as late.
        self.process_events();
        self.check();
        let well: Vec<bool> = self.fronts.iter().map(Front::is_well).collect();
        (0..seconds).for_each(|_| self.target.tick());
        for (front, well) in self.fronts.iter().zip(well) {
            if well && late {
                assert_eq!(
                    front.fake.is_shut(),
                    front.pending.is_some(),
                    "the drain limit closes the connection"
                );
            } else if well && front.pending.is_none() {
                assert!(!front.fake.is_shut(), "no reply was pending");
            }
        }
    }

    /// The event thread reports the end of a connection.
    fn event_thread_notices(&mut self) {
        let ended = |f: &Front| !f.closed && f.fake.is_shut();
        let ended: Vec<usize> =
            (0..self.fronts.len()).filter(|n| ended(&self.fronts[*n])).collect();
        if let Some(n) = self.rng.pick(&ended) {
            self.close(n);
        }
    }

    pub(crate) fn close(&mut self, n: usize) {
        self.trace.add(format!("front {n}: closed"));
        if self.flying_of(n).is_some() {
            self.count("closed with I/O in flight");
        }
        let planned = self.plan_for_event_thread();
        self.target.closed(self.fronts[n].id);
        self.is_closed(n);
        self.finish_plan(planned);
    }

    /// Records that the target was told of a connection's end.
    pub(crate) fn is_closed(&mut self, n: usize) {
        let front = &mut self.fronts[n];
        front.fake.shut_down();
        front.closed = true;
        front.gone = true;
        front.pending = None;
        front.script.clear();
    }

    /// Checks the conditions that hold after every step.
    pub(crate) fn check(&mut self) {
        for disk in 0..self.disks.len() {
            let seen = std::mem::take(&mut lock(&self.disks[disk].state).seen);
            for seen in seen {
                match seen {
                    Seen::Fetched(Part { request, flush: false }) => self.check_fetched(request),
                    Seen::Fetched(Part { request, flush: true }) => self.check_flush(request),
                    Seen::DoneAtOnce(part) => self.ended(part, Status::Ok),
                }
            }
            let wrong = lock(&self.disks[disk].state).wrong.take();
            assert_eq!(wrong, None, "disk {disk}");
        }
        self.notice_drains();
        for vm in 0..self.vms.len() {
            self.check_marks(vm);
            for ring in 0..RINGS {
                self.check_ring(vm, ring);
            }
        }
        for n in 0..self.fronts.len() {
            for message in self.fronts[n].fake.take_sent() {
                self.check_sent(n, &message);
            }
        }
    }

    /// Takes the completed requests, and checks that a stopped ring has none.
    fn check_ring(&mut self, vm: usize, ring: usize) {
        if self.vms[vm].rings[ring].size == 0 {
            return;
        }
        if let Some(quiet) = &self.vms[vm].rings[ring].quiet {
            let now = self.vms[vm].used_part(ring);
            assert!(*quiet == now, "machine {vm}: ring {ring} was written to after its stop");
        }
        let controller = self.vms[vm].controller;
        let disk = &self.disks[self.controllers[controller].disk];
        let may_be_removed = disk.backend.is_none() || !self.controllers[controller].exists;
        let front = self.fronts.iter().rfind(|f| f.serves(vm, ring));
        let memory = front.map_or(&[][..], |front| &front.memory);
        let kept = self.fronts.iter().filter(|f| f.vm == vm).filter_map(|f| f.kept(ring));
        let kept: Vec<_> = kept.collect();
        let back = self.vms[vm].consume(ring, |request| {
            let was_there = kept.iter().all(|view| request.has_data_in(&view.memory));
            may_be_removed || !request.has_data_in(memory) || request.again && !was_there
        });
        for id in &back {
            self.requests.remove(id);
            self.count(match self.vms[vm].device {
                DeviceKind::Block => "requests came back",
                DeviceKind::Entropy => "requests of an entropy device came back",
            });
        }
        for front in self.fronts.iter_mut().filter(|f| f.vm == vm) {
            let ring = &mut front.rings[ring];
            ring.uncalled |= !back.is_empty() && ring.call.is_some();
            // An fd that is replaced before the guest reads it has signalled in vain.
            if self.rng.one_in(4) {
                ring.look();
            }
        }
    }

    /// Checks a message that the target has sent on its own.
    fn check_sent(&mut self, n: usize, message: &[u8]) {
        let front = &self.fronts[n];
        assert!(!front.closed, "front {n}: a message after its connection was closed");
        let ring = match front.pending {
            Some(Pending::Base(ring)) => ring,
            Some(Pending::Reset) => {
                let expected = protocol::reply(request::RESET_DEVICE, &protocol::SUCCESS);
                assert_eq!(message, expected, "front {n}: the acknowledgement");
                self.trace.add(format!("front {n}: reset, deferred"));
                self.count("RESET_DEVICE acknowledged later");
                return self.is_reset(n);
            }
            None => panic!("front {n}: a reply without a request"),
        };
        let base = u16::from_le_bytes([message[16], message[17]]);
        let payload = protocol::vring_base(ring, self.both(n, base));
        let expected = protocol::reply(request::GET_VRING_BASE, &payload);
        assert_eq!(message, expected, "front {n}: the reply");
        self.trace.add(format!("front {n}: ring {ring} stopped at {base}, deferred"));
        self.count("GET_VRING_BASE answered later");
        self.answered(n, ring, base);
    }

    /// Returns the position in the format of the reply to GET_VRING_BASE: a packed ring has two
    /// positions, which are equal because nothing is in flight. The format stays although a reset
    /// clears the features.
    pub(crate) fn both(&self, n: usize, base: u16) -> u32 {
        let packed = self.vms[self.fronts[n].vm].packed;
        u32::from(base) * if packed { 0x1_0001 } else { 1 }
    }

    /// RESET_DEVICE was acknowledged: the guest may reuse all of its memory.
    pub(crate) fn is_reset(&mut self, n: usize) {
        // The target learns only from its memory table that a connection on another controller
        // belongs to the same machine.
        let front = &self.fronts[n];
        let known = |before: &&usize| {
            front.controller == self.fronts[**before].controller || !front.memory.is_empty()
        };
        let mine = std::iter::once(&n).chain(front.before.iter().filter(known));
        let flying = |front: &&usize| (0..RINGS).any(|ring| self.flies(**front, ring));
        let flying: Vec<_> = mine.filter(flying).collect();
        assert!(flying.is_empty(), "front {n}: reset with I/O of fronts {flying:?} in flight");
        let front = &mut self.fronts[n];
        front.pending = None;
        let vm = &mut self.vms[front.vm];
        for (ring, _) in front.rings.iter().enumerate().filter(|(_, r)| r.served == Served::Reset) {
            vm.rings[ring].quiet = Some(vm.used_part(ring));
        }
    }

    /// GET_VRING_BASE has got its reply.
    pub(crate) fn answered(&mut self, n: usize, ring: usize, base: u16) {
        let front = &mut self.fronts[n];
        front.pending = None;
        let vm = &mut self.vms[front.vm];
        let served = std::mem::replace(&mut front.rings[ring].served, Served::Stopped);
        if served == Served::Yes {
            vm.check_base(ring, base);
            front.rings[ring].look();
            let uncalled = front.rings[ring].uncalled && !front.was_reset;
            assert!(!uncalled, "ring {ring} stopped without a call");
            vm.rings[ring].quiet = Some(vm.used_part(ring));
        } else if served != Served::Stopped {
            front.rings[ring].served = served;
        }
    }
}
