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

    /// How many administrators may do everything.
    pub(crate) fn federation_admins(&self) -> usize {
        let holds = |roles: &BTreeSet<AdminRole>| roles.contains(&AdminRole::FederationAdmin);
        let founder = self.admins().all(|(name, _)| name.as_str() != FOUNDER);
        usize::from(founder) + self.admins().filter(|(_, row)| holds(&row.roles)).count()
    }
}
