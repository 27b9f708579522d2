//! Who is an administrator, and of what.

use crate::objects::AdminRow;
use crate::state::State;
use ambit_model::{AdminRole, ObjectName};
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
