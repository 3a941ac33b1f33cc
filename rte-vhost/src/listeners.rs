//! The sockets that this program listens on, by path. This module does the part of their closing
//! that rte_vhost must not do.
//!
//! The last close of a listening socket closes the connections in its backlog, and the fds that
//! were sent on them, on the closing thread. rte_vhost also removes the file at a socket's path
//! even if another process has put it there.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use closer::{Account, ForeignFd};

use crate::socket::{FileId, accept4, shut_down};

/// All listening sockets.
#[derive(Debug, Default)]
pub(crate) struct Listeners(Mutex<HashMap<PathBuf, Listener>>);

#[derive(Debug)]
struct Listener {
    socket: ForeignFd,
    account: Account,
    /// The file that `bind` made for it.
    file: Option<FileId>,
}

impl Listeners {
    fn all(&self) -> MutexGuard<'_, HashMap<PathBuf, Listener>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a socket that is bound to `path`, with its file.
    pub(crate) fn add(
        &self,
        path: &Path,
        file: Option<FileId>,
        socket: ForeignFd,
        account: Account,
    ) {
        self.all().insert(path.to_owned(), Listener { socket, account, file });
    }

    /// Returns whether the file at `path` is the one that this program's socket made.
    pub(crate) fn owns_file(&self, path: &Path) -> bool {
        let file = self.all().get(path).and_then(|listener| listener.file);
        file.is_some_and(|file| file.is_at(path))
    }

    /// Ends a socket that rte_vhost has closed: new connections are refused, and those in the
    /// backlog are shut down.
    pub(crate) fn end(&self, path: &Path) {
        let Some(Listener { socket, account, .. }) = self.all().remove(path) else { return };
        shut_down(&socket);
        while let Ok(waiting) = accept4(socket.as_fd()) {
            let waiting = ForeignFd::new(waiting, &account);
            shut_down(&waiting);
        }
    }

    /// Removes the files of all sockets, except those that other processes have replaced.
    pub(crate) fn remove_files(&self) {
        let file = |(path, listener): (&PathBuf, &Listener)| Some((path.clone(), listener.file?));
        let files: Vec<(PathBuf, FileId)> = self.all().iter().filter_map(file).collect();
        for (path, file) in files {
            file.remove_from(&path);
        }
    }
}
