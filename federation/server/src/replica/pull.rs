//! One pull from a peer, decided without IO: what is asked, what is answered, what is believed and how old it is.
//!
//! The leader's chores and the peer link's service drive it over the network, and the simulator over its own. Never: a
//! record that its origin's signed head does not lead to.

use ambit_identity::majority::{majority, signers};
use ambit_identity::record::Listed;
use ambit_identity::{CoSignature, KeySet, RecordKey, fingerprint};
use ambit_model::record::{Claim, Head, Record};
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
    /// [`Head`], postcard: all that earlier releases read and say.
    pub head: Vec<u8>,
    /// Over the head, by the record key of the replica that answered.
    pub signature: CoSignature,
    /// [`Claim`], postcard; empty where an earlier release answered.
    pub claim: Vec<u8>,
    /// Over the claim, by voters of the origin.
    pub signatures: Vec<CoSignature>,
    /// [`Record`]s, postcard, in sequence.
    pub records: Vec<Vec<u8>>,
}

/// Records that lead from what was imported to a head that a majority of their origin's voters signed for this very pull.
/// Only [`Ask::verify`] makes one.
///
/// ```compile_fail,E0451
/// use ambitd::replica::pull::Batch;
/// fn forge(head: ambit_model::record::Head) -> Batch {
///     Batch { head, records: Vec::new(), is_the_end: true, learned: None }
/// }
/// ```
#[derive(Debug)]
pub struct Batch {
    head: Head,
    records: Vec<Record>,
    is_the_end: bool,
    learned: Option<Command>,
}

/// Why an answer is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Untaken {
    /// It says nothing of the origin: whoever answered lies, lags or is away. Another replica of it is asked.
    Answer(Refusal),
    /// A majority of the origin's voters said it, and it does not go with what they said before.
    Origin(Refusal),
}

impl Untaken {
    /// What is wrong.
    pub fn refusal(&self) -> &Refusal {
        let (Self::Answer(refusal) | Self::Origin(refusal)) = self;
        refusal
    }
    /// Whether somebody answered who is no replica of the origin as it should be: its operators are to look at it.
    pub fn is_a_lie(&self) -> bool {
        matches!(self.refusal().code, Code::RecordChainBroken | Code::RecordEquivocation | Code::RecordSignature)
    }
}

impl From<Refusal> for Untaken {
    fn from(refusal: Refusal) -> Self {
        Self::Answer(refusal)
    }
}

