//! What cells may take from each other, judged by what each of them really decided.

use super::Violation;
use crate::plan::Micros;
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Generation, NodeId, Refusal, TrustDomain};
use ambit_state::State;
use std::collections::BTreeMap;

/// How an answer to a pull is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    /// Records that nobody decided, under a head signed by a key of the forger.
    Forged,
    /// The same, with a key set certified by a root of the forger.
    ForgedKeys,
    /// A record altered on its way.
    Altered,
    /// A record left out.
    Withheld,
    /// Records in another order.
    Disordered,
    /// An answer to an earlier pull.
    Replayed,
    /// Of another origin.
    Misplaced,
    /// Signed by the origin: it goes back behind what was imported.
    RolledBack,
    /// Signed by the origin: another history up to what was imported.
    Equivocated,
    /// Signed by the origin's lost incarnation.
    Lost,
    /// Records that nobody decided, told by a replica of the origin whose keys were stolen, under what others signed of it.
    Stolen,
    /// Such a replica says that there is nothing new, and there is.
    Hidden,
    /// Records that nobody decided, under a head signed by keys that the origin no longer has.
    FormerKeys,
}

/// A lie must not be taken for good, and the truth not for a lie. The refusal, if any, and whether it stops the import.
pub(crate) fn judge_answer(
    origin: &TrustDomain,
    lie: Option<Lie>,
    refused: Option<(&Refusal, bool)>,
) -> Result<(), Violation> {
    match (lie, refused) {
        (Some(lie), None) => {
            // Who hears an earlier answer as one of now takes what is old for new; its records are the origin's all the same.
            let of = if matches!(lie, Lie::Replayed | Lie::Hidden) { "I12" } else { "I9" };
            Err(Violation::of(of, format!("an answer of {origin} was believed: {lie:?}")))
        }
        // Whoever else lies must not end what the origin is believed.
        (Some(lie), Some((refusal, true))) if lie != Lie::Equivocated => {
            Err(Violation::of("I9", format!("a lie in the name of {origin} stops the import: {lie:?}: {refusal}")))
        }
        (None, Some((refusal, true))) => {
            Err(Violation::of("I9", format!("a true answer of {origin} stops the import: {refusal}")))
        }
        _ => Ok(()),
    }
}

/// What one cell's history says of its peering, in order.
pub(crate) enum News {
    /// It decided this record.
    Exported(Record),
    /// It took these in.
    Imported {
        index: u64,
        head: Head,
        records: Vec<Record>,
        /// The sequence that it shows after.
        position: u64,
    },
}

/// What every cell decided, and what every other took of it.
#[derive(Default)]
pub(crate) struct Ledger {
    exported: BTreeMap<TrustDomain, Vec<(Record, Micros)>>,
    /// Importer and origin: the sequence up to which records were taken.
    taken: BTreeMap<(TrustDomain, TrustDomain), u64>,
}

impl Ledger {
    pub(crate) fn note(&mut self, cell: &TrustDomain, news: News, now: Micros) -> Result<(), Violation> {
        match news {
            News::Exported(record) => {
                self.exported.entry(cell.clone()).or_default().push((record, now));
                Ok(())
            }
            News::Imported { index, head, records, position } => {
                let taken = self.imported(cell, index, &head.origin, &records)?;
                if taken == position {
                    return Ok(());
                }
                let found = format!("{cell} is at {position} of {} after {index}, and took {taken}", head.origin);
                Err(Violation::of("I9", found))
            }
        }
    }

    fn at(&self, origin: &TrustDomain, seq: u64) -> Option<&(Record, Micros)> {
        self.exported.get(origin)?.get(usize::try_from(seq.checked_sub(1)?).ok()?)
    }

    /// I9: each record once, in sequence, and just as its origin decided it.
    fn imported(
        &mut self,
        cell: &TrustDomain,
        index: u64,
        origin: &TrustDomain,
        records: &[Record],
    ) -> Result<u64, Violation> {
        let pair = (cell.clone(), origin.clone());
        let known = self.taken.get(&pair).copied().unwrap_or_default();
        let mut position = known;
        for record in records.iter().filter(|record| record.seq > known) {
            let wrong =
                |what: &str| Violation::of("I9", format!("{cell} took {origin}/{} at {index}: {what}", record.seq));
            if record.seq != position + 1 {
                return Err(wrong("out of sequence"));
            }
            match self.at(origin, record.seq) {
                Some((decided, _)) if decided == record => {}
                Some(_) => return Err(wrong("another record than was decided")),
                None => return Err(wrong("nobody decided it")),
            }
            position = record.seq;
        }
        self.taken.insert(pair, position);
        Ok(position)
    }

