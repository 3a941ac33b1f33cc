//! The file system's side of the FUSE protocol.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small files")]

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyLock, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::locks::Lock;
use super::{File, Kind, Op, Shared};

/// The directory's number. Files follow.
const ROOT: u64 = 1;

/// The kernel is to keep nothing: every question arrives.
const TTL: Duration = Duration::ZERO;

pub(super) struct Server(pub(super) Arc<Shared>);

fn attr(ino: INodeNo, size: Option<u64>) -> FileAttr {
    FileAttr {
        ino,
        size: size.unwrap_or(0),
        blocks: size.unwrap_or(0).div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if size.is_some() { FileType::RegularFile } else { FileType::Directory },
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn index(ino: INodeNo) -> usize {
    (ino.0 - ROOT - 1) as usize
}

impl File {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        attr(ino, Some(self.bytes.len() as u64))
    }

    fn read(&self, offset: u64, size: u32) -> &[u8] {
        let end = self.bytes.len().min(offset as usize + size as usize);
        &self.bytes[(offset as usize).min(end)..end]
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (start, end) = (offset as usize, offset as usize + data.len());
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(data);
    }

    fn allocate(&mut self, offset: u64, length: u64, mode: i32) {
        let end = offset as usize + length as usize;
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            let end = end.min(self.bytes.len());
            self.bytes[(offset as usize).min(end)..end].fill(0);
        }
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Requests that are held must not use up what others need.
        let _ = config.set_max_background(u16::MAX);
        // Otherwise the kernel keeps the locks itself, and none can hang.
        let _ = config.add_capabilities(InitFlags::FUSE_POSIX_LOCKS);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.0.lock();
        match state.files.iter().position(|file| name == file.name.as_str()) {
            Some(index) => {
                let ino = INodeNo(ROOT + 1 + index as u64);
                reply.entry(&TTL, &state.files[index].attr(ino), Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if ino.0 == ROOT {
            return reply.attr(&TTL, &attr(ino, None));
        }
        let answer = move |file: &mut File| reply.attr(&TTL, &file.attr(ino));
        self.0.request(index(ino), Op::Getattr, answer);
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.0.request(index(ino), Op::Setattr, move |file| {
            if let Some(size) = size {
                file.bytes.resize(size as usize, 0);
            }
            reply.attr(&TTL, &file.attr(ino));
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let handle = {
            let mut state = self.0.lock();
            state.handles += 1;
            FileHandle(state.handles)
        };
        self.0.request(index(ino), Op::Open, move |file| match file.kind {
            Kind::PageCache if flags.0 & libc::O_DIRECT != 0 => reply.error(Errno::EINVAL),
            Kind::PageCache | Kind::Direct => reply.opened(handle, FopenFlags::empty()),
            Kind::Uncached => reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO),
        });
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let answer = move |file: &mut File| reply.data(file.read(offset, size));
        self.0.request(index(ino), Op::Read, answer);
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.0.request(index(ino), Op::Write, move |file| {
            file.write(offset, &data);
            reply.written(data.len() as u32);
        });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.request(index(ino), Op::Fsync, move |_| reply.ok());
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.0.request(index(ino), Op::Fallocate, move |file| {
            file.allocate(offset, length, mode);
            reply.ok();
        });
    }

    fn flush(&self, _: &Request, ino: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.0.request(index(ino), Op::Close, move |_| reply.ok());
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.lock().files[index(ino)].locks.close(handle);
        reply.ok();
    }

    fn getlk(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let wanted = Lock { handle, owner, start, end, kind, pid };
        self.0.request(index(ino), Op::Lock, move |file| match file.locks.conflict(&wanted) {
            Some(held) => reply.locked(held.start, held.end, held.kind, held.pid),
            None => reply.locked(start, end, libc::F_UNLCK, 0),
        });
    }

    /// A conflict is answered at once, even to those who would wait.
    fn setlk(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let wanted = Lock { handle, owner, start, end, kind, pid };
        self.0.request(index(ino), Op::Lock, move |file| {
            if file.locks.set(wanted) { reply.ok() } else { reply.error(Errno::EAGAIN) }
        });
    }
}
