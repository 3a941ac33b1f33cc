//! Logical volume stores: blobstores whose blobs have names and UUIDs.

use uuid::Uuid;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::format::{BlobId, Clear, Xattr};
use crate::store::{Blob, LoadOptions, NewBlob, Store, StoreOptions};

/// The type of blobstores that are logical volume stores.
pub const STORE_TYPE: [u8; 16] = *b"LVOLSTORE\0\0\0\0\0\0\0";

/// The longest name of a store or volume, in bytes.
pub const NAME_LONGEST: usize = 63;

const NAME: &[u8] = b"name";
const UUID: &[u8] = b"uuid";

/// An open logical volume store.
#[derive(Debug)]
pub struct Lvs<D> {
    store: Store<D>,
    name: String,
    uuid: Uuid,
    identity: BlobId,
}

/// A volume: a blob that is not the store's own.
#[derive(Debug, Clone, Copy)]
pub struct Volume<'a> {
    /// The blob.
    pub blob: &'a Blob,
    /// Its name; none if the blob has no valid one.
    pub name: Option<&'a str>,
    /// Its UUID; none if the blob has no valid one.
    pub uuid: Option<Uuid>,
}

/// A volume to be created.
#[derive(Debug, Clone)]
pub struct NewVolume<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its length in clusters.
    pub clusters: u64,
    /// Whether clusters are allocated when they are first written.
    pub thin: bool,
    /// What is done to its clusters when it gives them up.
    pub clear: Clear,
}

impl<D: Device> Lvs<D> {
    /// Makes a store on a device, whose content is lost. `options.store_type` is ignored.
    pub async fn create(device: D, name: &str, uuid: Uuid, options: StoreOptions) -> Result<Self> {
        check_name(name)?;
        let options = StoreOptions { store_type: STORE_TYPE, ..options };
        let mut store = Store::create(device, options).await?;
        let xattrs = vec![xattr(UUID, text(&uuid.to_string())), xattr(NAME, text(name))];
        let identity = store.create_blob(NewBlob { xattrs, ..NewBlob::default() }).await?;
        store.set_super_blob(identity).await?;
        Ok(Self { store, name: name.to_owned(), uuid, identity })
    }

    /// Reads a store from a device. Volumes without a name are kept. A store without a name or UUID
    /// is refused, and not written.
    pub async fn load(device: D, read_only: bool) -> Result<Self> {
        let options = LoadOptions { store_type: Some(STORE_TYPE), read_only };
        let store = Store::load_if(device, options, |store| identify(store).map(|_| ())).await?;
        Self::of(store)
    }

    fn of(store: Store<D>) -> Result<Self> {
        let (name, uuid, identity) = identify(&store)?;
        Ok(Self { store, name, uuid, identity })
    }

    /// The name of the store.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The UUID of the store.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The blobstore.
    pub fn store(&self) -> &Store<D> {
        &self.store
    }

    /// The blobstore, for operations that concern no names.
    pub fn store_mut(&mut self) -> &mut Store<D> {
        &mut self.store
    }

    /// The blobstore, without the names.
    pub fn into_store(self) -> Store<D> {
        self.store
    }

