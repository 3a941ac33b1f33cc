//! The configuration file of `-c`: SPDK's JSON, replayed through the methods in two passes.
//!
//! The file is an object with `subsystems`, a list of `{"subsystem": …, "config": […]}`, whose
//! entries are calls `{"method": …, "params": …}` or lists of those. C comments are allowed. The
//! first pass carries out what may be called before the subsystems are initialised, the second the
//! rest, both in the file's order and one call at a time.
//!
//! A file that SPDK saved names options of parts that are not here. Those that only tune
//! ([`TUNING`]) are skipped with a line in the log; all other unknown methods of SPDK's subsystems
//! are errors, as a device or a controller that cannot be made is.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rpc::{Phase, Phases, Registry, RpcError};
use serde_json::{Map, Value};
use tracing::{error, info, warn};

use crate::methods::SUBSYSTEMS;

/// Methods that SPDK's `save_config` writes without being asked, and others that set options of
/// parts that are not here. Without them nothing is missing that a guest could see.
const TUNING: [&str; 19] = [
    "accel_assign_opc",
    "accel_set_driver",
    "bdev_iscsi_set_options",
    "bdev_nvme_set_hotplug",
    "bdev_nvme_set_options",
    "bdev_raid_set_options",
    "dpdk_cryptodev_scan_accel_module",
    "dsa_scan_accel_module",
    "framework_set_scheduler",
    "fsdev_set_opts",
    "iaa_scan_accel_module",
    "ioat_scan_accel_module",
    "keyring_linux_set_options",
    "scheduler_set_options",
    "sock_impl_set_options",
    "sock_set_default_impl",
    "trace_enable_tpoint_group",
    "trace_set_tpoint_mask",
    "vmd_enable",
];

/// How long a call may run before it is worth a line in the log.
const SLOW: Duration = Duration::from_secs(10);

/// Why the configuration was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// It is not a configuration.
    #[error("configuration {0}: {1}")]
    Form(PathBuf, String),
    /// A call failed.
    #[error("configuration: {0} failed: {1}")]
    Call(Place, RpcError),
    /// There is no such method.
    #[error("configuration: {0}: no such method")]
    Unknown(Place),
}

impl Error {
    /// SPDK's exit code for it.
    pub(crate) fn exit_code(&self) -> u8 {
        let errno = match self {
            Self::Read(..) => return 1,
            Self::Form(..) | Self::Call(..) => libc::EINVAL,
            Self::Unknown(_) => libc::ENOENT,
        };
        errno.wrapping_neg() as u8
    }
}

/// A call's place in the file, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    subsystem: String,
    /// From 1.
    entry: usize,
    method: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subsystem, entry, method } = self;
        write!(f, "{method} (subsystem {subsystem}, entry {entry})")
    }
}

/// A call of the file.
#[derive(Clone, Debug, PartialEq)]
struct Call {
    place: Place,
    params: Option<Value>,
}

/// A configuration that was read.
#[derive(Debug, PartialEq)]
pub(crate) struct ConfigFile {
    calls: Vec<Call>,
    /// Go on after calls that fail or are unknown.
    ignore_errors: bool,
}

impl ConfigFile {
    /// Reads a file. Blocks, for as long as the other end likes if it is a pipe.
    ///
    /// # Errors
    /// [`Error::Read`] or [`Error::Form`].
    pub(crate) fn read(path: &Path, ignore_errors: bool) -> Result<Self, Error> {
        let form = |reason| Error::Form(path.into(), reason);
        let bytes = fs::read(path).map_err(|e| Error::Read(path.into(), e))?;
        let text = String::from_utf8(bytes).map_err(|e| form(e.to_string()))?;
        let calls = parse(&text).map_err(form)?;
        Ok(Self { calls, ignore_errors })
    }

    /// Carries out the calls of one phase: for [`Phase::Startup`] those that may be made before
    /// initialisation, for [`Phase::Runtime`] those that may be made only after it.
    ///
    /// # Errors
    /// [`Error::Call`] or [`Error::Unknown`] for the first call that fails, unless errors are
    /// ignored. What was made before it stays.
    pub(crate) async fn replay(&self, registry: &Rc<Registry>, phase: Phase) -> Result<(), Error> {
        let first = phase == Phase::Startup;
        for call in &self.calls {
            let result = match registry.phases(&call.place.method) {
                Some(Phases::Startup | Phases::Both) if first => run(registry, call, phase).await,
                Some(Phases::Runtime) if !first => run(registry, call, phase).await,
                None if first => unknown(&call.place),
                _ => Ok(()),
            };
            match result {
                Err(e) if self.ignore_errors => warn!("{e}; going on"),
                result => result?,
            }
            // Lets the thread serve front ends and signals in between.
            tokio::task::yield_now().await;
        }
        Ok(())
    }
}

