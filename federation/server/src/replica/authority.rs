//! This replica's own authority: its issuing keys, its intermediate renewed in time, and what it shows in handshakes.
//!
//! Each renewal has a new issuing key. An authority is named by its key, in every issuance and every leaf; with the same
//! key a tainted intermediate could not be told from its successor, and a key that leaked would leak for ever.

use super::files::{Card, Files};
use super::keyring::Keyring;
use super::{Replica, random, trust_of, wall_clock};
use crate::authorise::{Client, Issuer};
use ambit_identity::tls::{Trust, certified};
use ambit_identity::wrap::Purpose;
use ambit_identity::{Csr, IssuingKey, Named, Root, SvidKey, Usage, fingerprint};
use ambit_model::bundle::RootState;
use ambit_model::{Code, Lifetime, Refusal, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::authorities::{AuthorityRow, RootId, RootRow};
use ambit_state::{Command, State};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// A root that cannot be opened now, or a leader that is being elected, is asked again this soon.
const RETRY: Duration = Duration::from_millis(500);
/// At most so long without a look: what makes a renewal due beside time comes with a revision.
const LOOK: Duration = Duration::from_secs(10);
/// How long a replica may take to be heard that begins again: an election or two.
const AGAIN_MS: u64 = 3_600_000;
/// An answer takes one Raft commit.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A TPM that is well opens a root in a second. Others are asked before this replica's leaf ends, with which it asks them.
const OWN_MAX: Duration = Duration::from_secs(3);

/// The issuing keys of this replica: the one in use, and the one before, for what was committed under it.
pub struct Issuers {
    keys: RwLock<(Arc<IssuingKey>, Option<Arc<IssuingKey>>)>,
}

impl Issuers {
    /// Begins with the one that is on disk.
    pub fn new(key: IssuingKey) -> Self {
        Self { keys: RwLock::new((Arc::new(key), None)) }
    }
    fn current(&self) -> Arc<IssuingKey> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }
    fn named(&self, authority: &str) -> Option<Arc<IssuingKey>> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(&keys.0).chain(&keys.1).find(|key| key.authority() == authority).cloned()
    }
    fn replace(&self, key: IssuingKey) {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let former = std::mem::replace(&mut keys.0, Arc::new(key));
        keys.1 = Some(former);
    }
}

impl Replica {
    /// The issuing key in use.
    pub fn issuer(&self) -> Arc<IssuingKey> {
        self.inner.issuers.current()
    }

    /// The issuing key of that name: what was committed under it can be signed by no other.
    pub fn issuing(&self, authority: &str) -> Result<Arc<IssuingKey>, Refusal> {
        let none = || Refusal::new(Code::AuthorityMismatch, "an intermediate of this replica", authority);
        self.inner.issuers.named(authority).ok_or_else(none)
    }

    /// A root with its key: from this replica's own file, or as it was wrapped to it. Held only while it signs.
    pub async fn open_root(&self, id: &RootId) -> Result<Root, Refusal> {
        let (files, kept) = (&self.inner.files, self.local(|s| kept(s, id)));
        open(files, &files.card()?, self.keyring(), kept, id).await
    }

    /// The root that signs now, with its key.
    pub async fn active_root(&self) -> Result<Root, Refusal> {
        let id = self.local(|s| s.active_root().map(|(id, _)| id));
        self.open_root(&id.ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?).await
    }

