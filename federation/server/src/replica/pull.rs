//! One pull from a peer, decided without IO: what is asked, what is answered, what is believed and how old it is.
//!
//! The leader's chores and the peer link's service drive it over the network, and the simulator over its own. Never: a
//! record that its origin's signed head does not lead to.

use ambit_identity::{KeySet, RecordKey, fingerprint};
use ambit_model::record::{Head, Record};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use ambit_state::authorities::RootId;
use ambit_state::objects::{KeySetRow, PeerRow};
use ambit_state::{Command, State};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Records asked for at once; the importer's state machine takes no more than 1,000.
pub const LIMIT: u32 = 500;
/// After a failed pull: long enough not to burn, short against the 10 s that make a peer degraded.
pub const RETRY: Duration = Duration::from_millis(500);
/// A pull waits up to 1 s for news at the far end; beyond this it is dead.
pub const TIMEOUT: Duration = Duration::from_secs(4);
/// A pull with nothing new waits this long for news, so that news need not wait for the next pull.
pub const WAIT: Duration = Duration::from_secs(1);

/// A pull under way: what is asked of an origin, and what was known of it then.
#[derive(Clone, Debug)]
pub struct Ask {
    origin: TrustDomain,
    known: PeerRow,
    /// Its roots, DER: each may have certified its record keys.
    roots: Vec<Vec<u8>>,
    /// Its JWT authorities, by kid.
    kids: Vec<String>,
    nonce: [u8; 16],
    limit: u32,
    /// This cell's time.
    at: Stamp,
}

/// What an origin says to a pull, as it came over the wire: nothing of it is believed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Certified by the origin's root.
    pub key_set: KeySetRow,
    /// [`Head`], postcard.
    pub head: Vec<u8>,
    /// Over the head, by a record key.
    pub signature: Vec<u8>,
    /// [`Record`]s, postcard, in sequence.
    pub records: Vec<Vec<u8>>,
}

/// Records that lead from what was imported to a head that their origin signed for this very pull. Only [`Ask::verify`]
/// makes one.
///
/// ```compile_fail,E0451
/// use ambitd::replica::pull::Batch;
/// fn forge(head: ambit_model::record::Head) -> Batch { Batch { head, records: Vec::new(), is_the_end: true } }
/// ```
#[derive(Debug)]
pub struct Batch {
    head: Head,
    records: Vec<Record>,
    is_the_end: bool,
}

impl Batch {
    /// Whether the origin had no more when it answered. Of a batch that is not the end nothing follows about how old the
    /// rest is (I12).
    pub fn is_the_end(&self) -> bool {
        self.is_the_end
    }
    /// What the importer commits; none where there is nothing new.
    pub fn into_import(self) -> Option<Command> {
        (!self.records.is_empty()).then_some(Command::Import(self.head, self.records))
    }
}

impl Ask {
    /// The next pull from `origin`, as `state` knows it; none where it is no peer.
    pub fn new(state: &State, origin: TrustDomain, nonce: [u8; 16], limit: u32) -> Option<Ask> {
        let (known, roots) = (state.peer(&origin)?.clone(), state.peer_roots(&origin));
        let kids = state.peer_jwt(&origin).iter().map(|key| key.kid.clone()).collect();
        Some(Ask { origin, known, roots, kids, nonce, limit, at: state.stamp() })
    }
    /// By which roots the origin is verified: it is told, so that it knows what may go.
    pub fn roots_held(&self) -> Vec<RootId> {
        self.roots.iter().map(|der| fingerprint(der)).collect()
    }
    /// The keys by which the origin's tokens are verified: it is told, as of its roots.
    pub fn kids_held(&self) -> &[String] {
        &self.kids
    }
    /// Records after this one are asked for.
    pub fn after_seq(&self) -> u64 {
        self.known.seq
    }
    /// To be echoed in the signed head.
    pub fn nonce(&self) -> [u8; 16] {
        self.nonce
    }
    /// At most so many.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Signature before content: key set by the root, head by the key set, nonce by the head, records by their chain to it.
    /// What [`stop`] says of the refusal tells a lie from a peer that lags.
    pub fn verify(&self, answer: &Answer) -> Result<Batch, Refusal> {
        let keys = self.keys(&answer.key_set)?;
        let head: Head = postcard::from_bytes(&answer.head).map_err(|e| broken("a head", e.to_string()))?;
        let signed = keys.verify_head(&head, &answer.signature);
        #[cfg(ambit_mutant)]
        let signed = if ambit_state::mutant::is("import-unsigned") { Ok(()) } else { signed };
        signed?;
        let is_ours = head.origin == self.origin && head.nonce == self.nonce;
        #[cfg(ambit_mutant)]
        let is_ours = is_ours || ambit_state::mutant::is("pull-nonce-unchecked");
        if !is_ours {
            return Err(Refusal::new(Code::RecordSignature, "the head of this pull", "another"));
        }
        self.place(&head)?;
        let records = self.chain(&head, &answer.records)?;
        let is_the_end = records.len() < self.limit as usize;
        #[cfg(ambit_mutant)]
        let is_the_end = is_the_end || ambit_state::mutant::is("full-batch-heard");
        Ok(Batch { head, records, is_the_end })
    }