impl Batch {
    /// Whether the origin had no more when it answered. Of a batch that is not the end nothing follows about how old the
    /// rest is (I12).
    pub fn is_the_end(&self) -> bool {
        self.is_the_end
    }
    /// The origin's key set, where it is a later one than is known: committed first, so that none of before is believed any
    /// more, by whichever replica pulls next. It changes when replicas come and go.
    pub fn learned(&mut self) -> Option<Command> {
        self.learned.take()
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

    /// Signature before content: key set by the root, claim by the key set, nonce by the claim, records by their chain to it.
    pub fn verify(&self, answer: &Answer) -> Result<Batch, Untaken> {
        let (keys, learned) = self.keys(&answer.key_set)?;
        let claim = self.claim(&keys, answer)?;
        let is_ours = claim.head.origin == self.origin && claim.head.nonce == self.nonce;
        #[cfg(ambit_mutant)]
        let is_ours = is_ours || ambit_state::mutant::is("pull-nonce-unchecked");
        if !is_ours {
            return Err(Refusal::new(Code::RecordSignature, "the head of this pull", "another").into());
        }
        self.place(&claim.head)?;
        let records = self.chain(&claim.head, &answer.records)?;
        let is_the_end = claim.is_the_end;
        // A true head and no records, again and again, would hold the puller to who gives it nothing.
        if !is_the_end && records.len() < self.limit as usize {
            let expected = format!("{} records, or the end", self.limit);
            return Err(Refusal::new(Code::Unavailable, expected, records.len().to_string()).into());
        }
        #[cfg(ambit_mutant)]
        let is_the_end = is_the_end || ambit_state::mutant::is("full-batch-heard");
        Ok(Batch { head: claim.head, records, is_the_end, learned })
    }

    /// A key set that the peer says is its own.
    ///
    /// # Errors
    /// As [`Ask::verify`].
    pub fn key_set(&self, set: &KeySetRow) -> Result<KeySet, Refusal> {
        self.keys(set).map(|(keys, _)| keys)
    }

    /// What was signed, by enough. An earlier release signs a head by itself: enough where the key set lists one voter.
    fn claim(&self, keys: &KeySet, answer: &Answer) -> Result<Claim, Refusal> {
        let is_earlier = answer.claim.is_empty();
        let claim = if is_earlier {
            let head = postcard::from_bytes(&answer.head).map_err(|e| broken("a head", e.to_string()))?;
            Claim { head, is_the_end: answer.records.len() < self.limit as usize }
        } else {
            match postcard::take_from_bytes(&answer.claim) {
                Ok((claim, [])) => claim,
                Ok(_) | Err(_) => return Err(broken("a claim", format!("{} bytes", answer.claim.len()))),
            }
        };
        let signed = if is_earlier {
            keys.verify_claim(&self.origin, &claim.head.signed_bytes(), std::slice::from_ref(&answer.signature))
        } else {
            keys.verify_claim(&self.origin, &claim.signed_bytes(), &answer.signatures)
        };
        #[cfg(ambit_mutant)]
        let signed = if ambit_state::mutant::is("import-unsigned") { Ok(()) } else { signed };
        signed.map(|()| claim)
    }

    /// The key set, and the command that remembers it where it is later than the one that is known.
    fn keys(&self, set: &KeySetRow) -> Result<(KeySet, Option<Command>), Refusal> {
        let keys = self.certified(set)?.in_time(self.at)?;
        if *set == self.known.key_set {
            return Ok((keys, None));
        }
        // As registering again does.
        let learn = || {
            let row = PeerRow { key_set: set.clone(), ..self.known.clone() };
            Some(Command::PutPeer(self.origin.clone(), row, None))
        };
        // What was certified by a root that is no more says nothing of how old a key set may be.
        let Ok(known) = self.certified(&self.known.key_set) else { return Ok((keys, learn())) };
        let is_old = keys.seq() < known.seq();
        #[cfg(ambit_mutant)]
        let is_old = is_old && !ambit_state::mutant::is("key-set-goes-back");
        if is_old {
            // A replica that lags, or the key of one that left: another is asked.
            let expected = "a key set no older than the last one heard";
            return Err(Refusal::new(Code::Unavailable, expected, keys.seq().to_string()));
        }
        let is_new = keys.seq() > known.seq();
        Ok((keys, if is_new { learn() } else { None }))
    }

    fn certified(&self, set: &KeySetRow) -> Result<KeySet, Refusal> {
        let none = Refusal::new(Code::RecordSignature, "a peer with a root", "none");
        let by = |root: &Vec<u8>| KeySet::verify(&self.origin, root, &set.statement, &set.signature);
        self.roots.iter().map(by).reduce(|one, other| one.or(other)).unwrap_or(Err(none))
    }

    /// Whether the head can be of the history that was imported so far.
    fn place(&self, head: &Head) -> Result<(), Untaken> {
        let peer = &self.known;
        let is_old = head.epoch < peer.epoch;
        #[cfg(ambit_mutant)]
        let is_old = is_old && !ambit_state::mutant::is("lost-incarnation-heard");
        if is_old {
            // The lost incarnation of a cell that began anew, or a replica of it that was left running: another is asked.
            let expected = format!("a head of epoch {} or later", peer.epoch);
            return Err(Refusal::new(Code::Unavailable, expected, head.epoch.to_string()).into());
        }
        if head.epoch > peer.epoch && head.seq < peer.seq && peer.epoch > 0 {
            let found = format!("epoch {} from sequence {}: it began anew from an older backup", head.epoch, head.seq);
            return Err(Untaken::Origin(broken(&format!("sequence {} as imported", peer.seq), found)));
        }
        if head.seq < peer.seq {
            let expected = format!("a head at {} or later", peer.seq);
            return Err(Refusal::new(Code::Unavailable, expected, head.seq.to_string()).into());
        }
        let equivocates = head.seq == peer.seq && head.hash != peer.hash && peer.seq > 0;
        #[cfg(ambit_mutant)]
        let equivocates = equivocates && !ambit_state::mutant::is("equivocation-heard");
        if equivocates {
            let (expected, found) = (format!("sequence {} as imported", peer.seq), "another history".to_owned());
            return Err(Untaken::Origin(Refusal::new(Code::RecordEquivocation, expected, found)));
        }
        Ok(())
    }

    /// Records that lead to the signed head are the origin's, whoever sent them: where they do not go on from what was
    /// imported, the origin has another history than it had. Any others speak against the sender alone.
    fn chain(&self, head: &Head, records: &[Vec<u8>]) -> Result<Vec<Record>, Untaken> {
        let mut out: Vec<Record> = Vec::with_capacity(records.len());
        for bytes in records {
            let record: Record = postcard::from_bytes(bytes).map_err(|e| broken("a record", e.to_string()))?;
            let (seq, prev_hash) = out.last().map_or((self.known.seq, record.prev_hash), |r| (r.seq, r.hash()));
            let follows = record.origin == self.origin && record.seq == seq + 1 && record.prev_hash == prev_hash;
            if !follows {
                let found = format!("{}/{}", record.origin, record.seq);
                return Err(broken("the next record of the chain", found).into());
            }
            out.push(record);
        }
        let (seq, hash) = out.last().map_or((self.known.seq, self.known.hash), |r| (r.seq, r.hash()));
        let leads_to_head = (seq, hash) == (head.seq, head.hash) || (head.seq == 0 && seq == 0);
        #[cfg(ambit_mutant)]
        let leads_to_head = leads_to_head || ambit_state::mutant::is("import-unchained");
        #[cfg(ambit_mutant)]
        let leads_to_head =
            leads_to_head || (head.seq == self.known.seq && ambit_state::mutant::is("equivocation-heard"));
        if !leads_to_head {
            let found = format!("sequence {seq}, head {}", head.seq);
            return Err(broken("records that lead to the signed head", found).into());
        }
        match out.first() {
            Some(first) if first.prev_hash != self.known.hash => {
                let expected = format!("records after sequence {} as imported", self.known.seq);
                let found = "another history".to_owned();
                Err(Untaken::Origin(Refusal::new(Code::RecordEquivocation, expected, found)))
            }
            Some(_) | None => Ok(out),
        }
    }
}

fn broken(expected: &str, found: String) -> Refusal {
    Refusal::new(Code::RecordChainBroken, expected, found)
}

/// What the importer commits where what a majority of the peer's voters said does not hold: no more is taken of it. None where
/// the answer speaks against whoever gave it: one stolen replica must not end what its cell is believed.
pub fn stop(origin: &TrustDomain, untaken: &Untaken) -> Option<Command> {
    match untaken {
        Untaken::Origin(refusal) if untaken.is_a_lie() => Some(Command::StopPeer(origin.clone(), refusal.to_string())),
        Untaken::Origin(_) | Untaken::Answer(_) => None,
    }
}

/// An answer before its claim is signed.
#[derive(Clone, Debug)]
pub struct Page {
    claim: Claim,
    records: Vec<Vec<u8>>,
    key_set: KeySetRow,
    listed: Listed,
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
        let key_set = state.key_set_for(held).cloned().unwrap_or_default();
        let listed = Listed::read(&key_set.statement);
        let listed = listed.ok_or_else(|| Refusal::new(Code::Unavailable, "a key set of this cell", "none"))?;
        Ok(Page { claim: Claim { head, is_the_end: seq == cell.export_seq }, records, key_set, listed })
    }
    /// What voters are asked to sign.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }
    /// Whose signatures count.
    pub fn voters(&self) -> &[[u8; 32]] {
        &self.listed.voters
    }
    /// How many of these signatures count, of so many as are wanted.
    pub fn count(&self, signatures: &[CoSignature]) -> (usize, usize) {
        let voters = self.voters();
        (signers(voters, &self.claim.signed_bytes(), signatures), majority(voters.len()))
    }
    /// The signature of a replica, under its place in the key set; none where its key is no voter's.
    pub fn named(&self, key: &[u8; 32], signature: Vec<u8>) -> Option<CoSignature> {
        let at = self.voters().iter().position(|voter| voter == key)?;
        Some(CoSignature { key_index: u32::try_from(at).ok()?, signature })
    }
    /// What this replica says itself.
    pub fn own(&self, key: &RecordKey) -> Option<CoSignature> {
        self.named(&key.public(), key.sign_claim(&self.claim))
    }
    /// The answer, under the signatures of a majority. `key`: of the replica that answers, for whom earlier releases take it.
    ///
    /// # Errors
    /// [`Code::Unavailable`] without a majority: a cell whose voters are away says nothing, and its peers see it age.
    pub fn into_answer(self, key: &RecordKey, signatures: Vec<CoSignature>) -> Result<Answer, Refusal> {
        let (signed, wanted) = self.count(&signatures);
        if signed < wanted {
            let expected = format!("signatures of {wanted} of {} voters on a head", self.voters().len());
            return Err(Refusal::new(Code::Unavailable, expected, signed.to_string()));
        }
        let (head, claim) = (encode(&self.claim.head)?, encode(&self.claim)?);
        // Earlier releases try all keys.
        let signature = CoSignature { key_index: 0, signature: key.sign_head(&self.claim.head) };
        Ok(Answer { key_set: self.key_set, head, signature, claim, signatures, records: self.records })
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
#[path = "pull_tests.rs"]
mod tests;
