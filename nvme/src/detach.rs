//! `bdev_nvme_detach_controller`.

use std::rc::Rc;
use std::time::Duration;

use bdev::method::{Answer, DecodeFailure, MethodError, Params};
use bdev::{BdevId, Host, life};
use serde::Deserialize;
use tracing::{error, info, warn};

use crate::controller::{Controller, Key, Path, Reserved};
use crate::entry::bdevs_of;
use crate::fabrics;
use crate::state::State;
use crate::target::{Given, Target};

/// The pause between two attempts to change a controller that is being changed.
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Deserialize)]
struct Request {
    name: String,
    trtype: Option<String>,
    traddr: Option<String>,
    adrfam: Option<String>,
    trsvcid: Option<String>,
    subnqn: Option<String>,
    hostaddr: Option<String>,
    hostsvcid: Option<String>,
}

impl Request {
    /// Returns whether the given fields are those of a path.
    fn fits(&self, path: &Path) -> bool {
        let same = |given: &Option<String>, of: &str| {
            given.as_ref().is_none_or(|given| given.is_empty() || given.eq_ignore_ascii_case(of))
        };
        let target = &path.target;
        let [_, addr, svcid] = &path.host;
        // In the kernel's form, as an attach takes several.
        let traddr = self.traddr.as_deref().map(|traddr| {
            let trtype = target.transport.name();
            let parsed = Target::parse(Given { trtype, traddr, ..Given::default() });
            parsed.map_or_else(|_| traddr.to_owned(), |target| target.address)
        });
        same(&self.trtype, target.transport.name())
            && same(&traddr, &target.address)
            && same(&self.adrfam, target.family.unwrap_or_default())
            && same(&self.trsvcid, &target.service)
            && same(&self.subnqn, &target.subnqn)
            && same(&self.hostaddr, addr)
            && same(&self.hostsvcid, svcid)
    }
}

/// Removes the paths of a controller that the parameters name, all of them if they name none. With
/// its last path, the controller and its bdevs go.
pub(crate) async fn detach(state: Rc<State>, host: Rc<dyn Host>, params: Params) -> Answer {
    let method = params.method();
    let request: Request = params.decode(DecodeFailure::INTERNAL)?;
    let Some(controller) = state.controllers.get(&request.name) else {
        error!("{method}: no controller has the name {:?}", request.name);
        return Err(MethodError::errno(libc::ENODEV));
    };
    // A look for namespaces changes it too, for a moment.
    let _changing = loop {
        if let Some(changing) = controller.change() {
            break changing;
        }
        host.sleep(PAUSE).await;
    };
    if !state.controllers.has(&controller) {
        error!("{method}: controller {} has just been detached", request.name);
        return Err(MethodError::errno(libc::ENODEV));
    }
    let (gone, left, _places) = loop {
        let (gone, left): (Vec<Path>, Vec<Path>) =
            controller.paths.borrow().iter().cloned().partition(|path| request.fits(path));
        if gone.is_empty() {
            error!("{method}: controller {} has no such path", request.name);
            return Err(MethodError::errno(libc::ENXIO));
        }
        // So that no attach adopts a connection that is about to end.
        let connections = gone.iter().filter(|path| path.is_connection());
        let reserve = |path: &Path| state.controllers.reserve(Key::Place(path.target.place()));
        let places: Option<Vec<Reserved>> = connections.map(reserve).collect();
        if let Some(places) = places {
            break (gone, left, places);
        }
        host.sleep(PAUSE).await;
    };
    if left.is_empty() {
        state.controllers.remove(&controller);
        let ids: Vec<BdevId> =
            bdevs_of(&controller, host.registry()).into_iter().map(|(id, _)| id).collect();
        life::remove(&host, &params, &ids).await;
    } else {
        *controller.paths.borrow_mut() = left;
    }
    end_connections(&state, &host, &controller, gone).await;
    Ok(true.into())
}

/// Ends the connections among these paths of a controller.
async fn end_connections(
    state: &Rc<State>,
    host: &Rc<dyn Host>,
    controller: &Rc<Controller>,
    paths: Vec<Path>,
) {
    for path in paths.into_iter().filter(Path::is_connection) {
        let (sysfs, open) = (state.sysfs.clone(), host.open_file());
        let (kernel, target) = (path.kernel.clone(), path.target);
        let disconnect = move || fabrics::disconnect(&open, &sysfs, &kernel, &target);
        match state.aside(host, disconnect).await {
            Ok(()) => info!("controller {}: disconnected {}", controller.name, path.kernel),
            Err(e) => warn!("controller {}: {e}", controller.name),
        }
    }
}
