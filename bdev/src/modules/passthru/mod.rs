//! A bdev that passes all I/O on to its base, unchanged. It is the example of a wrapper.
#![expect(unsafe_code, reason = "passes I/Os on under the contract's conditions")]

pub(crate) mod module;

use std::sync::Arc;

use uuid::{Uuid, uuid};

use crate::bdev_channel::BdevChannel;
use crate::contract::{Bdev, Channel};
use crate::error::Error;
use crate::io::{Io, Submit};
use crate::wrapper::{Wrapped, Wrapper, derived_uuid, forward_to_base};

/// SPDK's namespace for the UUIDs of passthru bdevs.
const NAMESPACE: Uuid = uuid!("7e25812e-c8c0-4d3f-8599-16d790555b85");

/// A bdev that passes all I/O on to its base.
pub struct Passthru(Wrapped);

impl Passthru {
    /// Wraps a bdev. Without a UUID, the UUID is derived from the base's.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is empty.
    pub fn create(
        name: String,
        base: Arc<dyn Bdev>,
        uuid: Option<Uuid>,
    ) -> Result<Arc<Self>, Error> {
        let uuid = uuid.unwrap_or_else(|| derived_uuid(NAMESPACE, &*base, &[]));
        Ok(Arc::new(Self(Wrapped::new(name, base, Some(uuid))?)))
    }
}

impl Wrapper for Passthru {
    fn wrapped(&self) -> &Wrapped {
        &self.0
    }

    fn product(&self) -> &'static str {
        "passthru"
    }

    fn open_channel(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(self.0.base(), depth)?;
        Ok(Box::new(PassthruChannel { base, _disk: self }))
    }
}

struct PassthruChannel {
    base: BdevChannel,
    /// Keeps the bdev in use while the channel is open.
    _disk: Arc<Passthru>,
}

impl Channel for PassthruChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        // SAFETY: the caller's promise covers the base, which completes no later than this channel.
        unsafe { self.base.submit(io) }
    }

    forward_to_base!(
        shortcut,
        wake_fds,
        set_wakes,
        set_limiting,
        wait,
        failure,
        kick,
        poll,
        abandon
    );
}
