//! An array that is online, for the registry.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use bdev::method::Call;
use bdev::module::{Description, Entry};
use bdev::{Aside, Bdev, Claim, Error, Host, life};
use serde_json::Value;
use tracing::{error, warn};

use super::assembly::{Assembly, AssemblySlot, Held, Phase, Wanted};
use super::create::Given;
use super::{CREATE, LIMIT, NAME, Shared, show};
use crate::array::{Array, Slot, SlotState, State, bit};
use crate::disk::RaidDisk;
use crate::superblock::{MemberState, Superblock};

/// The interval at which the control thread looks whether an array has let go of its members, or
/// has started.
pub(super) const POLL: Duration = Duration::from_millis(20);

pub(super) struct RaidEntry {
    pub(super) disk: Arc<RaidDisk>,
    shared: Weak<Shared>,
    host: Weak<dyn Host>,
    /// The create call. `None`: it was found by its superblocks.
    given: Option<Given>,
    /// By slot.
    claims: RefCell<Vec<Option<Claim>>>,
    /// Slots for which a bdev is on its way, each with a token that is dropped at the end.
    reserved: RefCell<Vec<(usize, std::sync::Weak<()>)>>,
}

impl RaidEntry {
    pub(super) fn new(
        shared: &Rc<Shared>,
        host: &Rc<dyn Host>,
        disk: Arc<RaidDisk>,
        given: Option<Given>,
        bases: Vec<AssemblySlot>,
    ) -> Rc<Self> {
        let claims = bases.into_iter().map(|slot| slot.base.map(|held| held.claim)).collect();
        Rc::new(Self {
            disk,
            shared: Rc::downgrade(shared),
            host: Rc::downgrade(host),
            given,
            claims: RefCell::new(claims),
            reserved: RefCell::default(),
        })
    }

    /// Takes the claims on all members.
    pub(super) fn take_claims(&self) -> Vec<Option<Claim>> {
        std::mem::take(&mut *self.claims.borrow_mut())
    }

    /// A member is removed without which the array does not work.
    pub(super) fn set_lost(&self, slot: usize) {
        let claim = self.claims.borrow_mut().get_mut(slot).and_then(Option::take);
        drop(claim);
    }

    fn array(&self) -> &Arc<Array> {
        &self.disk.array
    }

    /// The slot of a member.
    pub(super) fn slot_of(&self, is_it: impl Fn(&Arc<dyn Bdev>) -> bool) -> Option<usize> {
        self.array().state().slots.iter().position(|slot| slot.bdev.as_ref().is_some_and(&is_it))
    }

    /// Decides that the array goes on without a member. Returns false if it cannot.
    ///
    /// It takes the member out of `live` at once: two members that leave one after the other must
    /// not both count on the other.
    pub(super) fn can_lose(&self, slot: usize) -> bool {
        let state = self.array().state().slots.get(slot).map(|slot| slot.state);
        self.array().layout.level.is_redundant()
            && match state {
                Some(SlotState::InSync) => self.array().remove_live(bit(slot)),
                Some(SlotState::Writing | SlotState::Absent) => true,
                None => false,
            }
    }

