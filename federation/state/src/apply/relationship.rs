//! Foreign trust domains that are no cells, and their bundles (SPIFFE_Federation.md). What is fetched is judged here, against
//! what was taken before: never older, never another under the same sequence, never empty without an operator's word.

use super::{At, cell_row, jwt, touch};
use crate::command::{FetchedBundle, Reply};
use crate::objects::{EndpointProfile, RelationshipRow};
use crate::state::State;
use ambit_model::{Code, JwtAuthority, Refusal, Stamp, TrustDomain};

const RELATIONSHIPS_MAX: usize = 1_000;
/// Roots of one trust domain; it has a handful.
const ROOTS_MAX: usize = 64;
const URL_BYTES_MAX: usize = 2_048;
/// Where a bundle says nothing of it (SPIFFE_Federation.md section 4.1).
const REFRESH_HINT_S: u64 = 300;

pub(super) fn put(
    s: &mut State,
    at: At,
    td: &TrustDomain,
    url: &str,
    profile: &EndpointProfile,
    roots: &[Vec<u8>],
    by: &str,
) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    if *td == own || s.peer(td).is_some() {
        let found = format!("{td}, which is this cell's or a peer's");
        return Err(Refusal::new(Code::AlreadyExists, "a trust domain that is no cell", found));
    }
    if s.relationships.len() >= RELATIONSHIPS_MAX && !s.relationships.contains(td) {
        return Err(Refusal::new(Code::Busy, format!("at most {RELATIONSHIPS_MAX} relationships"), "one more"));
    }
    if url.len() > URL_BYTES_MAX || roots.len() > ROOTS_MAX {
        let expected = format!("a URL of at most {URL_BYTES_MAX} bytes and at most {ROOTS_MAX} roots");
        return Err(Refusal::new(Code::BadRequest, expected, "more"));
    }
    // Without a bundle to begin with nobody could tell who answers.
    if matches!(profile, EndpointProfile::HttpsSpiffe(_)) && roots.is_empty() {
        return Err(Refusal::new(Code::BadRequest, "a bootstrap bundle with https_spiffe", "none"));
    }
    if let Some(known) = s.relationships.get(td) {
        // What was given to begin with takes nothing back of what was fetched since.
        let begun = known.taken != Stamp(0) || roots.is_empty() || known.roots == roots;
        if known.url == url && known.profile == *profile && begun {
            return Ok(Reply::Done);
        }
        // By one administrator alone it would be what two must approve: to remove it.
        if s.approvers.len() > 0 {
            let expected = "it as it is; to change it two remove it (ambit federation remove), then it is put";
            return Err(Refusal::new(Code::AlreadyExists, expected, format!("another relationship with {td}")));
        }
    }
    let row = RelationshipRow {
        url: url.to_owned(),
        profile: profile.clone(),
        roots: roots.to_vec(),
        sequence: None,
        sha256: [0; 32],
        refresh_hint_s: REFRESH_HINT_S,
        taken: Stamp(0),
        held: None,
        trouble: String::new(),
        written_by: by.to_owned(),
    };
    s.relationships.put(&mut s.journal, td.clone(), row);
    // Keys come with a bundle that was fetched, never before.
    jwt::put_foreign(s, td, 0, &[]);
    touch(s, at);
    Ok(Reply::Done)
}

fn known(s: &State, td: &TrustDomain) -> Result<RelationshipRow, Refusal> {
    let none = || Refusal::new(Code::NotFound, "a federation relationship", td.as_str());
    s.relationships.get(td).cloned().ok_or_else(none)
}

/// Whether there is one to remove.
pub(super) fn removable(s: &State, td: &TrustDomain) -> Result<(), Refusal> {
    known(s, td).map(drop)
}

pub(super) fn remove(s: &mut State, at: At, td: &TrustDomain) -> Result<Reply, Refusal> {
    known(s, td)?;
    s.relationships.remove(&mut s.journal, td);
    jwt::put_foreign(s, td, 0, &[]);
    touch(s, at);
    Ok(Reply::Done)
}

