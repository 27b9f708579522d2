//! Whom this node refuses: the newest list of the cell (nodes, identities, single SVIDs), and whether the cell has put this
//! very node out.
//!
//! Lists come ahead of everything else and are in force from the moment they arrive, before any table is compiled:
//! whoever carries or opens a connection asks here, and is woken when the answer changes. A list stands until one of the
//! same or a later revision comes; an older one, from a replica that lags behind, undoes nothing.

use crate::staleness::Worth;
use ambit_identity::svid::{PeerSvid, Presented};
use ambit_model::policy::Endpoint;
use ambit_model::{Code, Generation, NodeId, Refusal, Revision, Serial, SpiffeId, TrustDomain, serial_number};
use ambit_proto::v1;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::watch;

/// Which SVIDs of an identity are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Refused {
    All,
    /// With serials up to and including this one; what is of another length tells nothing of when it was issued.
    UpTo(Serial),
}

impl Refused {
    fn covers(&self, serial: &[u8]) -> bool {
        match self {
            Self::All => true,
            Self::UpTo(last) => serial.len() != last.len() || *serial <= last[..],
        }
    }
}

/// One list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Denials {
    revision: Revision,
    /// Leaves of these nodes of a trust domain, up to and including the generation, are refused.
    by_node: BTreeMap<(TrustDomain, NodeId), Generation>,
    /// SVIDs of these identities: all of them, or those with serials up to and including this one.
    by_id: BTreeMap<SpiffeId, Refused>,
    /// These SVIDs: whose, authority, serial.
    by_serial: BTreeSet<(TrustDomain, String, Vec<u8>)>,
    /// Whatever these intermediates of a trust domain signed is refused.
    authorities: BTreeSet<(TrustDomain, String)>,
    /// The cell put this node out: nothing may be opened from here or to here.
    out: bool,
    /// What the cell said last is good for.
    worth: Worth,
}

impl Denials {
    /// Parses a list of `revision`. Anything unclear refuses it whole.
    pub fn parse(
        revision: Revision,
        found: &[v1::NodeDenial],
        authorities: &[v1::AuthorityDenial],
    ) -> Result<Self, Refusal> {
        let mut by_node = BTreeMap::new();
        for message in found {
            let key = (message.trust_domain.parse()?, message.node.parse()?);
            let to: &mut Generation = by_node.entry(key).or_default();
            *to = (*to).max(Generation(message.generation));
        }
        let name = |d: &v1::AuthorityDenial| Ok((d.trust_domain.parse()?, authority_name(&d.authority)?));
        let authorities = authorities.iter().map(name).collect::<Result<_, Refusal>>()?;
        Ok(Self { revision, by_node, authorities, ..Self::default() })
    }

    /// The same list with identities and SVIDs. Anything unclear refuses it whole.
    pub fn with_svids(mut self, ids: &[v1::IdDenial], leaves: &[v1::LeafDenial]) -> Result<Self, Refusal> {
        for message in ids {
            let bad = |_| Refusal::new(Code::BadRequest, "a serial of 16 bytes", message.up_to.len().to_string());
            let up_to: Serial = message.up_to.as_slice().try_into().map_err(bad)?;
            let refused = if message.barred { Refused::All } else { Refused::UpTo(up_to) };
            if self.by_id.insert(message.spiffe_id.parse()?, refused).is_some() {
                return Err(Refusal::new(Code::BadRequest, "each identity once", message.spiffe_id.clone()));
            }
        }
        for message in leaves {
            let key =
                (message.trust_domain.parse()?, message.authority.clone(), serial_number(&message.serial).to_vec());
            self.by_serial.insert(key);
        }
        Ok(self)
    }

    /// Whether an SVID is refused, by its identity or by itself; whether its node is, [`Denials::denies`] says.
    pub fn denies_svid(&self, id: &SpiffeId, authority: &str, serial: &[u8]) -> bool {
        if self.by_id.get(id).is_some_and(|refused| refused.covers(serial)) {
            return true;
        }
        !self.by_serial.is_empty()
            && self.by_serial.contains(&(id.trust_domain(), authority.to_owned(), serial.to_vec()))
    }

