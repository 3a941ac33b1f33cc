//! See [`vhost_fuzz::config_file`]: what `-c` reads.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::config_file::run(bytes));
