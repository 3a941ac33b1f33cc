//! Persistent reservations against a small model of their own: random operations of four nexuses.
//!
//! The model knows SPC-4's rules as statements about sets. It shares no code with the crate.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{End, PORT, cdb, medium};
use proptest::prelude::*;
use scsi::{Buffers, LogicalUnit, Nexus, Reply, Status, Step};

const NEXUSES: u64 = 4;

/// An operation of a nexus.
#[derive(Clone, Debug)]
enum Action {
    Out { action: u8, kind: u8, key: u64, new_key: u64 },
    Lost,
    Reserve,
    Release,
}

/// Unit attentions, by code and qualifier, that a nexus must be told.
type Told = BTreeMap<u64, BTreeSet<(u8, u8)>>;

/// The model.
#[derive(Clone, Debug, Default)]
struct Model {
    keys: BTreeMap<u64, u64>,
    /// Maker and type.
    held: Option<(u64, u8)>,
    reserved: Option<u64>,
    generation: u32,
    told: Told,
}

/// What a command ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Good,
    Conflict,
    Check,
}

const KINDS: [u8; 6] = [1, 3, 5, 6, 7, 8];

impl Model {
    fn holders(&self) -> BTreeSet<u64> {
        match self.held {
            None => BTreeSet::new(),
            Some((_, 7 | 8)) => self.keys.keys().copied().collect(),
            Some((maker, _)) => BTreeSet::from([maker]),
        }
    }

    /// Who may read, or write.
    fn may(&self, nexus: u64, write: bool) -> bool {
        if let Some(holder) = self.reserved {
            return holder == nexus;
        }
        let Some((_, kind)) = self.held else { return true };
        self.holders().contains(&nexus)
            || kind >= 5 && self.keys.contains_key(&nexus)
            || !write && [1, 5, 7].contains(&kind)
    }

    fn tell(&mut self, nexuses: impl IntoIterator<Item = u64>, code: (u8, u8)) {
        for nexus in nexuses {
            self.told.entry(nexus).or_default().insert(code);
        }
    }

    fn others(&self, nexus: u64) -> Vec<u64> {
        self.keys.keys().copied().filter(|other| *other != nexus).collect()
    }

    fn apply(&mut self, nexus: u64, action: &Action) -> Expected {
        match *action {
            Action::Out { action, kind, key, new_key } => {
                let end = self.out(nexus, action, kind, key, new_key);
                if end == Expected::Good && action != 1 && action != 2 {
                    self.generation += 1;
                }
                end
            }
            Action::Lost => {
                self.told.remove(&nexus);
                self.reserved = self.reserved.filter(|holder| *holder != nexus);
                Expected::Good
            }
            Action::Reserve | Action::Release => {
                let has_access = match self.held {
                    Some((_, 5..=8)) => self.keys.contains_key(&nexus),
                    _ => self.holders().contains(&nexus),
                };
                if has_access {
                    return Expected::Good;
                }
                if !self.keys.is_empty() {
                    return Expected::Conflict;
                }
                let mine = self.reserved.is_none_or(|holder| holder == nexus);
                match action {
                    Action::Reserve if mine => self.reserved = Some(nexus),
                    Action::Reserve => return Expected::Conflict,
                    _ if mine => self.reserved = None,
                    _ => {}
                }
                Expected::Good
            }
        }
    }

