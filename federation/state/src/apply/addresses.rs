//! Who holds an address. One holder each: whoever else claims it later would get its callers.

use crate::state::{OwnedName, State};
use ambit_model::{Address, TrustDomain};

/// Whose endpoint is behind the address, this cell's own first.
pub(super) fn endpoint_origin(s: &State, address: Address) -> Option<TrustDomain> {
    let own = s.cell().map(|c| &c.trust_domain);
    let mut origins = own.into_iter().chain(s.peers().map(|(td, _)| td));
    origins.find(|td| s.endpoints.contains(&((*td).clone(), address))).cloned()
}

/// Which service answers at the address.
pub(super) fn service_at(s: &State, address: Address) -> Option<&OwnedName> {
    s.services().find(|(_, row)| row.object.address == address).map(|(key, _)| key)
}

/// Before an endpoint of this cell is written: a peer that claimed the address gives way.
pub(super) fn free_of_peers(s: &mut State, own: &TrustDomain, address: Address) {
    let peers: Vec<TrustDomain> = s.peers().map(|(td, _)| td.clone()).filter(|td| td != own).collect();
    for td in peers {
        s.endpoints.remove(&mut s.journal, &(td, address));
    }
    if let Some(key) = service_at(s, address).filter(|(td, _)| td != own).cloned() {
        s.services.remove(&mut s.journal, &key);
    }
}
