//! See [`vhost_fuzz::dirty_log`]: dirty logs made by a stranger.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::dirty_log::run(bytes));
