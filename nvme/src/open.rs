//! From a namespace to a bdev.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bdev::{Access, Error, FileDisk, FileOptions, Flavour, OpenFile, Passthrough};
use tracing::info;
use uuid::Uuid;

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

/// How the namespaces of one attach are opened.
pub(crate) struct Opener {
    pub(crate) open: OpenFile,
    pub(crate) sysfs: Sysfs,
    /// Other processes may use the namespaces at the same time (`--share`).
    pub(crate) shared: bool,
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
        let character = self.character_device(namespace, name, &file);
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
        let disk = FileDisk::on_namespace(file, character, options)?;
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
                libc::EBUSY => BUSY_LIMIT,
                libc::ENOENT | libc::ENXIO => NODE_LIMIT,
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

    /// Opens the character device of a namespace, and tries a command on it. Logs why the disk does
    /// without.
    fn character_device(
        &self,
        namespace: &Namespace,
        name: &str,
        block: &File,
    ) -> Option<bdev::Namespace> {
        let path = Path::new("/dev").join(namespace.character());
        let without = |reason: &dyn std::fmt::Display| {
            let path = path.display();
            info!("bdev {name}: no NVMe commands through {path}, but block I/O: {reason}");
        };
        let file = match (self.open)(&path, Access::NvmeCharacter) {
            Ok(file) => Arc::new(file),
            Err(e) => {
                without(&e);
                return None;
            }
        };
        let passthrough = Passthrough::probe(Arc::clone(&file), block);
        let passthrough = passthrough.inspect_err(|e| without(e)).ok();
        Some(bdev::Namespace { file, passthrough })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::sysfs::tests::tree;

    fn namespace(uuid: Option<Uuid>) -> Namespace {
        Namespace { block: "nvme0n1".into(), id: 1, uuid, bytes: 4096 }
    }

    fn busy() -> Error {
        let source = std::io::Error::from_raw_os_error(libc::EBUSY);
        Error::System { what: "open".into(), source }
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
        let sysfs = Sysfs::at(dir.path());
        let holder = sysfs.block("nvme0n1").join("holders/md0");
        std::fs::create_dir_all(holder).unwrap();
        let open: OpenFile = Box::new(|_, access| {
            assert_eq!(access, Access::Exclusive);
            Err(busy())
        });
        let opener = Opener { open, sysfs, shared: false };
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
        let opener = Opener { open, sysfs: Sysfs::at(dir.path()), shared: false };
        opener.block_device(Path::new("/dev/nvme0n1"), &namespace(None)).unwrap();
        assert_eq!(tries.load(Ordering::Relaxed), 2);
    }
}
