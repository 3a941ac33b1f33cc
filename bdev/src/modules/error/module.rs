//! `bdev_error_*`.

use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;
use uuid::Uuid;

use super::{ErrorDisk, ErrorOptions, InjectedError, InjectedOp, Injection};
use crate::contract::Bdev;
use crate::control::Claim;
use crate::control::Host;
use crate::control::life;
use crate::control::method::{
    Answer, Call, DecodeFailure, GivenUuid, LocalFuture, Method, MethodError, Named, Params, given,
};
use crate::control::module::{Base, BdevModule, Description, Entry, Waiting};
use crate::error::Error;

const NAME: &str = "error";
const CREATE: &str = "bdev_error_create";

/// SPDK's module `error`.
pub(crate) struct Module;

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed(CREATE, parse, create),
            Method::new("bdev_error_delete", |host, params| life::delete(host, params, NAME)),
            Method::parsed("bdev_error_inject_error", parse_inject, inject),
            Method::new("bdev_error_resume_pending", resume_pending),
        ]
    }
}

/// The parameters of an error bdev.
struct Request {
    name: String,
    /// `None`: derived from the base's UUID.
    uuid: Option<Uuid>,
    base: String,
    params: Map<String, Value>,
}

impl Waiting for Request {
    fn module(&self) -> &'static str {
        NAME
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn uuid(&self) -> Option<Uuid> {
        self.uuid
    }

    fn base(&self) -> &str {
        &self.base
    }

    fn config(&self) -> Vec<Call> {
        vec![Call { method: CREATE, params: self.params.clone() }]
    }

    fn wake<'a>(
        self: Rc<Self>,
        _host: &'a Rc<dyn Host>,
        Base { bdev, claim }: Base,
    ) -> LocalFuture<'a, Result<Vec<Rc<dyn Entry>>, Error>> {
        Box::pin(async move {
            let (name, uuid) = (self.name.clone(), self.uuid);
            let disk = ErrorDisk::create(ErrorOptions { name, base: bdev, uuid })?;
            Ok(vec![Rc::new(ErrorEntry { disk, request: self, _claim: claim }) as _])
        })
    }
}

struct ErrorEntry {
    disk: Arc<ErrorDisk>,
    request: Rc<Request>,
    /// The claim on the base.
    _claim: Claim,
}

impl Entry for ErrorEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        Description::specific("error_disk", json!({ "base_bdev": self.disk.base().name() }))
    }

    /// With the UUID if the base's size has changed since it was derived.
    fn config(&self) -> Vec<Call> {
        let mut params = self.request.params.clone();
        let uuid = self.disk.uuid();
        if self.request.uuid.is_none() && uuid != super::uuid_on(&**self.disk.base()) {
            params.insert("uuid".into(), uuid.to_string().into());
        }
        vec![Call { method: CREATE, params }]
    }

    fn deleting(&self) {
        self.disk.abort_pending();
    }
}

fn parse(params: &Params) -> Result<Request, MethodError> {
    #[derive(Deserialize)]
    struct Create {
        base_name: String,
        uuid: Option<GivenUuid>,
    }
    let p: Create = params.decode(DecodeFailure::PARAMS)?;
    let (name, uuid) = (format!("EE_{}", p.base_name), given(p.uuid));
    Ok(Request { name, uuid, base: p.base_name, params: params.as_given() })
}

async fn create(host: Rc<dyn Host>, params: Params, request: Request) -> Answer {
    life::attach(&host, params.method(), Rc::new(request)).await.map_err(MethodError::errno)?;
    Ok(true.into())
}

fn find(host: &dyn Host, method: &str, name: &str) -> Result<Rc<ErrorEntry>, MethodError> {
    host.registry().entry(name).ok_or_else(|| {
        error!("{method}: no error bdev has this name: {name:?}");
        MethodError::errno(libc::ENODEV)
    })
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "virtio has one error for all of NVMe's")]
struct Inject {
    name: String,
    io_type: IoType,
    error_type: ErrorType,
    num: Option<u32>,
    #[serde(default)]
    queue_depth: u64,
    #[serde(default)]
    corrupt_offset: u64,
    #[serde(default)]
    corrupt_value: u8,
    nvme_sct: Option<u32>,
    nvme_sc: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum IoType {
    Clear,
    Read,
    Write,
    Unmap,
    Flush,
    All,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ErrorType {
    Failure,
    NvmeFailure,
    Pending,
    CorruptData,
    Nomem,
}

/// The bdev's name, and what to inject.
fn parse_inject(params: &Params) -> Result<(String, Injection), MethodError> {
    let p: Inject = params.decode(DecodeFailure::PARAMS)?;
    let op = match p.io_type {
        IoType::Clear => InjectedOp::Clear,
        IoType::Read => InjectedOp::Read,
        IoType::Write => InjectedOp::Write,
        IoType::Unmap => InjectedOp::Unmap,
        IoType::Flush => InjectedOp::Flush,
        IoType::All => InjectedOp::All,
    };
    let error = match p.error_type {
        ErrorType::Failure | ErrorType::NvmeFailure => InjectedError::Failure,
        ErrorType::Pending => InjectedError::Pending,
        ErrorType::CorruptData => {
            InjectedError::CorruptData { offset: p.corrupt_offset, value: p.corrupt_value }
        }
        ErrorType::Nomem => InjectedError::NoMemory,
    };
    let injection = Injection { op, error, count: p.num.unwrap_or(1), queue_depth: p.queue_depth };
    injection.check(&p.name).map_err(|e| MethodError::of(params.method(), &e))?;
    Ok((p.name, injection))
}

async fn inject(
    host: Rc<dyn Host>,
    params: Params,
    (name, injection): (String, Injection),
) -> Answer {
    let method = params.method();
    let injected = find(&*host, method, &name)?.disk.inject(injection);
    injected.map_err(|e| MethodError::of(method, &e))?;
    Ok(true.into())
}

async fn resume_pending(host: Rc<dyn Host>, params: Params) -> Answer {
    let named: Named = params.decode(DecodeFailure::PARAMS)?;
    find(&*host, params.method(), &named.name)?.disk.resume_pending();
    Ok(true.into())
}
