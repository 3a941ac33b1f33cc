//! Finds DPDK, writes the bindings and says what to link.
//!
//! Two environment variables change what it does. `VHOST_DPDK_LINK` is `static` or `dynamic`;
//! without it, the archives are linked where they are installed. `VHOST_DPDK_HEADERS` names
//! directories, with `:` between them, whose headers are read instead of the installed ones; that
//! is for checks only, because the library stays the installed one.

use std::env;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

/// What to install when a part is missing, by its name in Debian and Ubuntu.
const INSTALL: &str = "on Debian or Ubuntu: \
     apt-get install libdpdk-dev libnuma-dev libclang-dev clang pkg-config; elsewhere the same \
     under similar names (DPDK 22.11 or newer with its headers, libnuma, libclang)";

/// The oldest release whose rte_vhost this program was written against.
const OLDEST: &str = "22.11";

/// The releases that get a `dpdk_ge_YY_MM` cfg.
const RELEASES: [(u32, u32); 12] = [
    (22, 11),
    (23, 3),
    (23, 7),
    (23, 11),
    (24, 3),
    (24, 7),
    (24, 11),
    (25, 3),
    (25, 7),
    (25, 11),
    (26, 3),
    (26, 7),
];

/// The archives that rte_vhost and EAL need between them; `log`, `argparse` and `timer` exist in
/// newer releases only.
const ARCHIVES: [&str; 18] = [
    "vhost",
    "ethdev",
    "cryptodev",
    "hash",
    "pci",
    "dmadev",
    "mempool",
    "mbuf",
    "ring",
    "net",
    "meter",
    "rcu",
    "timer",
    "eal",
    "telemetry",
    "kvargs",
    "argparse",
    "log",
];

/// Without these archives there is nothing to link statically.
const ARCHIVES_NEEDED: [&str; 2] = ["vhost", "eal"];

/// The shared libraries whose functions this crate declares.
const SHARED: [&str; 3] = ["rte_vhost", "rte_eal", "rte_log"];

/// The libraries outside DPDK that the archives above may use; each is linked if pkg-config names
/// it or it is part of libc. The linker drops those that nothing uses.
const OUTSIDE: [&str; 5] = ["numa", "fdt", "bsd", "m", "dl"];

fn main() {
    for name in ["VHOST_DPDK_LINK", "VHOST_DPDK_HEADERS", "PKG_CONFIG_PATH", "LIBCLANG_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=wrapper.h");

    let dpdk = pkg_config::Config::new()
        .atleast_version(OLDEST)
        .cargo_metadata(false)
        .env_metadata(true)
        .probe("libdpdk")
        .unwrap_or_else(|error| {
            panic!("DPDK {OLDEST} or newer was not found.\n{INSTALL}\n\npkg-config says: {error}")
        });

    let mut include_paths = dpdk.include_paths.clone();
    if let Some(dirs) = env::var_os("VHOST_DPDK_HEADERS") {
        include_paths = env::split_paths(&dirs).collect();
    }
    emit_version(&include_paths);
    write_bindings(&include_paths);
    link(&dpdk);
}

/// Reads the version from the headers that bindgen reads and emits a cfg for every release it is
/// not older than.
fn emit_version(include_paths: &[PathBuf]) {
    let file = find(include_paths, "rte_build_config.h");
    println!("cargo::rerun-if-changed={}", file.display());
    println!("cargo::rerun-if-changed={}", find(include_paths, "rte_vhost.h").display());
    let text = std::fs::read_to_string(&file)
        .unwrap_or_else(|error| panic!("{}: {error}\n{INSTALL}", file.display()));
    let number = |name: &str| -> u32 {
        text.lines()
            .find_map(|line| line.strip_prefix("#define ")?.strip_prefix(name)?.trim().parse().ok())
            .unwrap_or_else(|| panic!("{}: no number after {name}", file.display()))
    };
    let version = (number("RTE_VER_YEAR"), number("RTE_VER_MONTH"));
    for (year, month) in RELEASES {
        println!("cargo::rustc-check-cfg=cfg(dpdk_ge_{year}_{month:02})");
        if version >= (year, month) {
            println!("cargo::rustc-cfg=dpdk_ge_{year}_{month:02}");
        }
    }
    assert!(
        version >= RELEASES[0],
        "DPDK {OLDEST} or newer is needed, not {version:?}.\n{INSTALL}"
    );
    println!("cargo::metadata=version={}.{:02}.{}", version.0, version.1, number("RTE_VER_MINOR"));
}

