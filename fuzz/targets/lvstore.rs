//! See [`vhost_fuzz::lvstore`]: logical volume stores with forged metadata.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::lvstore::run(bytes));
