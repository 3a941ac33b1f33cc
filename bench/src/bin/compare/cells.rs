//! Cells: one disk under one load.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use bench::servers::Disk;
use clap::ValueEnum;

/// A kind of disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum DiskKind {
    /// A disk without data
    Null,
    /// A disk in the server's memory
    Malloc,
    /// A file with data, O_DIRECT, through `bdev_aio_create` or qemu's `aio=native`
    Aio,
    /// A file with data, O_DIRECT, through `bdev_uring_create` or qemu's `aio=io_uring`
    #[value(alias = "file")]
    Uring,
    /// A block device through io_uring: a loop device over such a file, or --block-device
    Block,
}

impl DiskKind {
    pub(crate) const ALL: [Self; 5] =
        [Self::Null, Self::Malloc, Self::Aio, Self::Uring, Self::Block];
    /// The default kinds. A block device needs root's privileges.
    pub(crate) const USUAL: [Self; 4] = [Self::Null, Self::Malloc, Self::Aio, Self::Uring];

    /// The disk to serve. A disk on a file or device uses `path`.
    pub(crate) fn disk(self, path: &Path) -> Disk {
        match self {
            Self::Null => Disk::Null,
            Self::Malloc => Disk::Malloc,
            Self::Aio => Disk::Aio(path.to_owned()),
            Self::Uring => Disk::Uring(path.to_owned()),
            Self::Block => Disk::Block(path.to_owned()),
        }
    }

    /// Whether the kernel does its I/O.
    pub(crate) fn is_stored(self) -> bool {
        match self {
            Self::Null | Self::Malloc => false,
            Self::Aio | Self::Uring | Self::Block => true,
        }
    }

    /// The name of the disk and of its controller.
    pub(crate) fn name(self) -> &'static str {
        self.disk(Path::new("")).name()
    }
}

/// A kind of load, with fio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Workload {
    Randread,
    Randwrite,
    Randrw,
    Read,
    Write,
}

impl Workload {
    pub(crate) const ALL: [Self; 5] =
        [Self::Randread, Self::Randwrite, Self::Randrw, Self::Read, Self::Write];

    /// fio's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Randrw => "randrw",
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Bytes of a request: a number with `k` or `m`, as fio takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Size(pub(crate) u32);

impl Size {
    pub(crate) const K4: Self = Self(4 << 10);
    pub(crate) const K64: Self = Self(64 << 10);
    pub(crate) const ALL: [Self; 2] = [Self::K4, Self::K64];
}

/// Why a text is not a [`Size`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a multiple of 512, such as 4k")]
pub(crate) struct InvalidSize;

impl FromStr for Size {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, InvalidSize> {
        let lower = text.to_ascii_lowercase();
        let (number, unit) = match lower.strip_suffix('k') {
            Some(number) => (number, 1 << 10),
            None => lower.strip_suffix('m').map_or((lower.as_str(), 1), |n| (n, 1 << 20)),
        };
        let bytes = number.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
        match bytes {
            Some(bytes) if bytes >= 512 && bytes % 512 == 0 => Ok(Self(bytes)),
            _ => Err(InvalidSize),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes % (1 << 20) == 0 => write!(f, "{}m", bytes >> 20),
            bytes if bytes % (1 << 10) == 0 => write!(f, "{}k", bytes >> 10),
            bytes => write!(f, "{bytes}"),
        }
    }
}

/// One disk under one load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) disk: DiskKind,
    pub(crate) rw: Workload,
    pub(crate) bs: Size,
    pub(crate) depth: usize,
    pub(crate) queues: usize,
}

impl Cell {
    pub(crate) const DEPTHS: [usize; 5] = [1, 4, 16, 64, 128];

    /// The cells of a run without options: those of the aims, and neighbouring cells for
    /// comparison.
    pub(crate) fn subset() -> Vec<Self> {
        use DiskKind::{Aio, Malloc, Null, Uring};
        use Workload::{Randread, Randrw, Randwrite, Read, Write};
        let mut cells = Vec::new();
        let mut add = |disk, rw, bs, depths: &[usize], queues| {
            cells.extend(depths.iter().map(|&depth| Self { disk, rw, bs, depth, queues }));
        };
        add(Null, Randread, Size::K4, &Self::DEPTHS, 1);
        add(Null, Randread, Size::K4, &[64], 4);
        add(Malloc, Randread, Size::K4, &Self::DEPTHS, 1);
        add(Malloc, Randread, Size::K4, &[64], 4);
        add(Malloc, Randread, Size::K64, &[1, 64], 1);
        add(Malloc, Randwrite, Size::K4, &[1, 64], 1);
        add(Malloc, Randrw, Size::K4, &[64], 1);
        add(Uring, Randread, Size::K4, &Self::DEPTHS, 1);
        add(Uring, Randread, Size::K64, &[1, 64], 1);
        add(Uring, Randrw, Size::K4, &[64], 1);
        add(Aio, Randread, Size::K4, &[1, 64], 1);
        for disk in [Aio, Uring] {
            add(disk, Randread, Size::K4, &[64], 4);
            add(disk, Randwrite, Size::K4, &[1, 64], 1);
            add(disk, Read, Size::K4, &[64], 1);
            add(disk, Write, Size::K4, &[64], 1);
        }
        cells
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, rw, bs, depth, queues } = self;
        write!(f, "{} {} {bs} d{depth} q{queues}", disk.name(), rw.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, bytes) in [("4k", 4096), ("512", 512), ("64K", 65536), ("1m", 1 << 20)] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size, Size(bytes));
            assert_eq!(size.to_string(), text.to_ascii_lowercase());
        }
        for bad in ["", "k", "100", "-4k", "4g", "99999999m"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
