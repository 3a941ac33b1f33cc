//! One test suite that every bdev passes: modules, engines, and wrappers around them.
//!
//! A crate with a bdev calls [`conformance!`] in an integration test, with an expression that makes
//! the bdev. The modules, in the order in which they build on one another:
//!
//! 1. [`fixture`]: the disk under test, and what the test that makes it must guarantee.
//! 2. `random`: random numbers from a seed, and data that differs from block to block.
//! 3. [`driver`]: drives one channel, and checks that it keeps the contract of
//!    [`Channel`](bdev::Channel).
//! 4. [`checks`]: one function for each property.
//! 5. [`model`]: random I/Os, compared with a model of the disk.
//! 6. `suite`: [`conformance!`], which makes a test of each check.
//!
//! What is particular to one bdev stays with that bdev: its tests use [`Driver`] and [`pattern`].
//!
//! ```
//! use bdev::{Malloc, MallocOptions};
//! use bdev_conformance::{Fixture, SIZE, conformance};
//!
//! fn malloc(block_size: u32) -> Fixture {
//!     let num_blocks = SIZE / u64::from(block_size);
//!     let options = MallocOptions { name: "Malloc0".into(), num_blocks, block_size, uuid: None };
//!     Fixture::of(Malloc::create(options).unwrap())
//! }
//!
//! conformance! {
//!     malloc_512 => malloc(512);
//!     malloc_4096 => malloc(4096);
//! }
//! # fn main() {}
//! ```
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks, and random numbers")]
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

pub mod fixture;
mod random;

pub mod driver;

pub mod checks;
pub mod model;
mod suite;

pub use driver::{Driver, Memory, Request};
pub use fixture::{Fixture, SIZE};
pub use random::pattern;
