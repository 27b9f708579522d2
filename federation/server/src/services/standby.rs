//! Standby, grants and what follows, as operators ask for them.

use crate::replica::Replica;
use ambit_model::grant::SignedGrant;
use ambit_model::{Act, Code, Proposal, Refusal, Stamp};
use ambit_proto::{convert, v1};
use ambit_state::State;
use ambit_state::grant::GrantRow;

/// A naming, or none any more, as the act that approvers sign.
pub(super) fn naming(text: &str) -> Result<Act, Refusal> {
    if text.is_empty() { Ok(Act::RemoveStandby) } else { Ok(Act::NameStandby(text.parse()?)) }
}

/// What approvers of a home signed.
pub(super) fn signed(act: &str, approved: Option<v1::Approved>) -> Result<SignedGrant, Refusal> {
    let act: Act = act.parse()?;
    let Act::FailOver(grant) = &act else {
        return Err(Refusal::new(Code::BadRequest, "a grant (fail over)", act.to_string()));
    };
    let home = grant.home.clone();
    let missing = || Refusal::new(Code::ApprovalMissing, format!("two approvers of {home}"), "none");
    let approved = convert::approved(approved)?.ok_or_else(missing)?;
    let (epoch, expires, nonce) = (approved.epoch, approved.expires, approved.nonce);
    let proposal = Proposal { trust_domain: home, epoch, expires, nonce, act };
    Ok(SignedGrant { proposal, approvals: approved.approvals })
}

pub(super) fn listing(replica: &Replica) -> v1::ListStandbysResponse {
    let lease = replica.lease_text();
    let homes: Vec<_> = replica.local(|s| s.standbys().map(|(home, _)| home.clone()).collect());
    let held = homes.iter().filter_map(|home| {
        let key = replica.standby_key(home)?;
        Some(v1::StandbyAuthority {
            home: home.to_string(),
            holder: replica.trust_domain().to_string(),
            authority: key.authority().to_owned(),
            not_after_ms: key.not_after().0,
        })
    });
    let mut authorities: Vec<v1::StandbyAuthority> = held.collect();
    let mut all = replica.local(|s| of_state(s, &mut authorities));
    (all.lease, all.authorities) = (lease, authorities);
    all
}

fn of_state(s: &State, authorities: &mut Vec<v1::StandbyAuthority>) -> v1::ListStandbysResponse {
    let own = s.cell().map(|cell| cell.trust_domain.to_string()).unwrap_or_default();
    authorities.extend(s.standby_authorities().map(|(authority, row)| v1::StandbyAuthority {
        home: own.clone(),
        holder: row.holder.to_string(),
        authority: authority.clone(),
        not_after_ms: row.lifetime.not_after.0,
    }));
    let standbys = s.standbys().map(|(home, row)| v1::Standby {
        home: home.to_string(),
        naming: row.naming.as_ref().map(ToString::to_string).unwrap_or_default(),
        epoch: s.epoch_of(home),
        settled: row.settled && row.former.is_none(),
        former: row.former.as_ref().map(ToString::to_string).unwrap_or_default(),
    });
    let grants = s.grants().map(|((home, _), row)| {
        let (state, why) = state_of(s, home, row);
        v1::Grant {
            act: row.signed.proposal.act.to_string(),
            state,
            seen_ms: row.seen.0,
            by: row.by.clone(),
            why: why.map(|refusal| refusal.found).unwrap_or_default(),
        }
    });
    let late = s.late_records().map(|((origin, seq), record)| v1::LateRecord {
        origin: origin.to_string(),
        seq: *seq,
        epoch: record.epoch,
        kind: format!("{:?}", record.kind),
        key: record.key.clone(),
    });
    let fenced = s.fenced().map(|refusal| format!("{}: expected {}", refusal.code, refusal.expected));
    v1::ListStandbysResponse {
        standbys: standbys.collect(),
        grants: grants.collect(),
        late: late.collect(),
        fenced: fenced.unwrap_or_default(),
        lease: String::new(),
        authorities: Vec::new(),
        stamp_ms: s.stamp().0,
    }
}

/// Where a grant is in its life, and why it is not in effect at its holder yet.
fn state_of(s: &State, home: &ambit_model::TrustDomain, row: &GrantRow) -> (String, Option<Refusal>) {
    let over = |now: Stamp| row.signed.grant().is_ok_and(|grant| grant.ends <= now);
    let holds_here = row.signed.grant().is_ok_and(|grant| s.cell().is_some_and(|c| c.trust_domain == grant.holder));
    let (state, why) = match (row.released.is_some(), over(s.stamp()), holds_here) {
        (true, ..) => ("released", None),
        (_, true, _) => ("over", None),
        (_, _, false) => ("live", None),
        _ => match s.holds(home) {
            Ok(_) => ("in effect", None),
            Err(refusal) => ("waiting", Some(refusal)),
        },
    };
    (state.to_owned(), why)
}
