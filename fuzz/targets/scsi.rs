//! See [`vhost_fuzz::scsi`]: commands of guests to a SCSI disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_fuzz::scsi::run(bytes));