    fn out(&mut self, nexus: u64, action: u8, kind: u8, key: u64, new_key: u64) -> Expected {
        if self.reserved.is_some() {
            return Expected::Conflict;
        }
        let registered = self.keys.get(&nexus).copied();
        let right = match action {
            6 => true,
            0 => key == registered.unwrap_or(0),
            _ => registered == Some(key),
        };
        if !right {
            return Expected::Conflict;
        }
        let whole = kind >> 4 == 0;
        let valid = whole && KINDS.contains(&kind);
        match action {
            0 | 6 => self.register(nexus, new_key),
            1 if !valid => return Expected::Check,
            1 => match self.held {
                None => self.held = Some((nexus, kind)),
                Some((_, held)) if held == kind && self.holders().contains(&nexus) => {}
                Some(_) => return Expected::Conflict,
            },
            2 if self.holders().contains(&nexus) => {
                let held = self.held.map_or(0, |(_, kind)| kind);
                if held != kind {
                    return Expected::Check;
                }
                self.held = None;
                if held >= 5 {
                    self.tell(self.others(nexus), (0x2a, 4));
                }
            }
            2 => {}
            3 => {
                self.tell(self.others(nexus), (0x2a, 3));
                self.keys.clear();
                self.held = None;
            }
            _ => return self.preempt(nexus, kind, valid, new_key),
        }
        Expected::Good
    }

    fn register(&mut self, nexus: u64, new_key: u64) {
        if new_key != 0 {
            self.keys.insert(nexus, new_key);
            return;
        }
        let held = self.holders().contains(&nexus);
        self.keys.remove(&nexus);
        match self.held {
            Some((_, 7 | 8)) if self.keys.is_empty() => self.held = None,
            Some((_, kind)) if kind < 7 && held => {
                self.held = None;
                if kind >= 5 {
                    self.tell(self.others(nexus), (0x2a, 4));
                }
            }
            _ => {}
        }
    }

    fn preempt(&mut self, nexus: u64, kind: u8, valid: bool, victim: u64) -> Expected {
        let all = matches!(self.held, Some((_, 7 | 8)));
        let takes_over = match self.held {
            Some(_) if all => victim == 0,
            Some((maker, _)) => self.keys.get(&maker) == Some(&victim),
            None => false,
        };
        let victims: Vec<u64> = self
            .keys
            .iter()
            .filter(|(_, key)| takes_over && all || **key == victim)
            .map(|(nexus, _)| *nexus)
            .collect();
        if takes_over {
            if !valid {
                return Expected::Check;
            }
            for victim in victims.into_iter().filter(|victim| *victim != nexus) {
                self.keys.remove(&victim);
                self.tell([victim], (0x2a, 5));
            }
            if self.held.is_some_and(|(_, held)| held != kind) {
                self.tell(self.others(nexus), (0x2a, 4));
            }
            self.held = Some((nexus, kind));
            return Expected::Good;
        }
        if victim == 0 {
            return Expected::Check;
        }
        if victims.is_empty() {
            return Expected::Conflict;
        }
        for victim in victims {
            self.keys.remove(&victim);
            if victim != nexus {
                self.tell([victim], (0x2a, 5));
            }
        }
        if self.keys.is_empty() {
            self.held = None;
        }
        Expected::Good
    }
}

/// The crate, driven by commands.
struct Driven {
    lu: LogicalUnit,
    reply: Reply,
}

impl Driven {
    fn send(&mut self, nexus: u64, cdb: &[u8], list: &[u8]) -> End {
        let buffers = Buffers { data_in: 4096, data_out: list.len() as u64 };
        let nexus = Nexus(nexus);
        let mut step = self.lu.start(nexus, PORT, cdb, buffers, &mut self.reply);
        if let Step::Parameters { .. } = step {
            step = self.lu.with_parameters(nexus, PORT, cdb, list, buffers, &mut self.reply);
        }
        match (step, self.reply.status(), self.reply.sense()) {
            (Step::Io(plan), ..) => End::Io(plan),
            (_, Status::Good, _) => End::Good(self.reply.data().to_vec()),
            (_, Status::CheckCondition, Some(sense)) => End::Check(sense),
            (_, status, _) => End::Status(status),
        }
    }

