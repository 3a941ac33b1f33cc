//! What is behind disks on files and devices: a file of its own for each kind, as a server may refuse
//! to open one file for two disks, and a loop device over one.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use bench::servers::Disk;
use tempfile::NamedTempFile;

use crate::cells::DiskKind;
use crate::measure::noise;

/// All that is behind the disks of a run. Files and loop devices are removed when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Backing {
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    kind: DiskKind,
    path: PathBuf,
    /// Before the file that it is over.
    _loop_device: Option<LoopDevice>,
    _file: Option<NamedTempFile>,
}

impl Backing {
    /// Makes what `kinds` need: files of `mib` MiB in `dir`, and a loop device if there is no `device`.
    ///
    /// # Errors
    /// There is no room, or it is no directory; a loop device wants root's rights.
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
                .context("without --block-device")?;
            let path = device.as_ref().map_or(file.path(), |device| &device.0).to_owned();
            places.push(Place { kind, path, _loop_device: device, _file: Some(file) });
        }
        Ok(Self { places })
    }

    /// The file or device behind disks of `kind`.
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
    /// Past the page cache, as servers open it.
    fn over(file: &Path) -> Result<Self> {
        let output = Command::new("losetup")
            .args(["--direct-io=on", "--find", "--show"])
            .arg(file)
            .stdin(Stdio::null())
            .output()
            .context("cannot start losetup")?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cannot make a loop device: {}", words.trim());
        Ok(Self(String::from_utf8(output.stdout)?.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Command::new("losetup").arg("--detach").arg(&self.0).status());
    }
}

/// Makes a file of `mib` MiB in `dir` that is full of data and on the disk.
///
/// # Errors
/// There is no room, or it is no directory.
fn data_file(dir: &Path, mib: u64) -> Result<NamedTempFile> {
    let doing = || format!("cannot make a file of {mib} MiB in {}", dir.display());
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
    fn each_kind_has_a_file_of_its_own_that_is_removed() {
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
    fn a_device_that_is_named_is_taken_as_it_is() {
        let device = Path::new("/dev/null");
        let missing = Path::new("/no/such");
        let backing = Backing::make(&[DiskKind::Block], missing, 1, Some(device)).unwrap();
        assert_eq!(backing.disk(DiskKind::Block), Disk::Block(device.into()));
        assert!(Backing::make(&[DiskKind::Aio], missing, 1, Some(device)).is_err());
    }
}
