//! What a controller says of itself (Identify Controller), and its health (the SMART log page).

use serde_json::{Map, Value, json};

use crate::sysfs::Controller;

/// The properties of a controller that `bdev_get_bdevs` shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identity {
    vendor_id: u16,
    model: String,
    serial: String,
    firmware: String,
    controller_id: u16,
    subnqn: String,
    optional_commands: u16,
    capabilities: u8,
    version: u32,
}

/// Reads little-endian bytes; 0 where they are missing.
fn number(data: &[u8], at: usize, len: usize) -> u128 {
    let bytes = at.checked_add(len).and_then(|end| data.get(at..end)).unwrap_or_default();
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

#[expect(clippy::cast_possible_truncation, reason = "the caller's type has as many bytes")]
fn u16_at(data: &[u8], at: usize) -> u16 {
    number(data, at, 2) as u16
}

impl Identity {
    /// Combines the kernel's attributes with the data of Identify Controller, which is empty if the
    /// kernel does not allow that command.
    pub(crate) fn new(controller: &Controller, vendor: Option<u16>, data: &[u8]) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "four bytes, and one")]
        let (version, capabilities) = (number(data, 80, 4) as u32, number(data, 76, 1) as u8);
        Self {
            vendor_id: vendor.unwrap_or_else(|| u16_at(data, 0)),
            model: controller.model.clone(),
            serial: controller.serial.clone(),
            firmware: controller.firmware.clone(),
            controller_id: controller.controller_id,
            subnqn: controller.subnqn.clone(),
            optional_commands: u16_at(data, 256),
            capabilities,
            version,
        }
    }

    /// Returns whether these are the attributes of the same controller.
    pub(crate) fn is_of(&self, now: &Controller) -> bool {
        (&self.serial, &self.model, &self.subnqn) == (&now.serial, &now.model, &now.subnqn)
    }

    pub(crate) fn controller_id(&self) -> u16 {
        self.controller_id
    }

    pub(crate) fn serial(&self) -> &str {
        &self.serial
    }

    /// SPDK's object `ctrlr_data`.
    pub(crate) fn show(&self) -> Value {
        let optional = |bit: u32| u8::from(self.optional_commands & 1 << bit != 0);
        let capable = |bit: u32| self.capabilities & 1 << bit != 0;
        json!({
            "cntlid": self.controller_id,
            "vendor_id": format!("0x{:04x}", self.vendor_id),
            "model_number": self.model,
            "serial_number": self.serial,
            "firmware_revision": self.firmware,
            "subnqn": self.subnqn,
            "oacs": {
                "security": optional(0),
                "format": optional(1),
                "firmware": optional(2),
                "ns_manage": optional(3),
            },
            "multi_ctrlr": capable(1),
            "ana_reporting": capable(3),
        })
    }

    /// SPDK's object `vs`.
    pub(crate) fn version(&self) -> Value {
        let [tertiary, minor, major_low, major_high] = self.version.to_le_bytes();
        let major = u16::from_le_bytes([major_low, major_high]);
        let mut text = format!("{major}.{minor}");
        if tertiary != 0 {
            text = format!("{text}.{tertiary}");
        }
        json!({ "nvme_version": text })
    }

    /// The first fields of `bdev_nvme_get_controller_health_info`.
    fn names(&self, traddr: &str) -> Map<String, Value> {
        Map::from_iter(
            [
                ("model_number", &*self.model),
                ("serial_number", &self.serial),
                ("firmware_revision", &self.firmware),
                ("traddr", traddr),
            ]
            .map(|(name, text)| (name.to_owned(), text.into())),
        )
    }
}

/// Returns whether several controllers may use a namespace, by the data of Identify Namespace.
pub(crate) fn is_shared(data: &[u8]) -> bool {
    number(data, 30, 1) & 1 != 0
}

