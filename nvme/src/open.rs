//! From a namespace to a bdev.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bdev::{Access, Error, FileDisk, FileOptions, Flavour, OpenFile};
use uuid::Uuid;

use crate::controller;
use crate::sysfs::{Namespace, Sysfs};
use crate::users::user_of;

/// How long a block device may be busy without a user that the kernel names: the I/O of a process
/// that has ended keeps it.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
/// How long the node of a new device may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);

/// The namespace of the UUIDs that SPDK derives with its option `generate_uuids`.
const DERIVED: Uuid = Uuid::from_u128(0xedae_d2de_24bc_4b07_b559_f47e_cbe7_30fd);

/// The length of a serial number, which is padded with blanks.
const SERIAL_LEN: usize = 20;

/// Returns the UUID of a namespace's bdev: its own, or one that SPDK derives from the serial number
/// of its controller.
pub(crate) fn uuid_of(namespace: &Namespace, serial: &str) -> Uuid {
    namespace.uuid.unwrap_or_else(|| {
        let text = format!("{serial:SERIAL_LEN$}{}", namespace.id);
        Uuid::new_v5(&DERIVED, text.as_bytes())
    })
}

/// Reads the data of an admin command from a device. May block for a minute.
///
/// # Errors
/// The system's error: EACCES if the kernel does not allow the command.
pub(crate) fn data_of(open: &OpenFile, device: &str, access: Access) -> Result<Vec<u8>, Error> {
    let path = Path::new("/dev").join(device);
    let mut data = vec![];
    let read = open(&path, access)?.read_to_end(&mut data);
    read.map_err(|source| Error::System { what: path.display().to_string(), source })?;
    Ok(data)
}

/// Whether to wait for a device that is busy or whose node is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Up to [`BUSY_LIMIT`] and [`NODE_LIMIT`].
    Waits,
    /// Not at all: the caller tries again later.
    TriesOnce,
}

impl Patience {
    fn limited(self, limit: Duration) -> Duration {
        if self == Self::Waits { limit } else { Duration::ZERO }
    }
}

/// How the namespaces of one attach are opened.
pub(crate) struct Opener {
    pub(crate) open: OpenFile,
    pub(crate) sysfs: Sysfs,
    /// Other processes may use the namespaces at the same time (`--share`).
    pub(crate) shared: bool,
    pub(crate) patience: Patience,
    /// The paths of their controller.
    pub(crate) paths: Vec<controller::Path>,
}

impl Opener {
    /// Opens a namespace as the disk `name`. May block for as long as the controller does.
    ///
    /// # Errors
    /// EBUSY with the user of the namespace; the system's error.
    pub(crate) fn disk(
        &self,
        namespace: &Namespace,
        name: &str,
        uuid: Uuid,
    ) -> Result<Arc<FileDisk>, Error> {
        let path = Path::new("/dev").join(&namespace.block);
        let file = self.block_device(&path, namespace)?;
        if !self.is_same(namespace, &file) {
            let text = format!("{}: the drive was exchanged during the attach", path.display());
            return Err(Error::NoDevice(text));
        }
        let options = FileOptions {
            name: name.into(),
            filename: path,
            block_size: None,
            readonly: false,
            fallocate: false,
            uuid: Some(uuid),
            flavour: Flavour::Nvme,
            engine: None,
        };
        let disk = FileDisk::on(file, options)?;
        if self.shared {
            disk.share();
        }
        Ok(disk)
    }

    fn block_device(&self, path: &Path, namespace: &Namespace) -> Result<File, Error> {
        let access = if self.shared { Access::ReadWrite } else { Access::Exclusive };
        let began = Instant::now();
        loop {
            let e = match (self.open)(path, access) {
                Ok(file) => return Ok(file),
                Err(e) => e,
            };
            let limit = match e.errno() {
                libc::EBUSY => self.patience.limited(BUSY_LIMIT),
                libc::ENOENT | libc::ENXIO => self.patience.limited(NODE_LIMIT),
                _ => return Err(e),
            };
            if e.errno() == libc::EBUSY
                && let Some(user) = user_of(&self.sysfs, &namespace.block)
            {
                return Err(Error::Busy(user));
            }
            if began.elapsed() >= limit && e.errno() == libc::EBUSY {
                let path = path.display();
                let text = format!("{path} is in use by another process; see: fuser -v {path}");
                return Err(Error::Busy(text));
            }
            if began.elapsed() >= limit {
                return Err(e);
            }
            sleep(PAUSE);
        }
    }

    /// Returns whether the open device is that of a namespace of these paths. A drive may be
    /// exchanged before the open, and the kernel uses names and numbers again.
    fn is_same(&self, namespace: &Namespace, block: &File) -> bool {
        let number = block.metadata().ok().map(|metadata| metadata.rdev());
        number.is_some()
            && number == self.sysfs.number(&namespace.block)
            && self.paths.iter().any(|path| self.has(path, namespace))
    }