    /// What leads from this root to the one before it, while that one is relied on.
    pub fn cross_of(&self, id: &RootId) -> Option<CertificateDer<'static>> {
        self.local(|s| {
            let mut roots = s.roots();
            let relied_on = roots.values().any(|row| matches!(row.state, RootState::Old | RootState::Tainted));
            roots.remove(id).filter(|row| relied_on && !row.cross_der.is_empty()).map(|row| row.cross_der.into())
        })
    }

    /// What is shown above an intermediate that this root signed.
    pub fn above(&self, root: &Root) -> Above {
        Above { between: root.above().to_vec(), cross: self.cross_of(&fingerprint(root.der())) }
    }

    /// Commits and signs the next intermediate of a replica, which asked for itself: the certificate, and what is shown
    /// above it.
    pub async fn renew_of(
        &self,
        replica: u64,
        csr: &Csr,
        lifetime_ms: u64,
        request: [u8; 16],
    ) -> Result<(CertificateDer<'static>, Above), Refusal> {
        // Before anything is committed: whoever cannot sign commits nothing.
        drop(self.active_root().await?);
        let client = super::own_client(replica);
        let command = Command::RenewAuthority { replica, key_hash: csr.spki_sha256(), lifetime_ms };
        let committed = self.propose(client, request, command).await?.into_authority()?;
        self.check_clock()?;
        let root = self.open_root(&committed.get().root).await?;
        let intermediate = root.renewed(&committed, csr)?;
        tracing::info!(replica, authority = ambit_identity::authority::authority_id(csr), "intermediate signed");
        Ok((intermediate, self.above(&root)))
    }

    /// Commits and signs a downstream authority for the issuer of a cluster.
    pub async fn downstream_of(
        &self,
        client: Client,
        request: [u8; 16],
        issuer: &Issuer,
        csr: &Csr,
        lifetime_ms: u64,
    ) -> Result<v1::NewIntermediateCaResponse, Refusal> {
        // Before anything is committed: whoever cannot sign commits nothing.
        drop(self.active_root().await?);
        let Issuer { node, generation, serial } = *issuer;
        let command = Command::NewDownstream { node, generation, serial, key_hash: csr.spki_sha256(), lifetime_ms };
        let committed = self.propose(client, request, command).await?.into_downstream()?;
        self.check_clock()?;
        let (id, not_after_ms) = (committed.get().root, committed.get().lifetime.not_after.0);
        let authority = ambit_identity::authority::authority_id(csr);
        let root = self.open_root(&id).await?;
        let signed = self.sign(|| root.downstream(&committed, csr))?;
        tracing::info!(entry = %committed.get().entry, authority, "downstream authority signed");
        let chain_der = std::iter::once(signed).chain(self.above(&root).all()).map(|der| der.to_vec()).collect();
        let roots = self.local(|s| s.bundle_record()).map(|bundle| bundle.roots).unwrap_or_default();
        let roots_der = roots.into_iter().map(|root| root.der).collect();
        Ok(v1::NewIntermediateCaResponse { chain_der, roots_der, not_after_ms, authority })
    }

    /// Asks for this replica's own next intermediate: here where the root opens here and soon, else of the others in turn.
    async fn next_issuer(&self) -> Result<IssuingKey, Refusal> {
        let key = SvidKey::generate()?;
        let (csr_der, request) = (key.csr()?, random::<16>()?);
        let csr = Csr::parse(&csr_der)?;
        let lifetime_ms = self.inner.lifetime_ms;
        let own = async {
            let (intermediate, above) = self.renew_of(self.id(), &csr, lifetime_ms, request).await?;
            Ok((intermediate, above.all()))
        };
        // Given up after its commit, it is the same request that others sign.
        let own = tokio::time::timeout(OWN_MAX, own).await.unwrap_or_else(|_| {
            let found = format!("none in {} s here", OWN_MAX.as_secs());
            Err(Refusal::new(Code::IssuerUnavailable, "an intermediate", found))
        });
        let signed = match own {
            Err(refusal) if refusal.code == Code::IssuerUnavailable => {
                let ask = v1::RenewAuthorityRequest { request_id: request.to_vec(), issuer_csr: csr_der, lifetime_ms };
                self.ask_others(ask, refusal).await
            }
            signed => signed,
        };
        let (intermediate, above) = signed?;
        Ok(IssuingKey::new(key, intermediate)?.under(above))
    }

    async fn ask_others(
        &self,
        ask: v1::RenewAuthorityRequest,
        mut last: Refusal,
    ) -> Result<(CertificateDer<'static>, Vec<CertificateDer<'static>>), Refusal> {
        for (id, address) in self.known_members() {
            let call = async {
                let channel = self.dial_replica(id, &address).await?;
                let mut client = v1::membership_client::MembershipClient::new(channel);
                client.renew_authority(ask.clone()).await.map_err(|s| from_status(&s))
            };
            match tokio::time::timeout(ANSWER_MAX, call).await {
                Ok(Ok(answer)) => {
                    let answer = answer.into_inner();
                    let above = above_in(answer.above_der, answer.cross_der);
                    return Ok((CertificateDer::from(answer.intermediate_der), above));
                }
                Ok(Err(refusal)) => last = refusal,
                Err(_) => last = Refusal::new(Code::Unavailable, "an answer", format!("replica {id} is silent")),
            }
        }
        Err(last)
    }

    /// What this replica shows in handshakes, both as server and as client, under an intermediate.
    fn present(&self, issuer: &IssuingKey) -> Result<Arc<CertifiedKey>, Refusal> {
        let roots = self.local(presented_roots);
        let identity = leaf_of(issuer, self.id(), self.trust_domain(), &SvidKey::generate()?, roots)?;
        // Nobody would take what we ourselves would not.
        let (bundles, denied, fences) = self.local(|s| (s.bundles(), s.denied_authorities(), s.fences()));
        let trust = trust_of(bundles, denied, fences, self.trust_domain())?;
        taken(&trust, &identity.cert, wall_clock())?;
        Ok(identity)
    }

    /// One that nobody would take is not installed: it waits, for this replica to hear of what is above it, until another is
    /// to be had. Not thrown away, since each is committed and a replica has few at once.
    async fn renew(&self, waiting: &mut Option<IssuingKey>) -> Result<(), Refusal> {
        let issuer = match waiting.take().filter(|issuer| self.is_of_now(issuer)) {
            Some(issuer) => issuer,
            None => self.next_issuer().await?,
        };
        let shown = match self.present(&issuer) {
            Ok(shown) => shown,
            Err(refusal) => {
                *waiting = Some(issuer);
                return Err(refusal);
            }
        };
        let authority = issuer.authority().to_owned();
        // On disk before it signs anything: a replica that starts again goes on with it.
        self.inner.files.put_issuer(&issuer)?;
        let until = issuer.not_after();
        self.inner.issuers.replace(issuer);
        self.put_shown(shown);
        tracing::info!(authority, until_ms = until.0, "this replica has a new intermediate");
        // Last, since it may wait for a TPM.
        self.keep_later_root().await;
        Ok(())
    }

    /// Where the first root's key is kept in a file, for `ambitd restore`, that of its successor is too.
    async fn keep_later_root(&self) {
        let files = &self.inner.files;
        let kept = async {
            let Some((_, first)) = files.root_key()? else { return Ok(()) };
            let root = self.active_root().await?;
            if first.spki_sha256() == root.key().spki_sha256() { Ok(()) } else { files.put_later_root(&root) }
        };
        if let Err(refusal) = kept.await {
            tracing::warn!(%refusal, "the active root's key is not in a file");
        }
    }

    fn show(&self) -> Result<(), Refusal> {
        self.put_shown(self.present(&self.issuer())?);
        Ok(())
    }

    fn put_shown(&self, identity: Arc<CertifiedKey>) {
        self.inner.identity.replace(identity);
        // What goes over connections from now on goes under the new leaf; calls under way end on theirs.
        self.cell().reconnect();
    }

    /// Whether another intermediate would be no better than this one, as far as is known here.
    fn is_of_now(&self, issuer: &IssuingKey) -> bool {
        let under_last = self.local(|s| {
            let row = s.authority(issuer.authority());
            let active = s.active_root().map(|(id, _)| id);
            row.is_none_or(|row| !s.is_tainted(&row) && s.is_under_last(&row) && Some(row.root) == active)
        });
        under_last && leaf_end(issuer.lifetime()) > wall_clock()
    }
}

