//! `vhost-lvs`: shows, checks, exports and imports logical volumes that no server uses.
//!
//! `disk` is the file or block device, which the crate `blobstore` reads and writes. `inspect`
//! makes text or JSON of a store, `transfer` copies volumes.

#![forbid(unsafe_code)]

mod args;
mod disk;
mod inspect;
mod show;
mod transfer;

use std::error::Error;
use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use blobstore::check::{Severity, check};
use blobstore::lvs::Lvs;
use clap::Parser;
use futures_util::FutureExt;

use crate::args::{Args, Command};
use crate::disk::Disk;

type Failure = Box<dyn Error>;

fn main() -> ExitCode {
    let (is_check, done) = match Args::parse().command {
        Command::Inspect { file, json } => (false, inspect(&file, json)),
        Command::Check { file } => (true, run_check(&file)),
        Command::Export { file, volume, out, external } => {
            (false, export(&file, &volume, &out, external.as_deref()))
        }
        Command::Import { file, input, name, thin, recover } => {
            (false, import(&file, &input, &name, thin, recover))
        }
    };
    done.unwrap_or_else(|error| {
        // Unlike `eprintln`, this does not panic if the terminal is gone.
        let _ = writeln!(std::io::stderr(), "vhost-lvs: {error}");
        ExitCode::from(if is_check || error.is::<Unreadable>() { 2 } else { 1 })
    })
}

/// FILE cannot be opened or has no store.
#[derive(Debug)]
struct Unreadable(String);

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Unreadable {}

fn unreadable(file: &Path) -> impl Fn(&dyn std::fmt::Display) -> Failure {
    move |error| Unreadable(format!("{}: {error}", file.display())).into()
}

/// Disks complete at once, so that no runtime is needed.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("no request to a disk waits")
}

/// Reads a store without writing, and tells whether it was unloaded.
fn view(file: &Path, disk: Disk) -> Result<(Lvs<Disk>, bool), Failure> {
    let lvs = now(Lvs::load(disk, true)).map_err(|error| unreadable(file)(&error))?;
    let clean = lvs.store().super_block().clean;
    Ok((lvs, clean))
}

fn open(file: &Path) -> Result<Disk, Failure> {
    Disk::open(file).map_err(|error| unreadable(file)(&error))
}

fn print(text: &str) -> Result<(), Failure> {
    // Unlike `print`, this returns an error if the disk is full or the pipe is closed.
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    written.map_err(|error| format!("cannot print: {error}").into())
}

fn inspect(file: &Path, json: bool) -> Result<ExitCode, Failure> {
    let (lvs, clean) = view(file, open(file)?)?;
    match json {
        true => print(&format!("{:#}\n", inspect::json(&lvs, clean)))?,
        false => print(&inspect::text(&lvs, clean))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn run_check(file: &Path) -> Result<ExitCode, Failure> {
    let disk = open(file)?;
    let found = now(check(&disk)).map_err(|error| unreadable(file)(&error))?;
    let bad = found.iter().filter(|finding| finding.severity > Severity::Note).count();
    let line = |text: String| show::plain(&text) + "\n";
    let lines: String = found.iter().map(|finding| line(finding.to_string())).collect();
    let summary = match bad {
        0 => "clean\n".to_owned(),
        1 => "1 finding\n".to_owned(),
        _ => format!("{bad} findings\n"),
    };
    print(&(lines + &summary))?;
    Ok(ExitCode::from(u8::from(bad > 0)))
}

fn export(
    file: &Path,
    volume: &str,
    out: &Path,
    external: Option<&Path>,
) -> Result<ExitCode, Failure> {
    let mut disk = open(file)?;
    if let Some(external) = external {
        disk = disk.with_external(open(external)?);
    }
    let (lvs, _) = view(file, disk)?;
    let size = now(transfer::export(&lvs, volume, out))?;
    print(&format!("exported {}\n", show::bytes(size)))?;
    Ok(ExitCode::SUCCESS)
}

fn import(
    file: &Path,
    input: &Path,
    name: &str,
    thin: bool,
    recover: bool,
) -> Result<ExitCode, Failure> {
    let disk = Disk::open_exclusively(file).map_err(|error| unreadable(file)(&error))?;
    let (lvs, clean) = view(file, disk)?;
    if !clean && !recover {
        return Err(format!(
            "{}: the store was not unloaded; a server may use it. If none does, use --recover",
            file.display()
        )
        .into());
    }
    let disk = lvs.into_store().into_device();
    let mut lvs = now(Lvs::load(disk, false)).map_err(|error| unreadable(file)(&error))?;
    let done = now(transfer::import(&mut lvs, input, name, thin));
    let failed = lvs.store().failed();
    let unloaded = if failed { Ok(()) } else { now(lvs.store_mut().unload()) };
    print(&format!("imported {}\n", show::bytes(done?)))?;
    unloaded?;
    Ok(ExitCode::SUCCESS)
}
