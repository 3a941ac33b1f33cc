//! The actions of the operator: create controllers, delete them (as `vhost-app` does), remove
//! disks, set options, list.

use std::path::PathBuf;
use std::sync::Arc;

use vhost_target::{Connection, ControllerSpec, Core, Error};

use super::backend::{Backend, DeviceKind, has_backend};
use super::disk::lock;
use super::world::{Controller, Disk, World};

/// A deletion in progress.
pub(crate) struct Deletion {
    pub(crate) controller: usize,
    begun: vhost_target::Deletion,
    force: bool,
    /// How often it still checks before its time limit.
    checks_left: usize,
}

impl World {
    pub(crate) fn operator_acts(&mut self) {
        match self.rng.below(20) {
            _ if !self.controllers.iter().any(|c| c.exists) => self.create(),
            0..2 => self.create(),
            2..4 => self.begin_delete(),
            4 => self.remove_disk(),
            5 | 6 => self.set_coalescing(),
            7 | 8 => self.list(),
            9 | 10 => self.delete_a_busy_one(),
            _ => self.look_at_a_deletion(),
        }
    }

    /// Returns the kind of a controller's device.
    pub(crate) fn kind_of(&self, controller: usize) -> DeviceKind {
        self.disks[self.controllers[controller].disk].kind
    }

    fn existing(&mut self) -> Option<usize> {
        let all: Vec<usize> =
            (0..self.controllers.len()).filter(|c| self.controllers[*c].exists).collect();
        self.rng.pick(&all)
    }

    pub(crate) fn create(&mut self) {
        let name = format!("c{}", self.rng.below(3));
        let path = PathBuf::from(format!("/run/{name}"));
        if self.disks.is_empty() || (self.disks.len() < 4 && self.rng.one_in(2)) {
            let (block, entropy) = (DeviceKind::Block, DeviceKind::Entropy);
            let kind = if self.rng.one_in(3) { entropy } else { block };
            let name = format!("disk{}", self.disks.len());
            let (backend, state) = Backend::new(kind, name, &self.meanwhile);
            lock(&state).leased = self.rng.one_in(4);
            self.disks.push(Disk { kind, weak: backend.weak(), backend: Some(backend), state });
        }
        let disk = self.rng.below(self.disks.len());
        let Some(backend) = self.disks[disk].backend.clone() else { return };
        let cores = (0..self.reactors.len()).map(Core).collect::<Vec<_>>();
        let cores = self.rng.one_in(2).then(|| vec![cores[self.rng.below(cores.len())]]);
        let packed = self.rng.one_in(2);
        let spec = ControllerSpec {
            name: name.clone(),
            socket: path.clone(),
            device: backend.device(),
            cores,
            packed_ring: packed,
        };
        let taken = self.controllers.iter().any(|c| c.exists && c.name == name);
        let fails = self.rng.one_in(8);
        self.transport.fail(fails);
        let result = self.target.create_controller(spec, &*self.transport);
        self.trace.add(format!("create {name} on disk {disk}: {result:?}"));
        match result {
            Err(Error::Exists(_)) => assert!(taken),
            Err(Error::Listen(..)) => assert!(fails && !taken),
            Err(e) => panic!("create {name}: {e}"),
            Ok(()) => {
                assert!(!fails && !taken);
                let (exists, deleting) = (true, false);
                let write_through = false;
                let new = Controller { name, path, disk, packed, write_through, exists, deleting };
                self.controllers.push(new);
            }
        }
    }

    fn begin_delete(&mut self) {
        let force = self.rng.one_in(2);
        let Some(controller) = self.existing() else {
            let result = self.target.begin_delete("c0", force);
            assert!(matches!(result, Err(Error::NoController(_))));
            return;
        };
        let name = self.controllers[controller].name.clone();
        let deleting = self.controllers[controller].deleting;
        assert_eq!(self.target.is_deleting(&name), deleting);
        if deleting {
            let result = self.target.begin_delete(&name, force);
            assert!(matches!(result, Err(Error::Busy(_))));
            return;
        }
        let checks_left = self.rng.below(8);
        self.start_deletion(controller, force, checks_left);
    }

