//! See [`vhost_fuzz::config_file`]: the reader of `-c`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::config_file::run(bytes));
