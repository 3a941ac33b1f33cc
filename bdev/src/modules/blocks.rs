//! The parameters about blocks of the create methods of malloc and null bdevs.

use tracing::{error, warn};

use crate::contract::Bdev;
use crate::control::method::MethodError;

/// Parameters that would change the layout of the data. They are known, and rejected unless they
/// request the only supported layout.
pub(super) struct Metadata {
    pub(super) md_size: Option<u32>,
    pub(super) dif_type: Option<i32>,
}

impl Metadata {
    /// Returns an error if metadata is requested.
    pub(super) fn check(&self, method: &str) -> Result<(), MethodError> {
        let unsupported =
            [("md_size", self.md_size.map(i64::from)), ("dif_type", self.dif_type.map(i64::from))];
        for (name, value) in unsupported {
            if let Some(value) = value.filter(|value| *value != 0) {
                error!("{method}: {name} {value} is not supported: only 0 is");
                return Err(MethodError::errno(libc::EINVAL));
            }
        }
        Ok(())
    }
}

/// Logs the topology values that guests do not get, as they conflict with the block sizes.
pub(super) fn tell_of_topology(method: &str, bdev: &dyn Bdev) {
    let (said, used) = (bdev.topology(), bdev.topology().settled(bdev.block_size()));
    for (what, said, used) in [
        ("physical block size", said.physical_block_size, used.physical_block_size),
        ("preferred write granularity", said.min_io_blocks, used.min_io_blocks),
        ("optimal I/O size", said.optimal_io_blocks, used.optimal_io_blocks),
    ] {
        if said != 0 && said != used {
            warn!("{method}: {}: {what} {said} is inconsistent: guests get {used}", bdev.name());
        }
    }
}