    /// Deletes a controller by force while it has I/O in flight on a disk that hangs.
    fn delete_a_busy_one(&mut self) {
        let busy = |c: &usize| {
            let Controller { exists, deleting, .. } = self.controllers[*c];
            let mut mine = (0..self.fronts.len()).filter(|n| self.fronts[*n].controller == *c);
            exists && !deleting && mine.any(|n| self.flying_of(n).is_some())
        };
        let busy: Vec<usize> = (0..self.controllers.len()).filter(busy).collect();
        let Some(controller) = self.rng.pick(&busy) else { return };
        self.start_deletion(controller, true, 0);
        let deletion = self.deletions.pop().expect("it was just added");
        self.count("deleted with I/O in flight");
        if self.kind_of(controller) == DeviceKind::Entropy {
            self.count("an entropy device deleted with requests in flight");
        }
        self.finish_delete(deletion);
    }

    pub(crate) fn start_deletion(&mut self, controller: usize, force: bool, checks_left: usize) {
        let name = self.controllers[controller].name.clone();
        self.trace.add(format!("delete controller {controller} ({name}), force: {force}"));
        let begun = self.target.begin_delete(&name, force).expect("the controller exists");
        self.controllers[controller].deleting = true;
        self.deletions.push(Deletion { controller, begun, force, checks_left });
        if force {
            for front in self.fronts.iter().filter(|f| f.controller == controller && !f.closed) {
                assert!(front.fake.is_shut(), "force closes the connections");
            }
        }
    }

    pub(crate) fn look_at_a_deletion(&mut self) {
        if self.deletions.is_empty() {
            return;
        }
        let n = self.rng.below(self.deletions.len());
        let controller = self.deletions[n].controller;
        let name = self.controllers[controller].name.clone();
        let progress = self.deletions[n].begun.progress();
        let open = self.fronts.iter().filter(|f| f.controller == controller && !f.closed).count();
        assert_eq!(progress.connected, open, "the number of connections to {name}");
        self.trace.add(format!("deletion of controller {controller}: {progress:?}"));
        let done = progress.connected + progress.draining == 0;
        if !done && self.deletions[n].checks_left > 0 {
            self.deletions[n].checks_left -= 1;
            return;
        }
        self.count(match (done, self.deletions[n].force) {
            (true, _) => "deleted",
            (false, true) => "deleted with I/O in flight",
            (false, false) => "deletions given up",
        });
        let deletion = self.deletions.swap_remove(n);
        if done || deletion.force {
            self.finish_delete(deletion);
        } else {
            self.trace.add(format!("controller {controller}: not deleted"));
            drop(deletion);
            self.controllers[controller].deleting = false;
        }
    }

    fn finish_delete(&mut self, deletion: Deletion) {
        let Deletion { controller, begun, .. } = deletion;
        let mine: Vec<usize> = (0..self.fronts.len())
            .filter(|n| self.fronts[*n].controller == controller && !self.fronts[*n].closed)
            .collect();
        self.trace.add(format!("controller {controller}: deleted, ends fronts {mine:?}"));
        // Some of the closed connections are reported before the socket is closed. The others are
        // not reported.
        let noticed: Vec<_> = mine.iter().filter(|_| self.rng.one_in(2)).copied().collect();
        let noticed: Vec<_> = noticed.into_iter().map(|n| self.fronts[n].id).collect();
        let fakes: Vec<_> = mine.iter().map(|n| Arc::clone(&self.fronts[*n].fake)).collect();
        let target = Arc::clone(&self.target);
        self.transport.at_unlisten(move || {
            noticed.into_iter().for_each(|id| target.closed(id));
            fakes.iter().for_each(|fake| fake.shut_down());
        });
        begun.finish(&*self.transport);
        mine.into_iter().for_each(|n| self.is_closed(n));
        // Requests that have completed so far completed before the reply.
        self.check();
        self.abandon(controller);
        self.controllers[controller].exists = false;
        self.controllers[controller].deleting = false;
    }

