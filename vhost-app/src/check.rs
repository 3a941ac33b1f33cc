//! `--check`: whether a configuration can be loaded, without loading it.

mod controllers;

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rpc::{DecodeFailure, Params};
use serde::Deserialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::cli::Options;
use crate::config_file::{Call, ConfigFile, Place};
use crate::control::socket_dir;
use crate::methods::schema::{self, Kind};
use crate::methods::{EXAMINED_BY_THEMSELVES, SUBSYSTEMS, Trial};
use controllers::Controllers;

/// Checks the configuration at `path`, prints what it finds, and returns the exit code: 0 if the
/// configuration can be loaded, 1 if not.
///
/// Files and block devices are looked at, but not opened, so that a server that uses them is not
/// disturbed. What only an attempt can tell, such as whether they can be opened, is not found.
pub(crate) fn check(path: &Path, options: &Options) -> u8 {
    let mut out = io::stdout().lock();
    let mut print = |line: &dyn Display| {
        // Without a reader, the exit code still tells the result.
        let _ = writeln!(out, "{line}");
    };
    let file = match ConfigFile::read(path, false) {
        Ok(file) => file,
        Err(e) => {
            print(&format_args!("error: {e}"));
            return 1;
        }
    };
    let found = Check::of(&file.calls, options);
    found.notes.iter().for_each(|note| print(&format_args!("note: {note}")));
    found.errors.iter().for_each(|error| print(&format_args!("error: {error}")));
    let (errors, calls) = (found.errors.len(), file.calls.len());
    let ending = if errors == 1 { "" } else { "s" };
    print(&format_args!("{}: {errors} error{ending} in {calls} calls", path.display()));
    u8::from(errors > 0)
}

/// What was found in a configuration.
struct Check {
    trial: Trial,
    notes: Vec<String>,
    errors: Vec<String>,
    bdevs: Bdevs,
    controllers: Controllers,
}

/// The bdevs of a configuration.
#[derive(Default)]
struct Bdevs {
    /// Names and UUIDs that are taken, also by wrappers whose base never comes.
    taken: HashSet<String>,
    /// The bdevs that exist once all are created, by name and by UUID.
    live: HashSet<String>,
    /// Those of them that are empty when they are created, and so have no partitions.
    empty: HashSet<String>,
    /// Names of wrappers with the names of their bases.
    wrappers: Vec<(Vec<String>, String)>,
    /// Names of NVMe controllers, whose bdevs are `<name>n<id>`.
    nvme: HashSet<String>,
    /// Files by device and inode.
    files: HashMap<(u64, u64), String>,
}

impl Check {
    fn of(calls: &[Call], options: &Options) -> Self {
        let (cores, socket_dir) = (&options.cores, socket_dir(options.socket_dir.as_deref()));
        let mut check = Self {
            trial: Trial::new(cores.clone(), socket_dir),
            notes: vec![],
            errors: vec![],
            bdevs: Bdevs::default(),
            controllers: Controllers::default(),
        };
        let calls = calls.iter().filter(|call| check.is_possible(call)).collect::<Vec<_>>();
        for call in &calls {
            check.add_bdev(call, options.share);
        }
        check.bdevs.settle();
        for (names, base) in &check.bdevs.wrappers {
            if !names.iter().any(|name| check.bdevs.live.contains(name)) {
                check.notes.push(format!("{}: waits for bdev {base}, which is missing", names[0]));
            }
        }
        calls.iter().for_each(|call| check.add_other(call, cores));
        check
    }

    fn error(&mut self, place: &Place, text: impl Display) {
        self.errors.push(format!("{place}: {text}"));
    }

    /// Returns whether the method exists and accepts these parameters.
    fn is_possible(&mut self, call: &Call) -> bool {
        let place = &call.place;
        let known = SUBSYSTEMS.iter().any(|(name, _)| *name == place.subsystem);
        let method = match schema::method(&place.method) {
            Some(method) if method.kind != Kind::Absent => method,
            _ if known => {
                self.error(place, "vhost does not have this method; remove the entry");
                return false;
            }
            _ => {
                self.notes.push(format!("{place}: is ignored, as there is no such subsystem"));
                return false;
            }
        };
        if method.kind == Kind::Kept {
            self.notes.push(format!("{place}: is kept, but has no effect"));
        }
        let tried = self.trial.call(method.name, call.params.clone());
        let result = tried.unwrap_or_else(|| method.problem(params(call)).map_or(Ok(()), Err));
        result.map_err(|reason| self.error(place, reason)).is_ok()
    }

