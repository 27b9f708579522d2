use super::*;
use ambit_identity::Root;
use ambit_model::Stamp;
use ambit_model::record::Kind;
use ambit_state::objects::PeerState;

struct Origin {
    td: TrustDomain,
    keys: Vec<RecordKey>,
    key_set: KeySetRow,
    root: Root,
}

impl Origin {
    fn of(voters: usize) -> Origin {
        let td: TrustDomain = "west".parse().unwrap();
        let root = Root::create(&td, Stamp(1_700_000_000_000), [1; 16]).unwrap();
        let keys: Vec<RecordKey> = (0..voters).map(|_| RecordKey::generate().unwrap()).collect();
        let key_set = certified(&root, &td, 5, &keys);
        Origin { td, keys, key_set, root }
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
    /// Signed by all voters.
    fn says(&self, epoch: u64, records: &[Record], seq: u64, hash: [u8; 32]) -> Answer {
        let head = Head { origin: self.td.clone(), epoch, seq, hash, stamp: Stamp(1), nonce: [7; 16] };
        self.signed(Claim { head, is_the_end: true }, records, &self.keys)
    }
    fn signed(&self, claim: Claim, records: &[Record], by: &[RecordKey]) -> Answer {
        let sign = |(at, key): (usize, &RecordKey)| CoSignature {
            key_index: u32::try_from(at).unwrap(),
            signature: key.sign_claim(&claim),
        };
        Answer {
            key_set: self.key_set.clone(),
            signature: CoSignature { key_index: 0, signature: self.keys[0].sign_head(&claim.head) },
            head: encode(&claim.head).unwrap(),
            signatures: by.iter().enumerate().map(sign).collect(),
            claim: encode(&claim).unwrap(),
            records: records.iter().map(|r| encode(r).unwrap()).collect(),
        }
    }
    /// Records after `seq` and `hash`.
    fn records(&self, seq: u64, mut prev_hash: [u8; 32], count: u64) -> Vec<Record> {
        let record = |seq| {
            let (origin, key, payload) = (self.td.clone(), format!("p{seq}"), Vec::new());
            let record = Record { origin, epoch: 1, seq, prev_hash, kind: Kind::Policy, key, payload };
            prev_hash = record.hash();
            record
        };
        (seq + 1..=seq + count).map(record).collect()
    }
}

fn certified(root: &Root, td: &TrustDomain, seq: u64, keys: &[RecordKey]) -> KeySetRow {
    let keys = keys.iter().map(RecordKey::public).collect();
    let (statement, signature) = KeySet::certify(root, td, seq, keys).unwrap();
    KeySetRow { statement, signature }
}

fn stops(td: &TrustDomain, outcome: &Result<Batch, Untaken>) -> bool {
    outcome.as_ref().is_err_and(|untaken| stop(td, untaken).is_some())
}

fn code(outcome: &Result<Batch, Untaken>) -> Option<Code> {
    outcome.as_ref().err().map(|untaken| untaken.refusal().code)
}

/// A cell that begins anew is epoch 2; this peer imported up to sequence 5 of what it said.
#[test]
fn a_peer_fences_the_lost_incarnation_and_stops_where_history_was_lost() {
    let west = Origin::of(3);
    for (epoch_known, epoch, seq, hash, expected) in [
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
        assert_eq!(code(&outcome), expected, "epoch {epoch} at {seq}, known {epoch_known} at 5");
        let lies = matches!(expected, Some(Code::RecordChainBroken | Code::RecordEquivocation));
        assert_eq!(stops(&west.td, &outcome), lies);
    }
}

/// Under a load of more than a batch a second, what is still to come may be old: nothing is said of its age but where a
/// majority says that there was no more.
#[test]
fn only_what_was_signed_as_the_end_is_the_end() {
    let west = Origin::of(3);
    let records = west.records(0, [0; 32], 3);
    let last = records.last().unwrap().hash();
    for (limit, is_the_end) in [(4, true), (3, true), (3, false), (4, false)] {
        let head = Head { origin: west.td.clone(), epoch: 1, seq: 3, hash: last, stamp: Stamp(1), nonce: [7; 16] };
        let answer = west.signed(Claim { head, is_the_end }, &records, &west.keys);
        if limit == 4 && !is_the_end {
            // Less than was asked for, and more to come: whoever answers so again and again would hold the puller to itself.
            let outcome = west.ask(west.known(0, 0, [0; 32]), limit).verify(&answer);
            assert_eq!((code(&outcome), stops(&west.td, &outcome)), (Some(Code::Unavailable), false));
            continue;
        }
        let batch = west.ask(west.known(0, 0, [0; 32]), limit).verify(&answer).unwrap();
        assert_eq!(batch.is_the_end(), is_the_end, "3 of at most {limit}");
        assert!(matches!(batch.into_import(), Some(Command::Import(head, all)) if head.seq == 3 && all == records));
    }
}

/// A thief with one key of three serves whatever it likes: nothing of it is taken, and nothing ends for it.
#[test]
fn one_stolen_key_says_nothing_and_stops_nothing() {
    let west = Origin::of(3);
    let known = west.records(0, [0; 32], 5);
    let (at, more) = (known[4].hash(), west.records(5, known[4].hash(), 2));
    let ask = west.ask(west.known(1, 5, at), LIMIT);
    let honest = west.says(1, &more, 7, more[1].hash());
    assert_eq!(code(&ask.verify(&honest)), None);
    let thief = &west.keys[1];
    let claim = |seq, hash| {
        let head = Head { origin: west.td.clone(), epoch: 1, seq, hash, stamp: Stamp(1), nonce: [7; 16] };
        Claim { head, is_the_end: true }
    };
    let alone = |claim: Claim, records: &[Record]| {
        let one = |at| CoSignature { key_index: at, signature: thief.sign_claim(&claim) };
        Answer { signatures: (0..3).map(one).collect(), ..west.signed(claim.clone(), records, &[]) }
    };
    let other = west.records(5, [9; 32], 1);
    let mut broken = honest.clone();
    broken.records[0] = encode(&other[0]).unwrap();
    let mut short = honest.clone();
    short.records.pop();
    let earlier = Answer { claim: Vec::new(), signatures: Vec::new(), ..honest.clone() };
    let signature = Code::RecordSignature;
    for (what, answer, expected) in [
        ("a longer history", alone(claim(7, more[1].hash()), &more), signature),
        ("another history", alone(claim(5, [8; 32]), &[]), signature),
        ("a head behind", alone(claim(4, known[3].hash()), &[]), signature),
        ("a head of an earlier release", earlier, signature),
        ("an honest head over other records", broken, Code::RecordChainBroken),
        ("an honest head over fewer", short, Code::RecordChainBroken),
    ] {
        let outcome = ask.verify(&answer);
        assert_eq!(code(&outcome), Some(expected), "{what}");
        assert!(!stops(&west.td, &outcome), "{what} stops the import");
        assert!(outcome.is_err_and(|untaken| untaken.is_a_lie()), "{what}");
    }
    // What a majority signs against what it said before does stop it.
    let fork = west.says(1, &other, 6, other[0].hash());
    let outcome = ask.verify(&fork);
    assert_eq!((code(&outcome), stops(&west.td, &outcome)), (Some(Code::RecordEquivocation), true));
}

/// A cell of an earlier release signs alone: that is enough where it has one voter.
#[test]
fn an_earlier_release_is_believed_where_one_is_a_majority() {
    for (voters, expected) in [(1, None), (2, Some(Code::RecordSignature)), (3, Some(Code::RecordSignature))] {
        let west = Origin::of(voters);
        let records = west.records(0, [0; 32], 2);
        let says = west.says(1, &records, 2, records[1].hash());
        let earlier = Answer { claim: Vec::new(), signatures: Vec::new(), ..says };
        let outcome = west.ask(west.known(0, 0, [0; 32]), 10).verify(&earlier);
        assert_eq!(code(&outcome), expected, "{voters} voters");
        if let Ok(batch) = outcome {
            assert!(batch.is_the_end());
        }
    }
}

/// Keys that left a cell must not come back: the latest key set heard is kept, and no earlier one is believed.
#[test]
fn a_later_key_set_is_learned_and_an_earlier_one_refused() {
    let west = Origin::of(3);
    let of = |seq, keys: &[RecordKey]| Answer {
        key_set: certified(&west.root, &west.td, seq, keys),
        ..west.says(1, &[], 0, [0; 32])
    };
    let ask = west.ask(west.known(0, 0, [0; 32]), LIMIT);
    // The founder's own, from when it was alone: whoever has its key would be a majority.
    let alone = &of(4, &west.keys[..1]);
    assert_eq!(code(&ask.verify(alone)), Some(Code::Unavailable));
    let sixth = of(6, &west.keys);
    let mut later = ask.verify(&sixth).unwrap();
    let Some(Command::PutPeer(td, row, None)) = later.learned() else { panic!("nothing learned") };
    assert_eq!((td, row.key_set), (west.td.clone(), sixth.key_set));
    assert!(ask.verify(&west.says(1, &[], 0, [0; 32])).unwrap().learned().is_none(), "the one that is known");
}
