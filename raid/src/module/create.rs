//! `bdev_raid_create`.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, GivenUuid, MethodError, Params, given};
use bdev::{Bdev, ClaimKind, Host, life};
use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::error;
use uuid::Uuid;

use super::assembly::{Assembly, AssemblySlot, Held, Phase, Wanted};
use super::examine::array_of;
use super::{CREATE, NAME, PARSE, Shared, refused};
use crate::Level;
use crate::superblock::NAME_MAX;

#[derive(Clone, Copy, Deserialize)]
enum GivenLevel {
    #[serde(rename = "raid0", alias = "0")]
    Raid0,
    #[serde(rename = "raid1", alias = "1")]
    Raid1,
    #[serde(rename = "raid5f", alias = "5f")]
    Raid5f,
    #[serde(rename = "concat")]
    Concat,
}

/// The parameters of an array.
#[derive(Clone)]
pub(super) struct Given {
    pub(super) name: String,
    pub(super) level: Level,
    pub(super) strip_kb: u32,
    pub(super) bases: Vec<String>,
    pub(super) uuid: Option<Uuid>,
    pub(super) superblock: bool,
    /// Bytes of a member that the array used when it was online. `None`: all of them.
    pub(super) used: Option<u64>,
    pub(super) params: Map<String, Value>,
}

/// The name in `base_bdevs` of a slot whose member was removed. A slot must not be left out: the
/// number of members decides where the data is.
const REMOVED: &str = "removed_base_bdev_";

pub(super) fn parse(params: &Params) -> Result<Given, MethodError> {
    #[derive(Deserialize)]
    struct Create {
        name: String,
        #[serde(default)]
        strip_size_kb: u32,
        raid_level: GivenLevel,
        base_bdevs: Vec<String>,
        uuid: Option<GivenUuid>,
        #[serde(default)]
        superblock: bool,
    }
    let p: Create = params.decode(PARSE)?;
    let level = match p.raid_level {
        GivenLevel::Raid0 => Level::Raid0,
        GivenLevel::Raid1 => Level::Raid1,
        GivenLevel::Raid5f => Level::Raid5f,
        GivenLevel::Concat => Level::Concat,
    };
    let given = Given {
        name: p.name,
        level,
        strip_kb: p.strip_size_kb,
        bases: p.base_bdevs,
        uuid: given(p.uuid),
        superblock: p.superblock,
        used: None,
        params: params.as_given(),
    };
    match given.problem() {
        None => Ok(given),
        Some(problem) => {
            error!("{CREATE}: {problem}");
            Err(failed(&given.name, libc::EINVAL))
        }
    }
}

impl Given {
    fn problem(&self) -> Option<&'static str> {
        let striped = self.level != Level::Raid1;
        if self.name.is_empty() || (self.superblock && self.name.len() > NAME_MAX) {
            return Some("the name is empty or too long for a superblock");
        }
        if striped != self.strip_kb.is_power_of_two() || (!striped && self.strip_kb != 0) {
            return Some("strip_size_kb must be 0 for raid1, and a power of two for other levels");
        }
        if u64::from(self.strip_kb) << 10 > self.level.strip_max() {
            return Some("the strips are too large for its level");
        }
        let count = self.bases.len();
        let present = (0..count).filter(|slot| !self.is_removed(*slot)).count();
        let few = count < self.level.members_min() || present < self.level.operational(count);
        (few || count > self.level.members_max()).then_some("too few or too many members")
    }

    /// Whether the member of a slot was removed: the array starts without it. A new array with
    /// superblocks needs all of its members.
    pub(super) fn is_removed(&self, slot: usize) -> bool {
        self.level.is_redundant()
            && !self.superblock
            && self.bases.get(slot).is_some_and(|base| *base == format!("{REMOVED}{slot}"))
    }

    /// The bdev that a slot waits for.
    pub(super) fn wanted(&self, slot: usize) -> Wanted {
        match self.bases.get(slot) {
            Some(base) if !self.is_removed(slot) => Wanted::Name(base.clone()),
            _ => Wanted::Nothing,
        }
    }

    /// The same array with these members by slot. `None`: the slot has none whose data is right.
    pub(super) fn with_members(&self, members: &[Option<Arc<dyn Bdev>>]) -> Self {
        let name = |(slot, bdev): (usize, &Option<Arc<dyn Bdev>>)| match bdev {
            Some(bdev) => match self.bases.get(slot) {
                Some(uuid) if Uuid::try_parse(uuid) == Ok(bdev.uuid()) => uuid.clone(),
                _ => bdev.name().to_owned(),
            },
            None => format!("{REMOVED}{slot}"),
        };
        let bases: Vec<String> = members.iter().enumerate().map(name).collect();
        let mut params = self.params.clone();
        params.insert("base_bdevs".into(), bases.clone().into());
        Self { bases, params, ..self.clone() }
    }
}

/// The error of a call that cannot create an array.
pub(super) fn failed(name: &str, errno: i32) -> MethodError {
    refused(&format!("Failed to create RAID bdev {name}"), errno)
}