    fn add_bdev(&mut self, call: &Call, share: bool) {
        let text = |name: &str| text(call, name);
        let (names, base) = match call.place.method.as_str() {
            "bdev_malloc_create"
            | "bdev_nbd_create"
            | "bdev_null_create"
            | "bdev_rbd_create"
            | "bdev_virtio_attach_controller" => (vec![text("name")], None),
            // Its namespaces are known when it is attached.
            "bdev_nvme_attach_controller" => {
                self.bdevs.nvme.insert(text("name"));
                return;
            }
            "bdev_aio_create" | "bdev_uring_create" => {
                if let Err(problem) = self.bdevs.add_file(call, share) {
                    self.error(&call.place, problem);
                }
                (vec![text("name")], None)
            }
            "bdev_crypto_create" | "bdev_delay_create" | "bdev_passthru_create" => {
                (vec![text("name")], Some(text("base_bdev_name")))
            }
            "bdev_raid_create" => (vec![text("name")], None),
            "bdev_error_create" => {
                (vec![format!("EE_{}", text("base_name"))], Some(text("base_name")))
            }
            "bdev_split_create" => {
                let base = text("base_bdev");
                let count = params(call).get("split_count").and_then(Value::as_u64).unwrap_or(0);
                // A larger number is refused for its size.
                let parts = (0..count.min(10_000)).map(|n| format!("{base}p{n}"));
                (parts.collect(), Some(base))
            }
            _ => return,
        };
        // A malloc or RBD bdev may get its name when it is created.
        let names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
        let is_given = |uuid: &String| !uuid.is_empty() && *uuid != Uuid::nil().to_string();
        let uuid = Some(text("uuid").to_lowercase()).filter(is_given);
        for name in names.iter().chain(&uuid) {
            if !self.bdevs.taken.insert(name.clone()) {
                self.error(&call.place, format_args!("the name or UUID {name} is taken"));
            }
        }
        let all: Vec<String> = names.into_iter().chain(uuid).collect();
        if matches!(&*call.place.method, "bdev_malloc_create" | "bdev_null_create") {
            self.bdevs.empty.extend(all.iter().cloned());
        }
        match base {
            Some(base) if !all.is_empty() => self.bdevs.wrappers.push((all, base)),
            Some(_) => {}
            None => self.bdevs.live.extend(all),
        }
    }

    /// Checks a call that is about a bdev, or about a controller.
    fn add_other(&mut self, call: &Call, cores: &[usize]) {
        match call.place.method.as_str() {
            "vhost_create_blk_controller"
            | "vhost_create_scsi_controller"
            | "vhost_start_scsi_controller"
            | "vhost_scsi_controller_add_target"
            | "vhost_scsi_controller_remove_target"
            | "vhost_controller_set_coalescing" => self.check_controller(call, cores),
            "bdev_set_qos_limit" | "bdev_enable_histogram" | "nbd_start_disk" => {
                let is_export = call.place.method == "nbd_start_disk";
                self.require_bdev(call, &text(call, if is_export { "bdev_name" } else { "name" }));
            }
            "bdev_examine" if self.trial.auto_examine() => {
                self.error(&call.place, EXAMINED_BY_THEMSELVES);
            }
            _ => {}
        }
    }

    /// Checks that a bdev exists, or may be found in the partition table of a disk.
    fn require_bdev(&mut self, call: &Call, name: &str) {
        if self.bdevs.is_live(name) {
            return;
        }
        if let Some(disk) = self.bdevs.disk_of(name) {
            self.notes.push(format!("{}: bdev {name} must be a partition of {disk}", call.place));
        } else {
            self.error(&call.place, format_args!("there is no bdev {name}"));
        }
    }
}

impl Bdevs {
    fn is_live(&self, name: &str) -> bool {
        let is_namespace = || {
            let parts = name.rsplit_once('n');
            parts.is_some_and(|(controller, id)| {
                self.nvme.contains(controller) && id.parse::<u32>().is_ok()
            })
        };
        self.live.contains(name) || self.live.contains(&name.to_lowercase()) || is_namespace()
    }

    /// Whether it exists, or may be found in a partition table.
    fn exists(&self, name: &str) -> bool {
        self.is_live(name) || self.disk_of(name).is_some()
    }

