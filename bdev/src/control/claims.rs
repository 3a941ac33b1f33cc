//! Claims: the rights of users of a bdev.
//!
//! A claim is a guard. A user takes it before it builds on the bdev, and drops it when it is gone,
//! so that two users that exclude each other never use the bdev together.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::control::registry::BdevId;

/// The rights that a claim gives to its holder and leaves to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// The holder and others may read; nobody may write.
    ReadMany,
    /// The holder may write; nobody else may use the bdev.
    WriteExclusive,
    /// The same. SPDK's lvstores take this claim on their bases.
    WriteOne,
    /// All holders with the same owner may write; nobody else may use the bdev.
    Shared,
    /// A controller serves the bdev to guests. Any number of controllers may. This claim is not
    /// shown: SPDK's vhost takes no claim on a bdev that it opens.
    Served,
}

impl ClaimKind {
    /// SPDK's name, for `bdev_get_bdevs`. `None` if the claim is not shown.
    #[must_use]
    pub fn claim_type(self) -> Option<&'static str> {
        match self {
            Self::ReadMany => Some("read_many_write_none"),
            Self::WriteExclusive => Some("exclusive_write"),
            Self::WriteOne => Some("read_many_write_one"),
            Self::Shared => Some("read_many_write_shared"),
            Self::Served => None,
        }
    }
}

/// The existing claim that excludes a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Its kind.
    pub kind: ClaimKind,
    /// Its owner: a module's name, or a controller's.
    pub owner: String,
}

struct Held {
    id: u64,
    bdev: BdevId,
    by: Claimed,
}

/// All claims.
#[derive(Default)]
pub(crate) struct Claims {
    held: RefCell<Vec<Held>>,
    ids: Cell<u64>,
}

/// A claim on a bdev. Dropping it releases the claim.
///
/// It does not keep the bdev alive: when the bdev is deleted, the claim has no effect any more.
pub struct Claim {
    claims: Rc<Claims>,
    id: u64,
}

impl Claims {
    /// Takes a claim.
    pub(crate) fn take(
        self: &Rc<Self>,
        bdev: BdevId,
        kind: ClaimKind,
        owner: &str,
    ) -> Result<Claim, Claimed> {
        if let Some(other) = self.in_the_way(bdev, kind, owner) {
            return Err(other);
        }
        let id = self.ids.replace(self.ids.get() + 1);
        let by = Claimed { kind, owner: owner.to_owned() };
        self.held.borrow_mut().push(Held { id, bdev, by });
        Ok(Claim { claims: Rc::clone(self), id })
    }

    /// Returns the claim that excludes this one.
    pub(crate) fn in_the_way(&self, bdev: BdevId, kind: ClaimKind, owner: &str) -> Option<Claimed> {
        let agrees = |other: &Claimed| match (kind, other.kind) {
            (ClaimKind::ReadMany, ClaimKind::ReadMany) | (ClaimKind::Served, ClaimKind::Served) => {
                true
            }
            (ClaimKind::Shared, ClaimKind::Shared) => owner == other.owner,
            _ => false,
        };
        let held = self.held.borrow();
        let mut others = held.iter().filter(|held| held.bdev == bdev).map(|held| &held.by);
        others.find(|other| !agrees(other)).cloned()
    }

    /// Ends the claims on a bdev that was removed. A bdev that is created again may have its id.
    pub(crate) fn end_all(&self, bdev: BdevId) {
        self.held.borrow_mut().retain(|held| held.bdev != bdev);
    }

    /// Returns the claim type that `bdev_get_bdevs` shows.
    pub(crate) fn shown(&self, bdev: BdevId) -> Option<&'static str> {
        let held = self.held.borrow();
        held.iter().filter(|held| held.bdev == bdev).find_map(|held| held.by.kind.claim_type())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.held.borrow_mut().retain(|held| held.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BDEV: BdevId = BdevId::new(1);
    const KINDS: [ClaimKind; 5] = [
        ClaimKind::ReadMany,
        ClaimKind::WriteExclusive,
        ClaimKind::WriteOne,
        ClaimKind::Shared,
        ClaimKind::Served,
    ];

    #[test]
    fn readers_controllers_and_sharers_of_one_owner_are_compatible() {
        let claims = Rc::new(Claims::default());
        for one in KINDS {
            let _held = claims.take(BDEV, one, "a").ok().unwrap();
            for other in KINDS {
                for owner in ["a", "b"] {
                    let together = one == other
                        && match one {
                            ClaimKind::ReadMany | ClaimKind::Served => true,
                            ClaimKind::Shared => owner == "a",
                            ClaimKind::WriteExclusive | ClaimKind::WriteOne => false,
                        };
                    let taken = claims.take(BDEV, other, owner).map(drop);
                    let in_the_way = Claimed { kind: one, owner: "a".into() };
                    assert_eq!(taken, if together { Ok(()) } else { Err(in_the_way) });
                }
            }
            assert!(claims.take(BdevId::new(2), one, "a").is_ok(), "another bdev");
        }
        assert!(claims.held.borrow().is_empty());
    }

    #[test]
    fn spdks_names_are_shown_while_the_claim_is_held() {
        let claims = Rc::new(Claims::default());
        for kind in KINDS {
            let claim = claims.take(BDEV, kind, "a").ok().unwrap();
            assert_eq!(claims.shown(BDEV), kind.claim_type());
            drop(claim);
            assert_eq!(claims.shown(BDEV), None);
        }
    }
}
