//! `bdev_nvme_set_hotplug`: namespaces of attached controllers that come and go.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::method::{Answer, Call, DecodeFailure, Params};
use bdev::{Bdev, BdevId, FileDisk, Host, life};
use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::{info, warn};

use crate::attach::add_namespaces;
use crate::controller::{Controller, Refused};
use crate::entry::bdevs_of;
use crate::open::Patience;
use crate::state::State;
use crate::sysfs::{Namespace, Sysfs};
use crate::target::Target;

/// SPDK's default and limit of the period.
const PERIOD_US: u64 = 100_000;
const PERIOD_MAX_US: u64 = 10_000_000;

/// The shortest period: each look reads some files for each namespace.
const PERIOD_MIN_US: u64 = 50_000;

/// The pause before a namespace that could not be opened is tried again. It doubles up to the limit.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

pub(crate) const HOTPLUG: &str = "bdev_nvme_set_hotplug";

/// The options, and whether the task runs.
#[derive(Default)]
pub(crate) struct Hotplug {
    /// The parameters of the last call, for `save_config`.
    set: RefCell<Option<Map<String, Value>>>,
    enabled: Cell<bool>,
    period_us: Cell<u64>,
    has_task: Cell<bool>,
}

impl Hotplug {
    pub(crate) fn config(&self) -> Option<Call> {
        let params = self.set.borrow().clone()?;
        Some(Call { method: HOTPLUG, params })
    }
}

pub(crate) async fn set(
    hotplug: Rc<Hotplug>,
    state: Rc<State>,
    host: Rc<dyn Host>,
    params: Params,
) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        enable: bool,
        period_us: Option<u64>,
    }
    const FAILURE: DecodeFailure = DecodeFailure { code: -32602, text: "Invalid argument" };
    let Request { enable, period_us } = params.decode(FAILURE)?;
    let given = period_us.filter(|us| *us > 0).unwrap_or(PERIOD_US);
    hotplug.period_us.set(given.clamp(PERIOD_MIN_US, PERIOD_MAX_US));
    hotplug.enabled.set(enable);
    // What was not given keeps its value.
    let mut set = hotplug.set.borrow().clone().unwrap_or_default();
    set.extend(params.as_given());
    *hotplug.set.borrow_mut() = Some(set);
    if enable && !hotplug.has_task.replace(true) {
        host.spawn(Box::pin(watch(Rc::clone(&hotplug), state, Rc::clone(&host))));
    }
    Ok(true.into())
}

/// Looks at the attached controllers while hot-plug is enabled.
async fn watch(hotplug: Rc<Hotplug>, state: Rc<State>, host: Rc<dyn Host>) {
    while hotplug.enabled.get() {
        host.sleep(Duration::from_micros(hotplug.period_us.get())).await;
        for controller in state.controllers.all() {
            // On its own, as one that hangs must not keep the others waiting. The next look skips a
            // controller that is being changed.
            let (state, owner) = (Rc::clone(&state), Rc::clone(&host));
            host.spawn(Box::pin(async move { look(&state, &owner, &controller).await }));
        }
    }
    hotplug.has_task.set(false);
}

/// Removes what is gone of one controller, and adds what is new.
async fn look(state: &Rc<State>, host: &Rc<dyn Host>, controller: &Rc<Controller>) {
    let Some(_changing) = controller.change() else { return };
    let sysfs = state.sysfs.clone();
    let paths = controller.paths.borrow().clone();
    let paths: Vec<_> = paths.into_iter().map(|path| (path.kernel, path.target)).collect();
    let seen = host.blocking(move || Seen::of(&sysfs, &paths)).await;
    let bdevs = bdevs_of(controller, host.registry());
    let has = |namespace: &Namespace| seen.namespaces.iter().any(|it| it.block == namespace.block);
    let is_leaving = |id: &BdevId| controller.leaving.borrow().contains(id);
    let lost = bdevs.iter().filter(|(id, entry)| !has(&entry.namespace) && !is_leaving(id));
    let lost: Vec<(BdevId, String)> =
        lost.map(|(id, entry)| (*id, entry.name().to_owned())).collect();
    let known = |it: &Namespace| bdevs.iter().any(|(_, entry)| entry.namespace.id == it.id);
    let is_there = |block: &String| seen.namespaces.iter().any(|it| it.block == *block);
    controller.refused.borrow_mut().retain(|refused| is_there(&refused.block));
    let new = seen.namespaces.iter().filter(|it| !known(it) && controller.may_try(&it.block));
    let new: Vec<_> = new.map(|it| (it.clone(), false)).collect();
    let size = |id| seen.namespaces.iter().find(|it| it.id == id).map_or(0, |it| it.bytes);
    let grown = bdevs.iter().filter(|(_, it)| size(it.namespace.id) > it.disk.size_bytes());
    let grown: Vec<_> = grown.map(|(_, entry)| Arc::clone(&entry.disk)).collect();
    let count = bdevs.len();
    drop(bdevs);
    grow(host, grown).await;
    if seen.is_gone {
        info!("controller {}: its device is gone", controller.name);
        state.controllers.remove(controller);
    }
    if !lost.is_empty() {
        remove(host, controller, lost);
        return;
    }
    if new.is_empty() || count + new.len() > controller.max_bdevs {
        return;
    }
    for (namespace, can_share) in new {
        let block = namespace.block.clone();
        let one = vec![(namespace, can_share)];
        match add_namespaces(state, host, controller, one, Patience::TriesOnce).await {
            Ok(names) => info!("added the bdev of a new namespace: {}", names.join(", ")),
            Err(e) => {
                if controller.refuse(&block) {
                    warn!("controller {}: cannot add {block} yet: {}", controller.name, e.text);
                }
            }
        }
    }
}

