//! `bdev_nvme_*`.

use std::rc::Rc;
use std::time::Duration;

use bdev::method::{Answer, Call, DecodeFailure, Method, MethodError, Named, Params};
use bdev::module::BdevModule;
use bdev::{Access, Aside, Error, Host};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;

use crate::controller::{Controller, Controllers};
use crate::entry::NAME;
use crate::hotplug::{self, Hotplug};
use crate::identity::show_health;
use crate::open::data_of;
use crate::sysfs::{Sysfs, spdk_state};
use crate::{attach, detach, fabrics};

pub(crate) const ATTACH: &str = "bdev_nvme_attach_controller";
pub(crate) const HOTPLUG: &str = "bdev_nvme_set_hotplug";

/// The maximum number of operations on controllers at the same time, including those that hang
/// after their RPC has failed.
const OPERATIONS_MAX: usize = 64;

/// How long an RPC waits for such an operation. The kernel gives up on a command after 60 s.
const LIMIT: Duration = Duration::from_secs(70);

/// SPDK's module `nvme`, by the kernel's driver.
pub struct NvmeModule {
    pub(crate) sysfs: Sysfs,
    pub(crate) controllers: Rc<Controllers>,
    pub(crate) hotplug: Hotplug,
    operations: Aside,
}

impl Default for NvmeModule {
    fn default() -> Self {
        Self {
            sysfs: Sysfs::default(),
            controllers: Rc::default(),
            hotplug: Hotplug::default(),
            operations: Aside::new("NVMe", OPERATIONS_MAX),
        }
    }
}

impl NvmeModule {
    /// Runs what may wait for a controller.
    pub(crate) async fn aside<T: Send + 'static>(
        &self,
        host: &Rc<dyn Host>,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.operations.run(host, LIMIT, work).await
    }
}

impl BdevModule for NvmeModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        let module = || Rc::clone(&self);
        let (one, two, three, four, five, six) =
            (module(), module(), module(), module(), module(), module());
        vec![
            Method::new(HOTPLUG, move |host, params| hotplug::set(Rc::clone(&one), host, params)),
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
        hotplug.chain(self.controllers.config(ATTACH)).collect()
    }
}

async fn get_controllers(module: Rc<NvmeModule>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: Option<String>,
    }
    let Wanted { name } = params.decode(DecodeFailure::INTERNAL)?;
    let all = match name {
        None => module.controllers.all(),
        Some(name) => match module.controllers.get(&name) {
            Some(controller) => vec![controller],
            None => {
                let text = format!("Controller {name} does not exist");
                return Err(MethodError { code: -i64::from(libc::EINVAL), text });
            }
        },
    };
    let mut shown = vec![];
    for controller in all {
        shown.push(show(&module, &host, &controller).await);
    }
    Ok(shown.into())
}

async fn show(module: &NvmeModule, host: &Rc<dyn Host>, controller: &Controller) -> Value {
    let paths = controller.paths.borrow().clone();
    let (sysfs, kernels) =
        (module.sysfs.clone(), paths.iter().map(|it| it.kernel.clone()).collect::<Vec<_>>());
    let read = move || -> Vec<_> { kernels.iter().map(|name| sysfs.controller(name)).collect() };
    let states = host.blocking(read).await;
    let shown = paths
        .iter()
        .zip(states)
        .map(|(path, now)| path.show(now.map_or("failed", |now| spdk_state(&now.state))));
    json!({ "name": controller.name, "ctrlrs": shown.collect::<Value>() })
}

async fn reset(module: Rc<NvmeModule>, host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Wanted {
        name: String,
        cntlid: Option<u16>,
    }
    let method = params.method();
    let Wanted { name, cntlid } = params.decode(DecodeFailure::INTERNAL)?;
    let kernels: Vec<String> = module.controllers.get(&name).map_or(vec![], |controller| {
        let paths = controller.paths.borrow();
        let wanted = paths
            .iter()
            .filter(|path| cntlid.is_none_or(|cntlid| cntlid == path.identity.controller_id()));
        wanted.map(|path| path.kernel.clone()).collect()
    });
    if kernels.is_empty() {
        error!("{method}: no controller has the name {name:?} and this cntlid");
        return Err(MethodError::errno(libc::ENODEV));
    }
    params.let_next_start();
    for kernel in kernels {
        let open = host.open_file();
        let reset = move || fabrics::control(&open, &kernel, "reset_controller");
        module.aside(&host, reset).await.map_err(|e| MethodError::of(method, &e))?;
    }
    Ok(true.into())
}

async fn get_health(module: Rc<NvmeModule>, host: Rc<dyn Host>, params: Params) -> Answer {
    let method = params.method();
    let Named { name } = params.decode(DecodeFailure::INTERNAL)?;
    let path = module.controllers.get(&name).and_then(|it| it.paths.borrow().first().cloned());
    let Some(path) = path else {
        error!("{method}: no controller has the name {name:?}");
        return Err(MethodError::internal("Device not found"));
    };
    let (open, kernel) = (host.open_file(), path.kernel.clone());
    let read = move || data_of(&open, &kernel, Access::NvmeHealth);
    params.let_next_start();
    let log = module.aside(&host, read).await.map_err(|e| MethodError::of(method, &e))?;
    Ok(show_health(&path.identity, &path.target.address, &log))
}
