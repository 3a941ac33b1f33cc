//! Random operations on a store and on plain vectors: both always have the same content.

use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::{StoreOptions, Wanted};
use blobstore::{BlobId, Device, Error};
use proptest::prelude::*;
use uuid::Uuid;

use crate::medium::{Memory, cluster, findings, now, write};

const CLUSTER: usize = 4096;

/// An operation; volumes are chosen by a number modulo those that there are.
#[derive(Debug, Clone)]
enum Op {
    Create { len: u64, thin: bool, clear: u8 },
    Snapshot(usize),
    Clone(usize),
    Delete(usize),
    Resize(usize, u64),
    Write(usize, u64, u8),
    WriteMany(usize, u64, u64, u8),
    Release(usize, u64, u64),
    Inflate(usize),
    Decouple(usize),
    ReadOnly(usize),
    SetParent(usize, usize),
    Rename(usize),
    Reload(bool),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let length = prop_oneof![4 => 0..24_u64, 1 => 500..1100_u64];
    let volume = 0..8_usize;
    let index = prop_oneof![3 => 0..24_u64, 1 => 0..1100_u64];
    let v = || volume.clone();
    let op = prop_oneof![
        2 => (length.clone(), any::<bool>(), 0..4_u8)
            .prop_map(|(len, thin, clear)| Op::Create { len, thin, clear }),
        2 => v().prop_map(Op::Snapshot),
        2 => v().prop_map(Op::Clone),
        2 => v().prop_map(Op::Delete),
        2 => (v(), length).prop_map(|(at, len)| Op::Resize(at, len)),
        6 => (v(), index.clone(), 1..255_u8).prop_map(|(at, i, n)| Op::Write(at, i, n)),
        2 => (v(), index.clone(), 1..40_u64, 1..255_u8)
            .prop_map(|(at, i, len, n)| Op::WriteMany(at, i, len, n)),
        2 => (v(), index, 1..40_u64).prop_map(|(at, i, len)| Op::Release(at, i, len)),
        1 => v().prop_map(Op::Inflate),
        1 => v().prop_map(Op::Decouple),
        1 => v().prop_map(Op::ReadOnly),
        1 => (v(), v()).prop_map(|(at, parent)| Op::SetParent(at, parent)),
        1 => v().prop_map(Op::Rename),
        1 => any::<bool>().prop_map(Op::Reload),
    ];
    proptest::collection::vec(op, 1..60)
}

/// A volume as it must be: one number for each cluster.
#[derive(Debug, Clone)]
struct Plain {
    id: BlobId,
    content: Vec<u8>,
    parent: Option<BlobId>,
}

struct Pair {
    lvs: Option<Lvs<Memory>>,
    plain: Vec<Plain>,
    names: u32,
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

impl Pair {
    fn lvs(&mut self) -> &mut Lvs<Memory> {
        self.lvs.as_mut().unwrap()
    }

    fn name(&mut self) -> (String, Uuid) {
        self.names += 1;
        (format!("v{}", self.names), Uuid::from_u128(self.names.into()))
    }

