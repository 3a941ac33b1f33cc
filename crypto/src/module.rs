//! `accel_crypto_*` and `bdev_crypto_*`.

use std::rc::Rc;
use std::sync::Arc;

use bdev::life;
use bdev::method::{Answer, Call, DecodeFailure, LocalFuture, Method, MethodError, Named, Params};
use bdev::module::{Base, Description, Entry, Waiting};
use bdev::{Bdev, BdevModule, Claim, Error, Host};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tracing::error;
use zeroize::Zeroizing;

use crate::disk::{CryptoDisk, CryptoOptions};
use crate::keys::{Key, KeyError, Keys};

const NAME: &str = "crypto";
const CREATE: &str = "bdev_crypto_create";
const CREATE_KEY: &str = "accel_crypto_key_create";

const PARSE: DecodeFailure = DecodeFailure { code: -32700, text: "spdk_json_decode_object failed" };
const PARSE_DISK: DecodeFailure =
    DecodeFailure { code: -32700, text: "Failed to decode crypto disk create parameters." };

/// SPDK's module `crypto`, with the keys of its module `accel`.
#[derive(Default)]
pub struct CryptoModule {
    keys: Rc<Keys>,
}

impl BdevModule for CryptoModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        let [create, destroy, get, disk] = [(); 4].map(|()| Rc::clone(&self.keys));
        vec![
            Method::parsed(CREATE_KEY, parse_key, move |_, _, key| {
                std::future::ready(create_key(&create, key))
            }),
            Method::new("accel_crypto_key_destroy", move |host, params| {
                std::future::ready(destroy_key(&destroy, &*host, &params))
            }),
            Method::new("accel_crypto_keys_get", move |_, params| {
                std::future::ready(get_keys(&get, &params))
            }),
            Method::parsed(CREATE, parse_disk, move |host, params, request| {
                create_disk(Rc::clone(&disk), host, params, request)
            }),
            Method::new("bdev_crypto_delete", delete),
        ]
    }

    /// The keys, in clear, as SPDK saves them.
    fn config(&self) -> Vec<Call> {
        self.keys.all().iter().map(|key| Call::new(CREATE_KEY, shown(key))).collect()
    }
}

/// A key as SPDK shows and saves it.
fn shown(key: &Key) -> Value {
    let [data, tweak] = key.text();
    json!({
        "name": key.name(), "cipher": "AES_XTS", "key": data, "key2": tweak,
        "tweak_mode": "SIMPLE_LBA",
    })
}

#[derive(Deserialize, PartialEq)]
enum Cipher {
    #[serde(rename = "AES_CBC")]
    Cbc,
    #[serde(rename = "AES_XTS")]
    Xts,
}

#[derive(Default, Deserialize, PartialEq)]
enum TweakMode {
    #[default]
    #[serde(rename = "SIMPLE_LBA")]
    SimpleLba,
    #[serde(
        rename = "JOIN_NEG_LBA_WITH_LBA",
        alias = "INCR_512_FULL_LBA",
        alias = "INCR_512_UPPER_LBA"
    )]
    Other,
}

fn refused(rc: i32) -> MethodError {
    MethodError::invalid_params(format!("failed to create DEK, rc -{rc}"))
}

/// Decodes a key. The reason of a refusal names no part of the key.
fn parse_key(params: &Params) -> Result<Arc<Key>, MethodError> {
    #[derive(Deserialize)]
    struct Create {
        cipher: Cipher,
        key: String,
        #[serde(default)]
        key2: String,
        #[serde(default)]
        tweak_mode: TweakMode,
        name: String,
    }
    let p: Create = params.decode(PARSE)?;
    let (name, data, tweak) = (p.name, Zeroizing::new(p.key), Zeroizing::new(p.key2));
    if p.cipher != Cipher::Xts || p.tweak_mode != TweakMode::SimpleLba || name.is_empty() {
        error!("{CREATE_KEY}: {name:?}: only AES_XTS with SIMPLE_LBA and a name is supported");
        return Err(refused(libc::EINVAL));
    }
    Key::new(name, data, tweak).map_err(|_| {
        error!("{CREATE_KEY}: key and key2 must differ and have 16 or 32 bytes in hexadecimal");
        refused(libc::EINVAL)
    })
}

fn create_key(keys: &Keys, key: Arc<Key>) -> Answer {
    let name = key.name().to_owned();
    match keys.add(key) {
        Ok(()) => Ok(true.into()),
        Err(KeyError::Exists) => {
            error!("{CREATE_KEY}: the name {name:?} is in use");
            Err(refused(libc::EEXIST))
        }
        Err(KeyError::Invalid) => Err(refused(libc::EINVAL)),
    }
}

