//! See [`vhost_fuzz::json_rpc`]: RPC clients.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::json_rpc::run(bytes));
