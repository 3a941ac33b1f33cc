//! `bdev_delay_*`.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;
use uuid::Uuid;

use super::{Delay, DelayOptions, Latency, LatencyKind};
use crate::contract::Bdev;
use crate::control::Claim;
use crate::control::Host;
use crate::control::life;
use crate::control::method::{
    Answer, Call, DecodeFailure, GivenUuid, LocalFuture, Method, MethodError, Params, given,
};
use crate::control::module::{Base, BdevModule, Description, Entry, Waiting};
use crate::error::Error;
use crate::geometry::check_name;

const NAME: &str = "delay";

/// SPDK's module `delay`.
pub(crate) struct Module;

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed("bdev_delay_create", parse, create),
            Method::new("bdev_delay_delete", |host, params| life::delete(host, params, NAME)),
            Method::new("bdev_delay_update_latency", update_latency),
        ]
    }
}

/// The parameters of a delay bdev.
struct Request {
    name: String,
    /// `None`: derived from the base's UUID.
    uuid: Option<Uuid>,
    base: String,
    /// The latencies that the bdev had when it existed last.
    latency: Cell<Latency>,
    params: Map<String, Value>,
}

impl Request {
    /// Returns the calls that create it with these latencies.
    ///
    /// `bdev_delay_update_latency` may set a p99 latency below its average, which
    /// `bdev_delay_create` refuses. Then the p99 is raised, and further calls set it again.
    fn config(&self, latency: Latency) -> Vec<Call> {
        let mut params = self.params.clone();
        params.extend(latency_params(raised(latency)));
        let mut calls = vec![Call { method: "bdev_delay_create", params }];
        for (kind, average_us, p99_us) in [
            ("p99_read", latency.avg_read_us, latency.p99_read_us),
            ("p99_write", latency.avg_write_us, latency.p99_write_us),
        ] {
            if p99_us < average_us {
                let name = &self.name;
                calls.push(Call::new(
                    "bdev_delay_update_latency",
                    json!({"delay_bdev_name": name, "latency_type": kind, "latency_us": p99_us}),
                ));
            }
        }
        calls
    }

    /// Makes the bdev, also with latencies that the create method rejects.
    fn make(&self, base: Arc<dyn Bdev>) -> Result<Arc<Delay>, Error> {
        let latency = self.latency.get();
        let disk = Delay::create(DelayOptions {
            name: self.name.clone(),
            base,
            latency: raised(latency),
            uuid: self.uuid,
        })?;
        disk.update_latency(LatencyKind::P99Read, latency.p99_read_us);
        disk.update_latency(LatencyKind::P99Write, latency.p99_write_us);
        Ok(disk)
    }
}

/// Raises each p99 to at least its average.
fn raised(latency: Latency) -> Latency {
    Latency {
        p99_read_us: latency.p99_read_us.max(latency.avg_read_us),
        p99_write_us: latency.p99_write_us.max(latency.avg_write_us),
        ..latency
    }
}

/// Returns the latencies under the parameter names of `bdev_delay_create`.
fn latency_params(latency: Latency) -> Map<String, Value> {
    let Latency { avg_read_us, p99_read_us, avg_write_us, p99_write_us } = latency;
    [
        ("avg_read_latency", avg_read_us),
        ("p99_read_latency", p99_read_us),
        ("avg_write_latency", avg_write_us),
        ("p99_write_latency", p99_write_us),
    ]
    .into_iter()
    .map(|(name, us)| (name.to_owned(), us.into()))
    .collect()
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
        self.config(self.latency.get())
    }

    fn wake<'a>(
        self: Rc<Self>,
        _host: &'a Rc<dyn Host>,
        Base { bdev, claim }: Base,
    ) -> LocalFuture<'a, Result<Vec<Rc<dyn Entry>>, Error>> {
        Box::pin(async move {
            let disk = self.make(bdev)?;
            Ok(vec![Rc::new(DelayEntry { disk, request: self, _claim: claim }) as _])
        })
    }
}

struct DelayEntry {
    disk: Arc<Delay>,
    request: Rc<Request>,
    /// The claim on the base.
    _claim: Claim,
}

impl Entry for DelayEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let mut about = Map::new();
        about.insert("name".into(), self.disk.name().into());
        about.insert("base_bdev_name".into(), self.disk.base().name().into());
        about.insert("uuid".into(), self.disk.uuid().to_string().into());
        about.extend(latency_params(self.disk.latency()));
        Description::specific(NAME, about.into())
    }

    fn config(&self) -> Vec<Call> {
        self.request.config(self.disk.latency())
    }

    fn base_gone(&self) -> Option<Rc<dyn Waiting>> {
        self.request.latency.set(self.disk.latency());
        Some(Rc::clone(&self.request) as _)
    }
}

fn parse(params: &Params) -> Result<Request, MethodError> {
    #[derive(Deserialize)]
    struct Create {
        name: String,
        base_bdev_name: String,
        avg_read_latency: u64,
        p99_read_latency: u64,
        avg_write_latency: u64,
        p99_write_latency: u64,
        uuid: Option<GivenUuid>,
    }
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    let latency = Latency {
        avg_read_us: p.avg_read_latency,
        p99_read_us: p.p99_read_latency,
        avg_write_us: p.avg_write_latency,
        p99_write_us: p.p99_write_latency,
    };
    let checked = check_name(&p.name).and_then(|()| latency.check(&p.name));
    checked.map_err(|e| MethodError::of(params.method(), &e))?;
    Ok(Request {
        uuid: given(p.uuid),
        base: p.base_bdev_name,
        latency: Cell::new(latency),
        params: params.as_given(),
        name: p.name,
    })
}

async fn create(host: Rc<dyn Host>, params: Params, request: Request) -> Answer {
    let name = request.name.clone();
    life::attach(&host, params.method(), Rc::new(request)).await.map_err(MethodError::errno)?;
    Ok(name.into())
}

async fn update_latency(host: Rc<dyn Host>, params: Params) -> Answer {
    #[derive(Deserialize)]
    struct Update {
        delay_bdev_name: String,
        latency_type: Type,
        latency_us: u64,
    }
    #[derive(Clone, Copy, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Type {
        AvgRead,
        P99Read,
        AvgWrite,
        P99Write,
    }
    let p: Update = params.decode(DecodeFailure::INTERNAL)?;
    let kind = match p.latency_type {
        Type::AvgRead => LatencyKind::AvgRead,
        Type::P99Read => LatencyKind::P99Read,
        Type::AvgWrite => LatencyKind::AvgWrite,
        Type::P99Write => LatencyKind::P99Write,
    };
    let registry = host.registry();
    if let Some(entry) = registry.entry::<DelayEntry>(&p.delay_bdev_name) {
        entry.disk.update_latency(kind, p.latency_us);
    } else if let Some(request) = registry.waiting_named::<Request>(&p.delay_bdev_name) {
        // A delay bdev that waits for its base has latencies too, and a configuration may set them.
        let mut latency = request.latency.get();
        *match p.latency_type {
            Type::AvgRead => &mut latency.avg_read_us,
            Type::P99Read => &mut latency.p99_read_us,
            Type::AvgWrite => &mut latency.avg_write_us,
            Type::P99Write => &mut latency.p99_write_us,
        } = p.latency_us;
        request.latency.set(latency);
    } else {
        error!("bdev_delay_update_latency: no delay bdev has this name: {:?}", p.delay_bdev_name);
        return Err(MethodError::invalid_params("The requested bdev does not exist."));
    }
    Ok(true.into())
}
