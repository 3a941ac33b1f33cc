//! How much of the reactors' time each controller has used.
//!
//! Time is counted for each reactor. Each time that an operator asks, the busy time of a reactor
//! since the last time is divided among its controllers by the number of requests that they have
//! completed since. So the times of the controllers never fall, and add up to at most those of the
//! reactors.

use std::collections::HashMap;

use vhost_target::{ControllerInfo, ReactorInfo};

/// The weight of a request, which is divided among the queues of its session.
const REQUEST: u64 = 1 << 16;

/// The times of all controllers, in ticks.
#[derive(Debug, Default)]
pub(in super::super) struct BusyTimes {
    /// By controller number.
    busy: HashMap<u64, u64>,
    /// The requests of each session, by controller number and session id, at the last time.
    requests: HashMap<(u64, u32), u64>,
    /// The reactors' busy time at the last time, by core.
    reactors: HashMap<usize, u64>,
}

impl BusyTimes {
    /// Divides the time since the last call. Forgets controllers that are gone.
    pub(super) fn update(&mut self, reactors: &[ReactorInfo], controllers: &[ControllerInfo]) {
        let mut shares: HashMap<usize, Vec<(u64, u64)>> = HashMap::new();
        let mut requests = HashMap::new();
        for controller in controllers {
            for session in &controller.sessions {
                let key = (controller.number, session.id);
                let before = self.requests.get(&key).copied().unwrap_or(0);
                let done = session.requests.saturating_sub(before);
                requests.insert(key, session.requests);
                // The requests of one queue are not known, so all queues get an equal part.
                let queues = session.queues.len().max(1) as u64;
                let part = done.saturating_mul(REQUEST) / queues;
                for queue in &session.queues {
                    shares.entry(queue.core.0).or_default().push((controller.number, part));
                }
            }
        }
        self.requests = requests;
        self.busy.retain(|number, _| controllers.iter().any(|c| c.number == *number));
        for reactor in reactors {
            let before = self.reactors.insert(reactor.core.0, reactor.busy_ticks).unwrap_or(0);
            let ticks = u128::from(reactor.busy_ticks.saturating_sub(before));
            let shares = shares.get(&reactor.core.0).map_or(&[][..], Vec::as_slice);
            let all: u128 = shares.iter().map(|(_, part)| u128::from(*part)).sum();
            for (number, part) in shares {
                let share = (ticks * u128::from(*part)).checked_div(all).unwrap_or(0);
                // It fits, as `part` is at most `all`.
                *self.busy.entry(*number).or_default() += u64::try_from(share).unwrap_or(0);
            }
        }
    }

    /// The busy time of a controller.
    pub(super) fn of(&self, controller: u64) -> u64 {
        self.busy.get(&controller).copied().unwrap_or(0)
    }
}
