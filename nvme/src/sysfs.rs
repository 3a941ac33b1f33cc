//! What the kernel says of NVMe controllers and namespaces below `/sys`.

use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::target::{Target, Transport};

/// A tree like `/sys`.
#[derive(Clone, Debug)]
pub(crate) struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: "/sys".into() }
    }
}

/// A controller of the kernel's driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Controller {
    /// The kernel's name, such as `nvme0`.
    pub(crate) name: String,
    pub(crate) transport: String,
    pub(crate) address: String,
    pub(crate) model: String,
    pub(crate) serial: String,
    pub(crate) firmware: String,
    pub(crate) subnqn: String,
    pub(crate) hostnqn: String,
    pub(crate) controller_id: u16,
    /// The kernel's name of the state, such as `live`.
    pub(crate) state: String,
}

/// A namespace with a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Namespace {
    /// The kernel's name of the block device, such as `nvme0n1`.
    pub(crate) block: String,
    pub(crate) id: u32,
    /// The namespace's NGUID or UUID.
    pub(crate) uuid: Option<Uuid>,
    pub(crate) bytes: u64,
}

impl Namespace {
    /// The kernel's name of the character device.
    pub(crate) fn character(&self) -> String {
        self.block.replacen("nvme", "ng", 1)
    }
}

/// Why no controller was found at a PCI address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotFound {
    /// There is no such device.
    NoDevice,
    /// The device has no driver.
    Unbound,
    /// Another driver has it.
    OtherDriver(String),
    /// The driver has not made a controller of it.
    NoController,
}

impl NotFound {
    /// The reason and the remedy, for the log.
    pub(crate) fn text(&self, address: &str) -> String {
        let bind = format!(
            "bind it to the kernel's NVMe driver: echo nvme > \
             /sys/bus/pci/devices/{address}/driver_override; echo {address} > \
             /sys/bus/pci/drivers_probe"
        );
        match self {
            Self::NoDevice => format!("no PCI device has the address {address}"),
            Self::Unbound => format!("PCI device {address} has no driver; {bind}"),
            Self::OtherDriver(driver) => format!(
                "PCI device {address} is bound to {driver}, not to nvme; unbind it (echo {address} \
                 > /sys/bus/pci/drivers/{driver}/unbind), then {bind}"
            ),
            Self::NoController => {
                format!("the NVMe driver has no controller at {address}; see the kernel's log")
            }
        }
    }
}

/// Reads an attribute, without blanks around it.
fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

impl Sysfs {
    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    fn class(&self) -> PathBuf {
        self.root.join("class/nvme")
    }

    /// The directory of a block device.
    pub(crate) fn block(&self, name: &str) -> PathBuf {
        self.root.join("class/block").join(name)
    }

    /// Returns the device number of a block device.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        let text = read(&self.block(name).join("dev"))?;
        let (major, minor) = text.split_once(':')?;
        Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    /// The path of an attribute that controls a controller.
    pub(crate) fn control(name: &str, attribute: &str) -> PathBuf {
        Path::new("/sys/class/nvme").join(name).join(attribute)
    }

    /// Returns the kernel's name of the controller at a PCI address.
    pub(crate) fn at_pci(&self, address: &str) -> Result<String, NotFound> {
        let device = self.root.join("bus/pci/devices").join(address);
        if address.contains('/') || address.is_empty() || !device.exists() {
            return Err(NotFound::NoDevice);
        }
        let driver = fs::read_link(device.join("driver")).map_err(|_| NotFound::Unbound)?;
        match driver.file_name().and_then(|name| name.to_str()) {
            Some("nvme") => {}
            other => return Err(NotFound::OtherDriver(other.unwrap_or_default().into())),
        }
        let mut all = names(&device.join("nvme")).into_iter();
        all.find(|name| name.starts_with("nvme")).ok_or(NotFound::NoController)
    }

    /// Returns a controller's attributes; `None` if it is gone.
    pub(crate) fn controller(&self, name: &str) -> Option<Controller> {
        let dir = self.class().join(name);
        let text = |attribute: &str| read(&dir.join(attribute)).unwrap_or_default();
        Some(Controller {
            name: name.into(),
            state: read(&dir.join("state"))?,
            transport: text("transport"),
            address: text("address"),
            model: text("model"),
            serial: text("serial"),
            firmware: text("firmware_rev"),
            subnqn: text("subsysnqn"),
            hostnqn: text("hostnqn"),
            controller_id: text("cntlid").parse().unwrap_or(0),
        })
    }

