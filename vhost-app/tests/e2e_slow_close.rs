//! A disk's file whose close blocks, as on a network file system: only that disk's name stays in
//! use.
#![expect(clippy::unwrap_used, reason = "tests")]

mod harness;

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use bench::{FrontEnd, GuestRam, Options, QueueOptions, Request, STATUS_OK};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
};
use harness::{Vhost, wait_until};
use serde_json::json;

const DISK: INodeNo = INodeNo(2);
const DISK_BYTES: u64 = 1 << 20;

/// A file system with one file, `disk`, of zeroes.
#[derive(Clone, Default)]
struct SlowToClose(Arc<Flushes>);

#[derive(Default)]
struct Flushes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    answered: usize,
    /// Closes are not answered.
    hang: bool,
    held: Vec<ReplyEmpty>,
}

impl SlowToClose {
    fn mount(&self, at: &Path) -> io::Result<BackgroundSession> {
        fuser::spawn_mount(self.clone(), at, &Config::default())
    }

    /// Waits until so many closes were answered.
    fn wait_for_answered(&self, count: usize) {
        let state = self.0.state.lock().unwrap();
        drop(self.0.changed.wait_while(state, |state| state.answered < count).unwrap());
    }

    fn hang(&self) {
        self.0.state.lock().unwrap().hang = true;
    }

    fn wait_for_held(&self) {
        let state = self.0.state.lock().unwrap();
        drop(self.0.changed.wait_while(state, |state| state.held.is_empty()).unwrap());
    }

    fn go_on(&self) {
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

impl Filesystem for SlowToClose {
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
        let mut state = self.0.state.lock().unwrap();
        if state.hang {
            state.held.push(reply);
        } else {
            reply.ok();
            state.answered += 1;
        }
        self.0.changed.notify_all();
    }
}

/// A VM connects, does I/O and disconnects, and its disk and its memory are released.
fn a_vm_comes_and_goes(vhost: &Vhost) {
    vhost.malloc("M");
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vm", "dev_name": "M"}));
    let ram = GuestRam::new(&[4 << 20]).unwrap();
    let mut front_end = FrontEnd::connect(&vhost.socket("vm"), ram, Options::default()).unwrap();
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    front_end.stop().unwrap();
    front_end.disconnect().unwrap();
    vhost.ok("vhost_delete_controller", json!({"ctrlr": "vm", "force": true}));
    vhost.ok("bdev_malloc_delete", json!({"name": "M"}));
    let maps = format!("/proc/{}/maps", vhost.pid());
    wait_until("the VM's memory is unmapped", || {
        !std::fs::read_to_string(&maps).unwrap().contains("memfd:guest")
    });
}

#[test]
fn a_disk_whose_file_does_not_close_holds_up_its_own_name_only() {
    let (dir, files) = (tempfile::tempdir().unwrap(), SlowToClose::default());
    let mounted = match files.mount(dir.path()) {
        Ok(mounted) => mounted,
        Err(e) => return test_report::skipped("fuse", &e.to_string()),
    };
    let vhost = Vhost::start(&[]);
    a_vm_comes_and_goes(&vhost);
    let create = json!({"name": "F", "filename": dir.path().join("disk"), "block_size": 512});
    vhost.ok("bdev_aio_create", create.clone());
    // The process that opens disks has closed its copy.
    files.wait_for_answered(1);
    files.hang();
    vhost.ok("bdev_aio_delete", json!({"name": "F"}));
    files.wait_for_held();
    a_vm_comes_and_goes(&vhost);
    let stuck = || vhost.ok("framework_get_reactors", json!({}))["stuck_closes"].clone();
    wait_until("the close counts as stuck", || {
        stuck() == json!([{"name": "bdev F", "waiting": 1}])
    });
    vhost.wait_for_log("bdev F: a close takes long");
    assert_eq!(vhost.err("bdev_aio_create", create.clone()).code, -i64::from(libc::EBUSY));
    assert!(
        vhost
            .log()
            .contains("bdev F: the file of the deleted device of this name is still being closed")
    );
    a_vm_comes_and_goes(&vhost);
    files.go_on();
    wait_until("the close has ended", || stuck() == json!([]));
    vhost.ok("bdev_aio_create", create);
    vhost.ok("bdev_aio_delete", json!({"name": "F"}));
    assert_eq!(vhost.stop(), 0);
    drop(mounted);
}