    fn apply(&mut self, nexus: u64, action: &Action) -> Expected {
        let end = match *action {
            Action::Out { action, kind, key, new_key } => {
                let list = [&key.to_be_bytes()[..], &new_key.to_be_bytes(), &[0; 8]].concat();
                let cdb = cdb(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24], 10);
                self.send(nexus, &cdb, &list)
            }
            Action::Lost => {
                self.lu.nexus_lost(Nexus(nexus));
                assert!(self.lu.attach(Nexus(nexus), false));
                return Expected::Good;
            }
            Action::Reserve => self.send(nexus, &[0x16, 0, 0, 0, 0, 0], &[]),
            Action::Release => self.send(nexus, &[0x17, 0, 0, 0, 0, 0], &[]),
        };
        match end {
            End::Good(_) => Expected::Good,
            End::Check(_) => Expected::Check,
            End::Status(Status::ReservationConflict) => Expected::Conflict,
            other => panic!("{other:?}"),
        }
    }

    /// Takes all unit attentions.
    fn told(&mut self) -> Told {
        let mut told = Told::new();
        for nexus in 0..NEXUSES {
            loop {
                let End::Good(sense) = self.send(nexus, &[3, 0, 0, 0, 18, 0], &[]) else {
                    panic!("REQUEST SENSE")
                };
                if sense[2] != 6 {
                    break;
                }
                assert!(told.entry(nexus).or_default().insert((sense[12], sense[13])));
            }
        }
        told
    }

    fn compare(&mut self, model: &Model) {
        for nexus in 0..NEXUSES {
            for write in [false, true] {
                let opcode = if write { 0x2a } else { 0x28 };
                let end = self.send(nexus, &medium(opcode, 0, 0, 1), &[0; 512]);
                assert_eq!(matches!(end, End::Io(_)), model.may(nexus, write), "{nexus} {write}");
            }
        }
        if model.reserved.is_some() {
            return;
        }
        let End::Good(data) = self.send(0, &cdb(&[0x5e, 0, 0, 0, 0, 0, 0, 1], 10), &[]) else {
            panic!("READ KEYS")
        };
        let mut keys: Vec<u64> = data[8..]
            .chunks(8)
            .map(|key| u64::from_be_bytes(key.try_into().expect("8 bytes")))
            .collect();
        let mut expected: Vec<u64> = model.keys.values().copied().collect();
        keys.sort_unstable();
        expected.sort_unstable();
        assert_eq!((keys, &data[..4]), (expected, &model.generation.to_be_bytes()[..]));
        let End::Good(data) = self.send(0, &cdb(&[0x5e, 1, 0, 0, 0, 0, 0, 1], 10), &[]) else {
            panic!("READ RESERVATION")
        };
        let held = data.get(21).copied();
        assert_eq!(held, model.held.map(|(_, kind)| kind));
    }
}

fn operation() -> impl Strategy<Value = (u64, Action)> {
    let kind = prop_oneof![8 => prop::sample::select(KINDS.to_vec()), 1 => 0..=255_u8];
    // Few keys, so that they are often right.
    let out = (0..=6_u8, kind, 0..4_u64, 0..4_u64)
        .prop_map(|(action, kind, key, new_key)| Action::Out { action, kind, key, new_key });
    let action = prop_oneof![
        20 => out,
        1 => Just(Action::Lost),
        1 => Just(Action::Reserve),
        1 => Just(Action::Release)
    ];
    (0..NEXUSES, action)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn reservations_follow_the_model(operations in prop::collection::vec(operation(), 1..60)) {
        let mut unit = Driven { lu: LogicalUnit::new(common::facts()), reply: Reply::new() };
        for nexus in 0..NEXUSES {
            prop_assert!(unit.lu.attach(Nexus(nexus), false));
        }
        let mut model = Model::default();
        for (nexus, action) in &operations {
            let expected = model.apply(*nexus, action);
            prop_assert_eq!(unit.apply(*nexus, action), expected, "{} {:?}", nexus, action);
            prop_assert_eq!(unit.told(), std::mem::take(&mut model.told), "{:?}", action);
            unit.compare(&model);
        }
    }
}
