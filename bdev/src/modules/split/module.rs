//! `bdev_split_*`.

use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::json;
use tracing::{error, warn};

use super::Part;
use crate::contract::Bdev;
use crate::control::Claim;
use crate::control::Host;
use crate::control::life;
use crate::control::method::{
    Answer, Call, DecodeFailure, LocalFuture, Method, MethodError, Params, strerror,
};
use crate::control::module::{Base, BdevModule, Description, Entry, Waiting};
use crate::control::{BdevId, Errno};
use crate::error::Error;

const NAME: &str = "split";
/// Limit on the parts of a base, so that creating and removing them is quick.
const PARTS_MAX: u32 = 1024;
pub(super) const CREATE: &str = "bdev_split_create";

/// SPDK's module `split`.
pub(crate) struct Module;

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![Method::parsed(CREATE, parse, create), Method::new("bdev_split_delete", delete)]
    }
}

/// The parameters of a split.
#[derive(Debug, Deserialize)]
struct Request {
    base_bdev: String,
    split_count: u32,
    /// 0: all parts together are as large as possible.
    #[serde(default)]
    split_size_mb: u64,
}

/// SPDK's answer to a split that fails with a positive errno.
fn failed(count: u32, base: &str, errno: Errno) -> MethodError {
    let failed = format!("Failed to create {count} split bdevs from '{base}'");
    MethodError::invalid_params(format!("{failed}: {}", strerror(errno)))
}

fn parse(params: &Params) -> Result<Request, MethodError> {
    let request: Request = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let Request { base_bdev: base, split_count: count, .. } = &request;
    let invalid = |reason: &str| {
        error!("{CREATE}: {base} cannot be split: {reason}");
        failed(*count, base, libc::EINVAL)
    };
    if *count == 0 {
        return Err(invalid("split_count is 0"));
    }
    request.size_bytes().ok_or_else(|| invalid("split_size_mb is out of range"))?;
    Ok(request)
}

async fn create(host: Rc<dyn Host>, _: Params, request: Request) -> Answer {
    let (count, base) = (request.split_count, request.base_bdev.clone());
    let parts = split(&host, request).await;
    Ok(parts.map_err(|errno| failed(count, &base, errno))?.into())
}

async fn split(host: &Rc<dyn Host>, request: Request) -> Result<Vec<String>, Errno> {
    let base = &request.base_bdev;
    if !find(&**host, base).is_empty() {
        error!("{CREATE}: {base:?} is split already, or a split waits for it");
        return Err(libc::EEXIST);
    }
    life::attach(host, CREATE, Rc::new(request)).await
}

async fn delete(host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Delete {
        base_bdev: String,
    }
    let Delete { base_bdev } = params.decode(DecodeFailure::INVALID_PARAMETERS)?;
    let ids = find(&*host, &base_bdev);
    if ids.is_empty() {
        error!("{}: {base_bdev:?} is not split", params.method());
        return Err(MethodError::invalid_params(strerror(libc::ENOENT)));
    }
    life::remove(&host, &params, &ids).await;
    Ok(true.into())
}

/// Returns the parts of a base, by the name with which it was split, or the request that waits for
/// it.
fn find(host: &dyn Host, base: &str) -> Vec<BdevId> {
    let waiting = host.registry().waiting_of::<Request>().into_iter();
    let parts = host.registry().entries_of::<PartEntry>().into_iter();
    let all = waiting.chain(parts.map(|(id, part)| (id, Rc::clone(&part.request))));
    all.filter(|(_, request)| request.base_bdev == base).map(|(id, _)| id).collect()
}

impl Request {
    /// The size of each part, 0 if it depends on the base. `None` if it is out of range.
    fn size_bytes(&self) -> Option<u64> {
        self.split_size_mb.checked_mul(1 << 20)
    }

    /// Returns the number of parts of the base, and the number of blocks of each.
    fn geometry(&self, base: &dyn Bdev) -> Result<(u32, u64), Error> {
        let (name, block_size) = (base.name(), u64::from(base.block_size()));
        let invalid =
            |reason: &str| Err(Error::Invalid(format!("{name} cannot be split: {reason}")));
        let size = match self.size_bytes() {
            Some(0) => base.num_blocks() / u64::from(self.split_count),
            Some(bytes) if bytes.is_multiple_of(block_size) => bytes / block_size,
            Some(_) => return invalid("split_size_mb is not a multiple of the block size"),
            None => return invalid("split_size_mb is out of range"),
        };
        // SPDK creates no part if the size is too large, and blocks another split of the base.
        let Some(max @ 1..) = base.num_blocks().checked_div(size) else {
            return invalid("the base is too small for one part");
        };
        let count = u32::try_from(max).unwrap_or(u32::MAX).min(self.split_count);
        if count > PARTS_MAX {
            return invalid("too many parts; the limit is 1024");
        }
        if count < self.split_count {
            warn!("{name}: only {count} of {} split parts fit", self.split_count);
        }
        Ok((count, size))
    }
}

impl Waiting for Request {
    fn module(&self) -> &'static str {
        NAME
    }

    fn base(&self) -> &str {
        &self.base_bdev
    }

    fn config(&self) -> Vec<Call> {
        let Self { base_bdev, split_count, split_size_mb } = self;
        let params = json!({
            "base_bdev": base_bdev, "split_count": split_count, "split_size_mb": split_size_mb,
        });
        vec![Call::new(CREATE, params)]
    }

    fn wake<'a>(
        self: Rc<Self>,
        _host: &'a Rc<dyn Host>,
        Base { bdev, claim }: Base,
    ) -> LocalFuture<'a, Result<Vec<Rc<dyn Entry>>, Error>> {
        Box::pin(async move {
            let (count, size) = self.geometry(&*bdev)?;
            let claim = Rc::new(claim);
            let part = |number: u32| {
                let (name, offset) = (format!("{}p{number}", self.base_bdev), u64::from(number));
                let part = Part::create(name, Arc::clone(&bdev), offset * size, size)?;
                let (request, _claim) = (Rc::clone(&self), Rc::clone(&claim));
                Ok(Rc::new(PartEntry { part, request, _claim }) as _)
            };
            (0..count).map(part).collect()
        })
    }
}

struct PartEntry {
    part: Arc<Part>,
    request: Rc<Request>,
    /// The claim on the base, which all parts share.
    _claim: Rc<Claim>,
}

impl Entry for PartEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.part) as _
    }

    fn describe(&self) -> Description {
        let (base, offset) = (self.part.wrapped.base().name(), self.part.offset_blocks);
        Description::specific(NAME, json!({ "base_bdev": base, "offset_blocks": offset }))
    }

    fn config(&self) -> Vec<Call> {
        // One call creates all parts.
        if self.part.offset_blocks == 0 { self.request.config() } else { vec![] }
    }

    fn base_resized(&self) -> bool {
        false
    }
}