    /// Returns the controller that is connected to this target, if there is one; with a host NQN,
    /// only one with the same.
    pub(crate) fn connected(&self, target: &Target, hostnqn: Option<&str>) -> Option<Controller> {
        if target.transport != Transport::Tcp {
            return None;
        }
        let all = names(&self.class()).into_iter().filter_map(|name| self.controller(&name));
        let mut matching = all.filter(|controller| {
            let has = |part: String| controller.address.split(',').any(|other| other == part);
            controller.transport == "tcp"
                && has(format!("traddr={}", target.address))
                && has(format!("trsvcid={}", target.service))
                && controller.subnqn == target.subnqn
                && !controller.state.starts_with("deleting")
                && controller.state != "dead"
                && hostnqn.is_none_or(|nqn| nqn == controller.hostnqn)
        });
        matching.next()
    }

    /// Returns whether this name of the kernel still is that of the controller at a target. The
    /// kernel uses the name of a controller that is gone again.
    pub(crate) fn is_at(&self, name: &str, target: &Target) -> bool {
        match target.transport {
            Transport::Pcie => self.at_pci(&target.address).is_ok_and(|found| found == name),
            Transport::Tcp => self.connected(target, None).is_some_and(|found| found.name == name),
        }
    }

    /// Returns the vendor of a PCI device.
    pub(crate) fn pci_vendor(&self, address: &str) -> Option<u16> {
        let text = read(&self.root.join("bus/pci/devices").join(address).join("vendor"))?;
        u16::from_str_radix(text.strip_prefix("0x")?, 16).ok()
    }

    /// Returns a controller's namespaces with a block device of some size, by id.
    pub(crate) fn namespaces(&self, controller: &str) -> Vec<Namespace> {
        let all = names(&self.class().join(controller)).into_iter();
        let mut all: Vec<_> = all.filter_map(|name| self.namespace(&head(&name)?)).collect();
        all.sort_by_key(|namespace| namespace.id);
        all.dedup_by_key(|namespace| namespace.id);
        all
    }

    fn namespace(&self, block: &str) -> Option<Namespace> {
        let dir = self.block(block);
        let id = read(&dir.join("nsid"))?.parse().ok()?;
        let sectors: u64 = read(&dir.join("size"))?.parse().ok()?;
        let uuid = |name: &str| {
            let uuid = Uuid::try_parse(&read(&dir.join(name))?).ok()?;
            (!uuid.is_nil()).then_some(uuid)
        };
        // SPDK prefers the NGUID too.
        let uuid = uuid("nguid").or_else(|| uuid("uuid"));
        let namespace = Namespace { block: block.into(), id, uuid, bytes: sectors << 9 };
        (sectors > 0).then_some(namespace)
    }
}

/// Returns the name of the block device of a namespace that has this name below its controller:
/// `nvme0n1`, or with native multipath `nvme0c1n1`, a path of `nvme0n1`.
fn head(name: &str) -> Option<String> {
    let number = |text: &str| text.parse::<u32>().ok();
    let (controller, namespace) = name.strip_prefix("nvme")?.split_once('n')?;
    let instance = match controller.split_once('c') {
        None => number(controller)?,
        Some((subsystem, path)) => {
            number(path)?;
            number(subsystem)?
        }
    };
    Some(format!("nvme{instance}n{}", number(namespace)?))
}