async fn run(registry: &Rc<Registry>, call: &Call, phase: Phase) -> Result<(), Error> {
    let answer = registry.call(&call.place.method, call.params.clone(), phase);
    tokio::pin!(answer);
    loop {
        tokio::select! {
            result = &mut answer => {
                return result.map(drop).map_err(|e| Error::Call(call.place.clone(), e));
            }
            () = tokio::time::sleep(SLOW) => warn!("configuration: {} takes long", call.place),
        }
    }
}

fn unknown(place: &Place) -> Result<(), Error> {
    if TUNING.contains(&place.method.as_str()) {
        info!("configuration: {place} has no meaning here");
        return Ok(());
    }
    if SUBSYSTEMS.iter().any(|(name, _)| *name == place.subsystem) {
        return Err(Error::Unknown(place.clone()));
    }
    info!("configuration: {place} skipped, as there is no such subsystem");
    Ok(())
}

fn parse(text: &str) -> Result<Vec<Call>, String> {
    let text = without_comments(text)?;
    let root: Value = serde_json::from_str(&text).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(mut root) = root else {
        return Err("not an object".into());
    };
    let Some(subsystems) = root.remove("subsystems") else {
        warn!("the configuration has no \"subsystems\": nothing to do");
        return Ok(vec![]);
    };
    let Value::Array(subsystems) = subsystems else {
        return Err("\"subsystems\" is not a list".into());
    };
    let mut calls = vec![];
    for subsystem in subsystems {
        parse_subsystem(subsystem, &mut calls)?;
    }
    Ok(calls)
}

fn parse_subsystem(subsystem: Value, calls: &mut Vec<Call>) -> Result<(), String> {
    let mut members = object(subsystem, "a subsystem")?;
    let Some(Value::String(name)) = members.remove("subsystem") else {
        return Err("a subsystem without its name, \"subsystem\"".into());
    };
    let config = members.remove("config");
    no_more(&members, &format!("subsystem {name}"))?;
    let entries = match config {
        Some(Value::Array(entries)) => entries,
        Some(Value::Null) => vec![],
        _ => return Err(format!("subsystem {name}: \"config\" is neither a list nor null")),
    };
    for (n, entry) in entries.into_iter().enumerate() {
        let batch = match entry {
            Value::Array(batch) => batch,
            entry => vec![entry],
        };
        for call in batch {
            let what = format!("subsystem {name}, entry {}", n + 1);
            let mut members = object(call, &what)?;
            let Some(Value::String(method)) = members.remove("method") else {
                return Err(format!("{what}: no \"method\""));
            };
            let params = members.remove("params");
            no_more(&members, &format!("{what}, {method}"))?;
            if !matches!(params, None | Some(Value::Object(_))) {
                return Err(format!("{what}, {method}: \"params\" is not an object"));
            }
            let place = Place { subsystem: name.clone(), entry: n + 1, method };
            calls.push(Call { place, params });
        }
    }
    Ok(())
}

fn object(value: Value, what: &str) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(members) => Ok(members),
        _ => Err(format!("{what} is not an object")),
    }
}

fn no_more(members: &Map<String, Value>, what: &str) -> Result<(), String> {
    match members.keys().next() {
        Some(name) => Err(format!("{what}: unknown name {name:?}")),
        None => Ok(()),
    }
}