    /// Whether whatever this intermediate signed is refused. Only `origin` decides about its intermediates.
    pub fn denies_authority(&self, origin: &TrustDomain, authority: &str) -> bool {
        !self.authorities.is_empty() && self.authorities.contains(&(origin.clone(), authority.to_owned()))
    }

    /// The first of the authorities that a verified peer showed above its leaf whose leaves are refused.
    pub fn denied_above<'a>(&self, peer: &'a PeerSvid) -> Option<&'a str> {
        let origin = peer.id().trust_domain();
        peer.above().iter().map(String::as_str).find(|name| self.denies_authority(&origin, name))
    }

    /// The intermediates whose leaves are refused.
    pub fn authorities(&self) -> &BTreeSet<(TrustDomain, String)> {
        &self.authorities
    }

    /// The cell's revision that it is of.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether leaves of `origin`, issued through this node and generation, are refused now. Only `origin` decides about
    /// its nodes; and a node that was put out serves nobody.
    pub fn denies(&self, origin: &TrustDomain, node: &NodeId, generation: Generation) -> bool {
        self.ends_all() || self.lists(origin, node, generation)
    }

    /// Whether what a far end showed is refused now: by its identity, by the node that it was issued through, or under any of the authorities that it showed. Which
    /// of them signed was found in the handshake and is not asked again; nobody honest shows a revoked one.
    pub fn denies_presented(&self, peer: &Presented) -> bool {
        if self.by_id.get(&peer.id).is_some_and(|refused| refused.covers(&peer.serial)) {
            return true;
        }
        let origin = peer.id.trust_domain();
        if peer.binding.is_some_and(|bound| self.lists(&origin, &bound.node, bound.generation)) {
            return true;
        }
        let denies =
            |name: &String| self.denies_authority(&origin, name) || self.denies_svid(&peer.id, name, &peer.serial);
        peer.above.iter().any(denies)
    }

    /// Whether nothing may be opened to this endpoint: its node is denied by the cell that it belongs to, or its identity is
    /// barred. One whose SVIDs so far were revoked may have a new one.
    pub fn denies_endpoint(&self, endpoint: &Endpoint) -> bool {
        if self.by_id.get(&endpoint.spiffe_id) == Some(&Refused::All) {
            return true;
        }
        self.denies(&endpoint.spiffe_id.trust_domain(), &endpoint.node, endpoint.generation)
    }

    /// Whether an SVID of this identity, of which nothing else is known, may be one that is refused.
    pub fn may_deny(&self, id: &SpiffeId) -> bool {
        let domain = id.trust_domain();
        self.by_id.contains_key(id)
            || self.by_serial.iter().any(|(of, _, _)| *of == domain)
            || self.authorities.iter().any(|(of, _)| *of == domain)
    }

    /// Whether the list itself names this node and generation.
    pub fn lists(&self, origin: &TrustDomain, node: &NodeId, generation: Generation) -> bool {
        self.by_node.get(&(origin.clone(), *node)).is_some_and(|to| generation <= *to)
    }

    /// Whether this node is out.
    pub fn is_out(&self) -> bool {
        self.out
    }

    /// Whether nothing may go on that is open here: this node is out, or what it holds is too old to act upon.
    pub fn ends_all(&self) -> bool {
        self.out || self.worth == Worth::Nothing
    }

    /// Whether nothing may begin here for want of a newer word of the cell.
    pub fn is_stale(&self) -> bool {
        self.worth != Worth::All
    }
}

/// The name of an intermediate: its key identifier, 40 hex digits.
pub fn authority_name(text: &str) -> Result<String, Refusal> {
    let is_one = text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    is_one
        .then(|| text.to_owned())
        .ok_or_else(|| Refusal::new(Code::BadRequest, "a key identifier of 40 hex digits", text))
}

/// The list in force. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Lane(Arc<watch::Sender<Arc<Denials>>>);

