//! Events of one thread while another thread opens a device.

use std::sync::{Arc, Mutex};

use vhost_target::Verdict;

use super::disk::lock;
use super::message::Message;
use super::vm::RINGS;
use super::world::World;

/// An event on another thread while a device is being opened.
pub(crate) struct Planned {
    what: What,
    verdict: Arc<Mutex<Option<Verdict>>>,
}

enum What {
    Message(usize, Message),
    Close(usize),
    RemoveDisk(usize),
}

impl World {
    /// Plans an event of the event thread during the next action of the control thread.
    pub(crate) fn plan_for_control_thread(&mut self) -> Option<Planned> {
        if !self.rng.one_in(2) {
            return None;
        }
        let open: Vec<usize> = (0..self.fronts.len()).filter(|n| !self.fronts[*n].closed).collect();
        let n = self.rng.pick(&open)?;
        let front = &self.fronts[n];
        if front.fake.is_shut() {
            return Some(self.plan(What::Close(n)));
        }
        if front.pending.is_some() || front.gone || !front.script.is_empty() {
            return None;
        }
        let ring = self.rng.below(RINGS);
        let message = match self.rng.below(6) {
            0 => Message::Call(ring, self.call()),
            1 => self.new_memory(n).into_iter().next()?,
            2 => self.reset(),
            3 => self.switch_logging(n).into_iter().next()?,
            4 => Message::WriteCache(self.rng.one_in(2)),
            _ if self.may_stop(n, ring) => Message::GetBase(ring),
            _ => return None,
        };
        if matches!(message, Message::Table(_, false)) || self.comes_too_early(n, &message) {
            return None;
        }
        Some(self.plan(What::Message(n, message)))
    }

    /// Plans an event of the control thread during the next action of the event thread.
    pub(crate) fn plan_for_event_thread(&mut self) -> Option<Planned> {
        if !self.rng.one_in(16) {
            return None;
        }
        let there = |n: &usize| self.disks[*n].backend.is_some();
        let disks: Vec<usize> = (0..self.disks.len()).filter(there).collect();
        let disk = self.rng.pick(&disks)?;
        Some(self.plan(What::RemoveDisk(disk)))
    }

    fn plan(&mut self, what: What) -> Planned {
        let verdict = Arc::new(Mutex::new(None));
        let target = Arc::clone(&self.target);
        let act: Box<dyn FnOnce() + Send> = match &what {
            What::Message(n, message) => {
                let (id, (request, payload, fds)) = (self.fronts[*n].id, message.encode());
                let (verdict, need_reply) = (Arc::clone(&verdict), message.needs_reply());
                Box::new(move || {
                    let answer = target.message(id, request, need_reply, &payload, fds);
                    *lock(&verdict) = Some(answer);
                })
            }
            What::Close(n) => {
                let id = self.fronts[*n].id;
                Box::new(move || target.closed(id))
            }
            What::RemoveDisk(disk) => {
                let backend = self.disks[*disk].backend.clone().expect("the disk exists");
                Box::new(move || backend.remove_from(&target))
            }
        };
        *lock(&self.meanwhile) = Some(act);
        Planned { what, verdict }
    }

    /// Records what a plan has done, if it was carried out.
    pub(crate) fn finish_plan(&mut self, planned: Option<Planned>) {
        let Some(Planned { what, verdict }) = planned else { return };
        if lock(&self.meanwhile).take().is_some() {
            return;
        }
        self.trace.add("  meanwhile:".into());
        self.count("something happened while a device was opened");
        match what {
            What::Message(n, message) => {
                let verdict = lock(&verdict).take().expect("the message was sent");
                self.after_message(n, message, verdict);
            }
            What::Close(n) => {
                self.trace.add(format!("front {n}: closed"));
                self.is_closed(n);
            }
            What::RemoveDisk(disk) => self.disk_is_removed(disk),
        }
    }
}
