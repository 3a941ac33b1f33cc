//! A store as text and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use blobstore::format::Clear;
use blobstore::lvs::{Lvs, Volume};
use blobstore::store::Interrupted;
use blobstore::{BlobId, Device, Parent};
use serde_json::{Value, json};

use crate::show::{bytes, plain};

/// The store in lines of text.
pub(crate) fn text<D: Device>(lvs: &Lvs<D>, clean: bool) -> String {
    let store = lvs.store();
    let super_block = store.super_block();
    let (used, pages) = store.metadata_pages();
    let state = if clean { "unloaded" } else { "not unloaded: needs recovery" };
    let page = super_block.page_size();
    let growable = bytes(super_block.max_growable_size());
    let size = bytes(super_block.size_on(store.device().properties().size));
    let mut lines = vec![
        format!("store      {} {}", plain(lvs.name()), lvs.uuid()),
        format!("format     version {}, {state}", super_block.version),
        format!("size       {size}, can grow to {growable}"),
        format!(
            "clusters   {} of {}, {} free",
            store.data_clusters(),
            bytes(store.cluster_size()),
            store.free_clusters()
        ),
        format!("metadata   {pages} pages of {}, {} free", bytes(u64::from(page)), pages - used),
        format!("block      {}", bytes(u64::from(super_block.io_unit_size()))),
    ];
    let recovery = store.interrupted().iter().map(|what| format!("recovery   {}", describe(*what)));
    lines.extend(recovery);
    let broken = store.broken().iter().map(|b| format!("unreadable {}: {}", b.id, b.reason));
    lines.extend(broken);
    lines.push(String::new());
    lines.extend(tree(lvs));
    lines.push(String::new());
    lines.join("\n")
}

/// Volumes deeper in the tree are not indented further, as each line would be longer than the last.
const DEEPEST: usize = 32;

/// What a load does, or has done.
fn describe(interrupted: Interrupted) -> String {
    match interrupted {
        Interrupted::Removed(id) => format!("removes the unfinished snapshot {id}"),
        Interrupted::Kept(id) => format!("keeps the snapshot {id}"),
        Interrupted::Left(id) => format!("leaves the unfinished snapshot {id} as it is"),
        Interrupted::Resized(id) => format!("finishes the resize of {id}"),
    }
}

/// The volumes, each below the snapshot that it depends on.
fn tree<D: Device>(lvs: &Lvs<D>) -> Vec<String> {
    let mut children: BTreeMap<Option<BlobId>, Vec<Volume>> = BTreeMap::new();
    for volume in lvs.volumes() {
        let parent = if let Parent::Blob(id) = volume.blob.parent() { Some(id) } else { None };
        children.entry(parent).or_default().push(volume);
    }
    let mut rows = vec![["VOLUME", "SIZE", "CLUSTERS", "UUID", "FLAGS"].map(str::to_owned)];
    // A stack instead of recursion: chains of snapshots may be long.
    let mut stack: Vec<(Volume, usize, String, String)> = Vec::new();
    let roots = children.remove(&None).unwrap_or_default();
    stack.extend(roots.into_iter().rev().map(|root| (root, 0, String::new(), String::new())));
    while let Some((volume, depth, branch, below)) = stack.pop() {
        rows.push(row(lvs, &volume, &branch));
        let mut last = true;
        for child in children.remove(&Some(volume.blob.id())).unwrap_or_default().into_iter().rev()
        {
            let (branch, line) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            let deeper = if depth < DEEPEST { format!("{below}{line}") } else { below.clone() };
            stack.push((child, depth + 1, format!("{below}{branch}"), deeper));
            last = false;
        }
    }
    align(&rows)
}