/// The text with C comments turned into spaces, so that places in error messages stay right.
fn without_comments(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    let mut in_string = false;
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            ('\\', Some(_)) if in_string => {
                out.push(c);
                out.extend(chars.next());
            }
            ('"', _) => {
                in_string = !in_string;
                out.push(c);
            }
            ('/', Some('/')) if !in_string => {
                out.push(' ');
                while let Some(c) = chars.next_if(|c| *c != '\n') {
                    out.push(if c == '\r' { c } else { ' ' });
                }
            }
            ('/', Some('*')) if !in_string => {
                chars.next();
                out.push_str("  ");
                skip_block(&mut chars, &mut out)?;
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

fn skip_block(
    chars: &mut std::iter::Peekable<std::str::Chars<'_>>,
    out: &mut String,
) -> Result<(), String> {
    while let Some(c) = chars.next() {
        out.push(if c == '\n' { c } else { ' ' });
        if c == '*' && chars.next_if_eq(&'/').is_some() {
            out.push(' ');
            return Ok(());
        }
    }
    Err("a comment without an end".into())
}

/// Logs why the configuration was not carried out and gives the exit code.
pub(crate) fn report(e: &Error) -> u8 {
    error!("{e}");
    e.exit_code()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn methods(text: &str) -> Vec<String> {
        parse(text).unwrap().into_iter().map(|call| call.place.method).collect()
    }

    #[test]
    fn calls_come_in_the_files_order_and_batches_are_opened() {
        let text = r#"{"other": 1, "subsystems": [
            {"subsystem": "bdev", "config": [
                {"method": "a", "params": {"x": 1}},
                [{"method": "b"}, {"method": "c", "params": {}}]]},
            {"subsystem": "none", "config": null},
            {"config": [{"method": "d"}], "subsystem": "vhost_blk"}]}"#;
        assert_eq!(methods(text), ["a", "b", "c", "d"]);
        let calls = parse(text).unwrap();
        assert_eq!(calls[0].params, Some(json!({"x": 1})));
        assert_eq!(calls[2].place.to_string(), "c (subsystem bdev, entry 2)");
        assert!(methods("{}").is_empty());
    }

    #[test]
    fn comments_are_allowed_outside_strings() {
        let text = "// one\n{/* two\n * three **/\"subsystems\": [ // four \"\n \
            {\"subsystem\": \"b\", \"config\": [{\"method\": \"a//b /* \\\" */\"}]}]} // end";
        assert_eq!(methods(text), ["a//b /* \" */"]);
        assert!(parse("{} /* no end").unwrap_err().contains("comment"));
        // Errors name the line of the file.
        let reason = parse("// é\n/* \n */ x").unwrap_err();
        assert!(reason.contains("line 3 column 5"), "{reason}");
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_the_reason() {
        let subsystem = |inner: &str| format!(r#"{{"subsystems":[{inner}]}}"#);
        let entry = |inner: &str| subsystem(&format!(r#"{{"subsystem":"b","config":[{inner}]}}"#));
        for (text, part) in [
            (String::new(), "not JSON"),
            ("[]".into(), "not an object"),
            (r#"{"subsystems":{}}"#.into(), "not a list"),
            (subsystem("1"), "a subsystem is not an object"),
            (subsystem(r#"{"config":[]}"#), "without its name"),
            (subsystem(r#"{"subsystem":"b"}"#), "neither a list nor null"),
            (subsystem(r#"{"subsystem":"b","config":[],"x":1}"#), "unknown name \"x\""),
            (entry("1"), "entry 1 is not an object"),
            (entry(r#"{"method":"a"},{"params":{}}"#), "entry 2: no \"method\""),
            (entry(r#"{"method":"m","params":[]}"#), "entry 1, m: \"params\" is not an object"),
            (entry(r#"{"method":"m","parms":{}}"#), "entry 1, m: unknown name \"parms\""),
        ] {
            let reason = parse(&text).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }

    #[test]
    fn exit_codes_are_spdks() {
        let place = Place { subsystem: "b".into(), entry: 1, method: "m".into() };
        assert_eq!(Error::Call(place.clone(), RpcError::errno(17)).exit_code(), 234);
        assert_eq!(Error::Unknown(place).exit_code(), 254);
        assert_eq!(Error::Form("f".into(), "x".into()).exit_code(), 234);
        assert_eq!(Error::Read("f".into(), io::ErrorKind::NotFound.into()).exit_code(), 1);
    }

    #[test]
    fn tuning_is_skipped_devices_are_not() {
        let place = |subsystem: &str, method: &str| Place {
            subsystem: subsystem.into(),
            entry: 1,
            method: method.into(),
        };
        assert!(unknown(&place("sock", "sock_impl_set_options")).is_ok());
        assert!(unknown(&place("bdev", "bdev_nvme_attach_controller")).is_err());
        assert!(unknown(&place("vhost_scsi", "vhost_create_scsi_controller")).is_err());
        assert!(unknown(&place("nvmf", "nvmf_create_subsystem")).is_ok());
    }
}