    /// Waits until the array has let go of a member, and releases the claim on it.
    ///
    /// # Errors
    /// ETIMEDOUT if its I/O does not end.
    pub(super) async fn wait_for_removal(
        &self,
        host: &Rc<dyn Host>,
        result: Receiver<Result<(), Error>>,
    ) -> Result<(), Error> {
        let name = self.disk.name().to_owned();
        let work = move || match result.recv_timeout(LIMIT) {
            Ok(removed) => removed,
            // The array was deleted, and its thread has ended.
            Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                let text = format!("{name}: I/O of the removed member has not ended");
                Err(Error::of_errno(text, libc::ETIMEDOUT))
            }
        };
        let removed = Aside::new(self.disk.name(), 1).run(host, 2 * LIMIT, work).await;
        self.release_claims();
        // The channels were closed by another thread.
        host.released();
        removed
    }

    /// Keeps a free slot and the claim on its new member until the result is dropped.
    pub(super) fn reserve(&self, slot: usize, claim: Claim) -> Arc<()> {
        let token = Arc::new(());
        self.reserved.borrow_mut().push((slot, Arc::downgrade(&token)));
        let before = self.claims.borrow_mut().get_mut(slot).and_then(|s| s.replace(claim));
        drop(before);
        token
    }

    /// Whether a bdev is on its way to this slot.
    pub(super) fn is_reserved(&self, slot: usize) -> bool {
        let mut reserved = self.reserved.borrow_mut();
        reserved.retain(|(_, token)| token.strong_count() > 0);
        reserved.iter().any(|(other, _)| *other == slot)
    }

    /// Releases the claims on bdevs that are members no more. Returns whether there was one.
    pub(super) fn release_claims(&self) -> bool {
        // First: a member that arrives meanwhile keeps its claim.
        let reserved: Vec<bool> =
            (0..self.array().layout.members()).map(|slot| self.is_reserved(slot)).collect();
        let there: Vec<bool> = {
            let state = self.array().state();
            state.slots.iter().map(|slot| slot.bdev.is_some()).collect()
        };
        let mut released = vec![];
        let kept = reserved.into_iter().zip(there).map(|(reserved, there)| reserved || there);
        for (claim, kept) in self.claims.borrow_mut().iter_mut().zip(kept) {
            released.extend(claim.take_if(|_| !kept));
        }
        !released.is_empty()
    }

    /// The call with the members whose data is right.
    fn present(&self, given: &Given, state: &State) -> Given {
        let (layout, live) = (&self.array().layout, self.array().live.load(Ordering::Acquire));
        let redundant = layout.level.is_redundant();
        // A member that is about to be removed is not in `live` any more.
        let right = |(n, slot): (usize, &Slot)| {
            let right = slot.state == SlotState::InSync && (!redundant || live & bit(n) != 0);
            slot.bdev.clone().filter(|_| right)
        };
        let members: Vec<_> = state.slots.iter().enumerate().map(right).collect();
        let used = layout.extents.first().filter(|_| redundant).map(|extent| extent.len);
        Given { used, ..given.with_members(&members) }
    }

    /// The array as it waits for its members to return.
    fn lost(&self) -> Option<Lost> {
        let state = self.array().state();
        let found = self.array().superblock.then(|| self.array().superblock(&state, 0));
        let live = |slot: usize| {
            let place = &state.slots[slot];
            place.bdev.clone().filter(|_| place.state == SlotState::InSync)
        };
        let members: Vec<_> = (0..state.slots.len()).map(live).collect();
        let given = self.given.as_ref().map(|given| self.present(given, &state));
        (found.is_some() || given.is_some()).then(|| Lost {
            name: self.disk.name().to_owned(),
            uuid: self.disk.uuid(),
            found,
            given,
            members: members.iter().map(|bdev| bdev.as_ref().map(Arc::downgrade)).collect(),
            claims: self.take_claims(),
        })
    }
}

