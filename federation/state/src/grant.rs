//! Grants of another cell's authority, judged by signed records only, and the fence that follows from those that are known.
//!
//! The same code judges at the holder and at its peers; agents know no grant yet. Never: a grant that is believed because of who tells it.

use ambit_model::act::{Approval, SIGNATURE_BYTES};
use ambit_model::grant::{FailoverGrant, Naming, SignedGrant, Vouch};
use ambit_model::record::Record;
use ambit_model::{Code, ObjectName, Refusal, SpiffeId, Stamp, TrustDomain};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Approvers whose word a grant takes.
const TWO: usize = 2;
/// As many as a cell may have.
const APPROVALS_MAX: usize = 16;
/// Cells' times differ by less: what one ends, another begins this much later, milliseconds.
pub const CELLS_APART_MS: u64 = 60_000;
/// A fence stands until nothing of an older epoch can be in time: no intermediate lasts longer than a week.
pub const FENCE_MS: u64 = 7 * 24 * 3_600_000 + crate::ISSUER_MARGIN_MS;

/// Keys of approvers, by name.
pub type ApproverKeys = BTreeMap<ObjectName, [u8; 32]>;

/// Whom a home names, as this cell knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyRow {
    /// None: nobody any more.
    pub naming: Option<Naming>,
    /// Sequence of the home's record that says so.
    pub seq: u64,
    /// Of the own cell: what its former standby may still act on, until it has heard of `seq`.
    pub former: Option<Naming>,
    /// Of the own cell: the standby has heard of `seq`.
    pub settled: bool,
}

/// A grant as it was verified here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantRow {
    /// What the home's approvers signed.
    pub signed: SignedGrant,
    /// Who vouches that the home signs no more, as it was named.
    pub vouch: Vouch,
    /// When this cell took it in.
    pub seen: Stamp,
    /// At the holder: when it heard that the witness renews the home's lease no more.
    pub stopped: Option<Stamp>,
    /// When the holder gave it back before its end.
    pub released: Option<Stamp>,
    /// Who committed it, or the peer that told it.
    pub by: String,
}

/// What a holder tells its peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrantRecord {
    /// It holds the authority.
    Granted(SignedGrant),
    /// It gave that of this epoch back.
    Released(u64),
}

/// A record of a fenced epoch that is no revocation: kept or dropped when an operator says so.
pub type LateRecord = Record;

/// What is known of a home, by its own signed records.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Who may be granted its authority; none where any active peer may: a home that is granted away does not argue.
    pub naming: Option<&'a Naming>,
    /// Whose word counts.
    pub approvers: &'a ApproverKeys,
    /// The highest epoch that it is known to have had.
    pub epoch: u64,
}

/// A grant whose signatures, holder, epoch and window were found good. Only [`verify`] makes one.
///
/// ```compile_fail,E0451
/// use ambit_state::grant::VerifiedGrant;
/// fn forge(grant: ambit_model::FailoverGrant) -> VerifiedGrant { VerifiedGrant { grant } }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedGrant {
    grant: FailoverGrant,
}

impl VerifiedGrant {
    /// Of a row, which is written only after its grant was verified.
    pub(crate) fn of_row(grant: FailoverGrant) -> Self {
        Self { grant }
    }
    /// What was granted.
    pub fn get(&self) -> &FailoverGrant {
        &self.grant
    }
}

/// Judges a grant; what costs least is asked first. Whether it is over is the asker's to say: one that is over fences still.
///
/// # Errors
/// [`Code::GrantWindow`], [`Code::GrantHolder`], [`Code::GrantReplayed`], [`Code::ApprovalMissing`],
/// [`Code::ApprovalRepeated`], [`Code::ApprovalInvalid`].
pub fn verify(signed: &SignedGrant, known: Known<'_>) -> Result<VerifiedGrant, Refusal> {
    let grant = signed.grant()?;
    grant.check()?;
    if let Some(naming) = known.naming.filter(|naming| naming.standby != grant.holder) {
        let expected = format!("the standby of {}, {}", grant.home, naming.standby);
        return Err(Refusal::new(Code::GrantHolder, expected, grant.holder.as_str()));
    }
    if grant.epoch <= known.epoch || grant.epoch <= signed.proposal.epoch {
        let expected = format!("an epoch above {}", known.epoch.max(signed.proposal.epoch));
        return Err(Refusal::new(Code::GrantReplayed, expected, grant.epoch.to_string()));
    }
    two_approvers(signed, known.approvers)?;
    Ok(VerifiedGrant { grant: grant.clone() })
}

