//! Reactors: threads that poll, each on a core of its own, or sleep when there is nothing to do.
//!
//! Modules from the bottom up:
//!
//! * `clock`: the time-stamp counter. [`active_time`]: sleeps that do not count time in which the
//!   process was stopped. `event_fd`: eventfds.
//! * `iteration`: the clock and the books of a reactor's poll iterations.
//! * `events`: what pollables tell the control side, through a bounded queue.
//! * `waker`: what ends a reactor's sleep.
//! * `pollable`: what a reactor polls ([`Pollable`]).
//! * `reclaim`: the thread that frees what reactors may still be using.
//! * `poll_set`: the pollables of one reactor, and which of them it visits in an iteration.
//! * `reactor`: the thread.
//!
//! This crate never depends on a ring or a device. A reactor never locks, allocates, frees, maps,
//! unmaps, logs or waits, and nobody waits for it but the reclaim thread.

pub mod active_time;

mod clock;
mod event_fd;
mod events;
mod iteration;
mod poll_set;
mod pollable;
mod reactor;
mod reclaim;
mod waker;

pub use clock::{read_tsc, ticks_per_second};
pub use event_fd::{EventFd, add_one};
pub use events::Events;
pub use iteration::{Cause, Iteration, LongestIteration};
pub use pollable::{PollHint, Pollable, Wait};
pub use reactor::{Core, Mode, OnStart, Reactor, ReactorInfo, SteppedReactor};
pub use reclaim::{Garbage, Reclaim};
pub use waker::{WakeSource, Waker};