pub(super) async fn create(shared: Rc<Shared>, host: Rc<dyn Host>, given: Given) -> Answer {
    let name = given.name.clone();
    let created = create_array(&shared, &host, given).await;
    // Also after an error: members were claimed, and other requests may wait for them.
    life::settle(&host).await;
    created.map(|()| true.into()).map_err(|errno| failed(&name, errno))
}

async fn create_array(
    shared: &Rc<Shared>,
    host: &Rc<dyn Host>,
    given: Given,
) -> Result<(), libc::c_int> {
    let registry = host.registry();
    let reservation = registry.reserve(given.name.clone(), given.uuid)?;
    let mut slots: Vec<AssemblySlot> = vec![];
    for (n, name) in given.bases.iter().enumerate() {
        let wanted = given.wanted(n);
        if wanted == Wanted::Nothing {
            slots.push(AssemblySlot { wanted, base: None, uuid: Uuid::nil() });
            continue;
        }
        let twice = slots.iter().any(|slot| matches!(&slot.wanted, Wanted::Name(n) if n == name));
        if twice {
            error!("{CREATE}: the member {name} is given twice");
            return Err(libc::EPERM);
        }
        let base = match registry.bdev(name) {
            None => None,
            Some(bdev) => {
                let claim = registry.claim(&bdev, ClaimKind::WriteExclusive, NAME);
                let claim = claim.map_err(|other| {
                    error!("{CREATE}: the member {name} is claimed by {}", other.owner);
                    libc::EPERM
                })?;
                Some(Held::new(&bdev, claim))
            }
        };
        slots.push(AssemblySlot { wanted, base, uuid: Uuid::nil() });
    }
    for bdev in slots.iter().filter_map(|slot| slot.base.as_ref()?.bdev()) {
        if array_of(shared, host, &bdev).await?.is_some() {
            error!(
                "{CREATE}: bdev {} has the superblock of an array: delete that array with clear_sb first",
                bdev.name()
            );
            return Err(libc::EEXIST);
        }
    }
    let assembly = Assembly::of_call(given, slots, reservation, Phase::Configuring);
    if assembly.is_complete(&**host) {
        return assembly.go_online(shared, host).await.map_err(|e| {
            error!("{CREATE}: {e}");
            e.errno()
        });
    }
    shared.assemblies.borrow_mut().push(assembly);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(level: Level, bases: &[&str]) -> Given {
        Given {
            name: "R".into(),
            level,
            strip_kb: if level == Level::Raid1 { 0 } else { 64 },
            bases: bases.iter().map(|base| (*base).to_owned()).collect(),
            uuid: None,
            superblock: false,
            used: None,
            params: Map::new(),
        }
    }

    #[test]
    fn the_slot_of_a_removed_member_stays_empty() {
        let array = given(Level::Raid5f, &["A", "removed_base_bdev_1", "C"]);
        assert_eq!(array.problem(), None);
        let wanted: Vec<_> = (0..3).map(|slot| array.wanted(slot)).collect();
        let name = |name: &str| Wanted::Name(name.into());
        assert_eq!(wanted, [name("A"), Wanted::Nothing, name("C")]);
        // The name is that of a bdev in another slot, at other levels, and with superblocks.
        let other = given(Level::Raid5f, &["A", "removed_base_bdev_0", "C"]);
        assert_eq!(other.wanted(1), name("removed_base_bdev_0"));
        let other = given(Level::Raid0, &["removed_base_bdev_0"]);
        assert_eq!(other.wanted(0), name("removed_base_bdev_0"));
        assert_eq!(Given { superblock: true, ..array }.wanted(1), name("removed_base_bdev_1"));
    }

    #[test]
    fn an_array_has_enough_members_and_strips_that_fit_into_memory() {
        let one = ["removed_base_bdev_0", "B"];
        assert_eq!(given(Level::Raid1, &one).problem(), None);
        let none = ["removed_base_bdev_0", "removed_base_bdev_1", "C"];
        assert!(given(Level::Raid5f, &none).problem().is_some());
        assert!(given(Level::Raid1, &none[..2]).problem().is_some());
        let strip = |kb| Given { strip_kb: kb, ..given(Level::Raid5f, &["A", "B", "C"]) };
        assert_eq!(strip(16 << 10).problem(), None);
        assert!(strip(32 << 10).problem().is_some());
    }

    #[test]
    fn the_saved_members_keep_their_slots() {
        let bdev = |name: &str| -> Option<Arc<dyn Bdev>> {
            let (name, uuid) = (name.to_owned(), None);
            let options = bdev::MallocOptions { name, num_blocks: 8, block_size: 512, uuid };
            Some(bdev::Malloc::create(options).unwrap())
        };
        let (a, c) = (bdev("A"), bdev("C"));
        let uuid = c.as_ref().unwrap().uuid().to_string();
        let array = given(Level::Raid5f, &["A", "B", &uuid]).with_members(&[a, None, c]);
        assert_eq!(array.bases, ["A", "removed_base_bdev_1", &uuid]);
        assert_eq!(array.params["base_bdevs"], serde_json::json!(array.bases));
        assert_eq!(array.wanted(1), Wanted::Nothing);
    }
}
