//! The contract between a kind of bdev and the program: [`BdevModule`], and the objects that it
//! returns for each bdev.
//!
//! A create method makes a bdev and gives the registry an [`Entry`] for it. If a wrapper's base may
//! appear later, the method gives a [`Waiting`] instead. The registry calls it when the base
//! exists.

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::contract::Bdev;
use crate::control::claims::{Claim, ClaimKind};
use crate::control::host::Host;
use crate::control::method::{Call, LocalFuture, Method};
use crate::error::Error;

/// A kind of bdev.
///
/// It is used on the control thread. Obligations of the implementer: a method that can take time
/// uses `blocking` of `dyn Host` or threads of its own; claims on bases are taken before a bdev is
/// made.
pub trait BdevModule {
    /// SPDK's name for the module. It is unique.
    fn name(&self) -> &'static str;

    /// Its RPC methods.
    fn methods(self: Rc<Self>) -> Vec<Method>;

    /// The calls that restore what the module keeps besides its bdevs. `save_config` writes them
    /// before the calls that create bdevs.
    fn config(&self) -> Vec<Call> {
        vec![]
    }

    /// Examines a new bdev that is not claimed exclusively, for a module that stores its
    /// configuration on the bdev itself (a partition table, a superblock).
    fn examine<'a>(
        &'a self,
        _host: &'a Rc<dyn Host>,
        _bdev: &'a Arc<dyn Bdev>,
    ) -> LocalFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Called when a bdev has been removed, with the bdevs on it, and before their users have let
    /// go of it. A module that uses it otherwise than as the base of a bdev lets go of it, too.
    fn removed(&self, _host: &Rc<dyn Host>, _bdev: &Arc<dyn Bdev>) {}

    /// As [`Entry::release`], for what the module keeps besides its bdevs.
    fn release(&self, _host: &Rc<dyn Host>) -> Option<LocalFuture<'static, ()>> {
        None
    }
}

/// One live bdev, as seen by its module. It owns the claims on the bdev's bases.
pub trait Entry: Any {
    /// The module's name.
    fn module(&self) -> &'static str;

    /// The bdev. [`Bdev::bases`] returns its bases.
    fn bdev(&self) -> Arc<dyn Bdev>;

    /// The fields that `bdev_get_bdevs` shows in addition to the bdev's own properties.
    fn describe(&self) -> Description;

    /// The calls that create it again. Empty if another entry's calls, or examine, create it.
    fn config(&self) -> Vec<Call>;

    /// Called before it is deleted, by name or with its base: ends everything that could keep I/O
    /// outstanding for ever.
    fn deleting(&self) {}

    /// Called when one of its bases is about to be removed. Returns whether the bdev goes on without
    /// the base: it has let go of it, or will soon. If not, the bdev is removed with the base.
    fn base_leaving(&self, _base: &Arc<dyn Bdev>) -> bool {
        false
    }

    /// Called when one of its bases is gone, and so the bdev. Returns the request that waits for
    /// the base to return, if the module has one.
    fn base_gone(&self) -> Option<Rc<dyn Waiting>> {
        None
    }

    /// Called when the size of one of its bases has changed. Returns whether the bdev's size has
    /// changed.
    fn base_resized(&self) -> bool {
        true
    }

    /// Called about once a second, for periodic checks.
    fn each_second(&self) {}

    /// Called at the end of the process, when the reactors have stopped. Starts to release what
    /// other hosts may wait for, such as a lock, and returns a future that ends when it is
    /// released. The process waits for the future for a bounded time.
    fn release(&self) -> Option<LocalFuture<'static, ()>> {
        None
    }
}

/// The fields that `bdev_get_bdevs` shows in addition to the properties of [`Bdev`].
#[derive(Debug, Default)]
pub struct Description {
    /// The operator's preferred I/O sizes, by SPDK's names (`preferred_write_alignment`, …). Other
    /// names are ignored, and absent ones are shown as 0.
    pub hints: Map<String, Value>,
    /// Fields of this module, besides the common ones.
    pub fields: Map<String, Value>,
    /// The object `driver_specific`.
    pub driver_specific: Map<String, Value>,
}

impl Description {
    /// Makes a description with only this object, under `driver_specific`.
    #[must_use]
    pub fn specific(name: &str, about: Value) -> Self {
        let driver_specific = Map::from_iter([(name.to_owned(), about)]);
        Self { driver_specific, ..Self::default() }
    }
}

/// A base with the claim on it.
pub struct Base {
    /// The bdev.
    pub bdev: Arc<dyn Bdev>,
    /// Excludes other users.
    pub claim: Claim,
}

/// A configured bdev that waits for its base.
pub trait Waiting: Any {
    /// The module's name.
    fn module(&self) -> &'static str;

    /// The name that the bdev will have. It is reserved meanwhile. `None` if there may be several
    /// bdevs.
    fn name(&self) -> Option<&str> {
        None
    }

    /// The UUID that it will have, if known.
    fn uuid(&self) -> Option<Uuid> {
        None
    }

    /// The name or UUID of the base.
    fn base(&self) -> &str;

    /// The claim to take on the base.
    fn claims(&self) -> ClaimKind {
        ClaimKind::WriteExclusive
    }

    /// The calls that configure it again.
    fn config(&self) -> Vec<Call>;

    /// Creates the bdevs on the base: at least one.
    ///
    /// # Errors
    /// As the module's create method. The request then continues to wait for another base of this
    /// name.
    fn wake<'a>(
        self: Rc<Self>,
        host: &'a Rc<dyn Host>,
        base: Base,
    ) -> LocalFuture<'a, Result<Vec<Rc<dyn Entry>>, Error>>;
}
