//! The end of a simulation: the disks complete all I/O, and all waits must end.

use std::thread;
use std::time::Duration;

use super::connection::Served;
use super::disk::lock;
use super::message::Message;
use super::vm::{RINGS, Vm};
use super::world::World;

/// Rounds after which all waits for I/O must have ended. In a round, all I/O completes, every
/// reactor performs one poll iteration, and events are processed.
const ROUNDS: usize = 24;

/// Checks of a condition that other threads make true, about 0.1 ms apart, before the test fails.
/// Those threads have no other work.
const CHECKS: usize = 100_000;

impl World {
    /// Brings all I/O, moves and deletions to an end.
    pub(crate) fn settle(&mut self) {
        self.trace.add("the end begins".into());
        self.step_all();
        self.end_moves();
        assert!(
            self.moves.is_empty(),
            "a move did not end although every reactor has performed an iteration"
        );
        if self.rng.one_in(16) {
            // The reclaim thread has time to free memory that it must not free.
            for _ in 0..8 {
                self.step_all();
                thread::sleep(Duration::from_micros(200));
            }
        }
        for disk in &self.disks {
            let mut state = lock(&disk.state);
            (state.full, state.open_fails) = (false, false);
        }
        self.rounds("I/O completes", |world| {
            world.requests_of_served_rings() == 0 && world.fronts.iter().all(|f| !f.waits())
        });
        // A ring that has just started makes its first call in its first visit.
        self.step_all();
        self.step_all();
        self.check_calls();
        self.wait("removed disks are free", |world| {
            world.disks.iter().all(|d| d.backend.is_some() || d.weak.strong_count() == 0)
        });
        self.wait("replaced memory is unmapped", |world| {
            (0..world.vms.len()).all(|vm| world.mapped(vm).iter().all(|t| world.is_current(vm, *t)))
        });
        self.stop_some();
        self.end_all();
        self.rounds("all connections drain", |world| world.target.connections() == 0);
        assert_eq!(self.target.quarantine(), (0, 0, 0));
        assert!(!self.disks.iter().any(|disk| lock(&disk.state).has_users()), "leases are in use");
        self.delete_all();
        self.wait("all memory is unmapped", |world| {
            let logged = || world.vms.iter().any(Vm::has_log_mapped);
            (0..world.vms.len()).all(|vm| world.mapped(vm).is_empty()) && !logged()
        });
        self.vms.iter().for_each(Vm::check_logs_given_up);
        self.wait("all channels are closed, all disks are free", |world| {
            world.disks.iter().all(|disk| {
                let ours = usize::from(disk.backend.is_some());
                lock(&disk.state).channels == 0 && disk.weak.strong_count() == ours
            })
        });
        assert!(self.fronts.iter().all(|f| f.fake.take_sent().is_empty()));
        let attached: usize = self.target.reactors().iter().map(|r| r.queues).sum();
        assert_eq!(attached, 0, "queues are still polled");
    }

    fn step_all(&mut self) {
        (0..self.reactors.len()).for_each(|n| self.step(n));
        self.check();
        self.target.process_events();
        self.check();
    }

    /// Performs rounds until `done`.
    fn rounds(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        for _ in 0..ROUNDS {
            for disk in 0..self.disks.len() {
                while !lock(&self.disks[disk].state).flying.is_empty() {
                    let n = self.rng.below(lock(&self.disks[disk].state).flying.len());
                    self.complete(disk, n);
                }
            }
            self.report_ends();
            self.leases_are_granted(1);
            self.step_all();
            if done(self) && self.disks.iter().all(|d| lock(&d.state).flying.is_empty()) {
                return;
            }
        }
        panic!("{what} does not end: {:#?}", self.target.controllers());
    }

    /// Other connections wait for closed ones until the event thread has reported their end.
    fn report_ends(&mut self) {
        for n in 0..self.fronts.len() {
            if !self.fronts[n].closed && self.fronts[n].fake.is_shut() {
                self.close(n);
                self.check();
            }
        }
    }

    /// Waits for the reclaim threads.
    fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        self.trace.add(format!("wait until {what}"));
        for check in 0..CHECKS {
            self.step_all();
            if done(self) {
                return;
            }
            if check > 4 {
                thread::sleep(Duration::from_micros(100));
            } else {
                thread::yield_now();
            }
        }
        let mapped: Vec<_> = (0..self.vms.len()).map(|vm| self.mapped(vm)).collect();
        let left = (self.target.connections(), self.target.quarantine());
        panic!(
            "{what} does not end: tables mapped: {mapped:?}, connections and \
             quarantine: {left:?}"
        );
    }

    /// Returns the number of outstanding requests on rings that are served.
    fn requests_of_served_rings(&self) -> usize {
        let fronts = self.fronts.iter().filter(|f| f.is_well());
        let on = |f: &super::connection::Front| {
            let served = (0..RINGS).filter(|ring| f.rings[*ring].served == Served::Yes);
            served.map(|ring| self.vms[f.vm].outstanding(ring).count()).sum::<usize>()
        };
        fronts.map(on).sum()
    }

    /// Checks that guests that requested calls were called after the last completion.
    fn check_calls(&mut self) {
        for (n, front) in self.fronts.iter_mut().enumerate().filter(|(_, f)| f.is_well()) {
            for (ring, state) in front.rings.iter_mut().enumerate() {
                state.look();
                let missed = state.served == Served::Yes && state.uncalled;
                assert!(!missed, "front {n}: ring {ring} was not called");
            }
        }
    }

    fn mapped(&self, vm: usize) -> Vec<usize> {
        let vm = &self.vms[vm];
        (0..vm.tables()).filter(|table| vm.is_mapped(*table)).collect()
    }

    /// Returns whether a connection that is not closed has this table.
    fn is_current(&self, vm: usize, table: usize) -> bool {
        self.fronts.iter().any(|f| f.vm == vm && !f.closed && f.tables().any(|t| t == table))
    }

    /// Half of the front ends stop their rings before they disconnect.
    fn stop_some(&mut self) {
        for n in 0..self.fronts.len() {
            for ring in 0..RINGS {
                let front = &self.fronts[n];
                if n % 2 == 0 && front.is_well() && front.rings[ring].served == Served::Yes {
                    self.send(n, Message::GetBase(ring));
                    self.check();
                    self.rounds("a ring stops", |world| world.fronts[n].pending.is_none());
                    assert_eq!(self.fronts[n].rings[ring].served, Served::Stopped);
                }
            }
        }
    }

    fn end_all(&mut self) {
        if self.rng.one_in(4) {
            self.trace.add("shutdown".into());
            self.target.begin_shutdown();
            let open = self.fronts.iter().filter(|f| !f.closed);
            assert!(open.into_iter().all(|f| f.fake.is_shut()), "shutdown closes connections");
            self.controllers.iter_mut().for_each(|c| c.deleting = true);
        }
        for n in 0..self.fronts.len() {
            if !self.fronts[n].closed {
                self.die(n);
                self.close(n);
                self.check();
            }
        }
    }

    fn delete_all(&mut self) {
        for controller in 0..self.controllers.len() {
            let under_way = self.deletions.iter().any(|d| d.controller == controller);
            if self.controllers[controller].exists && !under_way {
                self.start_deletion(controller, false, 0);
            }
        }
        while !self.deletions.is_empty() {
            self.look_at_a_deletion();
            self.check();
        }
        assert!(self.controllers.iter().all(|c| !c.exists), "a deletion was cancelled");
        assert!(self.target.controllers().is_empty());
    }
}

impl super::connection::Front {
    fn waits(&self) -> bool {
        self.pending.is_some() && self.is_well()
    }
}
