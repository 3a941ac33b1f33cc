//! The services that the program offers to the modules.

use std::fs::File;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::access::Access;
use crate::contract::Bdev;
use crate::control::method::LocalFuture;
use crate::control::module::BdevModule;
use crate::control::registry::Registry;
use crate::error::Error;

/// Opens a file as [`crate::open_file`] does. May block.
pub type OpenFile = Box<dyn Fn(&Path, Access) -> Result<File, Error> + Send>;

/// What has happened to a bdev, for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BdevEvent {
    /// It has been created and examined.
    Registered,
    /// It has been deleted and has no user any more.
    Unregistered,
    /// Its size has changed. Its users are told next.
    Resized,
}

/// The program that the modules run in.
///
/// It is used on the control thread, like the modules. Obligations of the implementer: no method
/// waits on that thread, and each future ends once the awaited event has happened.
pub trait Host {
    /// All bdevs.
    fn registry(&self) -> &Registry;

    /// All modules, in the order in which they examine new bdevs.
    fn modules(&self) -> &[Rc<dyn BdevModule>];

    /// Runs `work` on a thread that may block. `blocking` of `dyn Host` is the convenient form.
    fn run_blocking(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()>;

    /// Returns a future that ends after this active time: time in which the process was stopped
    /// does not count.
    fn sleep(&self, time: Duration) -> LocalFuture<'static, ()>;

    /// Runs a task on the control thread until it ends or the process does.
    fn spawn(&self, task: LocalFuture<'static, ()>);

    /// Returns the function that opens files, for use on a thread that may block.
    fn open_file(&self) -> OpenFile;

    /// Returns the parameters that clients have set with an options method of the program, such as
    /// `bdev_nvme_set_options`; empty if none has.
    fn options(&self, _method: &str) -> Map<String, Value> {
        Map::new()
    }

    /// Returns whether several bdevs may write to the same file.
    fn shares_files(&self) -> bool;

    /// Reports an event of a bdev to operators.
    fn bdev_event(&self, event: BdevEvent, name: &str);

    /// Tells the users of this bdev that its size has changed.
    fn bdev_resized(&self, bdev: &Arc<dyn Bdev>);

    /// Takes bdevs away from their users, first all at once, and then waits for each of them until
    /// it has no user any more, or for its [`Bdev::deletion_limit`].
    fn retire(&self, bdevs: Vec<Arc<dyn Bdev>>) -> LocalFuture<'_, ()>;

    /// The caller has dropped a bdev that it held for a while: tasks that wait for the bdev's last
    /// user check again.
    fn released(&self);
}

impl dyn Host {
    /// Runs `work` on a thread that may block, and returns its result.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let (sender, result) = mpsc::channel();
        self.run_blocking(Box::new(move || {
            // The receiver waits; it is gone only if the call was cancelled.
            let _ = sender.send(work());
        }))
        .await;
        result.try_recv().expect("run_blocking ends after the work")
    }
}
