//! `bdev_malloc_*` and `bdev_null_*`: disks without a file.

use std::rc::Rc;

use bdev::{Bdev, Malloc, MallocOptions, Null, NullOptions, Topology};
use rpc::{DecodeFailure, Params, Phases, RpcError};
use serde::Deserialize;
use tracing::{error, warn};

use super::bdev::{delete, tell_of_size};
use super::{Answer, App, GivenUuid, Methods, as_given, bdev_error, blocking, given};
use crate::bdevs::{Disk, Kind};

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add("bdev_malloc_create", Phases::Runtime, malloc_create);
    methods.add("bdev_malloc_delete", Phases::Runtime, |app, params| {
        delete(app, params, Kind::Malloc)
    });
    methods.add_plain("bdev_null_create", Phases::Runtime, null_create);
    methods.add("bdev_null_delete", Phases::Runtime, |app, params| delete(app, params, Kind::Null));
    methods.add_plain("bdev_null_resize", Phases::Runtime, null_resize);
}

/// Parameters that would change how data is laid out. They are known, and refused unless they ask
/// for what is so anyway.
struct Layout {
    md_size: Option<u32>,
    dif_type: Option<i32>,
}

impl Layout {
    fn check(&self, method: &str) -> Result<(), RpcError> {
        let unsupported =
            [("md_size", self.md_size.map(i64::from)), ("dif_type", self.dif_type.map(i64::from))];
        for (name, value) in unsupported {
            if let Some(value) = value.filter(|value| *value != 0) {
                error!("{method}: {name} {value} is not supported, only 0 is");
                return Err(RpcError::errno(libc::EINVAL));
            }
        }
        Ok(())
    }
}

/// Logs what guests will not be told, as it does not go with the block sizes.
fn tell_of_topology(method: &str, bdev: &dyn Bdev) {
    let (said, used) = (bdev.topology(), bdev.topology().settled(bdev.block_size()));
    for (what, said, used) in [
        ("physical block size", said.physical_block_size, used.physical_block_size),
        ("preferred write granularity", said.min_io_blocks, used.min_io_blocks),
        ("optimal I/O size", said.optimal_io_blocks, used.optimal_io_blocks),
    ] {
        if said != 0 && said != used {
            warn!("{method}: {}: guests are told {what} {used}, not {said}", bdev.name());
        }
    }
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "known, and without an effect here")]
struct MallocCreate {
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

async fn malloc_create(app: Rc<App>, params: Params) -> Answer {
    let method = params.method();
    let p: MallocCreate = params.decode(DecodeFailure::INTERNAL)?;
    Layout { md_size: p.md_size, dif_type: p.dif_type }.check(method)?;
    let reserved =
        app.bdevs.reserve(p.name, given(p.uuid), as_given(&params)).map_err(RpcError::errno)?;
    let options = MallocOptions {
        name: reserved.name.clone(),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        uuid: Some(reserved.uuid),
    };
    let topology = Topology {
        physical_block_size: p.physical_block_size.unwrap_or(0),
        min_io_blocks: 0,
        optimal_io_blocks: p.optimal_io_boundary.unwrap_or(0),
    };
    let disk = blocking(move || Malloc::with_topology(options, topology)).await;
    let disk = disk.map_err(|e| bdev_error(method, &e))?;
    tell_of_topology(method, &*disk);
    let name = disk.name().to_owned();
    reserved.complete(Disk::Malloc(disk));
    Ok(name.into())
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "known, and without an effect here")]
struct NullCreate {
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

fn null_create(app: &App, params: &Params) -> Answer {
    let method = params.method();
    let p: NullCreate = params.decode(DecodeFailure::INTERNAL)?;
    Layout { md_size: p.md_size, dif_type: p.dif_type }.check(method)?;
    let reserved = app
        .bdevs
        .reserve(Some(p.name), given(p.uuid), as_given(params))
        .map_err(RpcError::errno)?;
    let options = NullOptions {
        name: reserved.name.clone(),
        num_blocks: p.num_blocks,
        block_size: p.block_size,
        uuid: Some(reserved.uuid),
    };
    let topology = Topology {
        physical_block_size: p.physical_block_size.unwrap_or(0),
        min_io_blocks: p.preferred_write_granularity.unwrap_or(0),
        optimal_io_blocks: p.optimal_write_size.unwrap_or(0),
    };
    let disk = Null::with_topology(options, topology).map_err(|e| bdev_error(method, &e))?;
    tell_of_topology(method, &*disk);
    let name = disk.name().to_owned();
    reserved.complete(Disk::Null(disk));
    Ok(name.into())
}

fn null_resize(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Resize {
        name: String,
        /// In MiB.
        new_size: u64,
    }
    let method = params.method();
    let p: Resize = params.decode(DecodeFailure::INTERNAL)?;
    let disk = app.bdevs.disk(&p.name).ok_or_else(|| RpcError::errno(libc::ENODEV))?;
    let Disk::Null(disk) = disk else {
        error!("{method}: {} is not a null bdev", p.name);
        return Err(RpcError::errno(libc::EINVAL));
    };
    let num_blocks = p
        .new_size
        .checked_mul(1 << 20)
        .map(|bytes| bytes / u64::from(disk.block_size()))
        .ok_or_else(|| RpcError::errno(libc::EINVAL))?;
    disk.resize(num_blocks).map_err(|e| bdev_error(method, &e))?;
    tell_of_size(app, &(disk as _));
    Ok(true.into())
}