    /// Returns the disk of which `name` may be a partition.
    fn disk_of<'a>(&self, name: &'a str) -> Option<&'a str> {
        let (disk, number) = name.rsplit_once('p')?;
        let is_number = (1..=128).any(|n: u32| n.to_string() == number);
        (is_number && self.is_live(disk) && !self.empty.contains(disk)).then_some(disk)
    }

    /// Adds the wrappers whose bases exist, and those on them.
    fn settle(&mut self) {
        loop {
            let due = self.wrappers.iter().filter(|(_, base)| self.exists(base));
            let new: Vec<String> = due.flat_map(|(names, _)| names.clone()).collect();
            let before = self.live.len();
            self.live.extend(new);
            if self.live.len() == before {
                return;
            }
        }
    }

    /// Adds the file of a bdev.
    fn add_file(&mut self, call: &Call, share: bool) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Given {
            name: String,
            filename: PathBuf,
            block_size: Option<u32>,
            #[serde(default)]
            readonly: bool,
        }
        let params = Params::local("", call.params.clone());
        let given = params.and_then(|params| params.decode_relaxed(DecodeFailure::INTERNAL));
        let Given { name, filename, block_size, readonly } = given.map_err(|e| e.to_string())?;
        let file = filename.display();
        let meta = std::fs::metadata(&filename).map_err(|e| format!("{file}: {e}"))?;
        bdev::check_unopened(&filename, &meta, block_size.filter(|size| *size != 0))
            .map_err(|e| e.to_string())?;
        if share || readonly {
            return Ok(());
        }
        match self.files.insert((meta.dev(), meta.ino()), name) {
            Some(other) => Err(format!("{file}: bdev {other} writes to it too; --share allows it")),
            None => Ok(()),
        }
    }
}

fn params(call: &Call) -> &Map<String, Value> {
    static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    call.params.as_ref().and_then(Value::as_object).unwrap_or(&NONE)
}