impl Lane {
    /// Puts `list` in force unless a later one is. False where it is not taken.
    pub fn offer(&self, list: Denials) -> bool {
        let mut taken = false;
        self.0.send_if_modified(|now| {
            taken = list.revision >= now.revision;
            let same = list.by_node == now.by_node
                && list.by_id == now.by_id
                && list.by_serial == now.by_serial
                && list.authorities == now.authorities;
            let changed = taken && !same;
            if taken {
                *now = Arc::new(Denials { out: now.out, worth: now.worth, ..list });
            }
            changed
        });
        taken
    }

    /// This node was put out, or let in again.
    pub fn set_out(&self, out: bool) {
        self.0.send_if_modified(|now| {
            let changed = now.out != out;
            if changed {
                *now = Arc::new(Denials { out, ..Denials::clone(now) });
            }
            changed
        });
    }

    /// What the cell said last is good for this. True where it was for something else.
    pub fn set_worth(&self, worth: Worth) -> bool {
        self.0.send_if_modified(|now| {
            let changed = now.worth != worth;
            if changed {
                *now = Arc::new(Denials { worth, ..Denials::clone(now) });
            }
            changed
        })
    }

    /// The list now.
    pub fn now(&self) -> Arc<Denials> {
        self.0.borrow().clone()
    }

    /// Follows the list: woken when who is refused changes.
    pub fn watch(&self) -> watch::Receiver<Arc<Denials>> {
        self.0.subscribe()
    }

