//! A channel, as the threads of its store see it.

use std::sync::Arc;

use bdev::Line;

use crate::volume::Volume;

/// A channel, as the store's thread sees it.
pub(crate) struct Link {
    pub(crate) volume: Arc<Volume>,
    /// The jobs. Each is an operation without data on a range of the volume.
    pub(crate) line: Arc<Line>,
}