impl Entry for RaidEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let mut about = show::online(self);
        about.remove("name");
        Description::specific(NAME, Value::Object(about))
    }

    /// The call with the members whose data is right. Examine finds an array with superblocks.
    fn config(&self) -> Vec<Call> {
        if self.array().superblock {
            return vec![];
        }
        let Some(given) = &self.given else { return vec![] };
        let params = self.present(given, &self.array().state()).params;
        vec![Call { method: CREATE, params }]
    }

    fn base_leaving(&self, base: &Arc<dyn Bdev>) -> bool {
        let Some(slot) = self.slot_of(|bdev| Arc::ptr_eq(bdev, base)) else { return false };
        let Some(host) = self.host.upgrade() else { return false };
        if !self.can_lose(slot) {
            return false;
        }
        let result = self.disk.remove_member(slot);
        let array = Arc::downgrade(self.array());
        let base = Arc::downgrade(base);
        let task = async move {
            // The channels are closed by another thread, which tells nobody.
            while result.try_recv().is_err() && array.strong_count() > 0 && base.strong_count() > 0
            {
                host.sleep(POLL).await;
            }
            host.released();
        };
        if let Some(host) = self.host.upgrade() {
            host.spawn(Box::pin(task));
        }
        true
    }

    fn deleting(&self) {
        let Some(host) = self.host.upgrade() else { return };
        let array = Arc::downgrade(self.array());
        let of_task = Rc::clone(&host);
        host.spawn(Box::pin(async move {
            // The thread of the array may be the last to hold members, and tells nobody.
            while array.strong_count() > 0 {
                of_task.sleep(POLL).await;
            }
            of_task.released();
        }));
    }

    /// It waits for its members to return.
    fn base_gone(&self) -> Option<Rc<dyn bdev::module::Waiting>> {
        let (host, shared) = (self.host.upgrade()?, self.shared.upgrade()?);
        let lost = self.lost()?;
        let of_task = Rc::clone(&host);
        host.spawn(Box::pin(async move {
            // First, the registry removes the bdev that has the name.
            of_task.sleep(Duration::ZERO).await;
            lost.wait_for_members(&of_task, &shared);
            life::settle(&of_task).await;
        }));
        None
    }

    /// The size stays that of the superblocks.
    fn base_resized(&self) -> bool {
        false
    }

    fn each_second(&self) {
        if self.release_claims()
            && let Some(host) = self.host.upgrade()
        {
            let of_task = Rc::clone(&host);
            host.spawn(Box::pin(async move { life::settle(&of_task).await }));
        }
    }
}

/// An array that has lost too many members.
struct Lost {
    name: String,
    uuid: uuid::Uuid,
    found: Option<Superblock>,
    given: Option<Given>,
    /// By slot: the members with right data.
    members: Vec<Option<std::sync::Weak<dyn Bdev>>>,
    claims: Vec<Option<Claim>>,
}

impl Lost {
    /// Lets the array wait, if there is still a member of it.
    fn wait_for_members(self, host: &Rc<dyn Host>, shared: &Rc<Shared>) {
        let mut slots = vec![];
        for (n, (member, claim)) in self.members.into_iter().zip(self.claims).enumerate() {
            let bdev = member.and_then(|member| member.upgrade());
            let bdev = bdev.filter(|bdev| host.registry().holds(bdev));
            let entry = self.found.as_ref().and_then(|found| found.member(n));
            let uuid = entry.map_or(uuid::Uuid::nil(), |entry| entry.uuid);
            let wanted = match (entry, &self.given) {
                (Some(entry), _) if entry.state == MemberState::Configured => Wanted::Uuid(uuid),
                // A member that was removed is stale.
                (None, Some(given)) => given.wanted(n),
                _ => Wanted::Nothing,
            };
            let base = bdev.zip(claim).filter(|_| wanted != Wanted::Nothing);
            let base = base.map(|(bdev, claim)| Held::new(&bdev, claim));
            slots.push(AssemblySlot { wanted, base, uuid });
        }
        if slots.iter().all(|slot| slot.base.is_none()) {
            return warn!("bdev {}: all members are gone", self.name);
        }
        let Ok(reservation) = host.registry().reserve(self.name.clone(), Some(self.uuid)) else {
            return error!(
                "bdev {}: cannot wait for its members: its name or UUID is in use",
                self.name
            );
        };
        warn!("bdev {}: offline, waits for its members to return", self.name);
        let assembly = match (self.found, self.given) {
            (Some(found), _) => Assembly::of_superblock(found, slots, reservation, Phase::Offline),
            (None, Some(given)) => Assembly::of_call(given, slots, reservation, Phase::Offline),
            (None, None) => return,
        };
        shared.assemblies.borrow_mut().push(assembly);
    }
}
