//! A file system with one file, `disk`, of zeroes, whose locks are refused, or hang, on demand.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry,
};
use tempfile::TempDir;

const DISK: INodeNo = INodeNo(2);
const DISK_BYTES: u64 = 1 << 20;

#[derive(Clone, Default)]
pub(crate) struct LockingFiles(Arc<Locks>);

#[derive(Default)]
struct Locks {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    refuse: bool,
    /// Calls are not answered.
    hang: bool,
    held: Vec<ReplyEmpty>,
}

pub(crate) struct Mounted {
    dir: TempDir,
    _session: BackgroundSession,
}

impl Mounted {
    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }
}

impl LockingFiles {
    /// `None`, and the test is skipped, if this host mounts none.
    #[track_caller]
    pub(crate) fn mount(&self) -> Option<Mounted> {
        let dir = tempfile::tempdir().unwrap();
        match fuser::spawn_mount(self.clone(), dir.path(), &Config::default()) {
            Ok(session) => Some(Mounted { dir, _session: session }),
            Err(e) => {
                test_report::skipped("fuse", &e.to_string());
                None
            }
        }
    }

    pub(crate) fn refuse(&self) {
        self.0.state.lock().unwrap().refuse = true;
    }

    pub(crate) fn hang(&self) {
        self.0.state.lock().unwrap().hang = true;
    }

    pub(crate) fn wait_for_held(&self) {
        let state = self.0.state.lock().unwrap();
        drop(self.0.changed.wait_while(state, |state| state.held.is_empty()).unwrap());
    }

    pub(crate) fn go_on(&self) {
        let mut state = self.0.state.lock().unwrap();
        state.hang = false;
        state.held.drain(..).for_each(ReplyEmpty::ok);
    }
}

fn attr(ino: INodeNo) -> FileAttr {
    let is_disk = ino == DISK;
    FileAttr {
        ino,
        size: if is_disk { DISK_BYTES } else { 0 },
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_disk { FileType::RegularFile } else { FileType::Directory },
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 512,
        flags: 0,
    }
}

impl Filesystem for LockingFiles {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        // Otherwise the kernel does the locks itself.
        let locks = config.add_capabilities(InitFlags::FUSE_POSIX_LOCKS);
        locks.map_err(|_| io::Error::other("the kernel sends no locks"))
    }

    fn lookup(&self, _: &fuser::Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => reply.entry(&Duration::ZERO, &attr(DISK), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &fuser::Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &attr(ino));
    }

    fn read(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(&vec![0; size as usize]);
    }

    fn flush(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn setlk(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let mut state = self.0.state.lock().unwrap();
        match (state.refuse, state.hang) {
            (true, _) => reply.error(Errno::ENOLCK),
            (false, true) => state.held.push(reply),
            (false, false) => reply.ok(),
        }
        self.0.changed.notify_all();
    }
}
