//! `bdev_nvme_set_hotplug`: namespaces of attached controllers that come and go.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bdev::method::{Answer, Call, DecodeFailure, Params};
use bdev::{BdevId, Host, life};
use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::{info, warn};

use crate::attach::add_namespaces;
use crate::controller::Controller;
use crate::entry::bdevs_of;
use crate::state::State;
use crate::sysfs::{Namespace, Sysfs};

/// SPDK's default and limit of the period.
const PERIOD_US: u64 = 100_000;
const PERIOD_MAX_US: u64 = 10_000_000;

/// The shortest period: each look reads some files for each namespace.
const PERIOD_MIN_US: u64 = 50_000;

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
            if hotplug.enabled.get() {
                look(&state, &host, &controller).await;
            }
        }
    }
    hotplug.has_task.set(false);
}

/// Removes what is gone of one controller, and adds what is new.
async fn look(state: &Rc<State>, host: &Rc<dyn Host>, controller: &Rc<Controller>) {
    let Some(_changing) = controller.change() else { return };
    let sysfs = state.sysfs.clone();
    let kernels: Vec<String> =
        controller.paths.borrow().iter().map(|path| path.kernel.clone()).collect();
    let seen = host.blocking(move || Seen::of(&sysfs, &kernels)).await;
    let bdevs = bdevs_of(controller, host.registry());
    let has = |namespace: &Namespace| seen.namespaces.iter().any(|it| it.block == namespace.block);
    let lost = bdevs.iter().filter(|(_, entry)| !has(&entry.namespace));
    let lost: Vec<(BdevId, String)> =
        lost.map(|(id, entry)| (*id, entry.name().to_owned())).collect();
    let known = |it: &Namespace| bdevs.iter().any(|(_, entry)| entry.namespace.id == it.id);
    let new: Vec<_> =
        seen.namespaces.iter().filter(|it| !known(it)).map(|it| (it.clone(), false)).collect();
    let count = bdevs.len();
    drop(bdevs);
    if seen.is_gone {
        info!("controller {}: its device is gone", controller.name);
        state.controllers.remove(controller);
    }
    if !lost.is_empty() {
        let names: Vec<_> = lost.iter().map(|(_, name)| &**name).collect();
        info!("removing bdevs whose namespace is gone: {}", names.join(", "));
        let ids: Vec<_> = lost.iter().map(|(id, _)| *id).collect();
        // Their I/O may end late; meanwhile, other controllers need the task.
        let owner = Rc::clone(host);
        host.spawn(Box::pin(async move { life::remove_lost(&owner, &ids).await }));
        return;
    }
    if new.is_empty() || count + new.len() > controller.max_bdevs {
        return;
    }
    match add_namespaces(state, host, controller, new).await {
        Ok(names) => info!("added bdevs of new namespaces: {}", names.join(", ")),
        Err(e) => warn!("controller {}: cannot add new namespaces: {}", controller.name, e.text),
    }
}

/// What the kernel has of a controller's paths.
struct Seen {
    is_gone: bool,
    namespaces: Vec<Namespace>,
}

impl Seen {
    fn of(sysfs: &Sysfs, kernels: &[String]) -> Self {
        let is_gone = kernels.iter().all(|name| sysfs.controller(name).is_none());
        let mut namespaces: Vec<_> =
            kernels.iter().flat_map(|name| sysfs.namespaces(name)).collect();
        namespaces.sort_by_key(|namespace| namespace.id);
        namespaces.dedup_by_key(|namespace| namespace.id);
        Self { is_gone, namespaces }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::tree;

    #[test]
    fn a_controller_is_gone_when_none_of_its_paths_is_left() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        let seen = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let Seen { is_gone, namespaces } = Seen::of(&sysfs, &names);
            (is_gone, namespaces.len())
        };
        assert_eq!(seen(&["nvme0"]), (false, 2));
        assert_eq!(seen(&["nvme0", "nvme9"]), (false, 2));
        assert_eq!(seen(&["nvme9"]), (true, 0));
    }
}
