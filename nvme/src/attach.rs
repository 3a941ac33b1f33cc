//! `bdev_nvme_attach_controller`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, DecodeFailure, MethodError, Params};
use bdev::{Access, Bdev, Error, FileDisk, Host, Reservation, check_alone, life};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{error, info, warn};

use crate::controller::{Controller, FurtherPaths, Key, Path};
use crate::entry::{NvmeEntry, bdevs_of};
use crate::fabrics::{self, Options, Timeouts};
use crate::identity::{Identity, is_shared};
use crate::open::{Opener, Patience, data_of, uuid_of};
use crate::state::{ATTACH, State};
use crate::sysfs::{self, Namespace, Sysfs};
use crate::target::{Given, Target, Transport, checked_address, checked_nqn};

/// SPDK's default of `max_bdevs`.
const MAX_BDEVS: u32 = 128;
/// SPDK's limit of `num_io_queues`.
const QUEUES_MAX: u32 = 65536;
/// The most bytes of a controller's name.
const NAME_MAX: usize = 128;

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Policy {
    ActivePassive,
    ActiveActive,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Selector {
    RoundRobin,
    QueueDepth,
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "checked; the kernel has options of its own for these")]
struct MultipathOptions {
    policy: Option<Policy>,
    selector: Option<Selector>,
    min_io: Option<u32>,
}

/// The parameters, as in SPDK's schema.
#[derive(Deserialize)]
#[expect(dead_code, reason = "checked; those that have no effect are named in the log")]
struct Request {
    name: String,
    trtype: String,
    traddr: String,
    adrfam: Option<String>,
    trsvcid: Option<String>,
    priority: Option<String>,
    subnqn: Option<String>,
    hostnqn: Option<String>,
    hostaddr: Option<String>,
    hostsvcid: Option<String>,
    #[serde(default)]
    prchk_reftag: bool,
    #[serde(default)]
    prchk_guard: bool,
    #[serde(default)]
    hdgst: bool,
    #[serde(default)]
    ddgst: bool,
    fabrics_connect_timeout_us: Option<u64>,
    #[serde(default)]
    multipath: FurtherPaths,
    num_io_queues: Option<u32>,
    ctrlr_loss_timeout_sec: Option<i32>,
    reconnect_delay_sec: Option<u32>,
    fast_io_fail_timeout_sec: Option<u32>,
    psk: Option<String>,
    max_bdevs: Option<u32>,
    dhchap_key: Option<String>,
    dhchap_ctrlr_key: Option<String>,
    allow_unrecognized_csi: Option<bool>,
    multipath_opts: Option<MultipathOptions>,
    #[serde(default)]
    disable_sq_flow_control: bool,
}

/// Parameters that are accepted and have no effect.
const WITHOUT_EFFECT: [&str; 6] = [
    "priority",
    "prchk_reftag",
    "prchk_guard",
    "fabrics_connect_timeout_us",
    "allow_unrecognized_csi",
    "multipath_opts",
];

/// What an attach is about, checked.
pub(crate) struct Attach {
    name: String,
    target: Target,
    options: Options,
    /// Which of the time-outs were given; the others come from `bdev_nvme_set_options`.
    given: GivenTimeouts,
    multipath: FurtherPaths,
    has_protection_options: bool,
    max_bdevs: usize,
}

#[derive(Clone, Copy)]
struct GivenTimeouts {
    loss: Option<i32>,
    reconnect: Option<u32>,
    fast_fail: Option<u32>,
}

impl GivenTimeouts {
    /// Returns the time-outs, with those of `bdev_nvme_set_options` where none was given.
    fn with(self, kept: &Map<String, Value>) -> Timeouts {
        let kept = |name: &str| kept.get(name).and_then(Value::as_i64).unwrap_or(0);
        let unsigned = |given: Option<u32>, name: &str| {
            given.map_or_else(|| u64::try_from(kept(name)).unwrap_or(0), u64::from)
        };
        Timeouts {
            loss: self.loss.map_or_else(|| kept("ctrlr_loss_timeout_sec"), i64::from),
            reconnect: unsigned(self.reconnect, "reconnect_delay_sec"),
            fast_fail: unsigned(self.fast_fail, "fast_io_fail_timeout_sec"),
        }
    }
}

/// Makes an error with this errno and text, and logs it.
fn refused(errno: i32, text: impl Into<String>) -> MethodError {
    let text = text.into();
    error!("{ATTACH}: {text}");
    MethodError { code: -i64::from(errno), text }
}

fn invalid(text: impl Into<String>) -> MethodError {
    refused(libc::EINVAL, text)
}

/// Logs the reason, and returns the error with the text of its errno.
fn failed(errno: i32, reason: &str) -> MethodError {
    error!("{ATTACH}: {reason}");
    MethodError::errno(errno)
}

