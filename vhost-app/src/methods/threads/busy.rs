//! How much of the reactors' time each controller has used.
//!
//! Time is counted for each reactor. Each time that an operator asks, the busy time of a reactor
//! since the last time is divided among its controllers by the number of requests that they have
//! completed since. So the times of the controllers never fall, and add up to at most those of the
//! reactors.

use std::collections::HashMap;

use vhost_target::{ControllerInfo, ReactorInfo};

/// The times of all controllers, in ticks.
#[derive(Debug, Default)]
pub(in super::super) struct BusyTimes {
    /// By controller number.
    busy: HashMap<u64, f64>,
    /// The requests of each session, by controller number and session id, at the last time.
    requests: HashMap<(u64, u32), u64>,
    /// The reactors' busy time at the last time, by core.
    reactors: HashMap<usize, u64>,
}

impl BusyTimes {
    /// Divides the time since the last call. Forgets controllers that are gone.
    pub(super) fn update(&mut self, reactors: &[ReactorInfo], controllers: &[ControllerInfo]) {
        let mut shares: HashMap<usize, Vec<(u64, f64)>> = HashMap::new();
        let mut requests = HashMap::new();
        for controller in controllers {
            for session in &controller.sessions {
                let key = (controller.number, session.id);
                let before = self.requests.get(&key).copied().unwrap_or(0);
                let done = session.requests.saturating_sub(before);
                requests.insert(key, session.requests);
                // The requests of one queue are not known, so all queues get an equal part.
                let part = to_f64(done) / to_f64(session.queues.len() as u64).max(1.0);
                for queue in &session.queues {
                    shares.entry(queue.core.0).or_default().push((controller.number, part));
                }
            }
        }
        self.requests = requests;
        self.busy.retain(|number, _| controllers.iter().any(|c| c.number == *number));
        for reactor in reactors {
            let before = self.reactors.insert(reactor.core.0, reactor.busy_ticks).unwrap_or(0);
            let ticks = to_f64(reactor.busy_ticks.saturating_sub(before));
            let shares = shares.get(&reactor.core.0).map_or(&[][..], Vec::as_slice);
            let all: f64 = shares.iter().map(|(_, part)| part).sum();
            for (number, part) in shares.iter().filter(|_| all > 0.0) {
                *self.busy.entry(*number).or_default() += ticks * part / all;
            }
        }
    }

    /// The busy time of a controller.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 2^53 ticks")]
    pub(super) fn of(&self, controller: u64) -> u64 {
        self.busy.get(&controller).copied().unwrap_or(0.0) as u64
    }
}

/// Exact up to 2^53 ticks, which are 26 days at 4 GHz; rounded above.
#[expect(clippy::cast_precision_loss, reason = "see above")]
fn to_f64(number: u64) -> f64 {
    number as f64
}