    fn remove_disk(&mut self) {
        let disk = self.rng.below(self.disks.len().max(1));
        let backend = self.disks.get(disk).and_then(|disk| disk.backend.clone());
        let Some(backend) = backend else { return };
        backend.remove_from(&self.target);
        self.disk_is_removed(disk);
    }

    /// Records that a disk was removed: its requests fail from now on.
    pub(crate) fn disk_is_removed(&mut self, disk: usize) {
        self.trace.add(format!("disk {disk}: removed"));
        self.count("disks removed");
        self.disks[disk].backend = None;
    }

    /// The operator moves a queue, or a move in progress ends.
    pub(crate) fn queues_move(&mut self) {
        if !self.moves.is_empty() && self.rng.one_in(2) {
            return self.end_moves();
        }
        let Some(controller) = self.existing() else { return };
        let name = self.controllers[controller].name.clone();
        let listed = self.target.controllers();
        let listed = listed.iter().find(|c| c.name == name).expect("the controller exists");
        // Closed connections of an earlier controller of that name are listed too, and do not move.
        let current: Vec<i32> = self
            .fronts
            .iter()
            .zip(0..)
            .filter(|(f, _)| f.controller == controller)
            .map(|(_, n)| n)
            .collect();
        let sessions = listed.sessions.iter().filter(|s| current.contains(&s.vid));
        let queues: Vec<_> = sessions.flat_map(|s| s.queues.iter().map(|q| (s.id, *q))).collect();
        let Some((session, queue)) = self.rng.pick(&queues) else { return };
        let core = Core(self.rng.below(self.reactors.len()));
        let result = self.target.begin_move(&name, Some(session), queue.ring, core);
        self.trace
            .add(format!("move {name}, session {session}: {queue:?} to {core:?}: {result:?}"));
        match result {
            Ok(None) => assert_eq!(queue.core, core),
            Ok(Some(moving)) => {
                self.count(if queue.inflight > 0 { "moved with I/O in flight" } else { "moved" });
                self.moves.push(moving);
            }
            Err(Error::Cpumask) => assert!(!listed.cores.contains(&core)),
            Err(Error::Moving(_)) => assert!(!self.moves.is_empty()),
            Err(e) => panic!("move {queue:?}: {e}"),
        }
    }

    /// Ends the moves of queues whose previous reactors have been quiescent.
    pub(crate) fn end_moves(&mut self) {
        let under_way = self.moves.len();
        if under_way == 0 {
            return;
        }
        let target = &self.target;
        self.moves.retain(|moving| {
            target.end_move(moving).map(|end| end.expect("room for wake sources")).is_none()
        });
        self.trace.add(format!("{} of {under_way} moves end", under_way - self.moves.len()));
    }

    fn set_coalescing(&mut self) {
        let Some(controller) = self.existing() else { return };
        let name = self.controllers[controller].name.clone();
        // Delays would depend on the clock. With this threshold there are none.
        let (delay, threshold) = [(1000, u32::MAX), (0, 60_000), (1, 99)][self.rng.below(3)];
        let result = self.target.set_coalescing(&name, delay, threshold);
        assert_eq!(result.is_err(), threshold < 100);
    }

    fn list(&mut self) {
        let mut expected: Vec<_> = self.controllers.iter().filter(|c| c.exists).collect();
        expected.sort_by(|a, b| a.name.cmp(&b.name));
        let listed = self.target.controllers();
        assert_eq!(listed.len(), expected.len());
        for (is, should) in listed.iter().zip(expected) {
            assert_eq!((&is.name, is.deleting), (&should.name, should.deleting));
            let there = self.disks[should.disk].backend.is_some();
            assert_eq!(has_backend(&is.device), there);
        }
        let (gone, _, _) = self.target.quarantine();
        let open = self.fronts.iter().filter(|f| !f.closed).count();
        assert_eq!(self.target.connections(), open + gone);
        assert_eq!(self.transport.listening(), listed.len());
        let queues: usize = self.target.reactors().iter().map(|r| r.queues).sum();
        let moving = !self.moves.is_empty();
        assert!(queues > 0 || gone == 0 || moving, "draining queues are attached");
    }
}
