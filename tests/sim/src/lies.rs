//! Answers to pulls that are not what the origin said.

use crate::card::Card;
use crate::dice::Dice;
use crate::oracle::{Lie, Violation};
use crate::template::Template;
use ambit_identity::record::Listed;
use ambit_identity::{CoSignature, RecordKey};
use ambit_model::record::{Claim, Head, Kind, Record};
use ambit_state::objects::KeySetRow;
use ambitd::replica::pull::Answer;
use std::collections::BTreeMap;
use std::rc::Rc;

/// From, to.
type Link = (usize, usize);

/// Somebody between two cells, or a replica that does not say the truth.
pub(crate) struct Liar {
    dice: Dice,
    /// The cells' own record keys, for what only they can sign.
    keys: Vec<Vec<Rc<RecordKey>>>,
    /// The key sets that they had at first.
    sets: Vec<KeySetRow>,
    /// Of the same names as the cells, certified by roots of the liar.
    forged: Vec<Rc<Card>>,
    /// The first answer on each link to who stood where it stands now, and the one before.
    heard: BTreeMap<Link, (u64, Answer, Option<Answer>)>,
    /// Cells that began anew, and the sequence that told of it.
    begun: BTreeMap<usize, u64>,
}

const KINDS: [Lie; 11] = [
    Lie::Forged,
    Lie::ForgedKeys,
    Lie::Altered,
    Lie::Withheld,
    Lie::Disordered,
    Lie::Replayed,
    Lie::Misplaced,
    Lie::RolledBack,
    Lie::Equivocated,
    Lie::Lost,
    Lie::FormerKeys,
];

impl Liar {
    pub(crate) fn new(templates: &[Template], dice: Dice) -> Result<Liar, Violation> {
        let keys = templates.iter().map(|t| t.record_keys.clone()).collect();
        let sets = templates.iter().map(|t| t.key_set.clone()).collect();
        let forged = templates.iter().filter_map(|t| t.forged.clone()).collect();
        Ok(Liar { dice, keys, sets, forged, heard: BTreeMap::new(), begun: BTreeMap::new() })
    }

    /// Answers are kept, to be told again: best to an asker that still stands where it stood.
    pub(crate) fn remember(&mut self, link: Link, answer: &Answer) {
        let Some(after) = head_of(answer).and_then(|head| after(&head, answer)) else { return };
        if self.heard.get(&link).is_none_or(|(known, _, _)| *known != after) {
            let before = self.heard.remove(&link).map(|(_, first, _)| first);
            self.heard.insert(link, (after, answer.clone(), before));
        }
    }

    pub(crate) fn begun_anew(&mut self, cell: usize, seq: u64) {
        self.begun.insert(cell, seq);
    }

    /// Another answer than this one; none where the kind that chance chose does not fit it.
    pub(crate) fn lie(&mut self, link: Link, truth: &Answer) -> Option<(Lie, Answer)> {
        let kind = *self.dice.pick(&KINDS)?;
        let told = self.tell(kind, link, truth)?;
        (told != *truth).then_some((kind, told))
    }

    fn tell(&mut self, kind: Lie, link: Link, truth: &Answer) -> Option<Answer> {
        let head = head_of(truth)?;
        let after = after(&head, truth)?;
        let mut told = truth.clone();
        let records = told.records.len() as u64;
        match kind {
            // A lost incarnation's disks, all of them, speak for a cell that began anew.
            Lie::FormerKeys => {
                self.begun.get(&link.0).filter(|begun| after >= **begun)?;
                let record = forged(&head);
                told.records.push(encode(&record)?);
                told.key_set = self.sets.get(link.0)?.clone();
                sign(&mut told, &Head { seq: record.seq, hash: record.hash(), ..head }, self.keys.get(link.0)?)?;
            }
            Lie::Stolen | Lie::Hidden => return None,
            Lie::Forged | Lie::ForgedKeys => {
                let forger = self.forged.get(link.0)?.clone();
                let record = forged(&head);
                told.records.push(encode(&record)?);
                let longer = Head { seq: record.seq, hash: record.hash(), ..head };
                if kind == Lie::ForgedKeys {
                    told.key_set = forger.key_set.clone();
                }
                sign(&mut told, &longer, &forger.keys)?;
            }
            Lie::Altered => {
                let one = told.records.get_mut(self.dice.below(records) as usize)?;
                let mut record: Record = postcard::from_bytes(one).ok()?;
                record.key = "altered".into();
                *one = encode(&record)?;
            }
            Lie::Withheld if records > 0 => drop(told.records.remove(self.dice.below(records) as usize)),
            Lie::Disordered if records > 1 => told.records.swap(0, self.dice.between(1, records) as usize),
            Lie::Withheld | Lie::Disordered => return None,
            Lie::Replayed => {
                let (_, first, before) = self.heard.get(&link)?;
                told = if first == truth { before.clone()? } else { first.clone() };
            }
            Lie::Misplaced => {
                let other = self.heard.iter().find(|((from, _), _)| *from != link.0);
                told = other.map(|(_, (_, answer, _))| answer.clone())?;
            }
            // A replica of the lost incarnation that was left running: who knows of the new one must not hear it.
            Lie::Lost => {
                self.begun.get(&link.0).filter(|begun| after >= **begun)?;
                let first = truth.records.first().and_then(|bytes| postcard::from_bytes::<Record>(bytes).ok());
                let hash = first.map_or(head.hash, |record| record.prev_hash);
                told.records.clear();
                let stale = Head { epoch: head.epoch.checked_sub(1)?, seq: after, hash, ..head };
                sign(&mut told, &stale, self.keys.get(link.0)?)?;
            }
            Lie::RolledBack | Lie::Equivocated => {
                let back = u64::from(kind == Lie::RolledBack);
                let seq = after.checked_sub(back).filter(|_| after > 0)?;
                let other = Head { seq, hash: self.dice.bytes(), ..head };
                told.records.clear();
                sign(&mut told, &other, self.keys.get(link.0)?)?;
            }
        }
        Some(told)
    }
}

fn head_of(answer: &Answer) -> Option<Head> {
    postcard::from_bytes(&answer.head).ok()
}

/// Where the asker stood.
fn after(head: &Head, answer: &Answer) -> Option<u64> {
    head.seq.checked_sub(answer.records.len() as u64)
}

/// A record that nobody decided, after the head.
fn forged(head: &Head) -> Record {
    Record {
        origin: head.origin.clone(),
        epoch: head.epoch,
        seq: head.seq + 1,
        prev_hash: head.hash,
        kind: Kind::NodeDenial,
        key: hex::encode([0xfe; 32]),
        payload: vec![1],
    }
}

/// Under every place of the key set that one of the keys has, or where none has one, that there is.
fn sign(answer: &mut Answer, head: &Head, keys: &[Rc<RecordKey>]) -> Option<()> {
    let claim = Claim { head: head.clone(), is_the_end: true };
    let voters = Listed::read(&answer.key_set.statement)?.voters;
    let holder = |voter: &[u8; 32]| keys.iter().find(|key| key.public() == *voter).or(keys.first());
    let signed = |(at, voter)| {
        let signature = holder(voter)?.sign_claim(&claim);
        Some(CoSignature { key_index: u32::try_from(at).ok()?, signature })
    };
    answer.signatures = voters.iter().enumerate().map(signed).collect::<Option<_>>()?;
    (answer.head, answer.claim) = (encode(head)?, encode(&claim)?);
    Some(())
}

fn encode<T: serde::Serialize>(what: &T) -> Option<Vec<u8>> {
    postcard::to_stdvec(what).ok()
}
