//! The kinds of block devices, one folder each.

pub(crate) mod delay;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod malloc;
pub(crate) mod null;