    /// Waits until `denied` holds, which it may do already.
    pub async fn until(&self, denied: impl FnMut(&Arc<Denials>) -> bool) {
        // It cannot end before `self`, which holds the sender.
        let _ = self.0.subscribe().wait_for(denied).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(revision: u64, denied: &[(&str, u8, u64)]) -> Denials {
        let message = |(td, node, generation): &(&str, u8, u64)| v1::NodeDenial {
            trust_domain: (*td).into(),
            node: hex::encode([*node; 32]),
            generation: *generation,
        };
        let messages: Vec<_> = denied.iter().map(message).collect();
        Denials::parse(Revision(revision), &messages, &[]).unwrap()
    }

    fn denies(lane: &Lane, td: &str, node: u8, generation: u64) -> bool {
        lane.now().denies(&td.parse().unwrap(), &NodeId([node; 32]), Generation(generation))
    }

    #[test]
    fn denials_reach_up_to_their_generation_and_no_further_than_their_trust_domain() {
        let lane = Lane::default();
        assert!(lane.offer(list(1, &[("west", 7, 2), ("west", 7, 1)])));
        for (td, node, generation, denied) in [
            ("west", 7, 1, true),
            ("west", 7, 2, true),
            ("west", 7, 3, false),
            ("west", 8, 1, false),
            ("east", 7, 1, false),
        ] {
            assert_eq!(denies(&lane, td, node, generation), denied, "{td} {node} {generation}");
        }
    }

    #[test]
    fn an_older_list_undoes_nothing_and_an_equal_one_wakes_nobody() {
        let lane = Lane::default();
        let mut woken = lane.watch();
        assert!(lane.offer(list(5, &[("west", 7, 2)])));
        assert!(woken.has_changed().unwrap());
        woken.borrow_and_update();
        assert!(!lane.offer(list(4, &[])), "a slice made before the denial");
        assert!(denies(&lane, "west", 7, 2));
        assert!(lane.offer(list(6, &[("west", 7, 2)])));
        assert!(!woken.has_changed().unwrap() && lane.now().revision() == Revision(6));
        assert!(lane.offer(list(7, &[])) && !denies(&lane, "west", 7, 2));
        assert!(woken.has_changed().unwrap());
    }

    #[test]
    fn a_node_that_is_out_refuses_everybody_whatever_lists_say_until_it_is_in_again() {
        let lane = Lane::default();
        lane.set_out(true);
        assert!(denies(&lane, "east", 1, 9) && lane.offer(list(3, &[])) && denies(&lane, "east", 1, 9));
        assert!(lane.now().is_out() && !lane.now().lists(&"east".parse().unwrap(), &NodeId([1; 32]), Generation(9)));
        lane.set_out(false);
        assert!(!denies(&lane, "east", 1, 9) && lane.now().revision() == Revision(3));
    }

    #[test]
    fn unclear_lists_are_refused_whole() {
        for (td, node) in [("", "ab".repeat(32)), ("west", "ab".into()), ("West", "ab".repeat(32))] {
            let good = v1::NodeDenial { trust_domain: "west".into(), node: "cd".repeat(32), generation: 1 };
            let bad = v1::NodeDenial { trust_domain: td.into(), node, generation: 1 };
            assert!(Denials::parse(Revision(1), &[good, bad], &[]).is_err());
        }
    }

    fn with(revision: u64, ids: &[(&str, u8, bool)], leaves: &[(&str, &str, u8)]) -> Result<Denials, Refusal> {
        let id = |(id, up_to, barred): &(&str, u8, bool)| v1::IdDenial {
            spiffe_id: (*id).into(),
            up_to: vec![*up_to; 16],
            barred: *barred,
        };
        let leaf = |(td, authority, serial): &(&str, &str, u8)| v1::LeafDenial {
            trust_domain: (*td).into(),
            authority: (*authority).into(),
            serial: vec![*serial; 16],
        };
        let (ids, leaves): (Vec<_>, Vec<_>) = (ids.iter().map(id).collect(), leaves.iter().map(leaf).collect());
        list(revision, &[]).with_svids(&ids, &leaves)
    }

    #[test]
    fn svids_are_denied_by_identity_up_to_a_serial_or_one_by_one() {
        let list =
            with(1, &[("spiffe://west/a", 5, false), ("spiffe://west/b", 0, true)], &[("west", "aa", 7)]).unwrap();
        for (id, authority, serial, denied) in [
            ("spiffe://west/a", "aa", vec![5; 16], true),
            ("spiffe://west/a", "aa", vec![6; 16], false),
            ("spiffe://west/a", "bb", vec![4; 16], true),
            ("spiffe://west/a", "aa", vec![9; 8], true),
            ("spiffe://west/a", "aa", vec![7; 16], true),
            ("spiffe://west/b", "aa", vec![255; 16], true),
            ("spiffe://west/c", "aa", vec![7; 16], true),
            ("spiffe://west/c", "bb", vec![7; 16], false),
            ("spiffe://east/a", "aa", vec![5; 16], false),
            ("spiffe://east/a", "aa", vec![7; 16], false),
        ] {
            assert_eq!(
                list.denies_svid(&id.parse().unwrap(), authority, &serial),
                denied,
                "{id} {authority} {serial:?}"
            );
        }
        // DER writes a zero before a first bit that is set; what is compared does not.
        let serial = [&[0], [0x80; 16].as_slice()].concat();
        let leaf = v1::LeafDenial { trust_domain: "west".into(), authority: "aa".into(), serial };
        let high = Denials::default().with_svids(&[], &[leaf]).unwrap();
        assert!(high.denies_svid(&"spiffe://west/c".parse().unwrap(), "aa", &[0x80; 16]));
        let bad = v1::IdDenial { spiffe_id: "spiffe://west/a".into(), up_to: vec![1; 15], barred: false };
        assert!(Denials::default().with_svids(&[bad], &[]).is_err());
        assert!(with(1, &[("spiffe://west/a", 5, false), ("spiffe://west/a", 4, false)], &[]).is_err());
        let lane = Lane::default();
        let mut woken = lane.watch();
        assert!(lane.offer(list.clone()) && woken.has_changed().unwrap());
        woken.borrow_and_update();
        assert!(lane.offer(Denials { revision: Revision(2), ..list }) && !woken.has_changed().unwrap());
        assert!(lane.offer(with(3, &[], &[]).unwrap()) && woken.has_changed().unwrap());
    }
}
