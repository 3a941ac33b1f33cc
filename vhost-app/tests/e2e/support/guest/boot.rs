//! Disks that firmware boots: one with a boot sector that shows that it can read and write, and one
//! with the test guest's kernel.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::Guest;

/// Copies the disk's sector 1 to sector 2 and prints it, up to a zero.
#[rustfmt::skip]
const BOOT: &[u8] = &[
    0x31, 0xc0,             // xor %ax, %ax
    0x8e, 0xd8,             // mov %ax, %ds
    0xbc, 0x00, 0x7c,       // mov $0x7c00, %sp
    0x8e, 0xd0,             // mov %ax, %ss
    0xbe, 0x2e, 0x7c,       // mov $packet, %si
    0xb4, 0x42,             // mov $0x42, %ah       read; the drive is in %dl
    0xcd, 0x13,             // int $0x13
    0x72, 0x19,             // jc halt
    0xff, 0x06, 0x36, 0x7c, // incw packet + 8
    0xb8, 0x00, 0x43,       // mov $0x4300, %ax     write
    0xcd, 0x13,             // int $0x13
    0x72, 0x0e,             // jc halt
    0xbe, 0x00, 0x7e,       // mov $0x7e00, %si
    0xba, 0xf8, 0x03,       // mov $0x3f8, %dx      the serial port
    0xac,                   // print: lodsb
    0x84, 0xc0,             // test %al, %al
    0x74, 0x03,             // jz halt
    0xee,                   // out %al, %dx
    0xeb, 0xf8,             // jmp print
    0xf4,                   // halt: hlt
    0xeb, 0xfd,             // jmp halt
    0x10, 0x00, 0x01, 0x00, // packet: one sector …
    0x00, 0x7e, 0x00, 0x00, // … at 0:7e00 …
    0x01, 0, 0, 0, 0, 0, 0, 0, // … from or to this one
];

/// A disk with the boot sector, seen from the host.
pub(crate) struct BootDisk(File);

impl BootDisk {
    /// Writes the boot sector to a file.
    pub(crate) fn make(file: &Path) -> Self {
        let mut sector = [0; 512];
        sector[..BOOT.len()].copy_from_slice(BOOT);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        let disk = File::options().read(true).write(true).open(file).unwrap();
        disk.write_all_at(&sector, 0).unwrap();
        Self(disk)
    }

    /// What the next boot is to print and to copy.
    pub(crate) fn put(&self, text: &str) {
        let mut sector = [0; 512];
        sector[..text.len()].copy_from_slice(text.as_bytes());
        self.0.write_all_at(&sector, 512).unwrap();
    }

    /// Lets a guest boot from it again and again, and ends the guest. The first boot is to print
    /// `GUEST: boot 0`.
    pub(crate) fn boots(&self, mut guest: Guest) {
        for n in 0..5 {
            guest.wait_line(&format!("boot {n}"));
            assert!(self.is_copied());
            self.put(&format!("GUEST: boot {}\n", n + 1));
            guest.qmp("system_reset", json!({}));
        }
        guest.wait_line("boot 5");
        guest.kill9();
    }

    /// Whether a boot has made its copy.
    fn is_copied(&self) -> bool {
        let sector = |n: u64| {
            let mut bytes = [0; 512];
            self.0.read_exact_at(&mut bytes, n * 512).unwrap();
            bytes
        };
        sector(1) == sector(2)
    }
}

/// Makes a disk from which firmware boots the test guest, by way of syslinux. An error names the
/// program that this machine lacks.
pub(crate) fn make_linux_disk(file: &Path) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("syslinux.cfg");
    let words = format!("{} job=hold", super::KERNEL_WORDS);
    let boot = "DEFAULT linux\nLABEL linux\nLINUX kernel\nINITRD initrd\nAPPEND";
    fs::write(&config, format!("{boot} {words}\n")).unwrap();
    let (kernel, initrd): (PathBuf, PathBuf) = super::kernel_and_initrd();
    run("mkfs.fat", &["-C".as_ref(), file, "49152".as_ref()])?;
    let copies = [(&kernel, "::kernel"), (&initrd, "::initrd"), (&config, "::syslinux.cfg")];
    for (from, to) in copies {
        run("mcopy", &["-i".as_ref(), file, from, to.as_ref()])?;
    }
    run("syslinux", &["--install".as_ref(), file])
}

fn run(program: &str, args: &[&Path]) -> Result<(), String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output = output.map_err(|e| format!("{program}: {e}"))?;
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
