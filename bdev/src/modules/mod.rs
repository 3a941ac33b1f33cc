//! The kinds of bdevs, one folder each: the device, its RPC methods, its configuration, its tests.

use std::rc::Rc;

use crate::control::module::BdevModule;

mod blocks;

pub(crate) mod delay;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod gpt;
pub(crate) mod malloc;
pub(crate) mod null;
pub(crate) mod passthru;
pub(crate) mod split;

/// All modules. A new one needs a folder and a line here.
#[must_use]
pub fn all() -> Vec<Rc<dyn BdevModule>> {
    vec![
        Rc::new(malloc::module::Module::default()),
        Rc::new(null::module::Module),
        Rc::new(file::module::Module(file::Flavour::Aio)),
        Rc::new(file::module::Module(file::Flavour::Uring)),
        Rc::new(delay::module::Module),
        Rc::new(error::module::Module),
        Rc::new(passthru::module::Module),
        Rc::new(split::module::Module),
        Rc::new(gpt::module::Module::default()),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::Host;
    use crate::control::test_host::TestHost;

    /// SHA-1 results for SPDK's namespaces, the 16 bytes of UUID 1 and, for a part, its range.
    #[test]
    fn uuids_that_are_not_given_are_derived_as_in_spdk() {
        let host = TestHost::new([]);
        host.null("A", 1);
        let delay = json!({"name": "D", "base_bdev_name": "A", "avg_read_latency": 1,
            "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1});
        host.call("bdev_delay_create", delay).unwrap();
        let uuid = |name: &str| host.registry().bdev(name).unwrap().uuid().to_string();
        assert_eq!(uuid("D"), "a238c1dc-7a7a-52f5-acdb-69c90f3050f9");
        host.call("bdev_delay_delete", json!({"name": "D"})).unwrap();
        host.call("bdev_error_create", json!({"base_name": "A"})).unwrap();
        assert_eq!(uuid("EE_A"), "f43e31e4-9e0e-51b9-8c83-1b3cb20b10df");
        // None is in the saved configuration, as the same one is derived when it is loaded.
        assert_eq!(host.config()[1], json!(["bdev_error_create", {"base_name": "A"}]));
    }
}
