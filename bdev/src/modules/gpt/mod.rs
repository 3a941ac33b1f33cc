//! The partitions of a disk with a GUID partition table: SPDK's `gpt`. The table is only read.

pub(crate) mod module;
mod read;
mod table;