/// SPDK's answer to `bdev_nvme_get_controller_health_info`, from the SMART log page. Counters above
/// 2^64 - 1 are shown as that.
pub(crate) fn show_health(identity: &Identity, traddr: &str, log: &[u8]) -> Value {
    const KELVIN: i64 = 273;
    let mut shown = identity.names(traddr);
    let mut add = |name: String, value: Value| drop(shown.insert(name, value));
    let small = |at, len| u64::try_from(number(log, at, len)).unwrap_or(u64::MAX);
    let celsius = |at| Value::from(i64::from(u16_at(log, at)) - KELVIN);
    add("critical_warning".into(), small(0, 1).into());
    add("temperature_celsius".into(), celsius(1));
    add("available_spare_percentage".into(), small(3, 1).into());
    add("available_spare_threshold_percentage".into(), small(4, 1).into());
    add("percentage_used".into(), small(5, 1).into());
    let counters = [
        "data_units_read",
        "data_units_written",
        "host_read_commands",
        "host_write_commands",
        "controller_busy_time",
        "power_cycles",
        "power_on_hours",
        "unsafe_shutdowns",
        "media_errors",
        "num_err_log_entries",
    ];
    for (n, name) in counters.into_iter().enumerate() {
        add(name.into(), small(32 + 16 * n, 16).into());
    }
    add("warning_temperature_time_minutes".into(), small(192, 4).into());
    add("critical_composite_temperature_time_minutes".into(), small(196, 4).into());
    for n in 0..8 {
        let at = 200 + 2 * n;
        if u16_at(log, at) != 0 {
            add(format!("temperature_sensor_{}_celsius", n + 1), celsius(at));
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(data: &[u8]) -> Identity {
        let controller =
            Controller { model: "M".into(), serial: "S".into(), ..Controller::default() };
        Identity::new(&controller, None, data)
    }

    #[test]
    fn identify_is_shown_as_spdk_does() {
        let mut data = vec![0; 4096];
        data[..2].copy_from_slice(&[0x36, 0x1b]);
        data[76] = 0b10;
        data[80..84].copy_from_slice(&[1, 4, 1, 0]);
        data[256] = 0b1010;
        let identity = identity(&data);
        let shown = identity.show();
        assert_eq!(shown["vendor_id"], "0x1b36");
        assert_eq!(
            shown["oacs"],
            json!({"security": 0, "format": 1, "firmware": 0, "ns_manage": 1})
        );
        assert_eq!((&shown["multi_ctrlr"], &shown["ana_reporting"]), (&json!(true), &json!(false)));
        assert_eq!(identity.version(), json!({"nvme_version": "1.4.1"}));
        data[30] = 1;
        assert!(is_shared(&data) && !is_shared(&[]));
    }

    #[test]
    fn a_controller_without_identify_data_is_shown_by_its_attributes() {
        let identity = identity(&[]);
        assert_eq!(identity.show()["model_number"], "M");
        assert_eq!(identity.version(), json!({"nvme_version": "0.0"}));
    }

    #[test]
    fn health_is_shown_as_spdk_does() {
        let mut log = vec![0; 512];
        log[1..3].copy_from_slice(&300_u16.to_le_bytes());
        log[3] = 100;
        log[32] = 7;
        log[48..64].fill(0xff);
        log[196] = 9;
        log[202..204].copy_from_slice(&270_u16.to_le_bytes());
        let shown = show_health(&identity(&[]), "0000:04:00.0", &log);
        assert_eq!(shown["traddr"], "0000:04:00.0");
        assert_eq!(
            (&shown["temperature_celsius"], &shown["data_units_read"]),
            (&27.into(), &7.into())
        );
        assert_eq!(shown["data_units_written"], u64::MAX);
        assert_eq!(shown["critical_composite_temperature_time_minutes"], 9);
        assert_eq!(shown["temperature_sensor_2_celsius"], -3);
        assert!(shown.get("temperature_sensor_1_celsius").is_none());
    }
}
