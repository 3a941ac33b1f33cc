//! The contract between a kind of bdev and the program: [`BdevModule`], and what it gives for each
//! bdev.
//!
//! A create method makes a bdev and hands the registry an [`Entry`] for it. A wrapper whose base
//! may come later hands over a [`Waiting`] instead; the registry calls it when the base is there.

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
/// Lives on the control thread. The implementer owes: a method that can take time does it with
/// `blocking` of `dyn Host` or on threads of its own; claims on bases are taken before
/// anything is made.
pub trait BdevModule {
    /// SPDK's name for it. No two modules share one.
    fn name(&self) -> &'static str;

    /// Its RPC methods.
    fn methods(self: Rc<Self>) -> Vec<Method>;

    /// Looks at a new bdev that nobody has claimed exclusively, for a module that finds its
    /// configuration on the bdev itself (a partition table, a superblock).
    fn examine<'a>(
        &'a self,
        _host: &'a Rc<dyn Host>,
        _bdev: &'a Arc<dyn Bdev>,
    ) -> LocalFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// One live bdev, as its module knows it. It owns the claims on the bdev's bases.
pub trait Entry: Any {
    /// The module's name.
    fn module(&self) -> &'static str;

    /// The bdev. [`Bdev::bases`] tells its bases.
    fn bdev(&self) -> Arc<dyn Bdev>;

    /// What `bdev_get_bdevs` shows beyond what the bdev itself says.
    fn describe(&self) -> Description;

    /// The calls that make it again; none if another entry's calls, or examine, do.
    fn config(&self) -> Vec<Call>;

    /// It is about to be deleted by name: whatever could keep I/O outstanding for ever ends.
    fn deleting(&self) {}

    /// One of its bases is gone, and so is the bdev. What waits for the base to come back, if
    /// anything does.
    fn base_gone(&self) -> Option<Rc<dyn Waiting>> {
        None
    }

    /// One of its bases has another size. Whether the bdev has another size too.
    fn base_resized(&self) -> bool {
        true
    }

    /// Called about once a second, for what has to be looked at from time to time.
    fn each_second(&self) {}
}

/// What `bdev_get_bdevs` shows of a bdev, in addition to what [`Bdev`] tells.
#[derive(Debug, Default)]
pub struct Description {
    /// What the operator said about the I/Os that suit it, by SPDK's names
    /// (`preferred_write_alignment`, …). Other names are ignored, and absent ones shown as 0.
    pub hints: Map<String, Value>,
    /// Fields of this module beside the common ones.
    pub fields: Map<String, Value>,
    /// The object `driver_specific`.
    pub driver_specific: Map<String, Value>,
}

impl Description {
    /// With this object under `driver_specific`, and nothing else.
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
    /// Keeps others from it.
    pub claim: Claim,
}

/// What was configured and waits for its base.
pub trait Waiting: Any {
    /// The module's name.
    fn module(&self) -> &'static str;

    /// The name that the bdev will have; nobody else can take it meanwhile. `None` if there may be
    /// several bdevs.
    fn name(&self) -> Option<&str> {
        None
    }

    /// The UUID that it will have, if that is known.
    fn uuid(&self) -> Option<Uuid> {
        None
    }

    /// The name or UUID of the base.
    fn base(&self) -> &str;

    /// What has to be claimed on the base.
    fn claims(&self) -> ClaimKind {
        ClaimKind::WriteExclusive
    }

    /// The calls that configure it again.
    fn config(&self) -> Vec<Call>;

    /// Makes the bdevs on the base: at least one.
    ///
    /// # Errors
    /// As the module's create method. It goes on waiting then, for another base of this name.
    fn wake<'a>(
        self: Rc<Self>,
        host: &'a Rc<dyn Host>,
        base: Base,
    ) -> LocalFuture<'a, Result<Vec<Rc<dyn Entry>>, Error>>;
}
