//! See [`vhost_fuzz::inflight`]: in-flight areas from an untrusted front end.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::inflight::run(bytes));
