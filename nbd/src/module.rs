//! `bdev_nbd_create` and `bdev_nbd_delete`. SPDK has no such module.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::method::{Answer, Call, DecodeFailure, GivenUuid, Method, MethodError, Params, given};
use bdev::module::{BdevModule, Description, Entry};
use bdev::{Aside, Bdev, Error, Host, life};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::{error, info};

use crate::disk::{NbdDisk, NbdOptions};
use crate::uri::NbdUri;

const NAME: &str = "nbd";
const CREATE: &str = "bdev_nbd_create";

/// The maximum number of attempts to connect at the same time, including those that hang after
/// their RPC has failed.
const CONNECTING_MAX: usize = 64;

/// The longest time that an RPC waits for a connection.
const LIMIT: Duration = Duration::from_secs(30);

/// The interval of attempts to connect to a server that is away.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);

/// The default number of connections of a disk, for servers that allow several.
const CONNECTIONS: u32 = 4;

/// Disks of NBD servers.
pub struct NbdModule {
    connecting: Aside,
    /// Whether the process may connect to other hosts.
    network: bool,
}

impl NbdModule {
    /// Makes the module. `network`: the process may connect over TCP.
    #[must_use]
    pub fn new(network: bool) -> Self {
        Self { connecting: Aside::new("NBD servers", CONNECTING_MAX), network }
    }
}

impl BdevModule for NbdModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed(CREATE, parse, move |host, params, options| {
                create(Rc::clone(&self), host, params, options)
            }),
            Method::new("bdev_nbd_delete", |host, params| life::delete(host, params, NAME)),
        ]
    }
}

struct NbdEntry {
    disk: Arc<NbdDisk>,
    params: Map<String, Value>,
}

impl Entry for NbdEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let about = json!({
            "uri": self.disk.uri().to_string(),
            "connected": self.disk.is_connected(),
            "connections": self.disk.connections(),
        });
        Description::specific(NAME, about)
    }

    fn config(&self) -> Vec<Call> {
        vec![Call { method: CREATE, params: self.params.clone() }]
    }

    fn deleting(&self) {
        self.disk.end();
    }
}

#[derive(Deserialize)]
struct Create {
    name: String,
    uri: String,
    /// In bytes.
    block_size: Option<u32>,
    #[serde(default)]
    readonly: bool,
    uuid: Option<GivenUuid>,
    /// In seconds.
    reconnect_delay_sec: Option<u32>,
    connections: Option<u32>,
}

/// Logs the reason of a failure.
fn failed(e: &Error) -> MethodError {
    MethodError::of(CREATE, e)
}

/// Decodes the parameters, and refuses those that are out of range.
fn parse(params: &Params) -> Result<NbdOptions, MethodError> {
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    let options = NbdOptions {
        uri: NbdUri::parse(&p.uri).map_err(|e| failed(&e))?,
        name: p.name,
        block_size: p.block_size,
        readonly: p.readonly,
        uuid: given(p.uuid),
        reconnect_delay: p.reconnect_delay_sec.map(|s| Duration::from_secs(s.into())),
        reconnect_interval: RECONNECT_INTERVAL,
        connections: p.connections.unwrap_or(CONNECTIONS),
    };
    options.check().map_err(|e| failed(&e))?;
    Ok(options)
}

async fn create(
    module: Rc<NbdModule>,
    host: Rc<dyn Host>,
    params: Params,
    options: NbdOptions,
) -> Answer {
    let NbdOptions { name, uri, uuid, .. } = options.clone();
    if uri.needs_network() && !module.network {
        error!(
            "{CREATE}: {uri}: connections to other hosts are off; start vhost with --network on"
        );
        return Err(MethodError::errno(libc::EPERM));
    }
    let reserved = host.registry().reserve(name, uuid).map_err(MethodError::errno)?;
    // Connecting may wait for the server.
    params.let_next_start();
    let connect = move || NbdDisk::connect(options);
    let disk = module.connecting.run(&host, LIMIT, connect).await.map_err(|e| failed(&e))?;
    let name = disk.name().to_owned();
    info!("bdev {name}: connected to {uri}, connections: {}", disk.connections());
    life::add(&host, reserved, Rc::new(NbdEntry { disk, params: params.as_given() })).await?;
    Ok(name.into())
}