fn destroy_key(keys: &Keys, host: &dyn Host, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Destroy {
        key_name: String,
    }
    let Destroy { key_name } = params.decode(PARSE)?;
    if keys.get(&key_name).is_none() {
        return Err(MethodError::invalid_params("No key object found"));
    }
    let registry = host.registry();
    let live = registry.entries_of::<CryptoEntry>().into_iter().map(|(_, entry)| entry.uses());
    let waiting = registry.waiting_of::<Request>().into_iter().map(|(_, request)| request.uses());
    // SPDK answers true, and goes on to use the key.
    if let Some((_, bdev)) = live.chain(waiting).find(|(key, _)| *key == key_name) {
        error!("{}: bdev {bdev} uses the key {key_name:?}", params.method());
        return Err(MethodError::errno(libc::EBUSY));
    }
    keys.remove(&key_name);
    Ok(true.into())
}

fn get_keys(keys: &Keys, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Get {
        key_name: Option<String>,
    }
    let Get { key_name } = params.decode(PARSE)?;
    let all = match key_name {
        None => keys.all(),
        Some(name) => {
            let none = || MethodError::invalid_params("key was not found");
            vec![keys.get(&name).ok_or_else(none)?]
        }
    };
    Ok(all.iter().map(|key| shown(key)).collect())
}

/// The parameters of a crypto bdev.
struct Given {
    name: String,
    base: String,
    key: String,
}

fn parse_disk(params: &Params) -> Result<Given, MethodError> {
    #[derive(Deserialize)]
    struct Create {
        base_bdev_name: String,
        name: String,
        key_name: Option<String>,
    }
    let p: Create = params.decode(PARSE_DISK)?;
    let key = p.key_name.ok_or_else(|| MethodError::internal("No key was found"))?;
    if p.name.is_empty() {
        error!("{CREATE}: the name is empty");
        return Err(MethodError::errno(libc::EINVAL));
    }
    Ok(Given { name: p.name, base: p.base_bdev_name, key })
}

async fn create_disk(keys: Rc<Keys>, host: Rc<dyn Host>, params: Params, given: Given) -> Answer {
    let Some(key) = keys.get(&given.key) else {
        return Err(MethodError::invalid_params("Key was not found"));
    };
    let name = given.name.clone();
    let request = Request { given, key, params: params.as_given() };
    life::attach(&host, CREATE, Rc::new(request)).await.map_err(MethodError::errno)?;
    Ok(name.into())
}

async fn delete(host: Rc<dyn Host>, params: Params) -> Answer {
    let named: Result<Named, _> = params.decode(DecodeFailure::INVALID_PARAMETERS);
    named?;
    life::delete(host, params, NAME).await
}

/// A crypto bdev that waits for its base, or will do so again.
struct Request {
    given: Given,
    key: Arc<Key>,
    params: Map<String, Value>,
}

impl Request {
    /// The names of the key and of the bdev that uses it.
    fn uses(&self) -> (String, String) {
        (self.key.name().to_owned(), self.given.name.clone())
    }
}

impl Waiting for Request {
    fn module(&self) -> &'static str {
        NAME
    }

    fn name(&self) -> Option<&str> {
        Some(&self.given.name)
    }

    fn base(&self) -> &str {
        &self.given.base
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
            let (name, key) = (self.given.name.clone(), Arc::clone(&self.key));
            let disk = CryptoDisk::create(CryptoOptions { name, base: bdev, key, uuid: None })?;
            Ok(vec![Rc::new(CryptoEntry { disk, request: self, _claim: claim }) as _])
        })
    }
}

struct CryptoEntry {
    disk: Arc<CryptoDisk>,
    request: Rc<Request>,
    /// The claim on the base.
    _claim: Claim,
}

impl CryptoEntry {
    fn uses(&self) -> (String, String) {
        self.request.uses()
    }
}

impl Entry for CryptoEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let about = json!({
            "base_bdev_name": self.disk.base().name(), "name": self.disk.name(),
            "key_name": self.disk.key().name(),
        });
        Description::specific(NAME, about)
    }

    fn config(&self) -> Vec<Call> {
        self.request.config()
    }

    fn base_gone(&self) -> Option<Rc<dyn Waiting>> {
        Some(Rc::clone(&self.request) as _)
    }
}
