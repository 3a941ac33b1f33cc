//! When may this be freed? Quiescent-state based reclamation (QSBR) for reactors.
//!
//! A *reader* runs in turns. While a turn lasts it may follow published pointers; between two
//! turns it says, with one load and one store, that it holds none: a *quiescent state*. A writer
//! swaps a pointer, takes a ticket, and may free the old value once every reader has been
//! quiescent since. Nobody waits in a lock, readers least of all: they neither know nor notice
//! that somebody waits for them.
//!
//! The modules in the order of use: [`domain`] holds the epoch and the readers, [`published`] the
//! pointer and its retired values, [`handshake`] how a reader that sleeps and whoever has work for
//! it do not miss each other. The atomic orderings, each with its reason, are in `ordering`;
//! `sync` swaps std for loom.
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