    /// A key set that the peer says is its own.
    ///
    /// # Errors
    /// As [`Ask::verify`].
    pub fn key_set(&self, set: &KeySetRow) -> Result<KeySet, Refusal> {
        self.keys(set)
    }

    fn keys(&self, set: &KeySetRow) -> Result<KeySet, Refusal> {
        let keys = self.certified(set)?.in_time(self.at)?;
        if *set == self.known.key_set {
            return Ok(keys);
        }
        // What was certified by a root that is no more says nothing of how old a key set may be.
        let Ok(known) = self.certified(&self.known.key_set) else { return Ok(keys) };
        if keys.seq() < known.seq() {
            // A replica that lags, not a lie: another is asked.
            let expected = "a key set no older than at registration";
            return Err(Refusal::new(Code::Unavailable, expected, keys.seq().to_string()));
        }
        Ok(keys)
    }

    fn certified(&self, set: &KeySetRow) -> Result<KeySet, Refusal> {
        let none = Refusal::new(Code::RecordSignature, "a peer with a root", "none");
        let by = |root: &Vec<u8>| KeySet::verify(&self.origin, root, &set.statement, &set.signature);
        self.roots.iter().map(by).reduce(|one, other| one.or(other)).unwrap_or(Err(none))
    }

    /// Whether the head can be of the history that was imported so far.
    fn place(&self, head: &Head) -> Result<(), Refusal> {
        let peer = &self.known;
        let is_old = head.epoch < peer.epoch;
        #[cfg(ambit_mutant)]
        let is_old = is_old && !ambit_state::mutant::is("lost-incarnation-heard");
        if is_old {
            // The lost incarnation of a cell that began anew, or a replica of it that was left running: another is asked.
            let expected = format!("a head of epoch {} or later", peer.epoch);
            return Err(Refusal::new(Code::Unavailable, expected, head.epoch.to_string()));
        }
        if head.epoch > peer.epoch && head.seq < peer.seq && peer.epoch > 0 {
            let found = format!("epoch {} from sequence {}: it began anew from an older backup", head.epoch, head.seq);
            return Err(broken(&format!("sequence {} as imported", peer.seq), found));
        }
        if head.seq < peer.seq {
            let expected = format!("a head at {} or later", peer.seq);
            return Err(Refusal::new(Code::Unavailable, expected, head.seq.to_string()));
        }
        let equivocates = head.seq == peer.seq && head.hash != peer.hash && peer.seq > 0;
        #[cfg(ambit_mutant)]
        let equivocates = equivocates && !ambit_state::mutant::is("equivocation-heard");
        if equivocates {
            let found = format!("{} with another history", head.seq);
            return Err(Refusal::new(Code::RecordEquivocation, format!("sequence {} as imported", peer.seq), found));
        }
        Ok(())
    }