/// Returns the name of a controller's state in SPDK.
pub(crate) fn spdk_state(state: &str) -> &'static str {
    match state {
        "live" => "enabled",
        "new" | "resetting" => "resetting",
        "connecting" => "reconnect_is_delayed",
        "dead" => "failed",
        _ => "deleting",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;
    use crate::target::Given;

    /// A tree with controller `nvme0` at 0000:00:04.0 with two namespaces, and `nvme1` by TCP with
    /// native multipath.
    pub(crate) fn tree() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        for (device, driver) in [("4", "nvme"), ("5", "vfio-pci")] {
            write(&format!("bus/pci/devices/0000:00:0{device}.0/vendor"), "0x1b36");
            let link = dir.path().join(format!("bus/pci/devices/0000:00:0{device}.0/driver"));
            symlink(format!("../../drivers/{driver}"), link).unwrap();
        }
        write("bus/pci/devices/0000:00:06.0/vendor", "0x8086");
        write("bus/pci/devices/0000:00:04.0/nvme/nvme0/state", "live");
        let controller = |name: &str, transport: &str, address: &str, nqn: &str| {
            let attributes = [
                ("transport", transport),
                ("address", address),
                ("subsysnqn", nqn),
                ("state", "live"),
                ("model", "Model M   "),
                ("serial", "S1"),
                ("firmware_rev", "1.0"),
                ("cntlid", "3"),
            ];
            for (attribute, text) in attributes {
                write(&format!("class/nvme/{name}/{attribute}"), text);
            }
        };
        controller("nvme0", "pcie", "0000:00:04.0", "nqn.pci");
        controller("nvme1", "tcp", "traddr=10.0.0.1,trsvcid=4420,src_addr=10.0.0.2", "nqn.tcp");
        let block = |name: &str, id: &str, sectors: &str| {
            write(&format!("class/block/{name}/nsid"), id);
            write(&format!("class/block/{name}/size"), sectors);
            write(&format!("class/block/{name}/dev"), &format!("258:{id}"));
        };
        for (name, id) in [("nvme0n1", "1"), ("nvme0n2", "5"), ("nvme1n1", "1")] {
            block(name, id, "2048");
        }
        block("nvme0n3", "7", "0");
        write("class/block/nvme0n1/uuid", "4b9bce33-9a30-4e2d-a0f9-24f6d7c1d8b1");
        write("class/block/nvme0n2/nguid", "11111111-2222-3333-4444-555555555555");
        write("class/block/nvme0n2/uuid", "4b9bce33-9a30-4e2d-a0f9-24f6d7c1d8b2");
        for path in ["nvme0/nvme0n1", "nvme0/nvme0n2", "nvme0/nvme0n3", "nvme1/nvme1c1n1"] {
            fs::create_dir_all(dir.path().join("class/nvme").join(path)).unwrap();
        }
        dir
    }

    #[test]
    fn a_controller_is_found_by_its_address_if_the_driver_has_it() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        assert_eq!(sysfs.at_pci("0000:00:04.0").unwrap(), "nvme0");
        let other = sysfs.at_pci("0000:00:05.0").unwrap_err();
        assert_eq!(other, NotFound::OtherDriver("vfio-pci".into()));
        assert!(other.text("0000:00:05.0").contains("drivers/vfio-pci/unbind"));
        assert_eq!(sysfs.at_pci("0000:00:06.0"), Err(NotFound::Unbound));
        assert_eq!(sysfs.at_pci("0000:00:07.0"), Err(NotFound::NoDevice));
        assert_eq!(sysfs.at_pci("../devices/0000:00:04.0"), Err(NotFound::NoDevice));
        assert_eq!(sysfs.pci_vendor("0000:00:04.0"), Some(0x1b36));
    }

    #[test]
    fn namespaces_are_found_below_a_controller_or_its_subsystem() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        let all = sysfs.namespaces("nvme0");
        let shown: Vec<_> = all.iter().map(|n| (&*n.block, n.id, n.bytes)).collect();
        assert_eq!(shown, [("nvme0n1", 1, 1 << 20), ("nvme0n2", 5, 1 << 20)]);
        assert_eq!(all[0].uuid.unwrap().to_string(), "4b9bce33-9a30-4e2d-a0f9-24f6d7c1d8b1");
        assert_eq!(all[1].uuid.unwrap().to_string(), "11111111-2222-3333-4444-555555555555");
        assert_eq!(all[1].character(), "ng0n2");
        assert_eq!(sysfs.number("nvme0n2"), Some(libc::makedev(258, 5)));
        assert_eq!(sysfs.number("nvme9n2"), None);
        assert_eq!(sysfs.namespaces("nvme1")[0].block, "nvme1n1");
        assert_eq!(sysfs.namespaces("nvme9"), []);
        assert_eq!(head("nvme0c1n2").as_deref(), Some("nvme0n2"));
        assert!(["nvme0", "ng0n1", "nvme0n1p1", "nvmeXn1"].iter().all(|x| head(x).is_none()));
    }

    #[test]
    fn a_connection_is_found_by_its_target() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        let target = |service, nqn| {
            let given = Given {
                trtype: "TCP",
                traddr: "10.0.0.1",
                trsvcid: Some(service),
                subnqn: Some(nqn),
                ..Given::default()
            };
            Target::parse(given).unwrap()
        };
        let found = sysfs.connected(&target("4420", "nqn.tcp"), None).unwrap();
        assert!(sysfs.is_at("nvme1", &target("4420", "nqn.tcp")));
        assert!(!sysfs.is_at("nvme0", &target("4420", "nqn.tcp")));
        assert_eq!((&*found.name, &*found.model), ("nvme1", "Model M"));
        assert_eq!(found.controller_id, 3);
        assert_eq!(sysfs.connected(&target("442", "nqn.tcp"), None), None);
        assert_eq!(sysfs.connected(&target("4420", "nqn.pci"), None), None);
        assert_eq!(sysfs.connected(&target("4420", "nqn.tcp"), Some("nqn.h")), None);
        fs::write(dir.path().join("class/nvme/nvme1/state"), "dead\n").unwrap();
        assert_eq!(sysfs.connected(&target("4420", "nqn.tcp"), None), None);
    }
}
