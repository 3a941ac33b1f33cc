//! Random operations on a store and on the model of it.

use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::{Claim, Wanted};
use blobstore::{BlobId, Device, Error, Place};
use futures_util::FutureExt;
use uuid::Uuid;

use super::disk::Disk;
use super::model::{BLOCK, BLOCKS, Cluster, Model, Volume, block};
use super::random::Random;

/// More volumes are not created.
const VOLUMES: usize = 10;

/// A claim that is committed later.
struct Held {
    name: String,
    claim: Claim,
    value: u64,
    filled: bool,
}

/// The operations until a cut.
pub(crate) struct Run<'a> {
    lvs: Lvs<Disk>,
    model: Model,
    random: &'a mut Random,
    held: Vec<Held>,
    /// What the store may be after the cut.
    candidates: Vec<Model>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(lvs: Lvs<Disk>, model: Model, random: &'a mut Random) -> Self {
        Self { lvs, model, random, held: Vec::new(), candidates: Vec::new() }
    }

    /// The store, and what it may be after a power cut now.
    pub(crate) fn end(self) -> (Lvs<Disk>, Vec<Model>) {
        let none = self.candidates.is_empty();
        (self.lvs, if none { vec![self.model] } else { self.candidates })
    }

    /// Does something. False if the power is cut.
    pub(crate) fn step(&mut self) -> bool {
        match self.random.below(26) {
            0 | 1 => self.create(),
            2 | 3 => self.snapshot(),
            4 => self.clone_volume(),
            5 | 6 => self.delete(),
            7 | 8 => self.resize(),
            9 => self.rename(),
            10 => self.attribute(),
            11 => self.read_only(),
            12 => self.inflate(),
            13 => self.decouple(),
            14 => self.release(),
            15 | 16 => self.flush(),
            17 | 18 => self.hold(),
            19 | 20 => self.commit_held(),
            _ => self.write(),
        }
    }

    fn name(&mut self) -> String {
        format!("v{:x}", self.random.next() >> 16)
    }

    fn uuid(&mut self) -> Uuid {
        Uuid::from_u128(u128::from(self.random.next()))
    }

    fn id(&self, name: &str) -> BlobId {
        self.lvs.find(name).unwrap().blob.id()
    }

    fn pick(&mut self, wanted: impl Fn(&Volume) -> bool) -> Option<String> {
        let names = self.model.names(wanted);
        self.random.pick(&names).cloned()
    }

    /// Takes the result of a change of metadata, which makes all that was written before durable.
    fn done<T>(&mut self, result: Option<blobstore::Result<T>>, after: Model) -> bool {
        self.done_or(result, after, Vec::new())
    }

    fn done_or<T>(
        &mut self,
        result: Option<blobstore::Result<T>>,
        after: Model,
        also: Vec<Model>,
    ) -> bool {
        match result {
            None => {
                self.candidates = [self.model.clone(), after].into_iter().chain(also).collect();
                return false;
            }
            Some(Ok(_)) => {
                self.model = after;
                self.model.flush();
            }
            Some(Err(Error::NoSpace(_))) => assert!(!self.lvs.store().failed()),
            Some(Err(error)) => panic!("{error}"),
        }
        true
    }

    fn create(&mut self) -> bool {
        if self.model.volumes.len() >= VOLUMES {
            return self.delete();
        }
        let (name, uuid, thin) = (self.name(), self.uuid(), self.random.chance(60));
        let len = match self.random.below(4) {
            0 if thin => 500 + self.random.below(1100),
            1 => self.random.below(2),
            _ => 1 + self.random.below(20),
        };
        let clear = [Clear::Default, Clear::None, Clear::Unmap, Clear::WriteZeroes];
        let clear = *self.random.pick(&clear).unwrap();
        let mut after = self.model.clone();
        let mut volume = Volume { len, thin, ..Volume::default() };
        if !thin {
            volume.own = (0..len).map(|index| (index, Cluster::default())).collect();
        }
        after.volumes.insert(name.clone(), volume);
        let new = NewVolume { name: &name, uuid, clusters: len, thin, clear };
        let result = self.lvs.create_volume(new).now_or_never();
        self.done(result, after)
    }

    fn snapshot(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only) else { return true };
        if self.model.volumes.len() >= VOLUMES {
            return self.delete();
        }
        let (id, new, uuid) = (self.id(&name), self.name(), self.uuid());
        let mut after = self.model.clone();
        after.snapshot(&name, &new);
        let result = self.lvs.snapshot(id, &new, uuid).now_or_never();
        self.done(result, after)
    }

    fn clone_volume(&mut self) -> bool {
        let Some(name) = self.pick(|volume| volume.read_only) else { return true };
        if self.model.volumes.len() >= VOLUMES {
            return self.delete();
        }
        let (id, new, uuid) = (self.id(&name), self.name(), self.uuid());
        let mut after = self.model.clone();
        let (len, parent) = (after.volumes[&name].len, Some(name));
        let clone = Volume { len, parent, thin: true, ..Volume::default() };
        after.volumes.insert(new.clone(), clone);
        let result = self.lvs.clone_volume(id, &new, uuid).now_or_never();
        self.done(result, after)
    }

    fn delete(&mut self) -> bool {
        let names = self.model.names(|_| true);
        let few = |name: &&String| self.model.clones(name).len() < 2;
        let names: Vec<String> = names.iter().filter(few).cloned().collect();
        let Some(name) = self.random.pick(&names).cloned() else { return true };
        let id = self.id(&name);
        let mut after = self.model.clone();
        after.delete(&name);
        let result = self.lvs.delete(id).now_or_never();
        self.done(result, after)
    }

    fn resize(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only) else { return true };
        let (old, thin) = (self.model.volumes[&name].len, self.model.volumes[&name].thin);
        let new = match self.random.below(4) {
            0 if thin => self.random.below(1600),
            1 => self.random.below(old + 1),
            _ => old + self.random.below(10),
        };
        if new == old {
            return true;
        }
        let (id, mut after) = (self.id(&name), self.model.clone());
        after.resize(&name, new);
        // Half-way: up to the end of a group of 512 clusters.
        let middle = old.min(new).next_multiple_of(512).min(old.max(new));
        let mut half = self.model.clone();
        half.resize(&name, middle);
        let result = self.lvs.store_mut().resize(id, new).now_or_never();
        self.done_or(result, after, vec![half])
    }

    fn rename(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only) else { return true };
        let (id, new, mut after) = (self.id(&name), self.name(), self.model.clone());
        let volume = after.volumes.remove(&name).unwrap();
        after.volumes.insert(new.clone(), volume);
        let result = self.lvs.rename(id, &new).now_or_never();
        for held in self.held.iter_mut().filter(|held| held.name == name) {
            held.name.clone_from(&new);
        }
        self.done(result, after)
    }

    /// Long attributes, so that blobs have chains.
    fn attribute(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only) else { return true };
        let id = self.id(&name);
        let xattrs = (0..3_u8).filter(|_| self.random.chance(70)).collect::<Vec<_>>();
        let xattrs = xattrs.into_iter().map(|n| {
            let len = usize::try_from(2000 + self.random.below(1500)).unwrap();
            (vec![b'x', n], self.random.chance(70).then(|| vec![1; len]))
        });
        let xattrs = xattrs.collect();
        let result = self.lvs.store_mut().set_xattrs(id, xattrs).now_or_never();
        self.done(result, self.model.clone())
    }

    fn read_only(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only) else { return true };
        if self.random.chance(60) {
            return true;
        }
        let (id, mut after) = (self.id(&name), self.model.clone());
        after.get(&name).read_only = true;
        let result = self.lvs.store_mut().set_read_only(id).now_or_never();
        self.done(result, after)
    }

    fn inflate(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only && volume.thin && volume.len < 100)
        else {
            return true;
        };
        let (id, mut after) = (self.id(&name), self.model.clone());
        after.inflate(&name);
        let result = self.lvs.store_mut().inflate(id).now_or_never();
        self.done(result, after)
    }

    fn decouple(&mut self) -> bool {
        let Some(name) = self.pick(|volume| !volume.read_only && volume.parent.is_some()) else {
            return true;
        };
        let (id, mut after) = (self.id(&name), self.model.clone());
        after.decouple(&name);
        let result = self.lvs.store_mut().decouple(id).now_or_never();
        self.done(result, after)
    }

    /// A volume that can be written, and an index.
    fn target(&mut self) -> Option<(String, BlobId, u64)> {
        // Often where a claim is held, so that it becomes stale.
        if let Some(held) = self.random.pick(&self.held).filter(|_| self.random.chance(40)) {
            let (name, index) = (held.name.clone(), held.claim.clusters()[0].index);
            let there = self.model.volumes.get(&name);
            if there.is_some_and(|volume| !volume.read_only && volume.len > index) {
                return Some((name.clone(), self.id(&name), index));
            }
        }
        let name = self.pick(|volume| !volume.read_only && volume.len > 0)?;
        let len = self.model.volumes[&name].len;
        let near = if self.random.chance(70) { len.min(12) } else { len };
        Some((name.clone(), self.id(&name), self.random.below(near)))
    }

    fn release(&mut self) -> bool {
        let Some((name, id, index)) = self.target() else { return true };
        let own = matches!(self.lvs.store().resolve(id, index), Ok(Place::Own(_)));
        let result = self.lvs.store_mut().release(id, &[index]).now_or_never();
        let mut after = self.model.clone();
        if own {
            after.write(&name, index, 0..BLOCKS, 0);
        }
        match result {
            None => self.candidates = vec![after],
            Some(Ok(freed)) => {
                self.model = after;
                if !freed.is_empty() {
                    self.model.flush();
                    let volume = self.model.get(&name);
                    volume.own.remove(&index);
                }
            }
            Some(Err(Error::NoSpace(_))) => {}
            Some(Err(error)) => panic!("{error}"),
        }
        self.candidates.is_empty()
    }

    /// The guest's flush.
    fn flush(&mut self) -> bool {
        let flushed = self.lvs.store().device().flush().now_or_never();
        if flushed.is_none() {
            self.candidates = vec![self.model.clone()];
            return false;
        }
        self.model.flush();
        true
    }

    /// The guest's write of some blocks.
    fn write(&mut self) -> bool {
        let Some((name, id, index)) = self.target() else { return true };
        let cluster = match self.lvs.store().resolve(id, index).unwrap() {
            Place::Own(cluster) => cluster,
            _ => match self.lvs.store_mut().allocate(id, &[index]).now_or_never() {
                Some(Ok(clusters)) => {
                    self.model.flush();
                    clusters[0]
                }
                Some(Err(Error::NoSpace(_))) => return true,
                Some(Err(error)) => panic!("{error}"),
                None => {
                    self.candidates = vec![self.model.clone()];
                    return false;
                }
            },
        };
        let start = usize::try_from(self.random.below(BLOCKS as u64)).unwrap();
        let end = start + 1 + usize::try_from(self.random.below((BLOCKS - start) as u64)).unwrap();
        let value = self.random.next() | 1;
        self.model.write(&name, index, start..end, value);
        let store = self.lvs.store();
        let offset = store.offset(cluster) + (start * BLOCK) as u64;
        let data = block(value).repeat(end - start);
        let written = store.device().write(offset, data).now_or_never();
        if written.is_none() {
            self.candidates = vec![self.model.clone()];
        }
        written.is_some()
    }

    /// Claims some clusters, and fills them or not.
    fn hold(&mut self) -> bool {
        let Some((name, id, index)) = self.target() else { return true };
        let count = 1 + self.random.below(4);
        let len = self.model.volumes[&name].len;
        let wanted: Vec<Wanted> = (index..len.min(index + count))
            .map(|index| Wanted { index, whole: self.random.chance(50) })
            .collect();
        let claim = match self.lvs.store_mut().claim(id, &wanted) {
            Ok(claim) => claim,
            Err(Error::Exists | Error::NoSpace(_)) => return true,
            Err(error) => panic!("{error}"),
        };
        let (value, filled) = (self.random.next() | 1, self.random.chance(50));
        let held = Held { name, claim, value, filled };
        if filled && !self.fill(&held) {
            return false;
        }
        self.held.push(held);
        true
    }

    /// Writes the content of claimed clusters: what they inherit, or whole clusters of the guest.
    fn fill(&mut self, held: &Held) -> bool {
        let store = self.lvs.store();
        let filled = store.fill(&held.claim).now_or_never();
        let whole = held.claim.clusters().iter().filter(|claimed| claimed.whole());
        let written = whole.map(|claimed| {
            let data = block(held.value).repeat(BLOCKS);
            store.device().write(store.offset(claimed.cluster), data).now_or_never()
        });
        let all = filled.is_some() && written.fold(true, |all, write| all & write.is_some());
        if !all {
            self.candidates = vec![self.model.clone()];
        }
        all
    }

    fn commit_held(&mut self) -> bool {
        if self.held.is_empty() {
            return self.write();
        }
        let at = self.random.below(self.held.len() as u64);
        let held = self.held.swap_remove(usize::try_from(at).unwrap());
        if !held.filled && !self.fill(&held) {
            return false;
        }
        let mut after = self.model.clone();
        let claimed = held.claim.clusters().to_vec();
        let Held { name, claim, value, .. } = held;
        let result = self.lvs.store_mut().commit(claim).now_or_never();
        if matches!(result, Some(Ok(()))) {
            after.flush();
        }
        if after.volumes.contains_key(&name) {
            let whole = claimed.iter().filter(|claimed| claimed.whole());
            whole.for_each(|claimed| after.write(&name, claimed.index, 0..BLOCKS, value));
        }
        match result {
            None => self.candidates = vec![after],
            Some(Ok(())) => self.model = after,
            Some(Err(Error::Stale | Error::NoSpace(_))) => assert!(!self.lvs.store().failed()),
            Some(Err(error)) => panic!("{error}"),
        }
        self.candidates.is_empty()
    }
}
