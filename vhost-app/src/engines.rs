//! The bdev modules that are crates of their own, each behind a cargo feature, and what they need
//! from the process.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use bdev::BdevModule;
use sandbox::Network;

use crate::cli::Options;

/// Returns all kinds of bdevs. `network`: whether the process may connect to other hosts.
pub(crate) fn modules(network: Network) -> Vec<Rc<dyn BdevModule>> {
    let mut modules = bdev::modules::all();
    let engines = [
        nbd_module(network),
        nvme_module(),
        rbd_module(),
        virtio_module(),
        crypto_module(),
        raid_module(),
        lvol_module(),
    ];
    modules.extend(engines.into_iter().flatten());
    modules
}

#[cfg(feature = "nbd")]
fn nbd_module(network: Network) -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(nbd::NbdModule::new(network == Network::Allowed)))
}

#[cfg(not(feature = "nbd"))]
fn nbd_module(_: Network) -> Option<Rc<dyn BdevModule>> {
    None
}

#[cfg(feature = "virtio-user")]
fn virtio_module() -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(virtio_user::VirtioModule::default()))
}

#[cfg(not(feature = "virtio-user"))]
fn virtio_module() -> Option<Rc<dyn BdevModule>> {
    None
}

#[cfg(feature = "nvme")]
fn nvme_module() -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(nvme::NvmeModule::default()))
}

#[cfg(not(feature = "nvme"))]
fn nvme_module() -> Option<Rc<dyn BdevModule>> {
    None
}

#[cfg(feature = "crypto")]
fn crypto_module() -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(crypto::CryptoModule::default()))
}

#[cfg(not(feature = "crypto"))]
fn crypto_module() -> Option<Rc<dyn BdevModule>> {
    None
}

#[cfg(feature = "lvol")]
fn lvol_module() -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(lvol::LvolModule::default()))
}

#[cfg(not(feature = "lvol"))]
fn lvol_module() -> Option<Rc<dyn BdevModule>> {
    None
}

#[cfg(feature = "raid")]
fn raid_module() -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(raid::RaidModule::default()))
}

#[cfg(not(feature = "raid"))]
fn raid_module() -> Option<Rc<dyn BdevModule>> {
    None
}

#[cfg(feature = "rbd")]
fn rbd_module() -> Option<Rc<dyn BdevModule>> {
    Some(Rc::new(rbd::RbdModule::default()))
}

#[cfg(not(feature = "rbd"))]
fn rbd_module() -> Option<Rc<dyn BdevModule>> {
    None
}

/// Returns whether the process may connect to storage clusters: what the operator says or, without
/// `--network`, whether librbd is installed.
pub(crate) fn network(options: &Options) -> Network {
    #[cfg(feature = "rbd")]
    let installed = rbd::is_installed();
    #[cfg(not(feature = "rbd"))]
    let installed = false;
    if options.network.unwrap_or(installed) { Network::Allowed } else { Network::Refused }
}

/// Returns the files and directories that librbd reads, if connections are allowed.
pub(crate) fn reads_in(options: &Options, network: Network) -> Vec<PathBuf> {
    if network == Network::Refused {
        return vec![];
    }
    // To resolve the host names of a cluster's monitors.
    let resolver = ["/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf"];
    let configured = std::env::var_os("CEPH_CONF").map(PathBuf::from);
    let beside = configured.as_deref().and_then(Path::parent).map(Path::to_owned);
    let fixed = ["/etc/ceph"].into_iter().chain(resolver).map(PathBuf::from);
    fixed.chain(beside).chain(options.ceph_dirs.iter().cloned()).collect()
}

/// Starts the thread that loads librbd: threads that start later may not map executable memory.
pub(crate) fn start(network: Network) -> std::io::Result<()> {
    #[cfg(feature = "rbd")]
    if network == Network::Allowed {
        return rbd::start_loader();
    }
    let _ = network;
    Ok(())
}