/// A replica is server and client: what is above it must allow both.
fn taken(trust: &Trust, chain: &[CertificateDer<'_>], now: Stamp) -> Result<(), Refusal> {
    [Usage::Server, Usage::Client].into_iter().try_for_each(|usage| trust.verify_for(usage, chain, now).map(drop))
}

/// What is shown above an intermediate.
pub struct Above {
    /// Between it and its root, nearest first; nothing where the root's key is in the cell.
    pub between: Vec<CertificateDer<'static>>,
    /// What leads from the root to the one before it, while that one is relied on. All that 0.1 knows of.
    pub cross: Option<CertificateDer<'static>>,
}

impl Above {
    /// All of it, in the order in which it is shown.
    pub fn all(self) -> Vec<CertificateDer<'static>> {
        self.between.into_iter().chain(self.cross).collect()
    }
    /// As it is told: all of it, and apart, as 0.1 reads it, what leads to the root before.
    pub fn told(self) -> (Vec<Vec<u8>>, Vec<u8>) {
        let cross = self.cross.as_ref().map(|der| der.to_vec()).unwrap_or_default();
        (self.all().into_iter().map(|der| der.to_vec()).collect(), cross)
    }
}

/// A root as the cell keeps it: its row, and what is between it and the key, where that is an authority under it.
pub(super) type Kept = (RootRow, Vec<CertificateDer<'static>>);

/// What the cell keeps of this root; none of one that it never had.
pub(super) fn kept(s: &State, id: &RootId) -> Option<Kept> {
    let row = s.roots().remove(id)?;
    let chain = s.external(id).map(|row| row.chain.clone()).unwrap_or_default();
    Some((row, chain.into_iter().map(CertificateDer::from).collect()))
}

/// A root with the key that signs for it: from the replica's own file, or as it is wrapped to the replica.
///
/// # Errors
/// [`Code::IssuerUnavailable`] where neither is so.
pub(super) async fn open(
    files: &Files,
    card: &Card,
    keyring: &Keyring,
    kept: Option<Kept>,
    id: &RootId,
) -> Result<Root, Refusal> {
    let kept = kept.filter(|(row, _)| row.state != RootState::Revoked);
    // The file has the key that this replica was founded or restored with, which need not sign any more.
    if let (Some((of, key)), Some((row, above))) = (files.root_key()?, &kept)
        && of == *id
        && let Ok(root) = Root::standing(&card.trust_domain, row.der.clone().into(), above.clone(), key)
    {
        return Ok(root);
    }
    let wrapped = kept.and_then(|(row, above)| Some((row.wrapped.get(&card.replica).cloned()?, row.der, above)));
    let Some((key, der, above)) = wrapped else {
        let found = format!("replica {}, to which it is not wrapped", card.replica);
        return Err(Refusal::new(Code::IssuerUnavailable, "a replica that can open the root", found));
    };
    let key = SvidKey::from_pkcs8(&keyring.unwrap_for(Purpose::Key, &key).await?)?;
    Root::standing(&card.trust_domain, CertificateDer::from(der), above, key)
}

/// What comes above an intermediate, as a replica was told it; 0.1 told of a cross-signed root only.
pub(super) fn above_in(above: Vec<Vec<u8>>, cross: Vec<u8>) -> Vec<CertificateDer<'static>> {
    let all = if above.is_empty() && !cross.is_empty() { vec![cross] } else { above };
    all.into_iter().map(CertificateDer::from).collect()
}