    /// Returns whether the kernel still has this path with this namespace.
    fn has(&self, path: &controller::Path, namespace: &Namespace) -> bool {
        let same = |it: &Namespace| {
            (&it.block, it.id, it.uuid) == (&namespace.block, namespace.id, namespace.uuid)
        };
        self.sysfs.is_at(&path.kernel, &path.target)
            && self.sysfs.controller(&path.kernel).is_some_and(|now| path.identity.is_of(&now))
            && self.sysfs.namespaces(&path.kernel).iter().any(same)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::identity::Identity;
    use crate::sysfs::tests::tree;
    use crate::target::{Given, Target};

    fn namespace(uuid: Option<Uuid>) -> Namespace {
        Namespace { block: "nvme0n1".into(), id: 1, uuid, bytes: 4096 }
    }

    fn busy() -> Error {
        let source = std::io::Error::from_raw_os_error(libc::EBUSY);
        Error::System { what: "open".into(), source }
    }

    fn opener(open: OpenFile, root: &Path) -> Opener {
        let sysfs = Sysfs::at(root);
        let given = Given { trtype: "PCIe", traddr: "0000:00:04.0", ..Given::default() };
        let path = controller::Path {
            kernel: "nvme0".into(),
            target: Target::parse(given).unwrap(),
            host: Default::default(),
            identity: Identity::new(&sysfs.controller("nvme0").unwrap(), None, &[]),
            params: Default::default(),
        };
        Opener { open, sysfs, shared: false, patience: Patience::Waits, paths: vec![path] }
    }

    #[test]
    fn a_drive_that_was_exchanged_is_refused() {
        let dir = tree();
        let write = |path: &str, text: &str| std::fs::write(dir.path().join(path), text).unwrap();
        let device = File::open("/dev/null").unwrap();
        let number = device.metadata().unwrap().rdev();
        let dev = format!("{}:{}", libc::major(number), libc::minor(number));
        let opener = opener(Box::new(|_, _| Err(busy())), dir.path());
        let found = opener.sysfs.namespaces("nvme0").remove(0);
        let same = || opener.is_same(&found, &device);
        assert!(!same(), "another number");
        write("class/block/nvme0n1/dev", &dev);
        assert!(same());
        write("class/block/nvme0n1/uuid", "4b9bce33-9a30-4e2d-a0f9-24f6d7c1d8b9");
        assert!(!same(), "another namespace");
        write("class/block/nvme0n1/uuid", &found.uuid.unwrap().to_string());
        assert!(same());
        write("class/nvme/nvme0/serial", "S2");
        assert!(!same(), "another drive");
    }

    #[test]
    fn a_namespace_without_an_id_has_a_uuid_that_stays() {
        let own = Uuid::from_u128(7);
        assert_eq!(uuid_of(&namespace(Some(own)), "S"), own);
        let derived = uuid_of(&namespace(None), "S");
        assert_eq!(derived, uuid_of(&namespace(None), "S"));
        assert_ne!(derived, uuid_of(&namespace(None), "T"));
        assert_ne!(derived, uuid_of(&Namespace { id: 2, ..namespace(None) }, "S"));
    }

    #[test]
    fn a_namespace_in_use_is_refused_with_its_user() {
        let dir = tree();
        let holder = Sysfs::at(dir.path()).block("nvme0n1").join("holders/md0");
        std::fs::create_dir_all(holder).unwrap();
        let open: OpenFile = Box::new(|_, access| {
            assert_eq!(access, Access::Exclusive);
            Err(busy())
        });
        let opener = opener(open, dir.path());
        let e = opener.disk(&namespace(None), "N", Uuid::nil()).unwrap_err();
        assert_eq!(e.errno(), libc::EBUSY);
        assert!(e.to_string().contains("/dev/nvme0n1 is used by md0"), "{e}");
    }

    #[test]
    fn a_device_that_is_busy_for_a_moment_is_opened() {
        let dir = tree();
        let tries = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&tries);
        let open: OpenFile = Box::new(move |_, _| match count.fetch_add(1, Ordering::Relaxed) {
            0 => Err(busy()),
            _ => Ok(tempfile::tempfile().unwrap()),
        });
        let opener = opener(open, dir.path());
        opener.block_device(Path::new("/dev/nvme0n1"), &namespace(None)).unwrap();
        assert_eq!(tries.load(Ordering::Relaxed), 2);
        tries.store(0, Ordering::Relaxed);
        let once = Opener { patience: Patience::TriesOnce, ..opener };
        let e = once.block_device(Path::new("/dev/nvme0n1"), &namespace(None)).unwrap_err();
        assert_eq!((e.errno(), tries.load(Ordering::Relaxed)), (libc::EBUSY, 1));
    }
}
