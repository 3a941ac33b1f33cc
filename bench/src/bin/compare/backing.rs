//! The files and devices of disks: a separate file for each kind of disk, because a server may
//! refuse to open a file for two disks, and a loop device over one.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use bench::servers::Disk;
use tempfile::NamedTempFile;

use crate::cells::DiskKind;
use crate::measure::noise;

/// The files and devices of a run's disks. Dropping it removes files and loop devices.
#[derive(Debug, Default)]
pub(crate) struct Backing {
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    kind: DiskKind,
    path: PathBuf,
    /// Dropped before its file.
    _loop_device: Option<LoopDevice>,
    _file: Option<NamedTempFile>,
}

impl Backing {
    /// Creates the files of `kinds`, with `mib` MiB each in `dir`, and a loop device if there is no
    /// `device`.
    ///
    /// # Errors
    /// `dir` is not a directory or has not enough space. A loop device needs root's privileges.
    pub(crate) fn make(
        kinds: &[DiskKind],
        dir: &Path,
        mib: u64,
        device: Option<&Path>,
    ) -> Result<Self> {
        let mut places: Vec<Place> = Vec::new();
        for &kind in kinds {
            if !kind.is_stored() || places.iter().any(|place| place.kind == kind) {
                continue;
            }
            if let (DiskKind::Block, Some(path)) = (kind, device) {
                let path = path.to_owned();
                places.push(Place { kind, path, _loop_device: None, _file: None });
                continue;
            }
            let file = data_file(dir, mib)?;
            let device = (kind == DiskKind::Block)
                .then(|| LoopDevice::over(file.path()))
                .transpose()
                .context("the block disk needs --block-device or a loop device")?;
            let path = device.as_ref().map_or(file.path(), |device| &device.0).to_owned();
            places.push(Place { kind, path, _loop_device: device, _file: Some(file) });
        }
        Ok(Self { places })
    }

    /// The file or device of disks of `kind`.
    pub(crate) fn path(&self, kind: DiskKind) -> Option<&Path> {
        Some(&self.places.iter().find(|place| place.kind == kind)?.path)
    }

    /// The disk of `kind` to serve.
    pub(crate) fn disk(&self, kind: DiskKind) -> Disk {
        kind.disk(self.path(kind).unwrap_or(Path::new("")))
    }
}

/// A loop device; dropping it removes it.
#[derive(Debug)]
struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Creates a device with direct I/O, as servers use files.
    fn over(file: &Path) -> Result<Self> {
        let output = Command::new("losetup")
            .args(["--direct-io=on", "--find", "--show"])
            .arg(file)
            .stdin(Stdio::null())
            .output()
            .context("cannot start losetup")?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cannot create a loop device: {}", words.trim());
        Ok(Self(String::from_utf8(output.stdout)?.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Command::new("losetup").arg("--detach").arg(&self.0).status());
    }
}

/// Creates a file of `mib` MiB in `dir` and writes all of it to the disk.
///
/// # Errors
/// `dir` is not a directory or has not enough space.
fn data_file(dir: &Path, mib: u64) -> Result<NamedTempFile> {
    let doing = || format!("cannot create a file of {mib} MiB in {}", dir.display());
    let file = tempfile::Builder::new().prefix("bench").tempfile_in(dir).with_context(doing)?;
    let write = |mut file: &File| -> std::io::Result<()> {
        for seed in 0..mib {
            let bytes: Vec<u8> = noise(seed).take((1 << 20) / 8).flatten().collect();
            file.write_all(&bytes)?;
        }
        file.sync_all()
    };
    write(file.as_file()).with_context(doing)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_a_separate_file_that_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let kinds = [DiskKind::Null, DiskKind::Aio, DiskKind::Uring, DiskKind::Aio];
        let backing = Backing::make(&kinds, dir.path(), 1, None).unwrap();
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files(), 2);
        assert_eq!(backing.path(DiskKind::Null), None);
        let (aio, uring) = (backing.disk(DiskKind::Aio), backing.disk(DiskKind::Uring));
        assert_ne!(aio.path(), uring.path());
        assert_eq!(aio.path().unwrap().metadata().unwrap().len(), 1 << 20);
        drop(backing);
        assert_eq!(files(), 0);
    }

    #[test]
    fn a_given_device_is_used_directly() {
        let device = Path::new("/dev/null");
        let missing = Path::new("/no/such");
        let backing = Backing::make(&[DiskKind::Block], missing, 1, Some(device)).unwrap();
        assert_eq!(backing.disk(DiskKind::Block), Disk::Block(device.into()));
        assert!(Backing::make(&[DiskKind::Aio], missing, 1, Some(device)).is_err());
    }
}