    fn chain(&self, head: &Head, records: &[Vec<u8>]) -> Result<Vec<Record>, Refusal> {
        let mut out = Vec::with_capacity(records.len());
        let (mut seq, mut hash) = (self.known.seq, self.known.hash);
        for bytes in records {
            let record: Record = postcard::from_bytes(bytes).map_err(|e| broken("a record", e.to_string()))?;
            let follows = record.origin == self.origin
                && record.seq == seq + 1
                && record.prev_hash == hash
                && record.seq <= head.seq;
            if !follows {
                return Err(broken("the next record of the chain", format!("{}/{}", record.origin, record.seq)));
            }
            (seq, hash) = (record.seq, record.hash());
            out.push(record);
        }
        let leads_to_head = (seq, hash) == (head.seq, head.hash) || (head.seq == 0 && seq == 0);
        #[cfg(ambit_mutant)]
        let leads_to_head = leads_to_head || ambit_state::mutant::is("import-unchained");
        #[cfg(ambit_mutant)]
        let leads_to_head =
            leads_to_head || (head.seq == self.known.seq && ambit_state::mutant::is("equivocation-heard"));
        if !leads_to_head {
            return Err(broken("records that lead to the signed head", format!("sequence {seq}, head {}", head.seq)));
        }
        Ok(out)
    }
}

fn broken(expected: &str, found: String) -> Refusal {
    Refusal::new(Code::RecordChainBroken, expected, found)
}

/// What the importer commits where a refusal speaks against the peer: its records do not hold, and no more are taken. None
/// where it is merely late or away.
pub fn stop(origin: &TrustDomain, refusal: &Refusal) -> Option<Command> {
    matches!(refusal.code, Code::RecordChainBroken | Code::RecordEquivocation | Code::RecordSignature)
        .then(|| Command::StopPeer(origin.clone(), refusal.to_string()))
}

/// An answer before its head is signed.
#[derive(Debug)]
pub struct Page {
    head: Head,
    records: Vec<Vec<u8>>,
    key_set: KeySetRow,
}

impl Page {
    /// Up to `limit` records after `after`, and a head at the last of them, so that what is sent always leads to what is
    /// signed. The state must be as new as the pull: a head that goes back looks like a rollback.
    /// `held`: the roots by which whoever asks verifies record keys.
    pub fn read(state: &State, after: u64, nonce: [u8; 16], limit: u32, held: &[RootId]) -> Result<Page, Refusal> {
        let cell = state.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
        let batch: Vec<&Record> = state.records_after(after).take(limit as usize).collect();
        let (seq, hash) = batch.last().map_or((cell.export_seq, cell.export_hash), |r| (r.seq, r.hash()));
        let records = batch.into_iter().map(encode).collect::<Result<_, _>>()?;
        let head =
            Head { origin: cell.trust_domain.clone(), epoch: cell.epoch, seq, hash, stamp: state.stamp(), nonce };
        Ok(Page { head, records, key_set: state.key_set_for(held).cloned().unwrap_or_default() })
    }
    /// Signed by the replica that answers.
    pub fn sign(self, key: &RecordKey) -> Result<Answer, Refusal> {
        let (signature, head) = (key.sign_head(&self.head), encode(&self.head)?);
        Ok(Answer { key_set: self.key_set, head, signature, records: self.records })
    }
}

/// Whether a pull that has everything up to `after` need not wait any longer.
pub fn has_news(state: &State, after: u64) -> bool {
    state.cell().is_some_and(|cell| cell.export_seq > after)
}

fn encode<T: serde::Serialize>(what: &T) -> Result<Vec<u8>, Refusal> {
    postcard::to_stdvec(what).map_err(|e| Refusal::new(Code::Internal, "a record that encodes", e.to_string()))
}

/// When each peer was heard last: at the *sending* of the last pull that brought all there was, by this replica's own clock
/// since boot (I12). What is shown is never younger than what is known.
#[derive(Debug, Default)]
pub struct Heard(BTreeMap<TrustDomain, Instant>);

