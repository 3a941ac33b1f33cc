//! Examination: finds the partitions of new bdevs. The module has no RPC methods.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tracing::{error, info, warn};

use super::read::{Found, read};
use super::table::{Partition, Table};
use crate::contract::{Bdev, with_bases};
use crate::control::Claim;
use crate::control::ClaimKind;
use crate::control::Host;
use crate::control::Unanswered;
use crate::control::method::{Call, LocalFuture, Method};
use crate::control::module::{BdevModule, Description, Entry};
use crate::modules::split::Part;

const NAME: &str = "gpt";
const PRODUCT: &str = "GPT Disk";
/// The time in which a bdev must answer the reads of its table. The call that creates the bdev
/// waits meanwhile.
const LIMIT: Duration = Duration::from_secs(5);

/// SPDK's module `gpt`.
pub(crate) struct Module {
    limit: Duration,
    unanswered: Unanswered,
}

impl Default for Module {
    fn default() -> Self {
        Self { limit: LIMIT, unanswered: Unanswered::default() }
    }
}

impl BdevModule for Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![]
    }

    fn examine<'a>(
        &'a self,
        host: &'a Rc<dyn Host>,
        bdev: &'a Arc<dyn Bdev>,
    ) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            if let Some(table) = self.table_of(host, bdev).await {
                add_partitions(host, bdev, table);
            }
        })
    }
}

impl Module {
    /// Returns the table of a bdev, if it has one.
    async fn table_of(&self, host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) -> Option<Table> {
        if is_on_partition(bdev) {
            return None;
        }
        let name = bdev.name();
        if self.unanswered.has_device_of(bdev) {
            error!("bdev {name}: is not examined: an earlier read of its device has not ended");
            return None;
        }
        let (of_thread, limit) = (Arc::clone(bdev), self.limit);
        match host.blocking(move || read(&of_thread, limit)).await {
            Ok(Found::Nothing) => None,
            Ok(Found::Table(table)) => Some(table),
            Ok(Found::Invalid([first, backup])) => {
                warn!("bdev {name}: no valid partition table: {first}; in the backup, {backup}");
                None
            }
            Ok(Found::NoAnswer(reads)) => {
                let seconds = limit.as_secs();
                error!("bdev {name}: is not examined: its device has not answered in {seconds} s");
                self.unanswered.add(bdev, &reads);
                None
            }
            Err(e) => {
                warn!("bdev {name}: is not examined: {e}");
                None
            }
        }
    }
}

/// Returns whether a bdev is a partition or built on one. A guest that writes tables into
/// partitions could otherwise make bdevs of any depth.
fn is_on_partition(bdev: &Arc<dyn Bdev>) -> bool {
    with_bases(bdev).iter().any(|bdev| bdev.product_name() == PRODUCT)
}

/// Registers the partitions of a bdev. They share one claim on it.
fn add_partitions(host: &Rc<dyn Host>, base: &Arc<dyn Bdev>, table: Table) {
    let name = base.name();
    for (number, reason) in &table.skipped {
        warn!("bdev {name}: partition {number} is skipped: {reason}");
    }
    if table.partitions.is_empty() {
        return;
    }
    let claim = match host.registry().claim(base, ClaimKind::WriteExclusive, NAME) {
        Ok(claim) => Rc::new(claim),
        Err(other) => {
            warn!("bdev {name}: its partitions are not used: {} has claimed it", other.owner);
            return;
        }
    };
    let mut added = 0;
    for partition in table.partitions {
        let number = partition.number;
        match add_partition(host, base, table.disk, partition, &claim) {
            Ok(()) => added += 1,
            Err(reason) => warn!("bdev {name}: partition {number} is skipped: {reason}"),
        }
    }
    info!("bdev {name}: {added} partitions");
}

/// Registers one partition.
///
/// # Errors
/// Its name or UUID is taken, or the base was deleted meanwhile.
fn add_partition(
    host: &Rc<dyn Host>,
    base: &Arc<dyn Bdev>,
    disk: uuid::Uuid,
    partition: Partition,
    claim: &Rc<Claim>,
) -> Result<(), String> {
    let system = |errno| std::io::Error::from_raw_os_error(errno).to_string();
    let uuid = Some(partition.unique).filter(|uuid| !uuid.is_nil());
    let name = format!("{}p{}", base.name(), partition.number);
    let reserved = host.registry().reserve(name, uuid).map_err(system)?;
    let (first, num_blocks) = (partition.first, partition.num_blocks);
    let (name, uuid) = (reserved.name.clone(), reserved.uuid);
    let part = Part::of_product(PRODUCT, name, uuid, Arc::clone(base), first, num_blocks)
        .map_err(|e| e.to_string())?;
    let entry = PartitionEntry { part, disk, partition, _claim: Rc::clone(claim) };
    reserved.complete(Rc::new(entry)).map_err(system)
}

struct PartitionEntry {
    part: Arc<Part>,
    /// The disk's GUID.
    disk: uuid::Uuid,
    partition: Partition,
    /// The claim on the base, which all partitions share.
    _claim: Rc<Claim>,
}

impl Entry for PartitionEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.part) as _
    }

    fn describe(&self) -> Description {
        let bases = self.part.bases();
        let base = bases.first().map(|base| base.name());
        let about = json!({
            "base_bdev": base,
            "offset_blocks": self.partition.first,
            "partition_table_guid": self.disk.to_string(),
            "partition_type_guid": self.partition.kind.to_string(),
            "unique_partition_guid": self.partition.unique.to_string(),
            "partition_name": self.partition.name,
        });
        Description::specific(NAME, about)
    }

    /// Examine finds it again.
    fn config(&self) -> Vec<Call> {
        vec![]
    }

    fn base_resized(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