/// Decodes the parameters, and refuses those that are invalid in any state of the program.
pub(crate) fn parse(params: &Params) -> Result<Attach, MethodError> {
    let p: Request = params.decode(DecodeFailure::INTERNAL)?;
    if p.max_bdevs == Some(0) {
        return Err(invalid("max_bdevs cannot be zero"));
    }
    if p.name.is_empty() || p.name.len() > NAME_MAX {
        let reason = format!("the name must have 1 to {NAME_MAX} bytes");
        return Err(failed(libc::EINVAL, &reason));
    }
    let given = Given {
        trtype: &p.trtype,
        adrfam: p.adrfam.as_deref(),
        traddr: &p.traddr,
        trsvcid: p.trsvcid.as_deref(),
        subnqn: p.subnqn.as_deref(),
    };
    let target = Target::parse(given).map_err(invalid)?;
    checked_nqn("hostnqn", p.hostnqn.as_deref().unwrap_or_default()).map_err(invalid)?;
    checked_address("hostaddr", p.hostaddr.as_deref().unwrap_or_default()).map_err(invalid)?;
    if p.hostsvcid.as_ref().is_some_and(|port| port.len() > 32) {
        return Err(invalid(format!("hostsvcid too long: {}", p.hostsvcid.unwrap_or_default())));
    }
    if p.num_io_queues.is_some_and(|queues| !(1..=QUEUES_MAX).contains(&queues)) {
        return Err(invalid(format!("num_io_queues out of bounds, min: 1 max: {QUEUES_MAX}")));
    }
    if p.psk.is_some() || p.dhchap_key.is_some() || p.dhchap_ctrlr_key.is_some() {
        return Err(failed(libc::ENOKEY, "psk and dhchap keys: there is no keyring"));
    }
    if target.transport == Transport::Tcp && (target.service.is_empty() || target.subnqn.is_empty())
    {
        return Err(failed(libc::EINVAL, "TCP needs traddr, trsvcid and subnqn"));
    }
    let timeouts = GivenTimeouts {
        loss: p.ctrlr_loss_timeout_sec,
        reconnect: p.reconnect_delay_sec,
        fast_fail: p.fast_io_fail_timeout_sec,
    };
    let options = Options {
        hostnqn: p.hostnqn.filter(|nqn| !nqn.is_empty()),
        hostaddr: p.hostaddr.filter(|address| !address.is_empty()),
        queues: p.num_io_queues,
        header_digest: p.hdgst,
        data_digest: p.ddgst,
        no_flow_control: p.disable_sq_flow_control,
        ..Options::default()
    };
    Ok(Attach {
        name: p.name,
        target,
        options,
        given: timeouts,
        multipath: p.multipath,
        has_protection_options: p.prchk_reftag || p.prchk_guard,
        max_bdevs: usize::try_from(p.max_bdevs.unwrap_or(MAX_BDEVS)).unwrap_or(usize::MAX),
    })
}

/// A controller that was found or connected.
struct Found {
    controller: sysfs::Controller,
    namespaces: Vec<Namespace>,
    /// By namespace: several controllers may use it.
    shared: Vec<bool>,
    identity: Identity,
    is_new: bool,
}

/// Finds or connects a controller. Reads nothing of its namespaces if they are too many. May block
/// for minutes.
fn find(
    sysfs: &Sysfs,
    open: &bdev::OpenFile,
    target: &Target,
    options: &Options,
    max_bdevs: usize,
) -> Result<Found, Error> {
    let (controller, is_new) = match target.transport {
        Transport::Pcie => {
            let address = &target.address;
            let name = sysfs.at_pci(address).map_err(|e| Error::NoDevice(e.text(address)))?;
            let gone = || Error::NoDevice(format!("{name} has disappeared"));
            (sysfs.controller(&name).ok_or_else(gone)?, false)
        }
        Transport::Tcp => fabrics::find_or_connect(open, sysfs, target, options)?,
    };
    let namespaces = match is_new {
        true => fabrics::wait_for_namespaces(sysfs, &controller.name),
        false => sysfs.namespaces(&controller.name),
    };
    // Without the right to ask, the kernel's attributes have to do.
    let data = |name: &str, access| data_of(open, name, access).unwrap_or_default();
    let vendor = sysfs.pci_vendor(&target.address);
    let of_controller = data(&controller.name, Access::NvmeController);
    let identity = Identity::new(&controller, vendor, &of_controller);
    let readable = namespaces.iter().filter(|_| namespaces.len() <= max_bdevs);
    let shared =
        readable.map(|it| is_shared(&data(&it.character(), Access::NvmeNamespace))).collect();
    Ok(Found { controller, namespaces, shared, identity, is_new })
}

