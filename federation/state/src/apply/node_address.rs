//! Where tunnels of nodes come from: a key that was copied to another attested node is refused there.

use super::{At, cell_row, export, payload, touch};
use crate::objects::NodeState;
use crate::state::State;
use ambit_model::policy::NodeAddress;
use ambit_model::record::Kind;
use ambit_model::{Code, Generation, NodeId, Refusal};
use std::net::Ipv4Addr;

impl State {
    /// Whether this admission of the node has registered this address. It does so once: an agent has one address for as long
    /// as it runs, and each start of it is a new admission. Whoever comes with another has a copy of its key.
    ///
    /// What is said here of an admission is not unsaid while it lasts, also where this state is not the newest.
    ///
    /// # Errors
    /// [`Code::BadRequest`], [`Code::NodeAddressMismatch`].
    pub fn has_registered(&self, id: &NodeId, generation: Generation, address: Ipv4Addr) -> Result<bool, Refusal> {
        if !is_of_a_node(address) {
            return Err(Refusal::new(Code::BadRequest, "the address of one machine", address.to_string()));
        }
        if self.registrations.get(id) != Some(&generation) {
            return Ok(false);
        }
        match self.node_address(id) {
            Some(known) if known.address == address => Ok(true),
            known => {
                let known = known.map_or_else(|| "none".to_owned(), |row| row.address.to_string());
                let expected = format!(
                    "{known}, which generation {generation} registered (an agent with another address starts anew)"
                );
                Err(Refusal::new(Code::NodeAddressMismatch, expected, address.to_string()))
            }
        }
    }
}

/// The node says it on the stream of this admission. The same address as before moves nothing: nodes renew their admissions
/// all day, and nobody need hear of it.
pub(super) fn register(
    s: &mut State,
    at: At,
    id: &NodeId,
    generation: Generation,
    address: Ipv4Addr,
) -> Result<(), Refusal> {
    let Some(node) = s.node(id).filter(|n| n.state == NodeState::Admitted) else {
        return Err(Refusal::new(Code::NodeUntrusted, "an admitted node", id.to_string()));
    };
    if node.generation != generation {
        let expected = format!("the leaf of generation {}", node.generation);
        return Err(Refusal::new(Code::SvidUntrusted, expected, generation.to_string()));
    }
    let cluster = node.cluster.clone();
    if s.has_registered(id, generation, address)? {
        return Ok(());
    }
    s.registrations.put(&mut s.journal, *id, generation);
    if s.node_address(id).is_some_and(|known| known.address == address) {
        return Ok(());
    }
    let row = NodeAddress { address, since: generation };
    let own = cell_row(s)?.trust_domain;
    if let Some(former) = s.node_address(id).map(|row| row.address) {
        s.leave(at.stamp, [former.into()], false);
    }
    s.node_addresses.put(&mut s.journal, (own, *id), row);
    export(s, Kind::NodeAddress, id.to_string(), payload(&row)?);
    // Who runs nothing calls nobody, and is in no slice.
    let runs_any = s.entries().any(|row| row.entry.cluster == cluster && s.fits(&row.entry, id));
    if runs_any {
        touch(s, at);
    }
    Ok(())
}

/// The node is out: no leaf of it comes from anywhere.
pub(super) fn forget(s: &mut State, at: At, id: &NodeId) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    s.registrations.remove(&mut s.journal, id);
    if let Some(row) = s.node_addresses.remove(&mut s.journal, &(own, *id)) {
        // Who was put out comes in by no address, and is gone to in no clear text.
        s.leave(at.stamp, [row.address.into()], true);
        export(s, Kind::NodeAddress, id.to_string(), Vec::new());
    }
    Ok(())
}

/// Not one that stands for none or for many (RFC 6890).
pub(super) fn is_of_a_node(address: Ipv4Addr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast()
}
