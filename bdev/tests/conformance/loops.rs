//! Loop devices, where the host lets us make them.
//!
//! They are taken down as soon as they are open, so that the last close removes them, even if the
//! test is killed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Runs a command. `None`, and the test is skipped, if it fails.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Option<String> {
    let result = match command.output() {
        Ok(output) if output.status.success() => Ok(output.stdout),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(e) => Err(e.to_string()),
    };
    match result {
        Ok(stdout) => Some(String::from_utf8(stdout).unwrap().trim().into()),
        Err(e) => {
            test_report::skipped("block-device", &format!("{command:?}: {e}"));
            None
        }
    }
}

/// A loop device that goes when it is closed.
pub(crate) struct Loop {
    device: PathBuf,
    _open: File,
    _dir: TempDir,
}

impl Loop {
    #[track_caller]
    pub(crate) fn new(size: u64, sector_size: u32) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let file = crate::disks::make_file(&dir, size);
        let sector_size = sector_size.to_string();
        let device = run(Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector_size])
            .arg(file))?;
        let open = File::open(&device).unwrap();
        run(Command::new("losetup").args(["--detach", &device]))?;
        Some(Self { device: device.into(), _open: open, _dir: dir })
    }

    pub(crate) fn device(&self) -> &Path {
        &self.device
    }
}