/// Attaches a controller, or a further path to one.
pub(crate) async fn attach(
    state: Rc<State>,
    host: Rc<dyn Host>,
    params: Params,
    mut attach: Attach,
) -> Answer {
    let kept = host.options("bdev_nvme_set_options");
    attach.options.timeouts = attach.given.with(&kept);
    attach.options.keep_alive_ms = kept.get("keep_alive_timeout_ms").and_then(Value::as_u64);
    if !attach.options.timeouts.fit() {
        return Err(failed(libc::EINVAL, "time-outs that contradict"));
    }
    let given = params.as_given();
    let unused: Vec<_> = WITHOUT_EFFECT.into_iter().filter(|it| given.contains_key(*it)).collect();
    if !unused.is_empty() {
        info!("{ATTACH}: ignoring options that have no effect: {}", unused.join(", "));
    }
    let existing = state.controllers.get(&attach.name);
    if let Some(existing) = &existing {
        check_further_path(existing, &attach)?;
    }
    // Until the end: a failed attach and a detach end a connection, which no other may adopt.
    let reserve = |key| state.controllers.reserve(key);
    let name = reserve(Key::Name(attach.name.clone()));
    let place = reserve(Key::Place(attach.target.place()));
    let (Some(_name), Some(_place)) = (name, place) else {
        let text = format!("{} or its target is being attached or detached", attach.name);
        return Err(failed(libc::EALREADY, &text));
    };
    // A target may take long to answer.
    params.let_next_start();
    let (sysfs, open) = (state.sysfs.clone(), host.open_file());
    let (target, options) = (attach.target.clone(), attach.options.clone());
    let max_bdevs = attach.max_bdevs;
    let find = move || find(&sysfs, &open, &target, &options, max_bdevs);
    let found = state.aside(&host, find).await.map_err(|e| MethodError::of(ATTACH, &e))?;
    let (kernel, is_new) = (found.controller.name.clone(), found.is_new);
    let made = match existing {
        Some(existing) => add_path(&state, &host, &existing, &attach, found, given),
        None => add_controller(&state, &host, &attach, found, given).await,
    };
    if made.is_err() && is_new {
        let (sysfs, open) = (state.sysfs.clone(), host.open_file());
        let (name, target) = (kernel.clone(), attach.target);
        let disconnect = move || fabrics::disconnect(&open, &sysfs, &name, &target);
        if let Err(e) = state.aside(&host, disconnect).await {
            warn!("{ATTACH}: cannot disconnect {kernel} again: {e}");
        }
    }
    made
}

/// Refuses what SPDK refuses for a name that exists.
fn check_further_path(existing: &Rc<Controller>, attach: &Attach) -> Result<(), MethodError> {
    let exists = format!("A controller named {} already exists", attach.name);
    if attach.multipath == FurtherPaths::Refuse {
        return Err(refused(libc::EALREADY, format!("{exists} and multipath is disabled")));
    }
    let paths = existing.paths.borrow();
    if paths.iter().any(|path| path.target == attach.target) {
        return Err(refused(libc::EALREADY, format!("{exists} with the specified network path")));
    }
    let merges = |further| further == FurtherPaths::Merge;
    if merges(existing.further) != merges(attach.multipath) {
        let reason = format!("{exists}, but was attached with another value of multipath");
        return Err(failed(libc::EINVAL, &reason));
    }
    if let Some(first) = paths.first() {
        let nqn = &first.target.subnqn;
        if *nqn != attach.target.subnqn {
            return Err(invalid(format!("{exists}, but uses a different subnqn ({nqn})")));
        }
        let [nqn, ..] = &first.host;
        if attach.options.hostnqn.as_ref().is_some_and(|given| given != nqn) {
            return Err(invalid(format!("{exists}, but uses a different hostnqn ({nqn})")));
        }
    }
    if attach.has_protection_options {
        let text = format!("{exists}. To add a path, do not specify PI options.");
        return Err(invalid(text));
    }
    Ok(())
}

/// Adds a path that the kernel has merged with those of a controller.
fn add_path(
    state: &Rc<State>,
    host: &Rc<dyn Host>,
    existing: &Rc<Controller>,
    attach: &Attach,
    found: Found,
    params: Map<String, Value>,
) -> Answer {
    if !state.controllers.has(existing) {
        let text = format!("controller {} has just been detached", attach.name);
        return Err(failed(libc::ENODEV, &text));
    }
    if state.controllers.has_path(&found.controller.name) {
        return Err(failed(libc::EEXIST, &attached_already(&found.controller.name)));
    }
    let bdevs = bdevs_of(existing, host.registry());
    let known: Vec<&str> = bdevs.iter().map(|(_, entry)| &*entry.namespace.block).collect();
    if let Some(other) = found.namespaces.iter().find(|it| !known.contains(&&*it.block)) {
        let reason = format!(
            "the kernel has not merged the path with the others of {}: it has made /dev/{} of it; \
             native multipath (nvme_core.multipath=Y) does that",
            attach.name, other.block
        );
        return Err(failed(libc::EINVAL, &reason));
    }
    existing.paths.borrow_mut().push(path(attach, &found, params));
    info!("controller {}: added the path {}", attach.name, found.controller.name);
    match attach.multipath {
        FurtherPaths::Failover => Ok(json!([])),
        _ => Ok(bdevs.iter().map(|(_, entry)| Value::from(entry.name())).collect()),
    }
}

