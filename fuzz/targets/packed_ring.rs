//! See [`vhost_fuzz::rings`]: a packed ring.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::rings::run(bytes, true));
