//! Workload SVIDs: asked for when somebody here needs one, renewed at half-life, kept while the cell is away. One that
//! nobody needs any more is kept for who comes back, and not renewed: a workload that connects again is told the same.
//!
//! Keys are made here and never leave this process but to their workload. A denial withdraws; an outage does not.

use crate::backoff::random;
use crate::clock::Clock;
use crate::denials::{Denials, Lane};
use crate::issued::{Issued, Svid, Svids};
use crate::metrics::METRICS;
use ambit_identity::svid::Presented;
use ambit_identity::{SharedTrust, SvidKey};
use ambit_model::refusal::Class;
use ambit_model::{Code, EntryId, Generation, NodeId, Refusal, SpiffeId, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1::svid_client::SvidClient;
use ambit_proto::v1::{BatchNewX509svidRequest, NewX509svid, X509svidResult};
use rustls_pki_types::CertificateDer;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::Channel;

/// SVIDs asked for in one request.
const BATCH_MAX: usize = 64;
/// An answer takes one Raft commit; a cell that changes its leader takes a few elections.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// After a refusal or an outage the same entry is not asked for again for this long.
const RETRY_MS: u64 = 1000;
/// What is to be issued anew is asked for within this long.
const REISSUE_MS: u64 = 2000;
/// A denied entry is asked for again this late: an operator may have changed it.
const DENIED_RETRY_MS: u64 = 5000;

/// The component.
#[derive(Debug)]
pub struct Issuance {
    /// Where SVIDs go, and what is wanted.
    pub issued: Issued,
    /// What they are checked against.
    pub trust: SharedTrust,
    /// The time.
    pub clock: Arc<Clock>,
    /// Whom the cell refuses: perhaps this node's earlier admissions.
    pub denials: Lane,
    /// This node and its admission.
    pub node: watch::Receiver<Option<(NodeId, Generation)>>,
    /// The way to the cell.
    pub channel: watch::Receiver<Option<Channel>>,
}

/// SVIDs kept that nobody needs now. What was needed last stays longest.
const IDLE_MAX: usize = 1000;

#[derive(Default)]
struct State {
    svids: Svids,
    /// When each is due next, also of those that are idle.
    due: BTreeMap<EntryId, Stamp>,
    /// Held, and needed by nobody now: in which order they ceased to be.
    idle: BTreeMap<EntryId, u64>,
    ceased: u64,
    /// This node was out when last looked at.
    out: bool,
}

impl State {
    /// What a tainted intermediate signed is due within seconds, not at half-life: spread, since every node of the cell
    /// hears of it at once.
    fn reissue(&mut self, tainted: &BTreeSet<String>, now: Stamp) {
        for (entry, svid) in &self.svids {
            if svid.as_ref().is_ok_and(|svid| tainted.contains(&svid.authority)) {
                let due = self.due.entry(entry.clone()).or_insert(now);
                if *due > now.plus_ms(REISSUE_MS) {
                    *due = now.plus_ms(random() % REISSUE_MS);
                }
            }
        }
    }
}

impl Issuance {
    /// Runs until the process ends.
    pub async fn run(mut self) {
        let mut wanted = self.issued.wanted();
        let mut views = self.issued.watch();
        let mut denials = self.denials.watch();
        let mut state = State::default();
        loop {
            let now = self.clock.now();
            let want = wanted.borrow_and_update().clone();
            self.forget(&mut state, &want, now);
            let due: Vec<EntryId> = want
                .iter()
                .filter(|e| state.due.get(*e).is_none_or(|at| *at <= now))
                .take(BATCH_MAX)
                .cloned()
                .collect();
            let channel = self.channel.borrow_and_update().clone();
            if let (Some(channel), false) = (channel, due.is_empty()) {
                self.ask(&mut state, channel, &due).await;
                continue;
            }
            let next = if due.is_empty() { state.next(&want, now) } else { RETRY_MS };
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                changed = self.channel.changed() => if changed.is_err() { return },
                changed = views.changed() => if changed.is_err() { return },
                changed = denials.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = denials.borrow_and_update().clone();
                    self.hurry(&mut state, &now);
                }
                () = tokio::time::sleep(Duration::from_millis(next)) => {}
            }
        }
    }

    /// Drops what is over.
    fn forget(&self, state: &mut State, want: &BTreeSet<EntryId>, now: Stamp) {
        let known = self.issued.now();
        let over = |entry: &EntryId, svid: &Result<Arc<Svid>, Refusal>| {
            svid.as_ref().is_ok_and(|svid| svid.not_after <= now) || !still_of(known.view.as_deref(), entry, svid)
        };
        // An entry whose SVID ran out is due at once, and so is one whose identity changed under its name.
        let over: Vec<EntryId> =
            state.svids.iter().filter(|(entry, svid)| over(entry, svid)).map(|(entry, _)| entry.clone()).collect();
        for entry in over {
            state.svids.remove(&entry);
            state.due.remove(&entry);
        }
        state.rest(want);
        if let Some(view) = &known.view {
            state.reissue(&view.tainted, now);
        }
        if !known.svids.keys().eq(state.svids.keys()) {
            self.issued.set_svids(state.svids.clone());
        }
    }

    /// What was revoked is due now, if it may be had anew. After a release the node is a new generation, and what was certified through an earlier one stays refused
    /// everywhere: those SVIDs are due now, not at half-life.
    fn hurry(&self, state: &mut State, denials: &Denials) {
        let back = state.out && !denials.is_out();
        state.out = denials.is_out();
        let Some((node, _)) = *self.node.borrow() else { return };
        let State { svids, due, idle, .. } = state;
        due.retain(|entry, _| match svids.get(entry) {
            Some(Ok(svid)) => {
                let chain = || svid.chain_der.iter().map(|der| der.as_slice().into()).collect::<Vec<_>>();
                let revoked = || Presented::of(&chain()).is_some_and(|shown| denials.denies_presented(&shown));
                !back && !denials.lists(&svid.id.trust_domain(), &node, svid.generation) && !revoked()
            }
            Some(Err(_)) => !back,
            None => true,
        });
        // Nobody renews an idle one, and it must not be told to who comes back.
        svids.retain(|entry, _| due.contains_key(entry) || !idle.contains_key(entry));
    }

    async fn ask(&self, state: &mut State, channel: Channel, due: &[EntryId]) {
        let answers = match self.request(channel, due).await {
            Ok(answers) => answers,
            Err(refusal) => {
                // The cell is away: what is held stays good until it ends.
                METRICS.svids.inc(["unavailable"]);
                tracing::debug!(%refusal, "SVIDs not renewed now");
                due.iter().map(|entry| (entry.clone(), Err(refusal.clone()))).collect()
            }
        };
        let now = self.clock.now();
        for (entry, answer) in answers {
            match answer {
                Ok(svid) => {
                    METRICS.svids.inc(["ok"]);
                    state.due.insert(entry.clone(), renew_at(svid.since, svid.not_after, random()));
                    state.svids.insert(entry, Ok(Arc::new(svid)));
                }
                Err(refusal) if withdraws(&refusal) => {
                    METRICS.svids.inc(["denied"]);
                    tracing::warn!(entry = %entry, %refusal, "SVID denied");
                    state.due.insert(entry.clone(), now.plus_ms(DENIED_RETRY_MS));
                    state.svids.insert(entry, Err(refusal));
                }
                Err(refusal) => {
                    tracing::debug!(entry = %entry, %refusal, "SVID not issued now");
                    state.due.insert(entry, now.plus_ms(RETRY_MS));
                }
            }
        }
        self.issued.set_svids(state.svids.clone());
    }

    async fn request(
        &self,
        channel: Channel,
        due: &[EntryId],
    ) -> Result<Vec<(EntryId, Result<Svid, Refusal>)>, Refusal> {
        let mut keys = BTreeMap::new();
        let mut items = Vec::new();
        for entry in due {
            let key = SvidKey::generate()?;
            items.push(NewX509svid { entry_id: entry.to_string(), csr: key.csr()? });
            keys.insert(entry.clone(), key);
        }
        let mut request_id = [0u8; 16];
        request_id[..8].copy_from_slice(&random().to_le_bytes());
        request_id[8..].copy_from_slice(&random().to_le_bytes());
        let request = BatchNewX509svidRequest { request_id: request_id.to_vec(), items };
        let mut client = SvidClient::new(channel);
        let answer = tokio::time::timeout(ANSWER_MAX, client.batch_new_x509svid(request)).await;
        let late = |_| Refusal::new(Code::Unavailable, "an answer", format!("none in {ANSWER_MAX:?}"));
        let results = answer.map_err(late)?.map_err(|s| from_status(&s))?.into_inner().results;
        let now = self.clock.now();
        Ok(keys
            .into_iter()
            .map(|(entry, key)| {
                let result = results.iter().find(|r| r.entry_id == entry.as_str());
                let made = self.accept(&entry, &key, result, now);
                (entry, made)
            })
            .collect())
    }

    /// Takes a leaf only if it is what was asked for: of the entry's identity, of the own key, good by the own bundle.
    fn accept(
        &self,
        entry: &EntryId,
        key: &SvidKey,
        result: Option<&X509svidResult>,
        now: Stamp,
    ) -> Result<Svid, Refusal> {
        let result = result.ok_or_else(|| Refusal::new(Code::Unavailable, "a result for the entry", "none"))?;
        if result.code != "ok" {
            let code = Code::from_text(&result.code).unwrap_or(Code::Internal);
            return Err(Refusal::new(code, "an SVID", result.message.as_str()));
        }
        let expected = self.identity_of(entry)?;
        let chain: Vec<CertificateDer<'_>> =
            result.chain_der.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let peer = self.trust.current().verify(&chain, now)?;
        if *peer.id() != expected {
            return Err(Refusal::new(Code::Internal, format!("a leaf of {expected}"), peer.id().as_str()));
        }
        let binding =
            peer.binding().ok_or_else(|| Refusal::new(Code::Internal, "a leaf bound to this node", "none"))?;
        Ok(Svid {
            id: expected,
            generation: binding.generation,
            authority: peer.authority().to_owned(),
            key_pkcs8: key.pkcs8(),
            chain_der: result.chain_der.clone(),
            since: now,
            not_after: peer.not_after(),
        })
    }

    fn identity_of(&self, entry: &EntryId) -> Result<SpiffeId, Refusal> {
        let view = self.issued.now().view;
        let found = view.as_ref().and_then(|v| v.entries.iter().find(|e| e.id == *entry)).map(|e| e.spiffe_id.clone());
        found.ok_or_else(|| Refusal::new(Code::NotFound, "an entry of the slice", entry.as_str()))
    }
}

