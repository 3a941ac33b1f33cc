//! The controllers of a configuration: the calls that create them and change their targets.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::{Check, params, text};
use crate::cli::parse_cores;
use crate::config_file::Call;

/// Which targets of a SCSI controller exist.
type Targets = [bool; vhost_scsi::TARGETS_MAX];

/// The controllers by name, SCSI controllers with their targets.
pub(super) type Controllers = HashMap<String, Option<Targets>>;

impl Check {
    /// Checks a call that is about a controller.
    pub(super) fn check_controller(&mut self, call: &Call, cores: &[usize]) {
        let name = text(call, "ctrlr");
        let targets = match self.controllers.get(&name) {
            _ if call.place.method == "vhost_create_blk_controller" => {
                self.require_free_bdev(call, &text(call, "dev_name"));
                return self.add_controller(call, cores, None);
            }
            _ if call.place.method == "vhost_create_scsi_controller" => {
                return self.add_controller(call, cores, Some(Targets::default()));
            }
            None => {
                return self.error(&call.place, format_args!("there is no controller {name}"));
            }
            Some(_) if call.place.method == "vhost_controller_set_coalescing" => return,
            Some(None) => {
                let text = format!("controller {name} is not a SCSI controller");
                return self.error(&call.place, text);
            }
            Some(Some(targets)) => *targets,
        };
        let changed = match call.place.method.as_str() {
            "vhost_scsi_controller_add_target" => {
                if !self.require_free_bdev(call, &text(call, "bdev_name")) {
                    return;
                }
                add(targets, number(call))
            }
            "vhost_scsi_controller_remove_target" => remove(targets, number(call)),
            _ => return,
        };
        match changed {
            Ok(targets) => _ = self.controllers.insert(name, Some(targets)),
            Err(e) => self.error(&call.place, format_args!("controller {name}: {e}")),
        }
    }

    fn add_controller(&mut self, call: &Call, cores: &[usize], targets: Option<Targets>) {
        let name = text(call, "ctrlr");
        let mask = parse_cores(&text(call, "cpumask")).unwrap_or_default();
        if let Some(core) = mask.into_iter().find(|core| !cores.contains(core)) {
            let text = format!("core {core} has no reactor; pass the same -m as the server");
            self.error(&call.place, text);
        }
        match self.controllers.entry(name) {
            // Also after an error, so that later calls about the controller do not fail for it.
            Entry::Vacant(place) => _ = place.insert(targets),
            Entry::Occupied(place) => {
                let text = format!("there is a controller {} already", place.key());
                self.error(&call.place, text);
            }
        }
    }

    /// Checks that a bdev exists, and that no other bdev is built on it. Returns whether it is so.
    fn require_free_bdev(&mut self, call: &Call, bdev: &str) -> bool {
        let errors = self.errors.len();
        self.require_bdev(call, bdev);
        let exists = |names: &[String]| names.iter().any(|name| self.bdevs.exists(name));
        let mut wrappers = self.bdevs.wrappers.iter();
        if let Some((wrapper, _)) = wrappers.find(|(names, base)| base == bdev && exists(names)) {
            let text = format!("bdev {bdev} is claimed by {}, which is built on it", wrapper[0]);
            self.error(&call.place, text);
        }
        self.errors.len() == errors
    }
}

/// The number of a target, which was checked; less than 0 for the first that is free.
fn number(call: &Call) -> i64 {
    // Any notation of an integer is allowed.
    #[expect(clippy::cast_possible_truncation, reason = "a number that was checked to be small")]
    let whole = |number: f64| number as i64;
    let number = params(call).get("scsi_target_num");
    number.and_then(|n| n.as_i64().or(n.as_f64().map(whole))).unwrap_or(-1)
}

fn add(mut targets: Targets, number: i64) -> Result<Targets, String> {
    let place = match usize::try_from(number) {
        Ok(number) => targets.get(number).is_some_and(|used| !used).then_some(number),
        Err(_) => targets.iter().position(|used| !used),
    };
    let place = place.ok_or_else(|| match number {
        0.. => format!("target {number} exists already"),
        _ => "there is no free target number".to_owned(),
    })?;
    targets[place] = true;
    Ok(targets)
}

fn remove(mut targets: Targets, number: i64) -> Result<Targets, String> {
    match usize::try_from(number).ok().and_then(|number| targets.get_mut(number)) {
        Some(used @ true) => *used = false,
        _ => return Err(format!("target {number} does not exist")),
    }
    Ok(targets)
}
