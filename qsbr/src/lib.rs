//! Quiescent-state-based reclamation (QSBR) for reactors: when may a replaced value be freed?
//!
//! A *reader* runs in iterations. Within an iteration, it may load published pointers. Between two
//! iterations it announces, with one load and at most one store, that it holds none: a *quiescent
//! state*. A writer swaps a pointer and ends an epoch. It may free the old value after the *grace
//! period*, when every reader has been quiescent since. Neither side takes a lock, and a reader's
//! work does not depend on how many writers wait.
//!
//! The modules in the order of use: [`domain`] holds the epoch and the readers, [`published`] the
//! pointer and its retired values, [`handshake`] the wake-up protocol of a reader that sleeps. The
//! atomic orderings, each with its reason, are in `ordering`; `sync` replaces std's atomics by
//! loom's.
//!
//! ```
//! let domain = qsbr::Domain::new(1);
//! let mut reader = domain.reader().expect("one slot is free");
//! let list = qsbr::Published::new(&domain, Box::new(vec![1, 2, 3]));
//!
//! reader.online();
//! // SAFETY: the reader is online and belongs to the list's domain.
//! assert_eq!(unsafe { list.load(&reader) }.len(), 3);
//! let old = list.replace(Box::new(vec![]));
//! assert!(!old.ready(), "the reader has not been quiescent since");
//! reader.quiesce();
//! assert_eq!(old.try_into_inner().ok().map(|v| v.len()), Some(3));
//! ```

pub mod domain;
pub mod handshake;
mod ordering;
pub mod published;
mod sync;

pub use domain::{Domain, Epoch, Reader};
pub use published::{Published, Retired};
