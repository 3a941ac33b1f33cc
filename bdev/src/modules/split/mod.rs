//! Parts of a bdev that follow one another: SPDK's `split`.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

pub(crate) mod module;

use std::sync::Arc;

use guest_memory::usize_of;
use uuid::Uuid;

use crate::bdev_channel::BdevChannel;
use crate::contract::{Bdev, Channel};
use crate::error::Error;
use crate::failure::Failure;
use crate::geometry::within;
use crate::io::{Io, Op, Status, Submit, Tag};
use crate::shortcut::Shortcut;
use crate::wrapper::{PARTS, Wrapped, Wrapper, derived_uuid, forward_to_base};

/// A range of another bdev.
pub struct Part {
    wrapped: Wrapped,
    product: &'static str,
    offset_blocks: u64,
    num_blocks: u64,
}

impl Part {
    /// Creates a bdev of `num_blocks` blocks, which begins at block `offset_blocks` of the base.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name or the range is empty, or the range is not within the base.
    pub fn create(
        name: String,
        base: Arc<dyn Bdev>,
        offset_blocks: u64,
        num_blocks: u64,
    ) -> Result<Arc<Self>, Error> {
        let range = [offset_blocks.to_le_bytes(), num_blocks.to_le_bytes()].concat();
        let uuid = derived_uuid(PARTS, &*base, &range);
        Self::of_product("Split Disk", name, uuid, base, offset_blocks, num_blocks)
    }

    /// As [`Part::create`], for a module that has a product name and UUIDs of its own.
    pub(crate) fn of_product(
        product: &'static str,
        name: String,
        uuid: Uuid,
        base: Arc<dyn Bdev>,
        offset_blocks: u64,
        num_blocks: u64,
    ) -> Result<Arc<Self>, Error> {
        let end = offset_blocks.checked_add(num_blocks);
        if num_blocks == 0 || end.is_none_or(|end| end > base.num_blocks()) {
            let (blocks, base) = (base.num_blocks(), base.name());
            return Err(Error::Invalid(format!(
                "{name}: invalid range of {base}, which has {blocks} blocks: offset \
                 {offset_blocks}, length {num_blocks}"
            )));
        }
        let wrapped = Wrapped::new(name, base, Some(uuid))?;
        Ok(Arc::new(Self { wrapped, product, offset_blocks, num_blocks }))
    }
}

impl Wrapper for Part {
    fn wrapped(&self) -> &Wrapped {
        &self.wrapped
    }

    fn product(&self) -> &'static str {
        self.product
    }

    fn size_blocks(&self) -> u64 {
        self.num_blocks
    }

    fn offset_bytes(&self) -> u64 {
        // No overflow: `create` has compared it with the size of the base.
        self.offset_blocks * u64::from(self.block_size())
    }

    fn open_channel(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(self.wrapped.base(), depth)?;
        let offset = self.offset_bytes();
        Ok(Box::new(PartChannel { base, offset, size: self.size_bytes(), _part: self }))
    }
}

struct PartChannel {
    base: BdevChannel,
    /// The offset of its first byte on the base.
    offset: u64,
    /// The size in bytes.
    size: u64,
    /// Keeps the bdev in use while the channel is open.
    _part: Arc<Part>,
}

impl Channel for PartChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        // A flush has no range, and applies to the whole base.
        let offset = if io.op == Op::Flush { 0 } else { self.offset };
        if !within(&io, self.size) {
            return Submit::Done(Status::IoError);
        }
        let mut on_base = io;
        on_base.offset += offset;
        // SAFETY: the caller's promise covers the base, which completes no later than this channel.
        match unsafe { self.base.submit(on_base) } {
            Submit::Full(_) => Submit::Full(io),
            Submit::Throttled(_) => Submit::Throttled(io),
            submit => submit,
        }
    }

    fn shortcut(&self) -> Shortcut {
        match self.base.shortcut() {
            Shortcut::Memory { base, size, stores } => {
                let rest = size.saturating_sub(self.offset);
                let base = base.wrapping_add(usize_of(self.offset));
                Shortcut::Memory { base, size: self.size.min(rest), stores }
            }
            other => other,
        }
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        let failure = self.base.failure(tag)?;
        let offset = failure.offset.map(|offset| offset.saturating_sub(self.offset));
        Some(Failure { offset, ..failure })
    }

    forward_to_base!(wake_fds, set_wakes, set_limiting, wait, kick, poll, abandon);
}

#[cfg(test)]
mod tests;
