//! The suite of `bdev-conformance` for every disk and every wrapper, and what is particular to some.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks, and random numbers")]
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod block_device;
mod disks;
mod engines;
mod files;
mod injection;
mod loops;

use bdev_conformance::{SIZE, conformance};
use disks::*;

conformance! {
    malloc_512 => malloc(512);
    malloc_4096 => malloc(4096);
    null_512 => null(512);
    null_4096 => null(4096);
    aio_512 => file(Flavour::Aio, 512);
    aio_4096 => file(Flavour::Aio, 4096);
    uring_512 => file(Flavour::Uring, 512);
    uring_4096 => file(Flavour::Uring, 4096);
    tmpfs_512 => tmpfs(512);
    tmpfs_4096 => tmpfs(4096);
    delay_malloc => delay(malloc(512));
    delay_file => delay(file(Flavour::Uring, 512));
    error_malloc => error(malloc(512));
    error_file => error(file(Flavour::Aio, 4096));
    error_that_retries => retrying(file(Flavour::Uring, 512));
    delay_error_delay => delay(error(delay(malloc(4096))));
    passthru_malloc => passthru(malloc(512));
    passthru_file => passthru(file(Flavour::Uring, 4096));
    passthru_delay_passthru => passthru(delay(passthru(malloc(4096))));
    part_of_malloc => part(malloc_of(3 * SIZE, 512));
    part_of_null => part(null_of(3 * SIZE, 4096));
    part_of_file => part(file_of(3 * SIZE, Flavour::Uring, 512));
    delayed_part_of_part => delay(part(part(malloc_of(9 * SIZE, 512))));
    limited_malloc => limited(malloc(512));
    limited_file => limited(file(Flavour::Uring, 4096));
    passthru_on_limited_malloc => passthru(limited(malloc(4096)));
    limited_part_of_limited_malloc => limited(part(limited(malloc_of(3 * SIZE, 512))));
    error_on_limited_malloc => retrying(limited(malloc(512)));
    resized_null => resized(null(512));
    resized_file => grown_file(512);
}

// Each engine, on all that it may have to serve.
conformance! {
    aio_direct_file_512 => engine(Aio, Direct, PlainFile, 512);
    aio_direct_file_4096 => engine(Aio, Direct, PlainFile, 4096);
    aio_direct_loop_device_512 => engine(Aio, Direct, LoopDevice, 512);
    aio_direct_loop_device_4096 => engine(Aio, Direct, LoopDevice, 4096);
    aio_buffered_file_512 => engine(Aio, Buffered, PlainFile, 512);
    aio_buffered_file_4096 => engine(Aio, Buffered, PlainFile, 4096);
    aio_buffered_loop_device_512 => engine(Aio, Buffered, LoopDevice, 512);
    aio_buffered_loop_device_4096 => engine(Aio, Buffered, LoopDevice, 4096);
    io_uring_direct_file_512 => engine(IoUring, Direct, PlainFile, 512);
    io_uring_direct_file_4096 => engine(IoUring, Direct, PlainFile, 4096);
    io_uring_direct_loop_device_512 => engine(IoUring, Direct, LoopDevice, 512);
    io_uring_direct_loop_device_4096 => engine(IoUring, Direct, LoopDevice, 4096);
    io_uring_buffered_file_512 => engine(IoUring, Buffered, PlainFile, 512);
    io_uring_buffered_file_4096 => engine(IoUring, Buffered, PlainFile, 4096);
    io_uring_buffered_loop_device_512 => engine(IoUring, Buffered, LoopDevice, 512);
    io_uring_buffered_loop_device_4096 => engine(IoUring, Buffered, LoopDevice, 4096);
    threads_direct_file_512 => engine(Threads, Direct, PlainFile, 512);
    threads_direct_file_4096 => engine(Threads, Direct, PlainFile, 4096);
    threads_direct_loop_device_512 => engine(Threads, Direct, LoopDevice, 512);
    threads_direct_loop_device_4096 => engine(Threads, Direct, LoopDevice, 4096);
    threads_buffered_file_512 => engine(Threads, Buffered, PlainFile, 512);
    threads_buffered_file_4096 => engine(Threads, Buffered, PlainFile, 4096);
    threads_buffered_loop_device_512 => engine(Threads, Buffered, LoopDevice, 512);
    threads_buffered_loop_device_4096 => engine(Threads, Buffered, LoopDevice, 4096);
}
