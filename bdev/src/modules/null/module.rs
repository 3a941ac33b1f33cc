//! `bdev_null_*`.

use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::error;

use super::{Null, NullOptions};
use crate::contract::Bdev;
use crate::control::Host;
use crate::control::life;
use crate::control::method::{
    Answer, Call, DecodeFailure, GivenUuid, Method, MethodError, Params, given,
};
use crate::control::module::{BdevModule, Description, Entry};
use crate::modules::blocks::{Blocks, tell_of_topology};
use crate::topology::Topology;

const NAME: &str = "null";
const CREATE: &str = "bdev_null_create";

/// SPDK's module `null`.
pub(crate) struct Module;

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed(CREATE, parse, create),
            Method::new("bdev_null_delete", |host, params| life::delete(host, params, NAME)),
            Method::parsed("bdev_null_resize", parse_resize, resize),
        ]
    }
}

struct NullEntry {
    disk: Arc<Null>,
    params: Map<String, Value>,
}

impl Entry for NullEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        Description { hints: self.params.clone(), ..Description::default() }
    }

    fn config(&self) -> Vec<Call> {
        let mut params = self.params.clone();
        params.insert("num_blocks".into(), self.disk.num_blocks().into());
        vec![Call { method: CREATE, params }]
    }
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "known, and without an effect here")]
struct Create {
    name: String,
    num_blocks: u64,
    block_size: u32,
    uuid: Option<GivenUuid>,
    physical_block_size: Option<u32>,
    md_size: Option<u32>,
    dif_type: Option<i32>,
    dif_is_head_of_md: Option<bool>,
    dif_pi_format: Option<u32>,
    preferred_write_alignment: Option<u32>,
    preferred_write_granularity: Option<u32>,
    optimal_write_size: Option<u32>,
    preferred_unmap_alignment: Option<u32>,
    preferred_unmap_granularity: Option<u32>,
}

impl Create {
    fn topology(&self) -> Topology {
        Topology {
            physical_block_size: self.physical_block_size.unwrap_or(0),
            min_io_blocks: self.preferred_write_granularity.unwrap_or(0),
            optimal_io_blocks: self.optimal_write_size.unwrap_or(0),
        }
    }
}

fn parse(params: &Params) -> Result<Create, MethodError> {
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    Blocks {
        name: &p.name,
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        topology: p.topology(),
        md_size: p.md_size,
        dif_type: p.dif_type,
    }
    .check(params.method())?;
    Ok(p)
}

async fn create(host: Rc<dyn Host>, params: Params, p: Create) -> Answer {
    let (method, topology) = (params.method(), p.topology());
    let reserved = host.registry().reserve(p.name, given(p.uuid)).map_err(MethodError::errno)?;
    let options = NullOptions {
        name: reserved.name.clone(),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        uuid: Some(reserved.uuid),
    };
    let disk = Null::with_topology(options, topology).map_err(|e| MethodError::of(method, &e))?;
    tell_of_topology(method, &*disk);
    let name = disk.name().to_owned();
    let params = params.as_named(&name, reserved.uuid);
    life::add(&host, reserved, Rc::new(NullEntry { disk, params })).await?;
    Ok(name.into())
}

struct Resize {
    name: String,
    bytes: u64,
}

fn parse_resize(params: &Params) -> Result<Resize, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        name: String,
        /// The new size in MiB.
        new_size: u64,
    }
    let Given { name, new_size } = params.decode(DecodeFailure::INTERNAL)?;
    let bytes = new_size.checked_mul(1 << 20).ok_or_else(|| {
        error!("{}: {name}: {new_size} MiB are too large", params.method());
        MethodError::errno(libc::EINVAL)
    })?;
    Ok(Resize { name, bytes })
}

async fn resize(host: Rc<dyn Host>, params: Params, p: Resize) -> Answer {
    let method = params.method();
    let registry = host.registry();
    if registry.id(&p.name).is_none() {
        return Err(MethodError::errno(libc::ENODEV));
    }
    let Some(entry) = registry.entry::<NullEntry>(&p.name) else {
        error!("{method}: {} is not a null bdev", p.name);
        return Err(MethodError::errno(libc::EINVAL));
    };
    let num_blocks = p.bytes / u64::from(entry.disk.block_size());
    entry.disk.resize(num_blocks).map_err(|e| MethodError::of(method, &e))?;
    life::resized(&host, &entry.bdev());
    Ok(true.into())
}
