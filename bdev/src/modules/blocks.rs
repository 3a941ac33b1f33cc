//! What the create methods of malloc and null bdevs say about blocks.

use tracing::{error, warn};

use crate::contract::Bdev;
use crate::control::method::MethodError;

/// Parameters that would change how data is laid out. They are known, and refused unless they ask
/// for what is so anyway.
pub(super) struct Metadata {
    pub(super) md_size: Option<u32>,
    pub(super) dif_type: Option<i32>,
}

impl Metadata {
    /// Fails if there is any.
    pub(super) fn check(&self, method: &str) -> Result<(), MethodError> {
        let unsupported =
            [("md_size", self.md_size.map(i64::from)), ("dif_type", self.dif_type.map(i64::from))];
        for (name, value) in unsupported {
            if let Some(value) = value.filter(|value| *value != 0) {
                error!("{method}: {name} {value} is not supported, only 0 is");
                return Err(MethodError::errno(libc::EINVAL));
            }
        }
        Ok(())
    }
}

/// Logs what guests will not be told, as it does not go with the block sizes.
pub(super) fn tell_of_topology(method: &str, bdev: &dyn Bdev) {
    let (said, used) = (bdev.topology(), bdev.topology().settled(bdev.block_size()));
    for (what, said, used) in [
        ("physical block size", said.physical_block_size, used.physical_block_size),
        ("preferred write granularity", said.min_io_blocks, used.min_io_blocks),
        ("optimal I/O size", said.optimal_io_blocks, used.optimal_io_blocks),
    ] {
        if said != 0 && said != used {
            warn!("{method}: {}: guests are told {what} {used}, not {said}", bdev.name());
        }
    }
}
