//! The end of trust in a peer: for a while, or for good. What it said against somebody stands in either case: losing a peer
//! opens no door.

use super::{At, touch};
use crate::command::Reply;
use crate::objects::{PeerRow, PeerState};
use crate::state::{OwnedName, State};
use ambit_model::{Address, Code, Refusal, TrustDomain};

fn known(s: &State, td: &TrustDomain) -> Result<PeerRow, Refusal> {
    s.peer(td).cloned().ok_or_else(|| Refusal::new(Code::NotFound, "a registered peer", td.as_str()))
}

/// Nobody of it is believed until it is approved again, and nothing is pulled; what was imported is kept.
pub(super) fn suspend(s: &mut State, at: At, td: &TrustDomain, by: &str) -> Result<Reply, Refusal> {
    let row = known(s, td)?;
    if row.state == PeerState::Suspended {
        return Ok(Reply::Done);
    }
    let row = PeerRow { state: PeerState::Suspended, trouble: format!("suspended by {by}"), ..row };
    s.peers.put(&mut s.journal, td.clone(), row);
    touch(s, at);
    Ok(Reply::Done)
}

/// Whether it may be removed: not while anybody relies on it.
pub(super) fn removable(s: &State, td: &TrustDomain) -> Result<(), Refusal> {
    match known(s, td)?.state {
        PeerState::Pending | PeerState::Suspended => Ok(()),
        PeerState::Active | PeerState::Stopped => {
            let expected = "a peer that is suspended first (ambit peer suspend): its workloads are still called";
            Err(Refusal::new(Code::PeerActive, expected, td.as_str()))
        }
    }
}

/// It and all that it said are forgotten, but for whom it denied; its addresses stay closed to egress for a month. Registered
/// again it begins anew.
pub(super) fn remove(s: &mut State, at: At, td: &TrustDomain) -> Result<Reply, Refusal> {
    removable(s, td)?;
    let endpoints = s.endpoints.iter().filter(|((of, _), _)| of == td).map(|((_, at), _)| *at);
    let services = s.services.iter().filter(|((of, _), _)| of == td).map(|(_, row)| row.object.address);
    let nodes = s.node_addresses.iter().filter(|((of, _), _)| of == td).map(|(_, row)| row.address.into());
    let left: Vec<Address> = endpoints.chain(services).chain(nodes).collect();
    s.leave(at.stamp, left, true);
    let policies: Vec<OwnedName> = s.policies.iter().map(|(key, _)| key).filter(|(of, _)| of == td).cloned().collect();
    for key in policies {
        s.reindex_policy(&key, |s| drop(s.policies.remove(&mut s.journal, &key)));
    }
    s.services.prune(&mut s.journal, |(of, _), _| of == td);
    s.groups.prune(&mut s.journal, |(of, _), _| of == td);
    s.endpoints.prune(&mut s.journal, |(of, _), _| of == td);
    s.node_addresses.prune(&mut s.journal, |(of, _), _| of == td);
    s.foreign_clusters.prune(&mut s.journal, |_, row| row.origin == *td);
    s.traits.prune(&mut s.journal, |(says, _), _| says == td);
    s.steers.prune(&mut s.journal, |(says, ..), _| says == td);
    s.peer_roots.remove(&mut s.journal, td);
    s.peer_jwt.remove(&mut s.journal, td);
    super::standby::forget_peer(s, td);
    s.late.prune(&mut s.journal, |(of, _), _| of == td);
    s.witnessed.prune(&mut s.journal, |(of, _), _| of == td);
    s.cosigned.remove(&mut s.journal, td);
    s.peers.remove(&mut s.journal, td);
    touch(s, at);
    Ok(Reply::Done)
}
