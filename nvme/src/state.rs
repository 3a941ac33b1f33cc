//! What the RPC methods share: the attached controllers, and the threads that may wait for one.

use std::rc::Rc;
use std::time::Duration;

use bdev::{Aside, Error, Host};

use crate::controller::Controllers;
use crate::sysfs::Sysfs;

pub(crate) const ATTACH: &str = "bdev_nvme_attach_controller";

/// The maximum number of operations on controllers at the same time, including those that hang
/// after their RPC has failed.
const OPERATIONS_MAX: usize = 16;

/// How long an RPC waits for such an operation. The kernel gives up on a command after 60 s.
const LIMIT: Duration = Duration::from_secs(70);

/// The state of the module.
pub(crate) struct State {
    pub(crate) sysfs: Sysfs,
    pub(crate) controllers: Rc<Controllers>,
    operations: Aside,
}

impl Default for State {
    fn default() -> Self {
        Self {
            sysfs: Sysfs::default(),
            controllers: Rc::default(),
            operations: Aside::new("NVMe", OPERATIONS_MAX),
        }
    }
}

impl State {
    /// Runs what may wait for a controller.
    pub(crate) async fn aside<T: Send + 'static>(
        &self,
        host: &Rc<dyn Host>,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.operations.run(host, LIMIT, work).await
    }
}
