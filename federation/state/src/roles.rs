//! Who is an administrator, and of what.

use crate::objects::{AdminRow, EntryRow};
use crate::state::State;
use ambit_model::{AdminRole, Generation, NodeId, ObjectName, SpiffeId};
use std::collections::BTreeSet;

/// The administrator that `ambitd init` and `ambitd restore` leave behind. Cells of the first release have no rows of
/// roles: in them the founder is a federation-admin, until a row says otherwise.
pub const FOUNDER: &str = "founder";

impl State {
    /// Rows of administrators, by name; the founder is among them only once a row was written.
    pub fn admins(&self) -> impl Iterator<Item = (&ObjectName, &AdminRow)> {
        self.admins.iter()
    }

    /// What an administrator may do. None: nothing, whatever the certificate.
    pub fn admin_roles(&self, name: &str) -> BTreeSet<AdminRole> {
        let row = name.parse::<ObjectName>().ok().and_then(|name| self.admins.get(&name));
        match row {
            Some(row) => row.roles.clone(),
            None if name == FOUNDER => BTreeSet::from([AdminRole::FederationAdmin]),
            None => BTreeSet::new(),
        }
    }

    /// Administrators by the identity of their entry.
    pub fn id_admins(&self) -> impl Iterator<Item = (&SpiffeId, &AdminRow)> {
        self.id_admins.iter()
    }

    /// The entry that a workload's SVID was issued under, by its record: there, as it was for its node, of an admission that
    /// is the node's present one and not denied. What is not on record, nobody here issued.
    pub fn entry_of_svid(&self, authority: &str, serial: &[u8], binding: (NodeId, Generation)) -> Option<&EntryRow> {
        let serial: [u8; 16] = serial.try_into().ok()?;
        let leaf = self.issued.get(&serial).filter(|leaf| leaf.authority == authority)?;
        let (node, generation) = binding;
        let row = self.node(&node).filter(|row| row.generation == generation && row.state.bars_trust().is_none())?;
        let denied = self.denied(&node).is_some_and(|denied| row.generation <= denied);
        self.entry_of(leaf).filter(|_| !denied && leaf.binding == Some(binding))
    }

    /// What whoever shows an SVID of this identity may do, where its entry is marked `admin`.
    pub fn id_admin_roles(&self, id: &SpiffeId) -> BTreeSet<AdminRole> {
        self.id_admins.get(id).map(|row| row.roles.clone()).unwrap_or_default()
    }

    /// Whether this administrator may do everything, and nobody else who is not denied.
    pub(crate) fn is_last_federation_admin(&self, name: &str) -> bool {
        let able = |name: &str| {
            let own = self.cell().map(|cell| &cell.trust_domain);
            let id = own.and_then(|own| own.member(&format!("/ambit/admin/{name}")).ok());
            self.admin_roles(name).contains(&AdminRole::FederationAdmin) && !id.is_some_and(|id| self.barred(&id))
        };
        let mut all = self.admins().map(|(name, _)| name.as_str()).chain([FOUNDER]);
        able(name) && !all.any(|other| other != name && able(other))
    }
}