fn row<D: Device>(lvs: &Lvs<D>, volume: &Volume, branch: &str) -> [String; 5] {
    let blob = volume.blob;
    let name = volume.name.map_or_else(|| format!("({})", blob.id()), plain);
    let uuid = volume.uuid.map_or_else(|| "-".to_owned(), |uuid| uuid.to_string());
    let size = bytes(blob.clusters().saturating_mul(lvs.store().cluster_size()));
    let clusters = format!("{}/{}", blob.allocated(), blob.clusters());
    [format!("{branch}{name}"), size, clusters, uuid, flags(volume).join(", ")]
}

fn flags(volume: &Volume) -> Vec<String> {
    let (blob, flags) = (volume.blob, volume.blob.flags());
    let mut words = Vec::new();
    words.extend(flags.thin().then(|| "thin".to_owned()));
    words.extend(flags.read_only().then(|| "read-only".to_owned()));
    words.extend((!flags.table()).then(|| "runs".to_owned()));
    words.extend(clear(flags.clear()).map(|clear| format!("clear {clear}")));
    if let Parent::External(id) = blob.parent() {
        words.push(format!("external {}", plain(&text_of(&id))));
    }
    words.extend(blob.damage().map(str::to_owned));
    words
}

fn clear(clear: Clear) -> Option<&'static str> {
    match clear {
        Clear::Default => None,
        Clear::None => Some("none"),
        Clear::Unmap => Some("unmap"),
        Clear::WriteZeroes => Some("write_zeroes"),
    }
}

fn text_of(id: &[u8]) -> String {
    String::from_utf8_lossy(id).trim_end_matches('\0').to_owned()
}

fn align(rows: &[[String; 5]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..5).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &[String; 5]| {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        line.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// The store as a JSON object. Sizes are in bytes.
pub(crate) fn json<D: Device>(lvs: &Lvs<D>, clean: bool) -> Value {
    let store = lvs.store();
    let super_block = store.super_block();
    let (used, pages) = store.metadata_pages();
    let volumes: Vec<Value> = lvs.volumes().map(|volume| volume_json(lvs, &volume)).collect();
    let broken: Vec<Value> = (store.broken().iter())
        .map(|broken| json!({ "blob_id": broken.id.0, "reason": broken.reason }))
        .collect();
    json!({
        "name": lvs.name(),
        "uuid": lvs.uuid().to_string(),
        "version": super_block.version,
        "clean": clean,
        "size": super_block.size_on(store.device().properties().size),
        "max_growable_size": super_block.max_growable_size(),
        "block_size": super_block.io_unit_size(),
        "cluster_size": store.cluster_size(),
        "total_data_clusters": store.data_clusters(),
        "free_clusters": store.free_clusters(),
        "md_page_size": super_block.page_size(),
        "md_pages": pages,
        "used_md_pages": used,
        "recovery": store.interrupted().iter().map(|what| describe(*what)).collect::<Vec<_>>(),
        "unreadable": broken,
        "volumes": volumes,
    })
}

fn volume_json<D: Device>(lvs: &Lvs<D>, volume: &Volume) -> Value {
    let (blob, flags) = (volume.blob, volume.blob.flags());
    let (mut parent, mut external) = (Value::Null, Value::Null);
    match blob.parent() {
        Parent::None => {}
        Parent::Blob(id) => {
            parent = json!(lvs.volume(id).and_then(|parent| parent.uuid).map(|u| u.to_string()));
        }
        Parent::External(id) => external = json!(text_of(&id)),
    }
    json!({
        "name": volume.name,
        "uuid": volume.uuid.map(|uuid| uuid.to_string()),
        "blob_id": blob.id().0,
        "size": blob.clusters().saturating_mul(lvs.store().cluster_size()),
        "num_clusters": blob.clusters(),
        "num_allocated_clusters": blob.allocated(),
        "thin_provision": flags.thin(),
        "read_only": flags.read_only(),
        "clear_method": clear(flags.clear()).unwrap_or("default"),
        "parent": parent,
        "external_snapshot": external,
        "damage": blob.damage(),
    })
}