impl State {
    /// Of what nobody needs any more, the SVIDs that were needed last stay.
    fn rest(&mut self, want: &BTreeSet<EntryId>) {
        let Self { svids, due, idle, ceased, .. } = self;
        idle.retain(|entry, _| !want.contains(entry) && svids.contains_key(entry));
        for (entry, _) in svids.iter().filter(|(entry, svid)| svid.is_ok() && !want.contains(*entry)) {
            idle.entry(entry.clone()).or_insert_with(|| {
                *ceased += 1;
                *ceased
            });
        }
        let mut order: Vec<u64> = idle.values().copied().collect();
        order.sort_unstable();
        if let Some(last_gone) = order.len().checked_sub(IDLE_MAX + 1).and_then(|n| order.get(n)) {
            idle.retain(|_, at| *at > *last_gone);
        }
        svids.retain(|entry, _| want.contains(entry) || idle.contains_key(entry));
        due.retain(|entry, _| want.contains(entry) || idle.contains_key(entry));
    }

    /// Milliseconds until something is due or over.
    fn next(&self, want: &BTreeSet<EntryId>, now: Stamp) -> u64 {
        let due = self.due.iter().filter(|(entry, _)| want.contains(*entry)).map(|(_, at)| *at);
        let over = self.svids.values().flatten().map(|svid| svid.not_after);
        due.chain(over).min().map_or(60_000, |at| at.0.saturating_sub(now.0)).clamp(50, 60_000)
    }
}

