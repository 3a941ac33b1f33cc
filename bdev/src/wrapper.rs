//! The common parts of bdevs that have one base bdev.

use std::sync::Arc;

use uuid::{Uuid, uuid};

use crate::contract::{Bdev, Channel, Extent, Features};
use crate::error::Error;
use crate::geometry::check_name;
use crate::qos::Qos;
use crate::stats::Stats;
use crate::topology::Topology;

/// The methods of [`Channel`] that a wrapper's channel forwards to its field `base`.
macro_rules! forward_to_base {
    (@ shortcut) => {
        fn shortcut(&self) -> $crate::Shortcut {
            self.base.shortcut()
        }
    };
    (@ wake_fds) => {
        fn wake_fds(&self) -> $crate::WakeFds<'_> {
            self.base.wake_fds()
        }
    };
    (@ set_wakes) => {
        fn set_wakes(&mut self, wakes: bool) {
            self.base.set_wakes(wakes);
        }
    };
    (@ set_limiting) => {
        fn set_limiting(&mut self, limiting: $crate::Limiting) {
            self.base.set_limiting(limiting);
        }
    };
    (@ wait) => {
        fn wait(&self) -> $crate::Wait {
            self.base.wait()
        }
    };
    (@ failure) => {
        fn failure(&mut self, tag: $crate::Tag) -> Option<$crate::Failure> {
            self.base.failure(tag)
        }
    };
    (@ kick) => {
        #[inline]
        fn kick(&mut self) {
            self.base.kick();
        }
    };
    (@ poll) => {
        #[inline]
        fn poll(&mut self, done: &mut [$crate::Completion]) -> usize {
            self.base.poll(done)
        }
    };
    (@ abandon) => {
        fn abandon(&mut self) {
            self.base.abandon();
        }
    };
    ($($method:ident),*) => {
        $(forward_to_base!(@ $method);)*
    };
}
pub(crate) use forward_to_base;

/// The common parts of a wrapper.
pub struct Wrapped {
    name: String,
    uuid: Uuid,
    base: Arc<dyn Bdev>,
    stats: Stats,
    qos: Qos,
}

impl Wrapped {
    /// Makes a wrapper's common parts. Without a UUID, the UUID is random.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is empty.
    pub fn new(name: String, base: Arc<dyn Bdev>, uuid: Option<Uuid>) -> Result<Self, Error> {
        check_name(&name)?;
        let uuid = uuid.unwrap_or_else(Uuid::new_v4);
        Ok(Self { name, uuid, base, stats: Stats::default(), qos: Qos::default() })
    }

    /// The bdev's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The base bdev.
    #[must_use]
    pub fn base(&self) -> &Arc<dyn Bdev> {
        &self.base
    }
}

/// SPDK's namespace for the UUIDs of the parts of a split bdev.
pub(crate) const PARTS: Uuid = uuid!("976b899e-3e1e-4d71-ab69-c2b08e9df8b8");

/// Returns the UUID that SPDK gives a wrapper when the operator gives none: version 5 (SHA-1) of
/// the module's namespace and the base's UUID, followed by `more`, which distinguishes the wrappers
/// on one base.
#[must_use]
pub fn derived_uuid(namespace: Uuid, base: &dyn Bdev, more: &[u8]) -> Uuid {
    Uuid::new_v5(&namespace, &[base.uuid().as_bytes(), more].concat())
}

/// A bdev on one base bdev, which has the base's properties unless it overrides them. Every
/// `Wrapper` is a [`Bdev`].
pub trait Wrapper: Send + Sync + 'static {
    /// The common parts.
    fn wrapped(&self) -> &Wrapped;
    /// As [`Bdev::product_name`].
    fn product(&self) -> &'static str;
    /// As [`Bdev::num_blocks`].
    fn size_blocks(&self) -> u64 {
        self.wrapped().base.num_blocks()
    }
    /// As [`Bdev::base_offset`].
    fn offset_bytes(&self) -> u64 {
        0
    }
    /// As [`Bdev::open`].
    ///
    /// # Errors
    /// As [`Bdev::open`].
    fn open_channel(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error>;
}

impl<W: Wrapper> Bdev for W {
    fn name(&self) -> &str {
        &self.wrapped().name
    }

    fn product_name(&self) -> &'static str {
        self.product()
    }

    fn uuid(&self) -> Uuid {
        self.wrapped().uuid
    }

    fn block_size(&self) -> u32 {
        self.wrapped().base.block_size()
    }

    fn num_blocks(&self) -> u64 {
        self.size_blocks()
    }

    fn features(&self) -> Features {
        self.wrapped().base.features()
    }

    fn topology(&self) -> Topology {
        self.wrapped().base.topology()
    }

    fn bases(&self) -> Vec<Arc<dyn Bdev>> {
        vec![Arc::clone(&self.wrapped().base)]
    }

    fn base_offset(&self) -> Option<u64> {
        Some(self.offset_bytes())
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        self.wrapped().base.extent(offset.saturating_add(self.offset_bytes()), len)
    }

    fn stats(&self) -> &Stats {
        &self.wrapped().stats
    }

    fn qos(&self) -> &Qos {
        &self.wrapped().qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        self.open_channel(depth)
    }
}