/// A short intermediate for a replica whose last one ended while it was away, signed by itself where it can open the root:
/// nothing can be committed before its replicas can speak. It is the first thing that it replaces.
///
/// # Errors
/// [`Code::IssuerUnavailable`] where it cannot open the root: then it must join again.
pub(super) async fn begin_again(
    files: &Files,
    card: &Card,
    keyring: &Keyring,
    state: &State,
) -> Result<IssuingKey, Refusal> {
    let facts = state.active_root().zip(state.cell().map(|cell| cell.epoch));
    let ((id, _), epoch) = facts.ok_or_else(|| {
        Refusal::new(Code::IssuerUnavailable, "an intermediate with time left", "one that ended: join again")
    })?;
    let root = open(files, card, keyring, kept(state, &id), &id).await?;
    let (key, now) = (SvidKey::generate()?, wall_clock());
    let ends = state.authority_ends().unwrap_or(Stamp(u64::MAX));
    if ends <= now {
        let expected = "an authority under the external root with time left";
        return Err(Refusal::new(Code::IssuerUnavailable, expected, format!("one that ended at {} (ms)", ends.0)));
    }
    let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(AGAIN_MS).min(ends) };
    let named = Named { replica: card.replica, epoch };
    let intermediate = root.begin_again(named, &Csr::parse(&key.csr()?)?, lifetime)?;
    let issuer = IssuingKey::new(key, intermediate)?.under(root.above().to_vec());
    tracing::warn!(
        authority = issuer.authority(),
        "the last intermediate ended: this replica begins again with a short one"
    );
    files.put_issuer(&issuer)?;
    Ok(issuer)
}