impl Heard {
    /// A pull succeeded whose batch was the end.
    pub fn note(&mut self, peer: &TrustDomain, sent: Instant) {
        self.0.insert(peer.clone(), sent);
    }
    /// Age of what is known of a peer; none where this replica did not pull.
    pub fn age(&self, peer: &TrustDomain, now: Instant) -> Option<Duration> {
        self.0.get(peer).map(|at| now.saturating_duration_since(*at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_identity::Root;
    use ambit_model::Stamp;
    use ambit_model::record::Kind;
    use ambit_state::objects::PeerState;

    struct Origin {
        td: TrustDomain,
        key: RecordKey,
        key_set: KeySetRow,
        root: Root,
    }

    impl Origin {
        fn new() -> Origin {
            let td: TrustDomain = "west".parse().unwrap();
            let root = Root::create(&td, Stamp(1_700_000_000_000), [1; 16]).unwrap();
            let key = RecordKey::generate().unwrap();
            let (statement, signature) = KeySet::certify(&root, &td, 1, vec![key.public()]).unwrap();
            Origin { td, key, key_set: KeySetRow { statement, signature }, root }
        }
        fn known(&self, epoch: u64, seq: u64, hash: [u8; 32]) -> PeerRow {
            PeerRow {
                state: PeerState::Active,
                fingerprint: [0; 32],
                addresses: Vec::new(),
                root_der: self.root.der().to_vec(),
                bundle_sequence: 1,
                key_set: self.key_set.clone(),
                epoch,
                seq,
                hash,
                trouble: String::new(),
            }
        }
        fn ask(&self, known: PeerRow, limit: u32) -> Ask {
            let roots = vec![known.root_der.clone()];
            Ask { origin: self.td.clone(), known, roots, kids: Vec::new(), nonce: [7; 16], limit, at: Stamp(0) }
        }
        fn says(&self, epoch: u64, records: &[Record], seq: u64, hash: [u8; 32]) -> Answer {
            let head = Head { origin: self.td.clone(), epoch, seq, hash, stamp: Stamp(1), nonce: [7; 16] };
            Answer {
                key_set: self.key_set.clone(),
                signature: self.key.sign_head(&head),
                head: encode(&head).unwrap(),
                records: records.iter().map(|r| encode(r).unwrap()).collect(),
            }
        }
        fn records(&self, count: u64) -> Vec<Record> {
            let mut prev_hash = [0; 32];
            let record = |seq| {
                let (origin, key, payload) = (self.td.clone(), format!("p{seq}"), Vec::new());
                let record = Record { origin, epoch: 1, seq, prev_hash, kind: Kind::Policy, key, payload };
                prev_hash = record.hash();
                record
            };
            (1..=count).map(record).collect()
        }
    }

    /// A cell that began anew is epoch 2; this peer imported up to sequence 5 of what it said.
    #[test]
    fn a_peer_fences_the_lost_incarnation_and_stops_where_history_was_lost() {
        let west = Origin::new();
        for (epoch_known, epoch, seq, hash, code) in [
            (2, 2, 5, 5, None),
            // A replica of the lost incarnation: another is asked, nothing of it is taken.
            (2, 1, 5, 5, Some(Code::Unavailable)),
            (2, 1, 9, 9, Some(Code::Unavailable)),
            // A replica that lags behind is no history lost.
            (2, 2, 4, 4, Some(Code::Unavailable)),
            // Began anew from before what was imported: the import stops and says so.
            (1, 2, 4, 4, Some(Code::RecordChainBroken)),
            (1, 2, 5, 6, Some(Code::RecordEquivocation)),
        ] {
            let ask = west.ask(west.known(epoch_known, 5, [5; 32]), LIMIT);
            let outcome = ask.verify(&west.says(epoch, &[], seq, [hash; 32]));
            let found = outcome.err();
            assert_eq!(found.as_ref().map(|r| r.code), code, "epoch {epoch} at {seq}, known {epoch_known} at 5");
            let lies = matches!(code, Some(Code::RecordChainBroken | Code::RecordEquivocation));
            assert_eq!(found.is_some_and(|refusal| stop(&west.td, &refusal).is_some()), lies);
        }
    }

    /// Under a load of more than a batch a second, what is still to come may be old: nothing is said of its age.
    #[test]
    fn only_a_batch_that_is_not_full_is_the_end() {
        let west = Origin::new();
        let records = west.records(3);
        let last = records.last().unwrap().hash();
        for (limit, is_the_end) in [(4, true), (3, false)] {
            let batch = west.ask(west.known(0, 0, [0; 32]), limit).verify(&west.says(1, &records, 3, last)).unwrap();
            assert_eq!(batch.is_the_end(), is_the_end, "3 of at most {limit}");
            assert!(matches!(batch.into_import(), Some(Command::Import(head, all)) if head.seq == 3 && all == records));
        }
    }
}