    /// I12: how old what a replica knows of an origin really is, if it imported up to `seq`: since the first record that it
    /// lacks was decided.
    pub(crate) fn true_age(&self, origin: &TrustDomain, seq: u64, now: Micros) -> Micros {
        self.at(origin, seq + 1).map_or(0, |(_, decided)| now.saturating_sub(*decided))
    }

    /// I11, I9: the importer stands where the origin stands, and holds what follows from its records: no more and no less.
    pub(crate) fn agree(&self, importer: (&TrustDomain, &State), origin: (&TrustDomain, &State)) -> Result<(), String> {
        let (cell, known) = importer;
        let (name, truth) = origin;
        let Some(peer) = known.peer(name) else { return Err(format!("{cell} does not know {name}")) };
        let end = truth.cell().map(|c| (c.export_seq, c.export_hash)).unwrap_or_default();
        if (peer.seq, peer.hash) != end {
            return Err(format!("{cell} is at {} of {name}, which is at {}", peer.seq, end.0));
        }
        let (expected, found) = (self.objects(name), held(known, name));
        let differs = expected
            .iter()
            .chain(&found)
            .find(|(key, value)| expected.get(*key) != Some(*value) || found.get(*key) != Some(*value));
        differs.map_or(Ok(()), |(key, _)| Err(format!("{cell} holds another {key:?} of {name} than it decided")))
    }

    /// The last word on each object of an origin.
    fn objects(&self, origin: &TrustDomain) -> BTreeMap<(Kind, String), Vec<u8>> {
        let mut out: BTreeMap<(Kind, String), Vec<u8>> = BTreeMap::new();
        for (record, _) in self.exported.get(origin).into_iter().flatten() {
            let key = (record.kind, record.key.clone());
            match record.kind {
                Kind::Policy | Kind::NodeDenial | Kind::NodeAddress if record.payload.is_empty() => {
                    drop(out.remove(&key))
                }
                Kind::Policy | Kind::NodeAddress => drop(out.insert(key, record.payload.clone())),
                Kind::NodeDenial => {
                    // Denials only grow.
                    let generation = |bytes: &[u8]| postcard::from_bytes::<Generation>(bytes).unwrap_or_default();
                    let known = out.get(&key).map(|bytes| generation(bytes)).unwrap_or_default();
                    if generation(&record.payload) >= known {
                        out.insert(key, record.payload.clone());
                    }
                }
                // Not decided by the simulated load.
                Kind::IdDenial | Kind::LeafDenial | Kind::AuthorityDenial | Kind::JwtKeys => {}
                // Of runs of their own.
                Kind::Standby | Kind::Approvers | Kind::Grant | Kind::Seen => {}
                Kind::Cluster | Kind::Bundle | Kind::Service | Kind::Group | Kind::Endpoint | Kind::Steer => {}
            }
        }
        out
    }
}

/// The objects of an origin that an importer holds.
fn held(state: &State, origin: &TrustDomain) -> BTreeMap<(Kind, String), Vec<u8>> {
    let bytes = |generation: &Generation| postcard::to_stdvec(generation).unwrap_or_default();
    let policies = state.policies().filter(|((td, _), _)| td == origin).map(|((_, name), row)| {
        ((Kind::Policy, name.to_string()), postcard::to_stdvec(&row.object).unwrap_or_default())
    });
    let denials = state.node_denials().filter(|((td, _), _)| td == origin);
    let denials = denials.map(|((_, node), generation): (&(TrustDomain, NodeId), _)| {
        ((Kind::NodeDenial, node.to_string()), bytes(generation))
    });
    let addresses = state
        .node_addresses()
        .filter(|((td, _), _)| td == origin)
        .map(|((_, node), row)| ((Kind::NodeAddress, node.to_string()), postcard::to_stdvec(row).unwrap_or_default()));
    policies.chain(denials).chain(addresses).collect()
}
