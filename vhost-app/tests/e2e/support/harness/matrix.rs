//! The cells of the table of front ends (`docs/src/front-ends.md`) that tests have run; `ci/matrix` writes it.

use std::fs::File;
use std::io::Write;

/// Says that `feature` works with `front_end` on rings of this kind: the last line of its test.
/// `ci/matrix` has the names. Without `VHOST_MATRIX`, the file to say it in, nothing happens.
pub(crate) fn cell(front_end: &str, rings: &str, feature: &str) {
    let Some(path) = std::env::var_os("VHOST_MATRIX") else { return };
    let mut file = File::options().create(true).append(true).open(path).unwrap();
    file.write_all(format!("{front_end}\t{rings}\t{feature}\n").as_bytes()).unwrap();
}