/// What was fetched is taken, or its row says why not: the outcome is that of the one item. Where only its JWT keys are gone,
/// the roots are taken, and the keys that were known stay until an operator's word; where there are more of them than we
/// hold, those that are still among them: neither a root nor a key that was removed is kept for their sake.
pub(super) fn take(
    s: &mut State,
    at: At,
    td: &TrustDomain,
    bundle: &FetchedBundle,
    keys: &[JwtAuthority],
) -> Result<Reply, Refusal> {
    let mut row = known(s, td)?;
    if row.url != bundle.url {
        return Err(Refusal::new(Code::StaleRevision, row.url, bundle.url.clone()));
    }
    let (before, keys_before) = (row.sha256, s.peer_jwt(td).to_vec());
    let mut judged = judge(&row, bundle);
    if judged.is_ok() {
        row.roots.clone_from(&bundle.roots);
        (row.sequence, row.sha256, row.refresh_hint_s) = (bundle.sequence, bundle.sha256, bundle.refresh_hint_s);
        (row.taken, row.held, row.trouble) = (at.stamp, None, String::new());
        if let Err(refusal) = jwt::bounded(keys) {
            let still: Vec<JwtAuthority> = keys_before.iter().filter(|key| keys.contains(key)).cloned().collect();
            jwt::put_foreign(s, td, bundle.sequence.unwrap_or_default(), &still);
            judged = Err(refusal);
        } else if keys.is_empty() && !keys_before.is_empty() {
            judged = Err(Refusal::new(Code::BundleShrunk, "JWT keys, or an operator's word", "none"));
        } else if keys != keys_before {
            jwt::put_foreign(s, td, bundle.sequence.unwrap_or_default(), keys);
        }
    }
    if let Err(refusal) = &judged {
        row.trouble = refusal.code.to_string();
        row.held = (refusal.code == Code::BundleShrunk).then_some((bundle.sequence, bundle.sha256));
    }
    let changed = row.sha256 != before || *s.peer_jwt(td) != keys_before;
    s.relationships.put(&mut s.journal, td.clone(), row);
    if changed {
        touch(s, at);
    }
    Ok(Reply::Items(vec![judged]))
}

/// design.md section 5 and identity.md section 7; the standard only says SHOULD.
fn judge(row: &RelationshipRow, new: &FetchedBundle) -> Result<(), Refusal> {
    if row.taken == Stamp(0) && new.roots.is_empty() {
        return Err(Refusal::new(Code::BundleShrunk, "a first bundle with roots", "an empty one"));
    }
    let same = new.sha256 == row.sha256;
    match (row.sequence, new.sequence) {
        (Some(then), Some(now)) if now < then => {
            return Err(Refusal::new(Code::BundleRollback, format!("sequence {then} or later"), now.to_string()));
        }
        (Some(then), None) => {
            return Err(Refusal::new(Code::BundleRollback, format!("sequence {then} or later"), "none"));
        }
        (Some(then), Some(now)) if now == then && !same => {
            let found = format!("another document, {}", hex::encode(new.sha256));
            return Err(Refusal::new(Code::BundleEquivocation, format!("what sequence {then} was"), found));
        }
        _ => {}
    }
    if new.roots.len() > ROOTS_MAX {
        return Err(Refusal::new(Code::BadRequest, format!("at most {ROOTS_MAX} roots"), new.roots.len().to_string()));
    }
    if new.roots.is_empty() && !row.roots.is_empty() {
        return Err(Refusal::new(Code::BundleShrunk, "roots, or an operator's word", "an empty bundle"));
    }
    Ok(())
}

/// Everything of that trust domain is revoked, or all its JWT-SVIDs, because its operators say so and ours confirm it.
pub(super) fn confirm(s: &mut State, at: At, td: &TrustDomain, sha256: &[u8; 32]) -> Result<Reply, Refusal> {
    let mut row = known(s, td)?;
    let Some((sequence, held)) = row.held.filter(|(_, held)| held == sha256) else {
        let found = row.held.map(|(_, held)| hex::encode(held)).unwrap_or_else(|| "none".into());
        return Err(Refusal::new(
            Code::NotFound,
            format!("an empty bundle that waits, {}", hex::encode(sha256)),
            found,
        ));
    };
    // One that was taken but for its keys has roots still.
    if row.sha256 != held {
        row.roots.clear();
    }
    jwt::put_foreign(s, td, 0, &[]);
    (row.sequence, row.sha256, row.taken) = (sequence, held, at.stamp);
    (row.held, row.trouble) = (None, String::new());
    s.relationships.put(&mut s.journal, td.clone(), row);
    touch(s, at);
    Ok(Reply::Done)
}