/// A TLS leaf for this replica, with everything above it that somebody may know it by.
pub(super) fn leaf_of(
    issuer: &IssuingKey,
    replica: u64,
    td: &ambit_model::TrustDomain,
    key: &SvidKey,
    roots: Vec<CertificateDer<'static>>,
) -> Result<Arc<CertifiedKey>, Refusal> {
    let now = wall_clock();
    let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: leaf_end(issuer.lifetime()) };
    if lifetime.not_after <= now {
        return Err(Refusal::new(Code::IssuerUnavailable, "an intermediate with time left", "one that ended"));
    }
    let mut chain = issuer.replica_leaf(replica, td, lifetime, &Csr::parse(&key.csr()?)?)?;
    chain.extend(roots);
    certified(chain, key)
}

/// The replica's own leaf ends before its intermediate, by the margin that every leaf keeps.
fn leaf_end(intermediate: Lifetime) -> Stamp {
    let life = intermediate.not_after.0.saturating_sub(intermediate.not_before.0);
    intermediate.not_after.minus_ms(ambit_state::ISSUER_MARGIN_MS.min(life / 10))
}

/// The active root, and the one before it until it is revoked, for those who know only a fingerprint.
fn presented_roots(s: &State) -> Vec<CertificateDer<'static>> {
    let bundle = s.bundle_record().map(|bundle| bundle.roots).unwrap_or_default();
    let shown = bundle.into_iter().filter(|root| root.state != RootState::Prepared);
    shown.map(|root| root.der.into()).collect()
}

/// When an intermediate is to be renewed: at half of its life, a tenth earlier or later, so that replicas do not all at
/// once; now, where it is tainted or another root is active, and where nothing was committed for it.
fn due(
    held: Lifetime,
    lifetime_ms: u64,
    row: Option<&AuthorityRow>,
    tainted: bool,
    active: &RootId,
    random: u64,
) -> Stamp {
    // It is valid a little before it was made, for clocks that lag.
    let made = held.not_before.plus_ms(ambit_state::NOT_BEFORE_SLACK_MS);
    let life = held.not_after.0.saturating_sub(made.0);
    let uncommitted = row.is_none() && life <= AGAIN_MS + 60_000;
    if tainted || uncommitted || row.is_some_and(|row| row.root != *active) {
        return Stamp(0);
    }
    // What a replica joined with may be longer than what it is to have.
    let life = life.min(lifetime_ms);
    made.plus_ms(life / 10 * 4 + random % (life / 10 * 2 + 1))
}

