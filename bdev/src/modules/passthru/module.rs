//! `bdev_passthru_*`.

use std::rc::Rc;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::Passthru;
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

const NAME: &str = "passthru";
const CREATE: &str = "bdev_passthru_create";

/// SPDK's module `passthru`.
pub(crate) struct Module;

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![
            Method::parsed(CREATE, parse, create),
            Method::new("bdev_passthru_delete", |host, params| life::delete(host, params, NAME)),
        ]
    }
}

/// The parameters of a passthru bdev.
struct Request {
    name: String,
    base: String,
    /// The given UUID; without one, the UUID is derived when the base exists.
    uuid: Option<Uuid>,
    params: Map<String, Value>,
}

fn parse(params: &Params) -> Result<Request, MethodError> {
    #[derive(Deserialize)]
    struct Create {
        base_bdev_name: String,
        name: String,
        uuid: Option<GivenUuid>,
    }
    let p: Create = params.decode(DecodeFailure::INTERNAL)?;
    check_name(&p.name).map_err(|e| MethodError::of(params.method(), &e))?;
    Ok(Request {
        name: p.name,
        base: p.base_bdev_name,
        uuid: given(p.uuid),
        params: params.as_given(),
    })
}

async fn create(host: Rc<dyn Host>, params: Params, request: Request) -> Answer {
    let name = request.name.clone();
    life::attach(&host, params.method(), Rc::new(request)).await.map_err(MethodError::errno)?;
    Ok(name.into())
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
            let disk = Passthru::create(self.name.clone(), bdev, self.uuid)?;
            Ok(vec![Rc::new(PassthruEntry { disk, request: self, _claim: claim }) as _])
        })
    }
}

struct PassthruEntry {
    disk: Arc<Passthru>,
    request: Rc<Request>,
    /// The claim on the base.
    _claim: Claim,
}

impl Entry for PassthruEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let (name, base) = (self.disk.0.name(), self.disk.0.base().name());
        let about = json!({ "name": name, "base_bdev_name": base });
        Description::specific(NAME, about)
    }

    fn config(&self) -> Vec<Call> {
        self.request.config()
    }

    fn base_gone(&self) -> Option<Rc<dyn Waiting>> {
        Some(Rc::clone(&self.request) as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::test_host::TestHost;

    fn params(uuid: Option<&str>) -> Value {
        let mut params = json!({ "base_bdev_name": "A", "name": "P" });
        uuid.into_iter().for_each(|uuid| params["uuid"] = uuid.into());
        params
    }

    #[test]
    fn it_is_shown_as_in_spdk_and_saved_as_it_was_given() {
        let host = TestHost::new([]);
        host.null("A", 1);
        assert_eq!(host.call(CREATE, params(None)), Ok("P".into()));
        let about = json!({ "passthru": { "name": "P", "base_bdev_name": "A" } });
        assert_eq!(host.driver_specific("P"), about);
        assert_eq!(host.claim_type("A"), Some("exclusive_write"));
        assert_eq!(host.config()[1], json!([CREATE, params(None)]));
        let base = json!({ "base_bdev_name": "A" });
        let code = host.call(CREATE, base).map_err(|e| (e.code, e.text));
        assert_eq!(code, Err((-32603, "spdk_json_decode_object failed".into())));
    }

    /// The derived UUID is the SHA-1 result for the namespace and the 16 bytes of UUID 1.
    #[test]
    fn its_uuid_is_given_or_derived_from_the_base() {
        const DERIVED: &str = "d5f2acf0-bee6-5315-99d6-b610207ad5d3";
        const GIVEN: &str = "11111111-2222-4333-8444-555555555555";
        for (uuid, expected) in [(None, DERIVED), (Some(GIVEN), GIVEN)] {
            let host = TestHost::new([]);
            host.call(CREATE, params(uuid)).unwrap();
            assert_eq!(host.registry().is_taken(GIVEN), uuid.is_some());
            host.null("A", 1);
            assert_eq!(host.registry().bdev(expected).unwrap().name(), "P");
        }
    }

    #[test]
    fn it_waits_for_its_base_and_for_the_next_one() {
        let host = TestHost::new([]);
        host.call(CREATE, params(None)).unwrap();
        assert_eq!(host.call(CREATE, params(None)), Err(MethodError::errno(libc::EEXIST)));
        for uuid in [1, 2] {
            host.null("A", uuid);
            assert_eq!(host.names(), ["P", "A"]);
            host.call("bdev_null_delete", json!({ "name": "A" })).unwrap();
            assert!(host.names().is_empty());
        }
        let named = json!({ "name": "P" });
        assert_eq!(host.call("bdev_passthru_delete", named.clone()), Ok(true.into()));
        assert!(host.config().is_empty());
        let none = Err(MethodError::errno(libc::ENODEV));
        assert_eq!(host.call("bdev_passthru_delete", named), none);
    }
}
