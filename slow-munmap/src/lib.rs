//! A library for `LD_PRELOAD` that makes one unmapping take four seconds.
//!
//! It is for tests and measurements of what a slow unmapping holds up, of servers in any language:
//! [`environment`] has what the server's process needs. In the directory that is given to it, whoever
//! starts the server puts a file [`ARMED`]; the server's next unmapping of 1 MiB or more renames it to
//! [`SLEEPING`], sleeps, and renames it to [`SLEPT`]. So the process must be allowed to rename files
//! there.
//!
//! The library is C (`slow_munmap.c`), compiled by the build script. Forbidden dependencies, which
//! `ci/arrows` checks: all of the workspace's crates.

use std::path::Path;

/// The file that makes the next large unmapping slow.
pub const ARMED: &str = "armed";
/// The file while that unmapping sleeps.
pub const SLEEPING: &str = "sleeping";
/// The file after its sleep.
pub const SLEPT: &str = "slept";

/// Environment variables, by name, of a process whose unmapping is made slow by files in `dir`.
#[must_use]
pub fn environment(dir: &Path) -> [(&'static str, &Path); 2] {
    [("LD_PRELOAD", Path::new(env!("SLOW_MUNMAP_LIBRARY"))), ("SLOW_MUNMAP", dir)]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_program_can_be_started_with_it() {
        let [(preload, library), (name, dir)] = environment(Path::new("/nowhere"));
        assert!(fs::metadata(library).unwrap().len() > 0);
        let mut program = Command::new("true");
        let output = program.env(preload, library).env(name, dir).output().unwrap();
        // The loader complains about a library that it cannot use, and goes on without it.
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}
