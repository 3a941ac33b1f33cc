//! The functions and constants that the program needs exist with the types it expects: compiled
//! against any release's headers, linked against the installed library (`ci/dpdk-headers`).
#![expect(unsafe_code, reason = "the functions under test are C's")]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};

use spdk_sys::*;

/// A function of type `$ty`, as an address to be printed.
macro_rules! needed {
    ($($name:ident: $ty:ty,)*) => {
        [$((stringify!($name), $name as $ty as *const c_void),)*]
    };
}

#[test]
fn the_functions_are_there_and_take_what_we_give() {
    type Path = *const c_char;
    let functions = needed! {
        rte_eal_init: unsafe extern "C" fn(c_int, *mut *mut c_char) -> c_int,
        rte_eal_cleanup: unsafe extern "C" fn() -> c_int,
        rte_openlog_stream: unsafe extern "C" fn(*mut FILE) -> c_int,
        rte_log_cur_msg_loglevel: unsafe extern "C" fn() -> c_int,
        rte_version: unsafe extern "C" fn() -> *const c_char,
        rte_version_year: unsafe extern "C" fn() -> c_uint,
        rte_version_month: unsafe extern "C" fn() -> c_uint,
        rte_vhost_driver_register: unsafe extern "C" fn(Path, u64) -> c_int,
        rte_vhost_driver_callback_register:
            unsafe extern "C" fn(Path, *const rte_vhost_device_ops) -> c_int,
        rte_vhost_driver_start: unsafe extern "C" fn(Path) -> c_int,
        rte_vhost_driver_unregister: unsafe extern "C" fn(Path) -> c_int,
        rte_vhost_driver_set_features: unsafe extern "C" fn(Path, u64) -> c_int,
        rte_vhost_driver_get_features: unsafe extern "C" fn(Path, *mut u64) -> c_int,
        rte_vhost_driver_set_protocol_features: unsafe extern "C" fn(Path, u64) -> c_int,
        rte_vhost_driver_get_protocol_features: unsafe extern "C" fn(Path, *mut u64) -> c_int,
        rte_vhost_driver_get_queue_num: unsafe extern "C" fn(Path, *mut u32) -> c_int,
        rte_vhost_extern_callback_register: unsafe extern "C" fn(
            c_int,
            *const rte_vhost_user_extern_ops,
            *mut c_void,
        ) -> c_int,
        rte_vhost_get_ifname: unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int,
        rte_vhost_get_negotiated_features: unsafe extern "C" fn(c_int, *mut u64) -> c_int,
        rte_vhost_get_negotiated_protocol_features: unsafe extern "C" fn(c_int, *mut u64) -> c_int,
        rte_vhost_get_mem_table: unsafe extern "C" fn(c_int, *mut *mut rte_vhost_memory) -> c_int,
        rte_vhost_get_vhost_vring: unsafe extern "C" fn(c_int, u16, *mut rte_vhost_vring) -> c_int,
        rte_vhost_get_vring_num: unsafe extern "C" fn(c_int) -> u16,
        rte_vhost_get_vring_base: unsafe extern "C" fn(c_int, u16, *mut u16, *mut u16) -> c_int,
        rte_vhost_set_vring_base: unsafe extern "C" fn(c_int, u16, u16, u16) -> c_int,
        rte_vhost_get_vring_base_from_inflight:
            unsafe extern "C" fn(c_int, u16, *mut u16, *mut u16) -> c_int,
        rte_vhost_get_vhost_ring_inflight:
            unsafe extern "C" fn(c_int, u16, *mut rte_vhost_ring_inflight) -> c_int,
        rte_vhost_get_log_base: unsafe extern "C" fn(c_int, *mut u64, *mut u64) -> c_int,
        rte_vhost_backend_config_change: unsafe extern "C" fn(c_int, bool) -> c_int,
    };
    for (name, address) in functions {
        assert!(!address.is_null(), "{name}");
        println!("needed: {name}");
    }
}

/// bindgen writes assertions on the layout of every structure it reads; these are on what the C
/// side's documentation promises and the program relies on.
#[test]
fn the_structures_have_the_layout_that_we_rely_on() {
    let pointer = size_of::<*const c_void>();
    assert_eq!(size_of::<rte_vhost_device_ops>(), 8 * pointer);
    assert_eq!(offset_of!(rte_vhost_device_ops, new_connection), 4 * pointer);
    assert_eq!(offset_of!(rte_vhost_device_ops, destroy_connection), 5 * pointer);
    assert_eq!(size_of::<rte_vhost_mem_region>(), 7 * 8);
    assert_eq!(offset_of!(rte_vhost_memory, regions), 8);
    assert_eq!(offset_of!(rte_vhost_user_extern_ops, post_msg_handle), pointer);
}

#[test]
fn the_constants_have_the_values_of_the_protocol() {
    assert_eq!(VHOST_USER_PROTOCOL_F_BACKEND_REQ, 5);
    assert_eq!(VHOST_USER_PROTOCOL_F_CONFIG, 9);
    assert_eq!(VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD, 10);
    assert_eq!(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, 12);
    assert_eq!(RTE_VHOST_MSG_RESULT_ERR, -1);
    assert_eq!(RTE_VHOST_MSG_RESULT_OK, 0);
    assert_eq!(RTE_VHOST_MSG_RESULT_REPLY, 1);
    assert_eq!(RTE_VHOST_MSG_RESULT_NOT_HANDLED, 2);
}

/// What is linked is of the release that the headers are of.
#[test]
fn the_library_is_of_the_headers_release() {
    // SAFETY: returns a constant.
    let year = unsafe { rte_version_year() };
    // SAFETY: returns a constant.
    let month = unsafe { rte_version_month() };
    assert_eq!((year, month), (RTE_VER_YEAR, RTE_VER_MONTH));
    let linked = if LINKED_STATICALLY { "static" } else { "dynamic" };
    println!("DPDK {year}.{month:02}, {linked}");
}
