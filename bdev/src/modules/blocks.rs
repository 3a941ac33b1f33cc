//! The parameters about blocks of the create methods of malloc and null bdevs.

use tracing::{error, warn};

use crate::contract::Bdev;
use crate::control::method::MethodError;
use crate::geometry::checked_size;
use crate::topology::Topology;

/// The parameters that both methods check.
pub(super) struct Blocks<'a> {
    pub(super) name: &'a str,
    pub(super) num_blocks: u64,
    pub(super) block_size: u32,
    pub(super) topology: Topology,
    /// This and `dif_type` would change the layout of the data. They are rejected unless they
    /// request the only supported layout.
    pub(super) md_size: Option<u32>,
    pub(super) dif_type: Option<i32>,
}

impl Blocks<'_> {
    /// Returns an error if no bdev can have these parameters.
    pub(super) fn check(&self, method: &str) -> Result<(), MethodError> {
        self.check_metadata(method)?;
        checked_size(self.name, self.num_blocks, self.block_size)
            .and_then(|_| self.topology.check(self.name))
            .map_err(|e| MethodError::of(method, &e))
    }

    fn check_metadata(&self, method: &str) -> Result<(), MethodError> {
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