/// A parameter; empty if it is not given.
fn text(call: &Call, name: &str) -> String {
    params(call).get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Notes and errors, without their places.
    fn check(calls: Value) -> (Vec<String>, Vec<String>) {
        let calls: Vec<Call> = calls
            .as_array()
            .unwrap()
            .iter()
            .map(|call| {
                let subsystem = if call[0] == "nvmf_create_target" { "nvmf" } else { "bdev" };
                let method = call[0].as_str().unwrap().to_owned();
                let place = Place { subsystem: subsystem.into(), entry: 1, method };
                Call { place, params: Some(call[1].clone()) }
            })
            .collect();
        let found = Check::of(&calls, &Options::parse(["vhost", "-m", "2"]).unwrap());
        let bare = |lines: Vec<String>| -> Vec<String> {
            lines
                .iter()
                .map(|line| line.split_once("): ").map_or(&**line, |(_, t)| t).into())
                .collect()
        };
        (bare(found.notes), bare(found.errors))
    }

    fn malloc(name: &str) -> Value {
        json!(["bdev_malloc_create", {"name": name, "num_blocks": 8, "block_size": 512}])
    }

    fn controller(name: &str, bdev: &str, mask: &str) -> Value {
        json!(["vhost_create_blk_controller", {"ctrlr": name, "dev_name": bdev, "cpumask": mask}])
    }

    #[test]
    fn wrappers_may_come_before_their_bases() {
        let passthru = json!(["bdev_passthru_create", {"name": "P", "base_bdev_name": "Mp1"}]);
        let split = json!(["bdev_split_create", {"base_bdev": "M", "split_count": 2}]);
        let (notes, errors) = check(json!([
            passthru,
            split,
            malloc("M"),
            controller("c", "P", "2"),
            controller("d", "Mp0", "0x2"),
            ["bdev_wait_for_examine", {}],
        ]));
        assert_eq!((notes, errors), (vec![], vec![]));
    }

    #[test]
    fn what_would_fail_is_found() {
        let nope = json!(["bdev_error_create", {"base_name": "nope"}]);
        let wrapped = json!(["bdev_error_create", {"base_name": "M"}]);
        let (notes, errors) = check(json!([
            nope, wrapped, malloc("M"), malloc("M"),
            controller("c", "M", "2"), controller("c", "EE_M", "1"), controller("d", "EE_nope", "x"),
            ["bdev_set_qos_limit", {"name": "Z", "rw_ios_per_sec": 1}],
            ["vhost_controller_set_coalescing", {"ctrlr": "z", "delay_base_us": 1, "iops_threshold": 100}],
            ["bdev_nvme_start_discovery", {"name": "n", "trtype": "TCP", "traddr": "x"}],
            ["bdev_aio_create", {"name": "F", "filename": "/no/such/file"}],
            ["bdev_null_create", {"name": "N"}],
            ["nvmf_create_target", {}],
            ["bdev_virtio_blk_set_hotplug", {"enable": true}],
            ["bdev_nvme_set_options", {"bdev_retry_count": -5}],
        ]));
        assert_eq!(
            notes,
            [
                "is ignored, as there is no such subsystem",
                "is kept, but has no effect",
                "EE_nope: waits for bdev nope, which is missing",
            ]
        );
        assert_eq!(
            errors,
            [
                "invalid cpumask \"x\"",
                "vhost does not have this method; remove the entry",
                "invalid parameters: missing field `num_blocks`",
                "time-outs that contradict, or bdev_retry_count below -1",
                "the name or UUID M is taken",
                "/no/such/file: No such file or directory (os error 2)",
                "bdev M is claimed by EE_M, which is built on it",
                "core 0 has no reactor; pass the same -m as the server",
                "there is a controller c already",
                "there is no bdev Z",
                "there is no controller z",
            ]
        );
    }

    #[test]
    fn targets_of_scsi_controllers_are_checked() {
        let call = |method: &str, params: Value| json!([method, params]);
        let create = |name: &str| call("vhost_create_scsi_controller", json!({"ctrlr": name}));
        let add = |name: &str, number: i64, bdev: &str| {
            let params = json!({"ctrlr": name, "scsi_target_num": number, "bdev_name": bdev});
            call("vhost_scsi_controller_add_target", params)
        };
        let remove = |number: i64| {
            let params = json!({"ctrlr": "s", "scsi_target_num": number});
            call("vhost_scsi_controller_remove_target", params)
        };
        let start = |name: &str| call("vhost_start_scsi_controller", json!({"ctrlr": name}));
        let wrapper = json!(["bdev_error_create", {"base_name": "W"}]);
        let mut calls = vec![malloc("M"), malloc("W"), wrapper, controller("c", "M", "2")];
        calls.extend([create("s"), create("c"), create("s"), add("s", 0, "M"), remove(0)]);
        calls.extend([add("s", 7, "nope"), add("s", 8, "M"), add("c", 0, "M"), add("t", 0, "M")]);
        calls.extend([add("s", 1, "W"), add("s", 1, "M"), add("s", 1, "M"), remove(2)]);
        calls.extend([start("c"), start("t")]);
        calls.extend([start("s"), create("d"), start("d")]);
        calls.extend((0..8).map(|_| add("d", -1, "M")));
        calls.push(add("d", -1, "M"));
        let (notes, errors) = check(calls.into());
        assert!(notes.is_empty(), "{notes:?}");
        assert_eq!(
            errors,
            [
                "expected a target number from 0 to 7",
                "there is a controller c already",
                "there is a controller s already",
                "there is no bdev nope",
                "controller c is not a SCSI controller",
                "there is no controller t",
                "bdev W is claimed by EE_W, which is built on it",
                "controller s: target 1 exists already",
                "controller s: target 2 does not exist",
                "controller c is not a SCSI controller",
                "there is no controller t",
                "controller d: there is no free target number",
            ]
        );
    }

    #[test]
    fn namespaces_of_a_controller_may_be_used() {
        let attach = |traddr: &str| {
            json!(["bdev_nvme_attach_controller",
                {"name": "Nvme0", "trtype": "PCIe", "traddr": traddr}])
        };
        let passthru = json!(["bdev_passthru_create", {"name": "P", "base_bdev_name": "Nvme0n2"}]);
        let calls = [attach("0000:04:00.0"), passthru, controller("c", "Nvme0n1", "2")];
        assert_eq!(check(json!(calls)), (vec![], vec![]));
        let (_, errors) = check(json!([attach("x"), controller("c", "Nvme0nx", "2")]));
        assert_eq!(errors, ["there is no bdev Nvme0nx"]);
        let long = attach(&"7".repeat(300));
        assert!(check(json!([long])).1[0].starts_with("traddr too long: 7"));
    }

    #[test]
    fn a_file_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 4096]).unwrap();
        let aio = |name: &str, readonly: bool| {
            let params = json!({"name": name, "filename": path, "block_size": 512,
                "readonly": readonly});
            json!(["bdev_aio_create", params])
        };
        assert!(check(json!([aio("A", false), aio("B", true)])).1.is_empty());
        let (_, errors) = check(json!([aio("A", false), aio("B", false)]));
        assert!(errors[0].ends_with("f: bdev A writes to it too; --share allows it"), "{errors:?}");
        let on_part = json!(["bdev_passthru_create", {"name": "P", "base_bdev_name": "Ap2"}]);
        let controllers =
            ["Ap1", "Ap0", "Ap129", "Ap01", "Mp1", "P"].map(|bdev| controller(bdev, bdev, "2"));
        let mut calls = vec![aio("A", false), malloc("M"), on_part];
        calls.extend(controllers);
        let (notes, errors) = check(calls.into());
        assert_eq!(notes, ["bdev Ap1 must be a partition of A"]);
        let none = ["Ap0", "Ap129", "Ap01", "Mp1"].map(|bdev| format!("there is no bdev {bdev}"));
        assert_eq!(errors, none);
    }
}