fn still_of(view: Option<&crate::view::View>, entry: &EntryId, svid: &Result<Arc<Svid>, Refusal>) -> bool {
    let Some(found) = view.and_then(|v| v.entries.iter().find(|e| e.id == *entry)) else { return false };
    svid.as_ref().map_or(true, |svid| svid.id == found.spiffe_id)
}

/// "No" withdraws an SVID; "not now" does not.
pub(crate) fn withdraws(refusal: &Refusal) -> bool {
    match refusal.code.class() {
        Class::Denied | Class::Unauthenticated | Class::Missing | Class::Invalid => true,
        Class::Conflict | Class::Unavailable | Class::Unimplemented | Class::Precondition => false,
    }
}

/// Half of the lifetime, ±10 %: renewals of one moment do not return as one.
pub fn renew_at(since: Stamp, not_after: Stamp, random: u64) -> Stamp {
    let life = not_after.0.saturating_sub(since.0);
    let (base, jitter) = (life / 100 * 40, life / 100 * 20);
    since.plus_ms(base + random % (jitter + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_identity::Trust;

    #[test]
    fn renewal_falls_around_half_life() {
        for random in [0, 1, 12_345, u64::MAX] {
            let at = renew_at(Stamp(1_000_000), Stamp(1_000_000 + 3_600_000), random).0 - 1_000_000;
            assert!((1_440_000..=2_160_000).contains(&at), "{at}");
        }
        assert_eq!(renew_at(Stamp(10), Stamp(5), 7), Stamp(10));
    }

    #[test]
    fn after_a_release_what_an_earlier_generation_was_given_is_due_at_once() {
        let denials = Lane::default();
        let (issued, trust) = (Issued::default(), Trust::Pinned("west".parse().unwrap(), [0; 32]));
        let me = NodeId([7; 32]);
        let (_node, node) = watch::channel(Some((me, Generation(3))));
        let (_channel, channel) = watch::channel(None);
        let clock = Arc::new(Clock::default());
        let issuance =
            Issuance { issued, trust: SharedTrust::new(trust), clock, denials: denials.clone(), node, channel };
        let entry = |name: &str| name.parse::<EntryId>().unwrap();
        let svid = |generation| Svid {
            id: "spiffe://west/web".parse().unwrap(),
            key_pkcs8: Vec::new().into(),
            chain_der: vec![],
            generation: Generation(generation),
            authority: "aa".repeat(20),
            since: Stamp(0),
            not_after: Stamp(u64::MAX),
        };
        let mut state = State::default();
        state.svids.insert(entry("old"), Ok(Arc::new(svid(2))));
        state.svids.insert(entry("new"), Ok(Arc::new(svid(3))));
        state.svids.insert(entry("none"), Err(Refusal::new(Code::NodeUntrusted, "", "")));
        for name in ["old", "new", "none"] {
            state.due.insert(entry(name), Stamp(1000));
        }
        let waits = |state: &mut State, revision, td: &str, node: NodeId, generation| {
            let denial = ambit_proto::v1::NodeDenial { node: node.to_string(), generation, trust_domain: td.into() };
            denials.offer(Denials::parse(ambit_model::Revision(revision), &[denial], &[]).unwrap());
            issuance.hurry(state, &denials.now());
            state.due.keys().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(waits(&mut state, 1, "east", me, 9), ["new", "none", "old"], "another trust domain's word");
        assert_eq!(waits(&mut state, 2, "west", NodeId([8; 32]), 9), ["new", "none", "old"], "another node");
        assert_eq!(waits(&mut state, 3, "west", me, 2), ["new", "none"]);
        // Out and in again, before any list says which generation was meant.
        denials.set_out(true);
        issuance.hurry(&mut state, &denials.now());
        assert_eq!(state.due.len(), 2);
        denials.set_out(false);
        issuance.hurry(&mut state, &denials.now());
        assert!(state.due.is_empty(), "{:?}", state.due);
    }

    #[test]
    fn who_comes_back_is_told_the_same_and_of_the_others_the_last_stay() {
        let entry = |n: usize| format!("e{n}").parse::<EntryId>().unwrap();
        let svid = Svid {
            id: "spiffe://west/web".parse().unwrap(),
            key_pkcs8: Vec::new().into(),
            chain_der: vec![],
            generation: Generation(1),
            authority: "aa".repeat(20),
            since: Stamp(0),
            not_after: Stamp(9_000),
        };
        let (svid, mut state) = (Arc::new(svid), State::default());
        let all: BTreeSet<EntryId> = (0..IDLE_MAX + 3).map(entry).collect();
        for one in &all {
            state.svids.insert(one.clone(), Ok(svid.clone()));
            state.due.insert(one.clone(), Stamp(5_000));
        }
        state.svids.insert(entry(0), Err(Refusal::new(Code::NotFound, "", "")));
        state.rest(&all);
        assert!(state.idle.is_empty() && state.svids.len() == all.len());
        // First 1, then 2 ceases to be needed, then all: a refusal and what was needed longest ago go.
        for gone in [&[1][..], &[1, 2], &(0..all.len()).collect::<Vec<_>>()] {
            let gone: BTreeSet<EntryId> = gone.iter().map(|n| entry(*n)).collect();
            state.rest(&all.difference(&gone).cloned().collect());
        }
        let left: BTreeSet<EntryId> =
            all.iter().filter(|e| ![entry(0), entry(1), entry(2)].contains(e)).cloned().collect();
        assert!(state.svids.keys().eq(&left) && state.due.keys().eq(&left) && state.idle.keys().eq(&left));
        // They wake nobody but when they are over; one that is needed again is due when it was.
        let nobody = BTreeSet::new();
        assert_eq!((state.next(&nobody, Stamp(1_000)), state.next(&left, Stamp(1_000))), (8_000, 4_000));
        state.rest(&BTreeSet::from([entry(3)]));
        assert!(!state.idle.contains_key(&entry(3)) && state.due[&entry(3)] == Stamp(5_000));
    }

    #[test]
    fn what_a_tainted_intermediate_signed_is_due_within_seconds_and_nothing_else() {
        let (tainted, now) = ("aa".repeat(20), Stamp(1_000_000));
        let mut state = State::default();
        for (name, authority) in [("old", tainted.clone()), ("new", "bb".repeat(20))] {
            let svid = Svid {
                id: "spiffe://west/web".parse().unwrap(),
                key_pkcs8: Vec::new().into(),
                chain_der: vec![],
                generation: Generation(1),
                authority,
                since: Stamp(0),
                not_after: Stamp(u64::MAX),
            };
            state.svids.insert(name.parse().unwrap(), Ok(Arc::new(svid)));
            state.due.insert(name.parse().unwrap(), now.plus_ms(600_000));
        }
        state.reissue(&[tainted].into(), now);
        let due = |state: &State, name: &str| state.due.get(&name.parse::<EntryId>().unwrap()).copied().unwrap();
        let first = due(&state, "old");
        assert!(first < now.plus_ms(REISSUE_MS), "{first:?}");
        assert_eq!(due(&state, "new"), now.plus_ms(600_000));
        state.reissue(&["aa".repeat(20)].into(), now);
        assert_eq!(due(&state, "old"), first, "not put off by a second look");
    }

    #[test]
    fn only_a_no_withdraws() {
        for (code, gone) in [
            (Code::EntryNotOnNode, true),
            (Code::NodeUntrusted, true),
            (Code::NotFound, true),
            (Code::Unavailable, false),
            (Code::Busy, false),
            (Code::NodeLate, false),
            (Code::NodeQuarantined, true),
            (Code::AuthorityMismatch, false),
            (Code::IssuerUnavailable, false),
        ] {
            assert_eq!(withdraws(&Refusal::new(code, "", "")), gone, "{code}");
        }
    }
}