    /// All volumes, by the number of their blob.
    pub fn volumes(&self) -> impl Iterator<Item = Volume<'_>> {
        let blobs = self.store.blobs().filter(|blob| blob.id() != self.identity);
        blobs.map(|blob| Volume { blob, name: name_of(blob), uuid: uuid_of(blob) })
    }

    /// The volume of this name or, if there is none, UUID.
    pub fn find(&self, name: &str) -> Option<Volume<'_>> {
        let uuid = Uuid::try_parse(name).ok();
        self.volumes()
            .find(|volume| volume.name == Some(name))
            .or_else(|| self.volumes().find(|volume| uuid.is_some() && volume.uuid == uuid))
    }

    /// A volume by the number of its blob.
    pub fn volume(&self, id: BlobId) -> Option<Volume<'_>> {
        let blob = self.store.blob(id).ok().filter(|blob| blob.id() != self.identity)?;
        Some(Volume { blob, name: name_of(blob), uuid: uuid_of(blob) })
    }

    fn check_new(&self, name: &str) -> Result<()> {
        check_name(name)?;
        let taken = self.volumes().any(|volume| volume.name == Some(name));
        if taken { Err(Error::Exists) } else { Ok(()) }
    }

    /// Creates a volume.
    pub async fn create_volume(&mut self, new: NewVolume<'_>) -> Result<BlobId> {
        self.check_new(new.name)?;
        let NewVolume { name, uuid, clusters, thin, clear } = new;
        let xattrs = identity(name, uuid);
        let blob = NewBlob { clusters, thin, clear, xattrs, external: None };
        self.store.create_blob(blob).await
    }

    /// Takes a snapshot of a volume.
    pub async fn snapshot(&mut self, id: BlobId, name: &str, uuid: Uuid) -> Result<BlobId> {
        self.check_new(name)?;
        self.store.snapshot(id, identity(name, uuid)).await
    }

    /// Creates a clone of a snapshot.
    pub async fn clone_volume(&mut self, id: BlobId, name: &str, uuid: Uuid) -> Result<BlobId> {
        self.check_new(name)?;
        self.store.clone_blob(id, identity(name, uuid)).await
    }

    /// Creates a clone, of this many clusters, of an external snapshot. `external` identifies it:
    /// SPDK writes the UUID of the block device.
    pub async fn clone_external(
        &mut self,
        external: Uuid,
        clusters: u64,
        name: &str,
        uuid: Uuid,
    ) -> Result<BlobId> {
        self.check_new(name)?;
        let xattrs = identity(name, uuid);
        let external = Some(text(&external.to_string()));
        let blob = NewBlob { clusters, thin: true, xattrs, external, ..NewBlob::default() };
        self.store.create_blob(blob).await
    }

    /// Renames a volume.
    pub async fn rename(&mut self, id: BlobId, name: &str) -> Result<()> {
        self.check_new(name)?;
        if id == self.identity {
            return Err(Error::NotFound);
        }
        self.store.set_xattrs(id, vec![(NAME.to_vec(), Some(text(name)))]).await
    }

    /// Renames the store.
    pub async fn rename_store(&mut self, name: &str) -> Result<()> {
        check_name(name)?;
        let xattrs = vec![(NAME.to_vec(), Some(text(name)))];
        self.store.set_xattrs(self.identity, xattrs).await?;
        name.clone_into(&mut self.name);
        Ok(())
    }

    /// Deletes a volume: see [`Store::delete`].
    pub async fn delete(&mut self, id: BlobId) -> Result<()> {
        if id == self.identity {
            return Err(Error::NotFound);
        }
        self.store.delete(id).await
    }

    /// Reads the store from the device again.
    pub async fn reload(self) -> Result<Self> {
        Self::of(self.store.reload().await?)
    }
}

/// The name and UUID of a store, and the blob that has them.
fn identify<D: Device>(store: &Store<D>) -> Result<(String, Uuid, BlobId)> {
    let identity = store.super_block().super_blob;
    let blob = identity.and_then(|id| store.blob(id).ok());
    let blob = blob.ok_or(Error::NotAStore("the blob that names the store is missing"))?;
    let name = name_of(blob).ok_or(Error::NotAStore("the store has no name"))?.to_owned();
    let uuid = uuid_of(blob).ok_or(Error::NotAStore("the store has no UUID"))?;
    Ok((name, uuid, blob.id()))
}

/// Whether a store or volume may have this name.
pub fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > NAME_LONGEST || name.contains('\0') {
        return Err(Error::Invalid("a name has 1 to 63 bytes"));
    }
    Ok(())
}

/// The attributes of a new volume, as SPDK writes them.
fn identity(name: &str, uuid: Uuid) -> Vec<Xattr> {
    let mut padded = name.as_bytes().to_vec();
    padded.resize(NAME_LONGEST + 1, 0);
    vec![xattr(NAME, padded), xattr(UUID, text(&uuid.to_string()))]
}

fn xattr(name: &[u8], value: Vec<u8>) -> Xattr {
    Xattr { name: name.to_vec(), value }
}

/// A text with a NUL at its end.
fn text(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn text_of(value: &[u8]) -> Option<&str> {
    let text = value.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(text).ok()
}

fn name_of(blob: &Blob) -> Option<&str> {
    text_of(blob.xattr(NAME)?).filter(|name| check_name(name).is_ok())
}

fn uuid_of(blob: &Blob) -> Option<Uuid> {
    Uuid::try_parse(text_of(blob.xattr(UUID)?)?).ok()
}
