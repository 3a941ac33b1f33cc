//! `bdev_malloc_*`.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Malloc, MallocOptions};
use crate::contract::Bdev;
use crate::control::Host;
use crate::control::Registry;
use crate::control::life;
use crate::control::method::{
    Answer, Call, DecodeFailure, GivenUuid, Method, MethodError, Params, given,
};
use crate::control::module::{BdevModule, Description, Entry};
use crate::modules::blocks::{Blocks, tell_of_topology};
use crate::topology::Topology;

const NAME: &str = "malloc";
const CREATE: &str = "bdev_malloc_create";

/// SPDK's module `malloc`.
#[derive(Default)]
pub(crate) struct Module {
    /// The number of the next bdev without a name.
    next_number: Cell<u64>,
}

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed(CREATE, parse, move |host, params, create| {
                self::create(Rc::clone(&self), host, params, create)
            }),
            Method::new("bdev_malloc_delete", |host, params| life::delete(host, params, NAME)),
        ]
    }
}

impl Module {
    fn next_name(&self, registry: &Registry) -> String {
        loop {
            let number = self.next_number.replace(self.next_number.get() + 1);
            let name = format!("Malloc{number}");
            if !registry.is_taken(&name) {
                return name;
            }
        }
    }
}

struct MallocEntry {
    disk: Arc<Malloc>,
    params: Map<String, Value>,
}

impl Entry for MallocEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let numa_id = self.params.get("numa_id").cloned().unwrap_or((-1).into());
        let fields = Map::from_iter([("numa_id".to_owned(), numa_id)]);
        Description { fields, ..Description::default() }
    }

    fn config(&self) -> Vec<Call> {
        vec![Call { method: CREATE, params: self.params.clone() }]
    }
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "known, and without an effect here")]
struct Create {
    name: Option<String>,
    num_blocks: u64,
    block_size: u32,
    uuid: Option<GivenUuid>,
    physical_block_size: Option<u32>,
    optimal_io_boundary: Option<u32>,
    md_size: Option<u32>,
    md_interleave: Option<bool>,
    dif_type: Option<i32>,
    dif_is_head_of_md: Option<bool>,
    dif_pi_format: Option<u32>,
    numa_id: Option<i32>,
}

impl Create {
    fn topology(&self) -> Topology {
        Topology {
            physical_block_size: self.physical_block_size.unwrap_or(0),
            min_io_blocks: 0,
            optimal_io_blocks: self.optimal_io_boundary.unwrap_or(0),
        }
    }
}

fn parse(params: &Params) -> Result<Create, MethodError> {
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    Blocks {
        // A bdev without a name gets one when it is created.
        name: p.name.as_deref().unwrap_or(NAME),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        topology: p.topology(),
        md_size: p.md_size,
        dif_type: p.dif_type,
    }
    .check(params.method())?;
    Ok(p)
}

async fn create(module: Rc<Module>, host: Rc<dyn Host>, params: Params, p: Create) -> Answer {
    let topology = p.topology();
    let registry = host.registry();
    let name = p.name.unwrap_or_else(|| module.next_name(registry));
    let reserved = registry.reserve(name, given(p.uuid)).map_err(MethodError::errno)?;
    let options = MallocOptions {
        name: reserved.name.clone(),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        uuid: Some(reserved.uuid),
    };
    let disk = host.blocking(move || Malloc::with_topology(options, topology)).await;
    let disk = disk.map_err(|e| MethodError::of(params.method(), &e))?;
    tell_of_topology(params.method(), &*disk);
    let name = disk.name().to_owned();
    let params = params.as_named(&name, reserved.uuid);
    life::add(&host, reserved, Rc::new(MallocEntry { disk, params })).await?;
    Ok(name.into())
}
