//! librados and librbd, opened when they are first used.
//!
//! The declarations follow the headers of Ceph 16. The program is not linked with the libraries:
//! then it would load 32 shared objects, of 20 MB, at each start, also without Ceph.
#![expect(unsafe_code, reason = "symbols of shared libraries")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::sync::{OnceLock, mpsc};
use std::thread;

use bdev::Error;
use libloading::os::unix::{Library as SharedObject, RTLD_GLOBAL, RTLD_NOW};

/// `rados_t`.
pub(crate) type Rados = *mut c_void;
/// `rados_ioctx_t`.
pub(crate) type IoCtx = *mut c_void;
/// `rbd_image_t`.
pub(crate) type ImagePtr = *mut c_void;
/// `rbd_completion_t`.
pub(crate) type CompletionPtr = *mut c_void;
/// `rbd_callback_t`.
pub(crate) type Callback = unsafe extern "C" fn(CompletionPtr, *mut c_void);
/// `rbd_update_callback_t`.
pub(crate) type UpdateCallback = unsafe extern "C" fn(*mut c_void);

/// `RBD_LOCK_MODE_EXCLUSIVE`.
pub(crate) const LOCK_EXCLUSIVE: c_int = 0;

/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`: write zeroes, release no space.
pub(crate) const ZEROES_THICK: c_int = 1;

/// `rbd_image_info_t`.
#[repr(C)]
pub(crate) struct ImageInfo {
    pub(crate) size: u64,
    pub(crate) object_size: u64,
    object_count: u64,
    order: c_int,
    block_name_prefix: [c_char; 24],
    parent_pool: i64,
    parent_name: [c_char; 96],
}

impl ImageInfo {
    pub(crate) const fn zeroed() -> Self {
        Self {
            size: 0,
            object_size: 0,
            object_count: 0,
            order: 0,
            block_name_prefix: [0; 24],
            parent_pool: 0,
            parent_name: [0; 96],
        }
    }
}

/// `rbd_image_watcher_t`.
#[repr(C)]
pub(crate) struct ImageWatcher {
    pub(crate) address: *mut c_char,
    id: i64,
    cookie: u64,
}

impl ImageWatcher {
    pub(crate) const fn none() -> Self {
        Self { address: std::ptr::null_mut(), id: 0, cookie: 0 }
    }
}

/// Declares the functions, and how each is loaded from its library.
macro_rules! functions {
    ($($library:ident { $($name:ident($($arg:ty),*) $(-> $result:ty)?;)* })*) => {
        /// The functions of the libraries.
        pub(crate) struct Library {
            $($(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*)*
        }

        impl Library {
            fn load($($library: &SharedObject),*) -> Result<Self, libloading::Error> {
                Ok(Self {$($(
                    // SAFETY: the type is that of the header; the function stays loaded, as no
                    // library is ever closed.
                    $name: *unsafe { $library.get(concat!(stringify!($name), "\0").as_bytes()) }?,
                )*)*})
            }
        }
    };
}

functions! {
    rados {
        rados_create2(*mut Rados, *const c_char, *const c_char, u64) -> c_int;
        rados_conf_read_file(Rados, *const c_char) -> c_int;
        rados_conf_set(Rados, *const c_char, *const c_char) -> c_int;
        rados_conf_get(Rados, *const c_char, *mut c_char, usize) -> c_int;
        rados_connect(Rados) -> c_int;
        rados_shutdown(Rados);
        rados_cluster_fsid(Rados, *mut c_char, usize) -> c_int;
        rados_getaddrs(Rados, *mut *mut c_char) -> c_int;
        rados_buffer_free(*mut c_char);
        rados_ioctx_create(Rados, *const c_char, *mut IoCtx) -> c_int;
        rados_ioctx_destroy(IoCtx);
        rados_ioctx_set_namespace(IoCtx, *const c_char);
    }
    rbd {
        rbd_open(IoCtx, *const c_char, *mut ImagePtr, *const c_char) -> c_int;
        rbd_open_read_only(IoCtx, *const c_char, *mut ImagePtr, *const c_char) -> c_int;
        rbd_close(ImagePtr) -> c_int;
        rbd_stat(ImagePtr, *mut ImageInfo, usize) -> c_int;
        rbd_resize(ImagePtr, u64) -> c_int;
        rbd_update_watch(ImagePtr, *mut u64, UpdateCallback, *mut c_void) -> c_int;
        rbd_update_unwatch(ImagePtr, u64) -> c_int;
        rbd_watchers_list(ImagePtr, *mut ImageWatcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup(*mut ImageWatcher, usize);
        rbd_lock_get_owners(ImagePtr, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
        rbd_lock_get_owners_cleanup(*mut *mut c_char, usize);
        rbd_lock_break(ImagePtr, c_int, *const c_char) -> c_int;
        rbd_aio_create_completion(*mut c_void, Callback, *mut CompletionPtr) -> c_int;
        rbd_aio_release(CompletionPtr);
        rbd_aio_get_return_value(CompletionPtr) -> isize;
        rbd_aio_readv(ImagePtr, *const libc::iovec, c_int, u64, CompletionPtr) -> c_int;
        rbd_aio_writev(ImagePtr, *const libc::iovec, c_int, u64, CompletionPtr) -> c_int;
        rbd_aio_flush(ImagePtr, CompletionPtr) -> c_int;
        rbd_aio_discard(ImagePtr, u64, u64, CompletionPtr) -> c_int;
        rbd_aio_write_zeroes(ImagePtr, u64, usize, CompletionPtr, c_int, c_int) -> c_int;
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("librbd")
    }
}

/// The libraries' file names, and the Debian package that has both.
const RADOS: &str = "librados.so.2";
const RBD: &str = "librbd.so.1";
const PACKAGE: &str = "librbd1";

impl Library {
    /// Returns the libraries. The first call that finds them opens them, in some 10 ms; they stay
    /// open.
    ///
    /// # Errors
    /// They are not installed, or cannot be loaded; the text says how to install them.
    pub(crate) fn get() -> Result<&'static Self, Error> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let library = on_loader(open).map_err(|e| {
            Error::Unsupported(format!(
                "Ceph RBD: {e}; install the Debian package {PACKAGE} (apt-get install {PACKAGE})"
            ))
        })?;
        Ok(LIBRARY.get_or_init(|| library))
    }
}

type Load = Box<dyn FnOnce() + Send>;

/// The thread that loads the libraries, if there is one.
static LOADER: OnceLock<mpsc::Sender<Load>> = OnceLock::new();

/// Starts a thread that loads the libraries when they are first used. For a program whose later
/// threads may not map executable memory.
///
/// # Errors
/// The system cannot start a thread.
pub fn start_loader() -> io::Result<()> {
    let (sender, loads) = mpsc::channel::<Load>();
    let serve = move || loads.into_iter().for_each(|load| load());
    thread::Builder::new().name("vhost-load".into()).spawn(serve)?;
    // A second loader ends when its sender is dropped.
    let _ = LOADER.set(sender);
    Ok(())
}

/// Calls `load` on the thread that loads libraries, or on this thread if there is none.
fn on_loader<T: Send + 'static>(load: impl FnOnce() -> T + Send + 'static) -> T {
    let Some(loader) = LOADER.get() else { return load() };
    let (sender, loaded) = mpsc::channel();
    let request: Load = Box::new(move || drop(sender.send(load())));
    loader.send(request).expect("the loader ends with the process");
    loaded.recv().expect("the loader answers each request")
}

fn open() -> Result<Library, libloading::Error> {
    // SAFETY: the libraries are Ceph's; their initialisers have no precondition.
    let rados = unsafe { SharedObject::open(Some(RADOS), RTLD_NOW | RTLD_GLOBAL) }?;
    // SAFETY: as above.
    let rbd = unsafe { SharedObject::open(Some(RBD), RTLD_NOW) }?;
    let library = Library::load(&rados, &rbd);
    // They are never closed: their threads and exit handlers may run until the process ends.
    std::mem::forget((rados, rbd));
    library
}

/// Returns whether librbd is in a directory in which the dynamic linker looks by default. Opens
/// nothing.
#[must_use]
pub fn is_installed() -> bool {
    const DIRECTORIES: [&str; 5] = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    ];
    DIRECTORIES.iter().any(|dir| std::path::Path::new(dir).join(RBD).exists())
}

/// Converts the result of a function that returns a negative errno on failure.
pub(crate) fn checked(what: impl FnOnce() -> String, result: c_int) -> Result<c_int, Error> {
    if result >= 0 {
        return Ok(result);
    }
    let source = io::Error::from_raw_os_error(result.saturating_neg());
    Err(Error::System { what: what(), source })
}

/// Returns the text in a buffer that a function has filled.
pub(crate) fn text_of(buffer: &[c_char]) -> String {
    let bytes = buffer.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

/// Copies a C string.
///
/// # Safety
/// It is null or ends with a zero byte.
pub(crate) unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
