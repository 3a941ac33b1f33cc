//! The suite of bdevs, on images of a real cluster. Needs `VHOST_CEPH`, as `ci/test-ceph` sets it.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bdev::{Bdev, Op, Status};
use bdev_conformance::{Driver, Fixture, SIZE, conformance};
use rbd::{Cluster, ClusterOptions, ConfigFile, ImageName, RbdDisk, RbdOptions};
use uuid::Uuid;

/// An image that is removed when it is dropped.
struct Image {
    conf: String,
    name: String,
}

impl Image {
    /// Makes an image of `size` bytes. `None`, and the test is skipped, without a cluster.
    #[track_caller]
    fn new(size: u64) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let Ok(dir) = std::env::var("VHOST_CEPH") else {
            test_report::skipped("ceph", "VHOST_CEPH is not set: see ci/test-ceph");
            return None;
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let image = Self {
            conf: format!("{dir}/ceph.conf"),
            name: format!("conformance-{}-{number}", std::process::id()),
        };
        image.rbd(&["create", &image.name, "--size", &format!("{size}B")]);
        Some(image)
    }

    fn rbd(&self, args: &[&str]) {
        let output = Command::new("rbd").args(["--conf", &self.conf]).args(args).output().unwrap();
        assert!(output.status.success(), "rbd {args:?}: {output:?}");
    }

    fn open(&self, options: &[(&str, &str)], block_size: u32, read_only: bool) -> Arc<RbdDisk> {
        let text = |(option, value): &(&str, &str)| ((*option).into(), (*value).into());
        let cluster = Cluster::connect(&ClusterOptions {
            file: ConfigFile::Given(self.conf.clone()),
            options: options.iter().map(text).collect(),
            ..ClusterOptions::default()
        });
        let image =
            ImageName { pool: "rbd".into(), namespace: None, image: self.name.clone(), read_only };
        let options =
            RbdOptions { name: self.name.clone(), uuid: Uuid::new_v4(), image, block_size };
        RbdDisk::open(&cluster.unwrap(), options).unwrap()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // The disk is being closed, which takes a moment.
        for _ in 0..100 {
            let args = ["--conf", &self.conf, "rm", "--no-progress", &self.name];
            if Command::new("rbd").args(args).output().is_ok_and(|output| output.status.success()) {
                return;
            }
        }
        eprintln!("{}: cannot be removed", self.name);
    }
}

fn disk(options: &[(&str, &str)], block_size: u32) -> Option<Fixture> {
    let image = Image::new(SIZE)?;
    Some(Fixture::on(image.open(options, block_size, false), image))
}

conformance! {
    rbd_512 => disk(&[], 512);
    rbd_4096 => disk(&[], 4096);
    rbd_with_cache => disk(&[("rbd_cache", "true")], 512);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let Some(image) = Image::new(SIZE) else { return };
    let disk = image.open(&[], 512, true);
    assert!(disk.features().read_only && !disk.features().unmap);
    let disk: Arc<dyn Bdev> = disk;
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.write(0, &[1; 512]), Status::IoError);
    assert_eq!(driver.plain(Op::WriteZeroes, 0, 512), Status::IoError);
    assert_eq!(driver.read(0, 512), (vec![0; 512], Status::Ok));
    drop(driver);
}

/// librbd itself would cut such a write, and report success.
#[test]
fn a_write_beyond_the_end_of_a_smaller_image_fails() {
    let Some(image) = Image::new(2 * SIZE) else { return };
    let disk = image.open(&[], 512, false);
    image.rbd(&["resize", "--no-progress", "--allow-shrink", &image.name, "--size", "4M"]);
    let disk: Arc<dyn Bdev> = disk;
    let mut driver = Driver::new(&disk, 4);
    assert_eq!(driver.write(SIZE - 512, &[1; 512]), Status::Ok);
    assert_eq!(driver.write(SIZE, &[1; 512]), Status::IoError);
    assert_eq!(driver.read(SIZE, 512).1, Status::IoError);
    drop(driver);
}

#[test]
fn missing_images_and_pools_have_errors() {
    let Some(image) = Image::new(SIZE) else { return };
    let options =
        ClusterOptions { file: ConfigFile::Given(image.conf.clone()), ..ClusterOptions::default() };
    let cluster = Cluster::connect(&options).unwrap();
    let errno = |pool: &str, name: &str, block_size| {
        let image =
            ImageName { pool: pool.into(), namespace: None, image: name.into(), read_only: false };
        let options = RbdOptions { name: "d".into(), uuid: Uuid::new_v4(), image, block_size };
        RbdDisk::open(&cluster, options).unwrap_err().errno()
    };
    assert_eq!(errno("nope", &image.name, 512), libc::ENOENT);
    assert_eq!(errno("rbd", "nope", 512), libc::ENOENT);
    assert_eq!(errno("rbd", &image.name, 100), libc::EINVAL);
    assert_eq!(errno("rbd", &image.name, 1 << 30), libc::EINVAL, "smaller than a block");
    let wrong = ClusterOptions { user_id: Some("nobody".into()), ..options.clone() };
    assert!([libc::EACCES, libc::ENOENT].contains(&Cluster::connect(&wrong).unwrap_err().errno()));
    let missing = ClusterOptions { file: ConfigFile::Given("/nope".into()), ..options };
    assert_eq!(Cluster::connect(&missing).unwrap_err().errno(), libc::ENOENT);
}
