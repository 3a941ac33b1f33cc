//! `bdev_raid_get_bdevs`, and `driver_specific` of an array.

use std::rc::Rc;

use bdev::Host;
use bdev::method::{Answer, Params};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::assembly::{Assembly, AssemblySlot, Held, Phase, Wanted};
use super::entry::RaidEntry;
use super::{PARSE, Shared, shown_uuid};
use crate::array::{Process, SlotState};

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Category {
    All,
    Online,
    Configuring,
    Offline,
}

pub(super) fn get_bdevs(shared: &Rc<Shared>, host: &dyn Host, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Get {
        category: Category,
    }
    let Get { category } = params.decode(PARSE)?;
    let mut all = vec![];
    if matches!(category, Category::All | Category::Online) {
        let entries = host.registry().entries_of::<RaidEntry>();
        all.extend(entries.iter().map(|(_, entry)| Value::Object(online(entry))));
    }
    for assembly in shared.assemblies.borrow().iter() {
        let shown = match category {
            Category::All => true,
            Category::Online => false,
            Category::Configuring => assembly.phase == Phase::Configuring,
            Category::Offline => assembly.phase == Phase::Offline,
        };
        if shown {
            assembly.forget_deleted(host);
            all.push(Value::Object(waiting(assembly)));
        }
    }
    Ok(Value::Array(all))
}

/// The parts that do not depend on the state.
fn head(name: &str, uuid: Value, strip_kb: u64, state: &str, level: &str) -> Map<String, Value> {
    let head = json!({
        "name": name, "uuid": uuid, "strip_size_kb": strip_kb, "state": state, "raid_level": level,
    });
    match head {
        Value::Object(head) => head,
        _ => Map::new(),
    }
}

/// An array that is online.
pub(super) fn online(entry: &RaidEntry) -> Map<String, Value> {
    let array = &entry.disk.array;
    let (layout, state) = (&array.layout, array.state());
    let blocks = |bytes: u64| bytes / u64::from(layout.block_size);
    let uuid = shown_uuid(Some(array.uuid));
    let mut about = head(&array.name, uuid, layout.strip >> 10, "online", layout.level.name());
    let in_use = state.slots.iter().filter(|slot| slot.state != SlotState::Absent);
    let in_sync = state.slots.iter().filter(|slot| slot.state == SlotState::InSync);
    let target = |process: Process| state.slots[process.slot].bdev.as_ref().map(|b| b.name());
    about.insert("superblock".into(), array.superblock.into());
    about.insert("num_base_bdevs".into(), state.slots.len().into());
    about.insert("num_base_bdevs_discovered".into(), in_use.count().into());
    about.insert("num_base_bdevs_operational".into(), in_sync.count().into());
    if let Some(process) = state.process {
        let percent = u128::from(process.at) * 100 / u128::from(layout.size.max(1));
        let percent = u64::try_from(percent).unwrap_or(100);
        about.insert(
            "process".into(),
            json!({
                "type": "rebuild",
                "target": target(process),
                "progress": {"blocks": blocks(process.at), "percent": percent},
            }),
        );
    }
    let list = state.slots.iter().zip(&layout.extents).map(|(slot, extent)| {
        let bdev = slot.bdev.as_ref().filter(|_| slot.state != SlotState::Absent);
        json!({
            "name": bdev.map(|bdev| bdev.name()),
            "uuid": shown_uuid(bdev.map(|bdev| bdev.uuid())),
            "is_configured": slot.state == SlotState::InSync,
            "data_offset": blocks(extent.offset),
            "data_size": blocks(extent.len),
        })
    });
    about.insert("base_bdevs_list".into(), list.collect());
    about
}

/// An array that is not online.
fn waiting(assembly: &Assembly) -> Map<String, Value> {
    let found = assembly.found.borrow();
    let slots = assembly.slots.borrow();
    let phase = if assembly.phase == Phase::Offline { "offline" } else { "configuring" };
    let strip_kb = match (&*found, &assembly.given) {
        (Some(found), _) => (u64::from(found.strip_size) * u64::from(found.block_size)) >> 10,
        (None, given) => given.as_ref().map_or(0, |given| given.strip_kb.into()),
    };
    let uuid = shown_uuid(assembly.uuid());
    let mut about = head(&assembly.name, uuid, strip_kb, phase, assembly.level.name());
    let superblock = found.is_some() || assembly.given.as_ref().is_some_and(|g| g.superblock);
    let there = slots.iter().filter(|slot| slot.base.is_some()).count();
    let wanted = slots.iter().filter(|slot| slot.wanted != Wanted::Nothing).count();
    about.insert("superblock".into(), superblock.into());
    about.insert("num_base_bdevs".into(), slots.len().into());
    about.insert("num_base_bdevs_discovered".into(), there.into());
    about.insert("num_base_bdevs_operational".into(), wanted.into());
    let list = slots.iter().enumerate().map(|(n, slot)| {
        let member = found.as_ref().and_then(|found| found.member(n));
        base(slot, member.map_or((0, 0), |member| (member.data_offset, member.data_size)))
    });
    about.insert("base_bdevs_list".into(), list.collect());
    about
}

fn base(slot: &AssemblySlot, (data_offset, data_size): (u64, u64)) -> Value {
    let bdev = slot.base.as_ref().and_then(Held::bdev);
    let name = match (&bdev, &slot.wanted) {
        (Some(bdev), _) => Some(bdev.name().to_owned()),
        (None, Wanted::Name(name)) => Some(name.clone()),
        (None, _) => None,
    };
    let known = Some(slot.uuid).filter(|uuid| !uuid.is_nil());
    json!({
        "name": name,
        "uuid": shown_uuid(bdev.as_ref().map(|bdev| bdev.uuid()).or(known)),
        "is_configured": bdev.is_some(),
        "data_offset": data_offset,
        "data_size": data_size,
    })
}
