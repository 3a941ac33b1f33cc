//! Reactors: threads that poll, each on its own core, or sleep while there is no work.
//!
//! Modules from the bottom up:
//!
//! * `clock`: the time-stamp counter. [`active_time`]: sleeps that do not count time in which the
//!   process was stopped. `event_fd`: eventfds;
//!   `shared_event_fd`: those that another process shares.
//! * `iteration`: the clock and the accounts of a reactor's poll iterations.
//! * `events`: the bounded event queue, from pollables to the control side.
//! * `waker`: ends a reactor's sleep.
//! * `pollable`: the trait of everything that a reactor polls ([`Pollable`]).
//! * `reclaim`: the thread that frees what reactors may still use.
//! * `poll_set`: the pollables of one reactor, and the choice of those that an iteration visits.
//! * `reactor`: the thread.
//!
//! This crate never depends on a ring or a device. A reactor never locks, allocates, frees, maps,
//! unmaps, logs or blocks. No thread waits for a reactor, except the reclaim thread.

pub mod active_time;

mod clock;
mod event_fd;
mod events;
mod iteration;
mod poll_set;
mod pollable;
mod reactor;
mod reclaim;
mod shared_event_fd;
mod waker;

pub use clock::{read_tsc, ticks_per_second};
pub use event_fd::{EventFd, add_one};
pub use events::Events;
pub use iteration::{Cause, Iteration, LongestIteration};
pub use pollable::{PollHint, Pollable, Wait};
pub use reactor::{Core, Mode, OnStart, Reactor, ReactorInfo, SteppedReactor};
pub use reclaim::{Garbage, Reclaim};
pub use shared_event_fd::SharedEventFd;
pub use waker::{WakeSource, Waker};