/// Removes bdevs whose namespace is gone. Their I/O may end late; meanwhile, the controller can
/// change.
fn remove(host: &Rc<dyn Host>, controller: &Rc<Controller>, lost: Vec<(BdevId, String)>) {
    let (ids, names): (Vec<_>, Vec<_>) = lost.into_iter().unzip();
    info!("removing bdevs whose namespace is gone: {}", names.join(", "));
    controller.leaving.borrow_mut().extend(&ids);
    let (owner, controller) = (Rc::clone(host), Rc::clone(controller));
    host.spawn(Box::pin(async move {
        life::remove_lost(&owner, &ids).await;
        controller.leaving.borrow_mut().retain(|id| !ids.contains(id));
    }));
}

impl Controller {
    /// Returns whether a new namespace has not been refused, or may be tried again.
    fn may_try(&self, block: &str) -> bool {
        let refused = self.refused.borrow();
        refused.iter().all(|it| it.block != block || it.next <= Instant::now())
    }

    /// Remembers that a new namespace could not be opened. Returns whether this is the first time.
    fn refuse(&self, block: &str) -> bool {
        let mut refused = self.refused.borrow_mut();
        let now = Instant::now();
        if let Some(again) = refused.iter_mut().find(|it| it.block == block) {
            again.pause = (again.pause * 2).min(RETRY_MAX);
            again.next = now + again.pause;
            return false;
        }
        refused.push(Refused { block: block.into(), pause: RETRY, next: now + RETRY });
        true
    }
}

/// What the kernel has of a controller's paths.
struct Seen {
    is_gone: bool,
    namespaces: Vec<Namespace>,
}

impl Seen {
    fn of(sysfs: &Sysfs, paths: &[(String, Target)]) -> Self {
        let left: Vec<_> = paths.iter().filter(|(name, at)| sysfs.is_at(name, at)).collect();
        let mut namespaces: Vec<_> =
            left.iter().flat_map(|(name, _)| sysfs.namespaces(name)).collect();
        namespaces.sort_by_key(|namespace| namespace.id);
        namespaces.dedup_by_key(|namespace| namespace.id);
        Self { is_gone: left.is_empty(), namespaces }
    }
}

/// Adopts the sizes of namespaces that have grown.
async fn grow(host: &Rc<dyn Host>, grown: Vec<Arc<FileDisk>>) {
    for disk in grown {
        let scanned = Arc::clone(&disk);
        let before = disk.num_blocks();
        match host.blocking(move || scanned.rescan()).await {
            Ok(now) if now != before => life::resized(host, &(Arc::clone(&disk) as _)),
            Ok(_) => {}
            Err(e) => warn!("bdev {}: {e}", disk.name()),
        }
        drop(disk);
        // A task may wait for the disk's last user.
        host.released();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::FurtherPaths;
    use crate::sysfs::tests::tree;
    use crate::target::Given;

    #[test]
    fn a_controller_is_gone_when_none_of_its_paths_is_left() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        let seen = |names: &[&str]| {
            let traddr = "0000:00:04.0";
            let given = Given { trtype: "PCIe", traddr, ..Given::default() };
            let target = Target::parse(given).unwrap();
            let paths: Vec<_> =
                names.iter().map(|name| ((*name).to_owned(), target.clone())).collect();
            let Seen { is_gone, namespaces } = Seen::of(&sysfs, &paths);
            (is_gone, namespaces.len())
        };
        assert_eq!(seen(&["nvme0"]), (false, 2));
        assert_eq!(seen(&["nvme0", "nvme9"]), (false, 2));
        // Another controller has this name now.
        assert_eq!(seen(&["nvme1"]), (true, 0));
    }

    #[test]
    fn a_refused_namespace_is_reported_once_and_tried_later() {
        let controller = Controller {
            name: "N".into(),
            max_bdevs: 1,
            paths: RefCell::default(),
            further: FurtherPaths::default(),
            refused: RefCell::default(),
            leaving: RefCell::default(),
            changing: Cell::default(),
        };
        assert!(controller.may_try("nvme0n1"));
        assert!(controller.refuse("nvme0n1"));
        assert!(!controller.may_try("nvme0n1") && controller.may_try("nvme0n2"));
        controller.refused.borrow_mut()[0].next = Instant::now();
        assert!(controller.may_try("nvme0n1"));
        assert!(!controller.refuse("nvme0n1"), "it is known");
        assert_eq!(controller.refused.borrow()[0].pause, RETRY * 2);
        assert!((0..9).all(|_| !controller.refuse("nvme0n1")));
        assert_eq!(controller.refused.borrow()[0].pause, RETRY_MAX);
    }
}
