//! Tests of the whole crate. One program, because linking and optimizing the crate for each file is slow.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod faults;
mod hostile;
mod images;
mod medium;
mod power_cut;
mod properties;
mod reader;
mod volumes;