/// Renews in time, for ever; shows the roots as they change.
pub(super) async fn keep(replica: Replica) {
    let mut revisions = replica.watch_revision();
    let mut random = jitter();
    // What it shows since it started: connections that are open need not be opened anew for the same.
    let mut waiting = None;
    let mut shown = replica.inner.files.root_der().ok().map(|root| vec![root]);
    loop {
        // A replica that is no member yet has nothing to renew; one whose state is behind may not know of its renewal.
        let facts = replica.local(|s| {
            let authority = replica.issuer().authority().to_owned();
            let row = s.authority(&authority);
            // Another authority under the same external root signs now: as where another root does.
            let tainted = row.as_ref().is_some_and(|row| s.is_tainted(row) || !s.is_under_last(row));
            let (active, _) = s.active_root()?;
            s.member(replica.id())?;
            Some((row, tainted, active, presented_roots(s), s.authority_ends()))
        });
        let (mut wait, mut failed) = (LOOK, false);
        if let Some((row, tainted, active, roots, ends)) = facts {
            let held = replica.issuer().lifetime();
            let mut at = due(held, replica.inner.lifetime_ms, row.as_ref(), tainted, &active, random);
            // One that lasts as long as the authority above it has nothing to gain.
            if at > Stamp(0) && ends.is_some_and(|ends| held.not_after.plus_ms(1_000) > ends) {
                at = Stamp(u64::MAX);
            }
            let now = wall_clock();
            if at <= now {
                match replica.renew(&mut waiting).await {
                    Ok(()) => (random, shown) = (jitter(), Some(roots)),
                    Err(refusal) => {
                        tracing::warn!(%refusal, "this replica's intermediate is not renewed yet");
                        failed = true;
                    }
                }
            } else if shown.as_ref() != Some(&roots) {
                match replica.show() {
                    Ok(()) => shown = Some(roots),
                    Err(refusal) => {
                        tracing::warn!(%refusal, "this replica's own leaf is not renewed yet");
                        failed = true;
                    }
                }
            }
            wait = wait.min(Duration::from_millis(at.0.saturating_sub(now.0))).max(Duration::from_millis(50));
        }
        if failed {
            // Whatever is committed meanwhile: a cell at work would else be asked with each of its revisions.
            tokio::time::sleep(RETRY).await;
            continue;
        }
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

fn jitter() -> u64 {
    // Without randomness replicas renew together, which is merely slower.
    random::<8>().map(u64::from_le_bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_state::authorities::AuthorityState;

    const DAY_MS: u64 = 86_400_000;

    #[test]
    fn a_renewal_is_due_around_half_life_and_at_once_when_what_is_above_it_changed() {
        let held = Lifetime { not_before: Stamp(970_000), not_after: Stamp(87_400_000) };
        let row = |root| AuthorityRow {
            replica: 1,
            root: [root; 32],
            serial: [0; 16],
            lifetime: held,
            state: AuthorityState::Active,
        };
        for random in [0, 7, 17_279_999, 17_280_000, u64::MAX] {
            for known in [None, Some(&row(1))] {
                let at = due(held, DAY_MS, known, false, &[1; 32], random).0 - 1_000_000;
                assert!((34_560_000..=51_840_000).contains(&at), "{at}");
            }
        }
        let joined = Lifetime { not_before: Stamp(970_000), not_after: Stamp(7 * DAY_MS) };
        let at = due(joined, DAY_MS, None, false, &[1; 32], 0);
        assert_eq!(at, Stamp(1_000_000 + DAY_MS / 10 * 4), "as it is to be, not as it came");
        let brief = Lifetime { not_before: Stamp(970_000), not_after: Stamp(1_000_000 + AGAIN_MS) };
        assert_eq!(due(brief, DAY_MS, None, false, &[1; 32], 0), Stamp(0), "nothing was committed for it");
        assert_eq!(due(held, DAY_MS, Some(&row(2)), false, &[1; 32], 0), Stamp(0), "under a root that is not active");
        assert_eq!(due(held, DAY_MS, Some(&row(1)), true, &[1; 32], 0), Stamp(0), "tainted");
    }

    #[test]
    fn the_former_release_is_told_what_leads_to_the_root_before_and_nothing_else() {
        let der = |n: u8| CertificateDer::from(vec![n]);
        for (between, cross, told) in [
            (vec![], None, (vec![], vec![])),
            (vec![], Some(3), (vec![vec![3]], vec![3])),
            (vec![1, 2], Some(3), (vec![vec![1], vec![2], vec![3]], vec![3])),
            (vec![1, 2], None, (vec![vec![1], vec![2]], vec![])),
        ] {
            let above = Above { between: between.into_iter().map(der).collect(), cross: cross.map(der) };
            let (all, alone) = above.told();
            assert_eq!((&all, &alone), (&told.0, &told.1));
            let read = above_in(all, alone);
            assert_eq!(read.len(), told.0.len());
        }
    }

    #[test]
    fn the_own_leaf_ends_five_minutes_before_a_day_and_a_tenth_before_less() {
        let of = |ms| leaf_end(Lifetime { not_before: Stamp(0), not_after: Stamp(ms) }).0;
        assert_eq!(of(86_400_000), 86_400_000 - 300_000);
        assert_eq!(of(20_000), 18_000);
    }
}
