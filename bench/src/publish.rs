//! What the measuring programs show while they work, and what they leave behind.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

/// A file beside this program; with `..`, one beside its directory.
///
/// # Errors
/// The system does not say where this program is.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// Shows what is being done, on a terminal only; nothing clears the line.
pub fn progress(what: &str) {
    let mut stderr = io::stderr();
    if stderr.is_terminal() {
        // Erases the line that was there; a terminal that is gone shows nothing.
        drop(write!(stderr, "\r\x1b[K{what}"));
    }
}

/// Writes a file, makes its directory if need be, and says so.
///
/// # Errors
/// The system refuses; the path is in the error.
pub fn save(path: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("")))
        .and_then(|()| fs::write(path, text))
        .map_err(|e| about(path, &e))?;
    eprintln!("wrote {}", path.canonicalize().unwrap_or(path.to_owned()).display());
    Ok(())
}

/// Appends a section to a file of results, an empty line before it.
///
/// # Errors
/// The system refuses; the path is in the error.
pub fn append(path: &Path, section: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| write!(file, "\n{section}"))
        .map_err(|e| about(path, &e))
}

fn about(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