/// The first of `include_paths` that has `header`, joined with it.
fn find(include_paths: &[PathBuf], header: &str) -> PathBuf {
    include_paths
        .iter()
        .map(|dir| dir.join(header))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("DPDK's {header} is in none of {include_paths:?}.\n{INSTALL}"))
}

/// Writes `bindings.rs`: the functions, types and constants named here and what they refer to.
fn write_bindings(include_paths: &[PathBuf]) {
    let functions = [
        "rte_eal_(init|cleanup)",
        "rte_vhost_.*",
        "rte_version.*",
        "rte_openlog_stream",
        "rte_log|rte_log_cur_msg_loglevel",
        "fopencookie",
    ];
    let variables =
        ["RTE_VHOST_.*", "RTE_MAX_VHOST_DEVICE", "VHOST_.*", "RTE_VER_.*", "RTE_LOG_.*"];

    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(["-D_GNU_SOURCE", "-DALLOW_EXPERIMENTAL_API"])
        .clang_args(include_paths.iter().map(|dir| format!("-I{}", dir.display())))
        .rust_edition(bindgen::RustEdition::Edition2024)
        .allowlist_type("rte_vhost_.*")
        // A packet's mbuf would drag in mempools and rings; this program sends no packets.
        .blocklist_function("rte_vhost_(en|de)queue_burst")
        .wrap_unsafe_ops(true)
        .prepend_enum_name(false)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .derive_default(true)
        .opaque_type("_IO_FILE")
        .use_core()
        .generate_comments(false)
        .layout_tests(true)
        .merge_extern_blocks(true);
    for name in functions {
        builder = builder.allowlist_function(name);
    }
    for name in variables {
        builder = builder.allowlist_var(name);
    }
    // bindgen panics where it finds no libclang, and would not say which package has it.
    let bindings = std::panic::catch_unwind(AssertUnwindSafe(|| builder.generate()))
        .unwrap_or_else(|_| panic!("bindgen found no libclang.\n{INSTALL}"))
        .unwrap_or_else(|error| {
            panic!("bindgen cannot read DPDK's headers.\n{INSTALL}\n\n{error}")
        });
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindings.write_to_file(out.join("bindings.rs")).expect("OUT_DIR can be written");
}

/// Says what to link: the few archives where they are installed, otherwise the shared libraries.
fn link(dpdk: &pkg_config::Library) {
    println!("cargo::rustc-check-cfg=cfg(dpdk_static)");
    let libdir = pkg_config::get_variable("libdpdk", "libdir").unwrap_or_default();
    let libdir = Path::new(&libdir);
    let has = |name: &str| libdir.join(format!("librte_{name}.a")).is_file();
    let missing = ARCHIVES_NEEDED.into_iter().find(|name| !has(name));

    let wanted = env::var("VHOST_DPDK_LINK").unwrap_or_default();
    let archives = match (wanted.as_str(), missing) {
        ("dynamic", _) | ("", Some(_)) => false,
        ("static" | "", None) => true,
        ("static", Some(name)) => panic!(
            "VHOST_DPDK_LINK=static, but there is no librte_{name}.a in {}.\n{INSTALL}",
            libdir.display()
        ),
        (other, _) => panic!("VHOST_DPDK_LINK is \"{other}\"; it can be static or dynamic"),
    };

    println!("cargo::rustc-link-search=native={}", libdir.display());
    println!("cargo::metadata=link={}", if archives { "static" } else { "dynamic" });
    if !archives {
        let named = SHARED.into_iter().filter(|name| dpdk.libs.iter().any(|lib| lib == name));
        named.for_each(|name| println!("cargo::rustc-link-lib=dylib={name}"));
        return;
    }
    println!("cargo::rustc-cfg=dpdk_static");
    // rustc puts the objects of all of them into this crate's one archive, so that their order and
    // the circles among them do not matter.
    for name in ARCHIVES.into_iter().filter(|name| has(name)) {
        println!("cargo::rerun-if-changed={}", libdir.join(format!("librte_{name}.a")).display());
        println!("cargo::rustc-link-lib=static=rte_{name}");
    }
    let numa = pkg_config::Config::new().cargo_metadata(false).probe("numa");
    if numa.is_err() && !libdir.join("libnuma.so").exists() {
        panic!("DPDK's archives need libnuma, which was not found.\n{INSTALL}");
    }
    let private = pkg_config::Config::new()
        .statik(true)
        .cargo_metadata(false)
        .probe("libdpdk-libs")
        .map(|lib| lib.libs)
        .unwrap_or_default();
    for name in OUTSIDE {
        let named = private.iter().chain(&dpdk.libs).any(|lib| lib == name);
        if named || ["m", "dl"].contains(&name) {
            println!("cargo::rustc-link-lib=dylib={name}");
        }
    }
}
