//! Builds the shared library, and tells the crate where it is.

use std::env;
use std::path::PathBuf;

const SOURCE: &str = "src/slow_munmap.c";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SOURCE}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out.join("libslow_munmap.so");
    // `cc::Build::compile` makes static libraries only.
    let mut compiler = cc::Build::new().pic(true).warnings(true).get_compiler().to_command();
    compiler.arg("-shared").arg(SOURCE).arg("-o").arg(&library);
    let status = compiler.status().unwrap_or_else(|e| panic!("cannot run {compiler:?}: {e}"));
    assert!(status.success(), "{compiler:?} failed: {status}");
    println!("cargo::rustc-env=SLOW_MUNMAP_LIBRARY={}", library.display());
}
