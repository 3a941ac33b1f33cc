//! The status of a chain that ends just before descriptors that were not returned to the driver.

use super::block::Block;
use super::scene::UNSUPP;
use crate::suites::overlap::{OTHER, end_chain, overlapping};

/// Of readable buffers but for the last one: its first bytes are no request that the disk knows.
#[test]
fn a_chain_that_fits_exactly_is_answered() {
    let mut scene = overlapping::<Block>();
    end_chain(&scene);
    scene.visit();
    assert_eq!(scene.queue().control().requests(), (1, 1), "it counts as an error");
    // Its status byte is the last one of its last descriptor.
    assert_eq!(scene.get(OTHER + 15, 1), [UNSUPP]);
    scene.complete_all();
    assert_eq!(scene.queue().control().requests(), (2, 1));
}
