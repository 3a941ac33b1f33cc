//! See [`vhost_fuzz::dirty_log`]: dirty logs from an untrusted front end.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::dirty_log::run(bytes));
