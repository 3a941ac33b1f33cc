//! Copying volumes out of a store and into one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NAME_LONGEST, NewVolume, Volume, check_name};
use blobstore::store::Wanted;
use blobstore::{BlobId, Device, Error, Place};
use indicatif::{ProgressBar, ProgressStyle};
use uuid::Uuid;

use crate::disk::{Disk, EXCLUSIVE};
use crate::show::plain;

/// Why a transfer failed.
type Failure = Box<dyn std::error::Error>;

/// Bytes that are copied between two steps of the bar, at least one cluster.
const STEP: u64 = 16 << 20;

/// A bar on the terminal; nothing if there is none.
fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// The volume that is called STORE/VOLUME or has this UUID.
fn find<'a, D: Device>(lvs: &'a Lvs<D>, text: &str) -> Option<Volume<'a>> {
    let prefix = format!("{}/", lvs.name());
    lvs.find(text.strip_prefix(&prefix).unwrap_or(text))
}

/// Writes the content of a volume to `out`. Returns its size in bytes. If it fails, a new file is
/// removed.
pub(crate) async fn export(lvs: &Lvs<Disk>, name: &str, out: &Path) -> Result<u64, Failure> {
    let volume =
        find(lvs, name).ok_or_else(|| format!("no volume {name} in {}", plain(lvs.name())))?;
    let cluster = lvs.store().cluster_size();
    let size = volume.blob.clusters().checked_mul(cluster).ok_or("the volume is too large")?;
    let (file, holes) = create(lvs.store().device(), out, size)?;
    let written = copy_out(lvs, volume, &file, holes).await;
    if written.is_err() && holes {
        std::fs::remove_file(out)?;
    }
    written.map_err(|error| format!("{}: {error}", out.display()))?;
    Ok(size)
}

async fn copy_out(
    lvs: &Lvs<Disk>,
    volume: Volume<'_>,
    file: &File,
    holes: bool,
) -> Result<(), Failure> {
    let (store, id) = (lvs.store(), volume.blob.id());
    let cluster = store.cluster_size();
    let bar = bar(volume.blob.clusters() * cluster);
    let zeroes = vec![0; usize::try_from(cluster)?];
    for index in 0..volume.blob.clusters() {
        let at = index * cluster;
        let data = match store.resolve(id, index)? {
            Place::Zeroes if holes => None,
            Place::Zeroes => Some(zeroes.clone()),
            Place::Own(n) | Place::Inherited(n) => {
                Some(store.device().read(store.offset(n), zeroes.len()).await?)
            }
            Place::External => {
                let external = store.external(id)?.unwrap_or_default();
                let read = store.device().read_external(&external, at, zeroes.len()).await;
                Some(read.map_err(|error| match error.errno {
                    19 => "the volume depends on an external snapshot: use --external".into(),
                    _ => Failure::from(error),
                })?)
            }
        };
        if let Some(data) = data {
            file.write_all_at(&data, at)?;
        }
        bar.set_position(at + cluster);
    }
    file.sync_all()?;
    bar.finish_and_clear();
    Ok(())
}

/// Opens the output, and tells whether what is not written reads as zeroes.
fn create(store: &Disk, out: &Path, size: u64) -> Result<(File, bool), Failure> {
    let named = |error| format!("{}: {error}", out.display());
    let is_device = std::fs::metadata(out).is_ok_and(|found| found.file_type().is_block_device());
    if is_device {
        if store.is(out).map_err(named)? {
            return Err(format!("{}: the store is on this device", out.display()).into());
        }
        let available = Disk::open(out).map_err(named)?.properties().size;
        if available < size {
            return Err(format!("{} is too small", out.display()).into());
        }
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(EXCLUSIVE);
        return Ok((options.open(out).map_err(named)?, false));
    }
    let file = OpenOptions::new().write(true).create_new(true).open(out).map_err(named)?;
    file.set_len(size).map_err(named)?;
    Ok((file, true))
}