    /// Takes the result of an operation: whether it succeeded. Only these errors may occur.
    fn ok<T>(result: Result<T, Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(Error::NoSpace(_) | Error::NotPermitted(_) | Error::Invalid(_) | Error::Exists) => {
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn inherited(&self, parent: Option<BlobId>, at: usize) -> u8 {
        let parent = self.plain.iter().find(|plain| Some(plain.id) == parent);
        parent.and_then(|parent| parent.content.get(at)).copied().unwrap_or(0)
    }

    fn apply(&mut self, op: &Op) {
        if let Op::Create { len, thin, clear } = *op {
            let clear =
                [Clear::Default, Clear::None, Clear::Unmap, Clear::WriteZeroes][usize::from(clear)];
            let (name, uuid) = self.name();
            let new = NewVolume { name: &name, uuid, clusters: len, thin, clear };
            if let Some(id) = Self::ok(now(self.lvs().create_volume(new))) {
                self.plain.push(Plain { id, content: vec![0; index(len)], parent: None });
            }
            return;
        }
        if let Op::Reload(clean) = *op {
            let mut lvs = self.lvs.take().unwrap();
            if clean {
                now(lvs.store_mut().unload()).unwrap();
            }
            assert_eq!(findings(lvs.store().device()), [""; 0]);
            self.lvs = Some(now(lvs.reload()).unwrap());
            return;
        }
        if !self.plain.is_empty() {
            self.apply_to_volume(op);
        }
    }

    #[expect(clippy::collapsible_match, reason = "a guard should have no effects")]
    fn apply_to_volume(&mut self, op: &Op) {
        let count = self.plain.len();
        let (Op::Snapshot(at)
        | Op::Clone(at)
        | Op::Delete(at)
        | Op::Resize(at, _)
        | Op::Write(at, ..)
        | Op::WriteMany(at, ..)
        | Op::Release(at, ..)
        | Op::Inflate(at)
        | Op::Decouple(at)
        | Op::ReadOnly(at)
        | Op::SetParent(at, _)
        | Op::Rename(at)) = op
        else {
            return;
        };
        let at = at % count;
        let old = self.plain[at].clone();
        let (id, len) = (old.id, old.content.len() as u64);
        match *op {
            Op::Snapshot(_) => {
                let (name, uuid) = self.name();
                if let Some(made) = Self::ok(now(self.lvs().snapshot(id, &name, uuid))) {
                    self.plain.push(Plain { id: made, ..old });
                    self.plain[at].parent = Some(made);
                }
            }
            Op::Clone(_) => {
                let (name, uuid) = self.name();
                if let Some(made) = Self::ok(now(self.lvs().clone_volume(id, &name, uuid))) {
                    self.plain.push(Plain { id: made, parent: Some(id), ..old });
                }
            }
            Op::Delete(_) => {
                if Self::ok(now(self.lvs().delete(id))).is_some() {
                    self.plain.remove(at);
                    let clones = self.plain.iter_mut().filter(|p| p.parent == Some(id));
                    clones.for_each(|clone| clone.parent = old.parent);
                }
            }
            Op::Resize(_, new) => {
                let thin = self.lvs().store().blob(id).unwrap().flags().thin();
                if Self::ok(now(self.lvs().store_mut().resize(id, new))).is_some() {
                    self.plain[at].content.truncate(index(new));
                    for i in old.content.len()..index(new) {
                        let shown = if thin { self.inherited(old.parent, i) } else { 0 };
                        self.plain[at].content.push(shown);
                    }
                }
            }
            Op::Write(_, i, n) if len > 0 => self.write(at, i % len, n),
            Op::WriteMany(_, i, count, n) if len > 0 => {
                let start = i % len;
                self.write_many(at, start..len.min(start + count), n);
            }
            Op::Release(_, i, count) if len > 0 => self.release(at, i % len, count),
            Op::Inflate(_) => {
                if Self::ok(now(self.lvs().store_mut().inflate(id))).is_some() {
                    self.plain[at].parent = None;
                }
            }
            Op::Decouple(_) => {
                if Self::ok(now(self.lvs().store_mut().decouple(id))).is_some() {
                    let parent = self.plain.iter().find(|p| Some(p.id) == old.parent).unwrap();
                    self.plain[at].parent = parent.parent;
                }
            }
            Op::ReadOnly(_) => drop(Self::ok(now(self.lvs().store_mut().set_read_only(id)))),
            Op::SetParent(_, parent) => self.set_parent(at, parent % count),
            Op::Rename(_) => {
                let (name, _) = self.name();
                Self::ok(now(self.lvs().rename(id, &name)));
            }
            _ => {}
        }
    }

    fn write(&mut self, at: usize, i: u64, n: u8) {
        let id = self.plain[at].id;
        let store = self.lvs().store();
        let own = matches!(store.resolve(id, i), Ok(blobstore::Place::Own(_)));
        let room = store.free_clusters() > 0 && {
            let (used, all) = store.metadata_pages();
            used + 8 < all
        };
        if !store.blob(id).unwrap().writable() || !own && !room {
            return;
        }
        write(self.lvs().store_mut(), id, i, 0, vec![n; CLUSTER]);
        self.plain[at].content[index(i)] = n;
    }

    /// One claim of several clusters, of which every other one is written as a whole.
    fn write_many(&mut self, at: usize, range: std::ops::Range<u64>, n: u8) {
        let id = self.plain[at].id;
        let store = self.lvs().store_mut();
        let own: Vec<u64> = range
            .filter(|i| !matches!(store.resolve(id, *i), Ok(blobstore::Place::Own(_))))
            .collect();
        let wanted: Vec<Wanted> =
            own.iter().map(|i| Wanted { index: *i, whole: i % 2 == 0 }).collect();
        let Some(claim) = Self::ok(store.claim(id, &wanted)) else { return };
        now(store.fill(&claim)).unwrap();
        for claimed in claim.clusters().iter().filter(|claimed| claimed.whole()) {
            let offset = store.offset(claimed.cluster);
            now(store.device().write(offset, vec![n; CLUSTER])).unwrap();
        }
        if Self::ok(now(store.commit(claim))).is_some() {
            for i in own.into_iter().filter(|i| i % 2 == 0) {
                self.plain[at].content[index(i)] = n;
            }
        }
    }

    fn release(&mut self, at: usize, start: u64, count: u64) {
        let id = self.plain[at].id;
        let end = self.plain[at].content.len() as u64;
        let store = self.lvs().store_mut();
        let own: Vec<u64> = (start..end.min(start + count))
            .filter(|i| matches!(store.resolve(id, *i), Ok(blobstore::Place::Own(_))))
            .collect();
        if Self::ok(now(store.release(id, &own))).is_some() {
            own.into_iter().for_each(|i| self.plain[at].content[index(i)] = 0);
        }
    }

    fn set_parent(&mut self, at: usize, parent: usize) {
        let (id, parent) = (self.plain[at].id, self.plain[parent].id);
        if Self::ok(now(self.lvs().store_mut().set_parent(id, parent))).is_none() {
            return;
        }
        self.plain[at].parent = Some(parent);
        for i in 0..self.plain[at].content.len() {
            let place = self.lvs().store().resolve(id, i as u64).unwrap();
            if !matches!(place, blobstore::Place::Own(_)) {
                self.plain[at].content[i] = self.inherited(Some(parent), i);
            }
        }
    }

    fn compare(&mut self) {
        let plain = self.plain.clone();
        let lvs = self.lvs();
        assert_eq!(lvs.volumes().count(), plain.len());
        for plain in &plain {
            let blob = lvs.store().blob(plain.id).unwrap();
            assert_eq!(blob.clusters(), plain.content.len() as u64);
            let parent = match blob.parent() {
                blobstore::Parent::Blob(id) => Some(id),
                _ => None,
            };
            assert_eq!(parent, plain.parent);
            for (i, wanted) in (0..).zip(&plain.content) {
                let found = cluster(lvs.store(), plain.id, i);
                assert!(found.iter().all(|byte| byte == wanted), "{} cluster {i}", plain.id);
            }
        }
        let allocated: u64 = lvs.store().blobs().map(|blob| blob.allocated()).sum();
        assert_eq!(lvs.store().free_clusters(), lvs.store().data_clusters() - allocated);
    }
}

fn run(ops: &[Op], memory: Memory) {
    let options = StoreOptions {
        cluster_size: 4096,
        pages_per_hundred_clusters: 20,
        ..StoreOptions::default()
    };
    let lvs = now(Lvs::create(memory, "p", Uuid::nil(), options)).unwrap();
    let mut pair = Pair { lvs: Some(lvs), plain: Vec::new(), names: 0 };
    for op in ops {
        pair.apply(op);
    }
    pair.compare();
    for clean in [false, true] {
        pair.apply(&Op::Reload(clean));
        pair.compare();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_store_has_the_content_of_plain_vectors(ops in ops(), zeroes in any::<bool>()) {
        let size = 1 << 20;
        run(&ops, if zeroes { Memory::new(vec![0; size], 512) } else { Memory::dirty(size, 512) });
    }
}
