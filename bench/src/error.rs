//! What can go wrong with a load or a measurement.

use std::io;

/// The result of most of what this crate does.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the front end has failed
    #[error(transparent)]
    FrontEnd(#[from] front_end::Error),
    /// the system refused
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// this process may not use the core, or there is none such
    #[error("cannot run on core {0}: {1}")]
    Core(usize, io::Error),
    /// the back end offers less than the load needs
    #[error("{0}")]
    TooLittle(String),
    /// the load's thread has ended early
    #[error("the load has ended: {0}")]
    LoadEnded(String),
}

impl Error {
    /// For `map_err` on a system call.
    pub(crate) fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { doing, source: source.into() }
    }
}
