//! See [`vhost_fuzz::messages`]: messages and fds of front ends.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::messages::run(bytes));
