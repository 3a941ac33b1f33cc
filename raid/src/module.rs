//! `bdev_raid_*`, and the assembly of arrays from superblocks.

mod assembly;
mod create;
mod entry;
mod examine;
mod members;
mod show;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::life;
use bdev::method::{Answer, Call, DecodeFailure, LocalFuture, Method, MethodError, Params};
use bdev::{Aside, Bdev, BdevId, BdevModule, Error, Host, Unanswered};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{error, info};

use crate::Pace;
use crate::metadata;
use assembly::Assembly;
use entry::RaidEntry;

pub(crate) const NAME: &str = "raid";
const CREATE: &str = "bdev_raid_create";

const PARSE: DecodeFailure = DecodeFailure { code: -32700, text: "spdk_json_decode_object failed" };

/// The time in which a member must answer to a call.
const LIMIT: Duration = Duration::from_secs(30);

/// SPDK's module `raid`.
#[derive(Default)]
pub struct RaidModule(Rc<Shared>);

/// What the methods and the entries share.
#[derive(Default)]
struct Shared {
    /// Arrays that are not online.
    assemblies: RefCell<Vec<Rc<Assembly>>>,
    /// Devices whose superblock was asked for and has not arrived in time.
    unanswered: Unanswered,
}

/// SPDK's default of `process_window_size_kb`, and the largest window in bytes.
const WINDOW_KB: u64 = 1024;
const WINDOW_MAX: u64 = 64 << 20;

impl BdevModule for RaidModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        let [create, delete, get, add, remove] = [(); 5].map(|()| Rc::clone(&self.0));
        vec![
            Method::parsed(CREATE, create::parse, move |host, _, given| {
                create::create(Rc::clone(&create), host, given)
            }),
            Method::new("bdev_raid_delete", move |host, params| {
                delete_array(Rc::clone(&delete), host, params)
            }),
            Method::new("bdev_raid_get_bdevs", move |host, params| {
                std::future::ready(show::get_bdevs(&get, &*host, &params))
            }),
            Method::new("bdev_raid_add_base_bdev", move |host, params| {
                members::add(Rc::clone(&add), host, params)
            }),
            Method::new("bdev_raid_remove_base_bdev", move |host, params| {
                members::remove(Rc::clone(&remove), host, params)
            }),
        ]
    }

    /// The arrays without superblocks that wait for members.
    fn config(&self) -> Vec<Call> {
        self.0.assemblies.borrow().iter().filter_map(|assembly| assembly.config()).collect()
    }

    fn examine<'a>(
        &'a self,
        host: &'a Rc<dyn Host>,
        bdev: &'a Arc<dyn Bdev>,
    ) -> LocalFuture<'a, ()> {
        Box::pin(examine::examine(Rc::clone(&self.0), host, bdev))
    }
}

impl Shared {
    /// How a rebuild of an array with this unit runs: what clients have set with
    /// `bdev_raid_set_options`, which the program keeps.
    fn pace(host: &dyn Host, unit: u64) -> Pace {
        let options = host.options("bdev_raid_set_options");
        let option = |name: &str| options.get(name).and_then(Value::as_u64).unwrap_or(0);
        let window = match option("process_window_size_kb") {
            0 => WINDOW_KB << 10,
            // A window is copied through memory.
            kb => (kb << 10).min(WINDOW_MAX),
        };
        let bytes_per_sec = option("process_max_bandwidth_mb_sec") << 20;
        Pace { window: window.next_multiple_of(unit.max(1)), bytes_per_sec }
    }

    fn assembly(&self, is_it: impl Fn(&Assembly) -> bool) -> Option<Rc<Assembly>> {
        self.assemblies.borrow().iter().find(|assembly| is_it(assembly)).cloned()
    }

