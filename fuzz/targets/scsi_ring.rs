//! See [`vhost_fuzz::rings`]: rings of a virtio-scsi device.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::rings::run_scsi(bytes));