fn two_approvers(signed: &SignedGrant, approvers: &ApproverKeys) -> Result<(), Refusal> {
    let approvals = &signed.approvals;
    if approvals.len() > APPROVALS_MAX {
        let expected = format!("at most {APPROVALS_MAX} approvals");
        return Err(Refusal::new(Code::ApprovalInvalid, expected, approvals.len().to_string()));
    }
    let mut by: BTreeSet<[u8; 32]> = BTreeSet::new();
    for approval in approvals {
        let new = by.insert(approval.key);
        #[cfg(ambit_mutant)]
        let new = new || crate::mutant::is("approver-signs-twice");
        if !new {
            let found = format!("{} twice", hex_of(&approval.key));
            return Err(Refusal::new(Code::ApprovalRepeated, "approvals of different approvers", found));
        }
    }
    let word = by.len();
    #[cfg(ambit_mutant)]
    let word = if crate::mutant::is("approver-signs-twice") { approvals.len() } else { word };
    if word < TWO {
        return Err(Refusal::new(Code::ApprovalMissing, format!("{TWO} approvers of the home"), word.to_string()));
    }
    let message = signed.proposal.statement()?;
    for approval in approvals {
        if !approvers.values().any(|key| *key == approval.key) {
            let expected = format!("a key of an approver of {}", signed.proposal.trust_domain);
            return Err(Refusal::new(Code::ApprovalInvalid, expected, hex_of(&approval.key)));
        }
        if !signs(approval, &message) {
            let expected = format!("a signature over: {}", signed.proposal.act);
            return Err(Refusal::new(Code::ApprovalInvalid, expected, "another signature of that key"));
        }
    }
    Ok(())
}

/// RFC 8032, as in `apply/act.rs`.
fn signs(approval: &Approval, message: &[u8]) -> bool {
    approval.signature.len() == SIGNATURE_BYTES
        && UnparsedPublicKey::new(&ED25519, &approval.key).verify(message, &approval.signature).is_ok()
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What of a leaf the fence looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts<'a> {
    /// Whose it is.
    pub id: &'a SpiffeId,
    /// The epoch of the authority that signed it, as the root said; 0 where it said nothing.
    pub epoch: u64,
    /// The epoch that the leaf itself names, through its node; none where it names none.
    pub bound: Option<u64>,
    /// First instant of validity.
    pub not_before: Stamp,
    /// Last instant of validity.
    pub not_after: Stamp,
    /// Who holds the standby authority that signed it, as the root said; none for the home's own.
    pub standby: Option<TrustDomain>,
}

/// All grants that somebody knows, by home: what he accepts of which epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fences {
    grants: BTreeMap<TrustDomain, BTreeMap<u64, FailoverGrant>>,
}

impl Fences {
    /// From now on this one is known too.
    pub fn know(&mut self, grant: VerifiedGrant) {
        let VerifiedGrant { grant } = grant;
        self.grants.entry(grant.home.clone()).or_default().insert(grant.epoch, grant);
    }

    /// Whether nothing is fenced.
    pub fn is_empty(&self) -> bool {
        self.grants.is_empty()
    }

    /// I20. A standby's leaf is good under the live grant to that very holder and in its epoch and window. The home's is
    /// refused where it is of no later epoch than a grant and was issued after that began.
    ///
    /// A cell's own replicas and administrators are let through: they speak for that cell alone, and it must be spoken
    /// with to be told of the grant, to hand over its revocations and to be taken back.
    ///
    /// # Errors
    /// [`Code::StandbyUngranted`], [`Code::EpochFenced`].
    pub fn judge(&self, leaf: &LeafFacts<'_>, now: Stamp) -> Result<(), Refusal> {
        let (home, none) = (leaf.id.trust_domain(), BTreeMap::new());
        let grants = self.grants.get(&home).unwrap_or(&none);
        match &leaf.standby {
            Some(holder) => under_grant(grants, holder, leaf, now),
            None if is_organ(leaf.id) => Ok(()),
            None => match grants.values().find(|grant| is_fenced(grant, leaf)) {
                None => Ok(()),
                Some(grant) => {
                    let expected = format!("a leaf of {home} of an epoch above {}", grant.epoch);
                    Err(Refusal::new(Code::EpochFenced, expected, format!("one of epoch {}", leaf.epoch)))
                }
            },
        }
    }
}

/// A home's leaf, issued after this grant began. A leaf is valid a little before it was issued; its times are whole seconds.
fn is_fenced(grant: &FailoverGrant, leaf: &LeafFacts<'_>) -> bool {
    let issued = leaf.not_before.plus_ms(crate::NOT_BEFORE_SLACK_MS);
    leaf.epoch <= grant.epoch && issued >= grant.begins
}

/// Of the cell itself: its replicas and administrators.
fn is_organ(id: &SpiffeId) -> bool {
    id.path().starts_with("/ambit/replica/") || id.path().starts_with("/ambit/admin/")
}

fn under_grant(
    grants: &BTreeMap<u64, FailoverGrant>,
    holder: &TrustDomain,
    leaf: &LeafFacts<'_>,
    now: Stamp,
) -> Result<(), Refusal> {
    let refuse = |expected: String, found: String| Err(Refusal::new(Code::StandbyUngranted, expected, found));
    if is_organ(leaf.id) {
        return refuse("no replica or administrator under a standby's authority".into(), leaf.id.to_string());
    }
    // A later grant ends an earlier one.
    let Some((epoch, grant)) = grants.last_key_value() else {
        return refuse(format!("a grant to {holder}"), "none".into());
    };
    if grant.holder != *holder || !grant.is_live(now) {
        return refuse(format!("a live grant to {holder}"), grant.to_string());
    }
    let issued = leaf.not_before.plus_ms(crate::NOT_BEFORE_SLACK_MS);
    if leaf.bound != Some(*epoch) || leaf.not_after > grant.ends || issued < grant.begins {
        let found = format!("epoch {:?}, {} to {} (ms)", leaf.bound, leaf.not_before.0, leaf.not_after.0);
        return refuse(format!("a leaf within the grant: {grant}"), found);
    }
    Ok(())
}
