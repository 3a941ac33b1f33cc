//! `bdev_nvme_*`.

use std::rc::Rc;

use bdev::method::{Answer, Call, DecodeFailure, Method, MethodError, Named, Params};
use bdev::module::BdevModule;
use bdev::{Access, Error, Host};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;

use crate::controller::{Controller, Path};
use crate::entry::NAME;
use crate::hotplug::{self, HOTPLUG, Hotplug};
use crate::identity::show_health;
use crate::open::data_of;
use crate::state::{ATTACH, State};
use crate::sysfs::spdk_state;
use crate::{attach, detach, fabrics};

/// SPDK's module `nvme`, by the kernel's driver.
#[derive(Default)]
pub struct NvmeModule {
    state: Rc<State>,
    hotplug: Rc<Hotplug>,
}

impl BdevModule for NvmeModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        let state = || Rc::clone(&self.state);
        let (one, two, three, four, five, six) =
            (state(), state(), state(), state(), state(), state());
        let hotplug = Rc::clone(&self.hotplug);
        vec![
            Method::new(HOTPLUG, move |host, params| {
                hotplug::set(Rc::clone(&hotplug), Rc::clone(&one), host, params)
            }),
            Method::parsed(ATTACH, attach::parse, move |host, params, p| {
                attach::attach(Rc::clone(&two), host, params, p)
            }),
            Method::new("bdev_nvme_get_controllers", move |host, params| {
                get_controllers(Rc::clone(&three), host, params)
            }),
            Method::new("bdev_nvme_detach_controller", move |host, params| {
                detach::detach(Rc::clone(&four), host, params)
            }),
            Method::new("bdev_nvme_reset_controller", move |host, params| {
                reset(Rc::clone(&five), host, params)
            }),
            Method::new("bdev_nvme_get_controller_health_info", move |host, params| {
                get_health(Rc::clone(&six), host, params)
            }),
        ]
    }

    /// The bdevs' entries have no calls: one attach creates all bdevs of a controller.
    fn config(&self) -> Vec<Call> {
        let hotplug = self.hotplug.config().into_iter();
        hotplug.chain(self.state.controllers.config(ATTACH)).collect()
    }
}

async fn get_controllers(state: Rc<State>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
    }
    let Wanted { name } = params.decode(DecodeFailure::INTERNAL)?;
    let all = match name {
        None => state.controllers.all(),
        Some(name) => match state.controllers.get(&name) {
            Some(controller) => vec![controller],
            None => {
                let text = format!("Controller {name} does not exist");
                return Err(MethodError { code: -i64::from(libc::EINVAL), text });
            }
        },
    };
    let mut shown = vec![];
    for controller in all {
        shown.push(show(&state, &host, &controller).await);
    }
    Ok(shown.into())
}

async fn show(state: &State, host: &Rc<dyn Host>, controller: &Controller) -> Value {
    let paths = controller.paths.borrow().clone();
    let (sysfs, kernels) =
        (state.sysfs.clone(), paths.iter().map(|it| it.kernel.clone()).collect::<Vec<_>>());
    let read = move || -> Vec<_> { kernels.iter().map(|name| sysfs.controller(name)).collect() };
    let states = host.blocking(read).await;
    let shown = paths
        .iter()
        .zip(states)
        .map(|(path, now)| path.show(now.map_or("failed", |now| spdk_state(&now.state))));
    json!({ "name": controller.name, "ctrlrs": shown.collect::<Value>() })
}

async fn reset(state: Rc<State>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: String,
        cntlid: Option<u16>,
    }
    let method = params.method();
    let Wanted { name, cntlid } = params.decode(DecodeFailure::INTERNAL)?;
    let paths: Vec<Path> = state.controllers.get(&name).map_or(vec![], |controller| {
        let mut paths = controller.paths.borrow().clone();
        paths.retain(|path| cntlid.is_none_or(|cntlid| cntlid == path.identity.controller_id()));
        paths
    });
    if paths.is_empty() {
        error!("{method}: no controller has the name {name:?} and this cntlid");
        return Err(MethodError::errno(libc::ENODEV));
    }
    params.let_next_start();
    for Path { kernel, target, .. } in paths {
        let (open, sysfs) = (host.open_file(), state.sysfs.clone());
        let reset = move || match sysfs.is_at(&kernel, &target) {
            true => fabrics::control(&open, &kernel, "reset_controller"),
            false => Err(Error::NoDevice(format!("{kernel} is gone"))),
        };
        state.aside(&host, reset).await.map_err(|e| MethodError::of(method, &e))?;
    }
    Ok(true.into())
}

async fn get_health(state: Rc<State>, host: Rc<dyn Host>, params: Params) -> Answer {
    let method = params.method();
    let Named { name } = params.decode(DecodeFailure::INTERNAL)?;
    let path = state.controllers.get(&name).and_then(|it| it.paths.borrow().first().cloned());
    let Some(path) = path else {
        error!("{method}: no controller has the name {name:?}");
        return Err(MethodError::internal("Device not found"));
    };
    let (open, kernel) = (host.open_file(), path.kernel.clone());
    let read = move || data_of(&open, &kernel, Access::NvmeHealth);
    params.let_next_start();
    let log = state.aside(&host, read).await.map_err(|e| MethodError::of(method, &e))?;
    Ok(show_health(&path.identity, &path.target.address, &log))
}