fn attached_already(kernel: &str) -> String {
    format!("{kernel} is attached already, under another name")
}

fn path(attach: &Attach, found: &Found, params: Map<String, Value>) -> Path {
    let own = |prefix: &str| {
        let mut parts = found.controller.address.split(',');
        parts.find_map(|part| part.strip_prefix(prefix)).unwrap_or_default().to_owned()
    };
    Path {
        kernel: found.controller.name.clone(),
        target: attach.target.clone(),
        host: [found.controller.hostnqn.clone(), own("src_addr="), String::new()],
        identity: found.identity.clone(),
        params,
    }
}

/// Adds a controller and the bdevs of its namespaces.
async fn add_controller(
    state: &Rc<State>,
    host: &Rc<dyn Host>,
    attach: &Attach,
    found: Found,
    params: Map<String, Value>,
) -> Answer {
    if state.controllers.has_path(&found.controller.name) {
        return Err(failed(libc::EEXIST, &attached_already(&found.controller.name)));
    }
    let count = found.namespaces.len();
    if count > attach.max_bdevs {
        let text = format!("{count} namespaces, but max_bdevs is {}", attach.max_bdevs);
        return Err(failed(libc::ERANGE, &text));
    }
    let controller = Rc::new(Controller {
        name: attach.name.clone(),
        max_bdevs: attach.max_bdevs,
        paths: RefCell::new(vec![path(attach, &found, params)]),
        further: attach.multipath,
        refused: RefCell::default(),
        leaving: RefCell::default(),
        changing: Cell::new(false),
    });
    // Before its bdevs, so that no other attach takes its path. Meanwhile a detach waits.
    state.controllers.add(Rc::clone(&controller));
    let _changing = controller.change();
    let new = found.namespaces.into_iter().zip(found.shared).collect();
    let made = add_namespaces(state, host, &controller, new, Patience::Waits).await;
    match &made {
        Ok(_) => info!("controller {}: attached /dev/{}", attach.name, found.controller.name),
        Err(_) => state.controllers.remove(&controller),
    }
    Ok(made?.into())
}

/// Makes the bdevs of new namespaces, all or none. Returns their names.
pub(crate) async fn add_namespaces(
    state: &Rc<State>,
    host: &Rc<dyn Host>,
    controller: &Rc<Controller>,
    new: Vec<(Namespace, bool)>,
    patience: Patience,
) -> Result<Vec<String>, MethodError> {
    let serial = controller.paths.borrow().first().map(|it| it.identity.serial().to_owned());
    let serial = serial.unwrap_or_default();
    let mut reserved: Vec<Reservation> = vec![];
    for (namespace, _) in &new {
        let name = format!("{}n{}", controller.name, namespace.id);
        let uuid = uuid_of(namespace, &serial);
        let taken = MethodError::errno;
        reserved.push(host.registry().reserve(name, Some(uuid)).map_err(taken)?);
    }
    let all = new.iter().zip(&reserved);
    let wanted: Vec<_> = all.map(|((it, _), of)| (it.clone(), of.name.clone(), of.uuid)).collect();
    let shared = host.shares_files();
    let paths = controller.paths.borrow().clone();
    let (open, sysfs) = (host.open_file(), state.sysfs.clone());
    let opener = Opener { open, sysfs, shared, patience, paths };
    let open = move || -> Result<Vec<Arc<FileDisk>>, Error> {
        wanted.iter().map(|(it, name, uuid)| opener.disk(it, name, *uuid)).collect()
    };
    let disks = state.aside(host, open).await.map_err(|e| MethodError::of(ATTACH, &e))?;
    if !shared {
        for disk in &disks {
            check_alone(&**host, disk).map_err(|e| MethodError::of(ATTACH, &e))?;
        }
    }
    let mut names = vec![];
    for (((namespace, can_share), reserved), disk) in new.into_iter().zip(reserved).zip(disks) {
        disk.log_service();
        names.push(disk.name().to_owned());
        let controller = Rc::clone(controller);
        let entry = Rc::new(NvmeEntry { controller, namespace, disk, can_share });
        life::add(host, reserved, entry).await?;
    }
    Ok(names)
}