    /// Waits while an array is going online, which may then be online.
    async fn idle(&self, host: &Rc<dyn Host>, is_it: impl Fn(&Assembly) -> bool) {
        while self.assembly(|assembly| assembly.is_busy() && is_it(assembly)).is_some() {
            host.sleep(entry::POLL).await;
        }
    }

    fn forget(&self, assembly: &Rc<Assembly>) {
        self.assemblies.borrow_mut().retain(|other| !Rc::ptr_eq(other, assembly));
    }
}

/// Returns the array that is online and has this name or UUID.
fn online(host: &dyn Host, name: &str) -> Option<(BdevId, Rc<RaidEntry>)> {
    let entry = host.registry().entry::<RaidEntry>(name)?;
    Some((host.registry().id(name)?, entry))
}

async fn delete_array(shared: Rc<Shared>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Delete {
        name: String,
        #[serde(default)]
        clear_sb: bool,
    }
    let Delete { name, clear_sb } = params.decode(PARSE)?;
    let is_it = |assembly: &Assembly| assembly.name == name;
    shared.idle(&host, is_it).await;
    let mut clear = vec![];
    if let Some((id, entry)) = online(&*host, &name) {
        let members = entry.disk.array.members();
        if clear_sb && entry.disk.array.superblock {
            clear = members;
        }
        // Examine must not find superblocks that are about to be cleared. Nothing else may be kept:
        // the removal waits until nobody has the bdev.
        let held = (!clear.is_empty()).then(|| entry.take_claims());
        drop(entry);
        life::remove(&host, &params, &[id]).await;
        let cleared = clear_superblocks(&host, &name, clear).await;
        drop(held);
        life::settle(&host).await;
        return cleared;
    }
    let Some(assembly) = shared.assembly(is_it) else {
        let text = format!("raid bdev {name} not found");
        return Err(MethodError { code: -i64::from(libc::ENODEV), text });
    };
    shared.forget(&assembly);
    if clear_sb && assembly.has_superblocks() {
        clear = assembly.present();
    }
    let cleared = clear_superblocks(&host, &name, clear).await;
    drop(assembly);
    life::settle(&host).await;
    cleared
}

/// Overwrites superblocks with zeroes.
async fn clear_superblocks(host: &Rc<dyn Host>, name: &str, members: Vec<Arc<dyn Bdev>>) -> Answer {
    if members.is_empty() {
        return Ok(true.into());
    }
    let block = members.iter().map(|bdev| bdev.block_size()).max().unwrap_or(0);
    let len = metadata::read_len(block);
    let members = members.into_iter().enumerate().collect();
    let failed = write(host, name, members, vec![0; len]).await;
    match failed.map_err(|e| MethodError::of("bdev_raid_delete", &e))?.into_iter().next() {
        None => Ok(true.into()),
        Some((_, e)) => Err(MethodError::of("bdev_raid_delete", &e)),
    }
}

/// Writes to the beginning of members. Returns those that have failed.
async fn write(
    host: &Rc<dyn Host>,
    name: &str,
    members: Vec<(usize, Arc<dyn Bdev>)>,
    bytes: Vec<u8>,
) -> Result<Vec<(usize, Error)>, Error> {
    let work = move || Ok(metadata::write_all(members, &bytes, metadata::LIMIT));
    let failed = Aside::new(name, 1).run(host, LIMIT, work).await?;
    for (_, e) in &failed {
        error!("bdev {name}: {e}");
    }
    Ok(failed)
}

/// Logs the reason of a failed call, and returns SPDK's error.
fn refused(what: &str, errno: i32) -> MethodError {
    let text = format!("{what}: {}", bdev::method::strerror(errno));
    error!("{text}");
    MethodError { code: -i64::from(errno), text }
}

/// Shows a UUID; zeroes if it is not known.
fn shown_uuid(uuid: Option<uuid::Uuid>) -> Value {
    json!(uuid.unwrap_or_default().to_string())
}

fn info_online(name: &str) {
    info!("bdev {name}: the array is online");
}