/// What is appended to the name of a volume until it is complete.
const IMPORTING: &str = ".importing";

/// The name of a volume until it is complete.
fn temporary(name: &str) -> String {
    let room = NAME_LONGEST - IMPORTING.len();
    let ends = name.char_indices().map(|(at, c)| at + c.len_utf8());
    let end = ends.take_while(|end| *end <= room).last().unwrap_or(0);
    format!("{}{IMPORTING}", &name[..end])
}

/// Creates a volume with the content of `input`. Returns its size in bytes. If it fails, the volume
/// is deleted, or the error says that it is left.
pub(crate) async fn import(
    lvs: &mut Lvs<Disk>,
    input: &Path,
    name: &str,
    thin: bool,
) -> Result<u64, Failure> {
    let input = Disk::open(input).map_err(|error| format!("{}: {error}", input.display()))?;
    let clusters = input.bytes().div_ceil(lvs.store().cluster_size());
    if !thin && lvs.store().free_clusters() < clusters {
        return Err("no space left: clusters".into());
    }
    check_name(name)?;
    let temporary = temporary(name);
    for name in [name, &temporary] {
        if lvs.volumes().any(|volume| volume.name == Some(name)) {
            return Err(format!("volume {name}: {}", Error::Exists).into());
        }
    }
    // Thin at first, so that no cluster is written twice.
    let (uuid, clear) = (Uuid::new_v4(), Clear::Default);
    let new = NewVolume { name: &temporary, uuid, clusters, thin: true, clear };
    let id = lvs.create_volume(new).await?;
    let done = match copy_in(lvs, &input, id, thin).await {
        Ok(()) => lvs.rename(id, name).await.map_err(Failure::from),
        Err(error) => Err(error),
    };
    if let Err(error) = done {
        let left = lvs.delete(id).await.err();
        let left = left.map(|why| format!("; the volume {temporary} is left: {why}"));
        return Err(format!("{error}{}", left.unwrap_or_default()).into());
    }
    Ok(clusters * lvs.store().cluster_size())
}

async fn copy_in(lvs: &mut Lvs<Disk>, input: &Disk, id: BlobId, thin: bool) -> Result<(), Failure> {
    let store = lvs.store_mut();
    let cluster = store.cluster_size();
    let clusters = store.blob(id)?.clusters();
    let step = (STEP / cluster).max(1);
    let bar = bar(clusters * cluster);
    let mut start = 0;
    while start < clusters {
        let end = clusters.min(start + step);
        let (mut wanted, mut contents) = (Vec::new(), Vec::new());
        for index in start..end {
            let data = input.read_padded(index * cluster, usize::try_from(cluster)?)?;
            let whole = data.iter().any(|byte| *byte != 0);
            if whole || !thin {
                wanted.push(Wanted { index, whole });
                contents.push(data);
            }
        }
        let claim = store.claim(id, &wanted)?;
        if let Err(error) = store.fill(&claim).await {
            store.give_back(claim);
            return Err(error.into());
        }
        for ((claimed, wanted), data) in claim.clusters().iter().zip(&wanted).zip(contents) {
            if !wanted.whole {
                continue;
            }
            if let Err(error) = store.device().write(store.offset(claimed.cluster), data).await {
                store.give_back(claim);
                return Err(error.into());
            }
        }
        store.commit(claim).await?;
        start = end;
        bar.set_position(end * cluster);
    }
    if !thin {
        store.inflate_end(id).await?;
    }
    bar.finish_and_clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_name_is_a_valid_one() {
        assert_eq!(temporary("a"), "a.importing");
        for long in ["x".repeat(NAME_LONGEST), "\u{e9}".repeat(31), "\u{1f600}".repeat(15)] {
            let short = temporary(&long);
            assert!(check_name(&short).is_ok() && short.len() > 60 - 4, "{short}");
            assert!(long.starts_with(short.strip_suffix(IMPORTING).unwrap()));
        }
    }
}
