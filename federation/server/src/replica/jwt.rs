//! The trust domain's JWT authorities at a replica: made and wrapped by the leader, opened and used by every replica.

use super::Replica;
use ambit_identity::JwtKey;
use ambit_identity::wrap::{Purpose, wrap_for};
use ambit_model::{Code, Refusal};
use ambit_state::objects::{JwtAuthorityRow, JwtAuthorityState};
use ambit_state::{Command, JwtDue};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Keys held open: the one that signs, and the one before while requests for it are under way.
const OPEN_MAX: usize = 2;

/// Authorities as this replica unwrapped them: unwrapping costs a key agreement.
#[derive(Default)]
pub struct OpenJwtKeys {
    keys: Mutex<Vec<Arc<JwtKey>>>,
}

impl OpenJwtKeys {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<JwtKey>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn get(&self, kid: &str) -> Option<Arc<JwtKey>> {
        self.lock().iter().find(|key| key.kid() == kid).cloned()
    }
    fn keep(&self, key: &Arc<JwtKey>) {
        let mut keys = self.lock();
        if keys.len() >= OPEN_MAX {
            keys.remove(0);
        }
        keys.push(key.clone());
    }
}

/// The authority that signs now.
///
/// # Errors
/// [`Code::IssuerUnavailable`] while there is none, or none that this replica can open yet.
pub async fn signer(replica: &Replica) -> Result<Arc<JwtKey>, Refusal> {
    let row = replica.local(|s| s.jwt_signer().map(|row| (row.kid.clone(), row.spki_der.clone(), row.wrapped.clone())));
    let none = |found: &str| Refusal::new(Code::IssuerUnavailable, "a JWT authority that this replica can open", found);
    let (kid, spki, wrapped) = row.ok_or_else(|| none("none: the cell is starting"))?;
    open(replica, &kid, &spki, &wrapped).await?.ok_or_else(|| none("one that was not wrapped to it yet"))
}

/// What signs no more is not held: a thief of this memory gets no key that is believed and no use.
pub fn forget(replica: &Replica) {
    let signs = |row: &JwtAuthorityRow| matches!(row.state, JwtAuthorityState::Active | JwtAuthorityState::Prepared);
    let kids: Vec<String> =
        replica.local(|s| s.jwt_authorities().filter(|row| signs(row)).map(|row| row.kid.clone()).collect());
    replica.jwt_keys().lock().retain(|key| kids.iter().any(|kid| kid == key.kid()));
}

/// None where it was not wrapped to this replica.
async fn open(
    replica: &Replica,
    kid: &str,
    spki: &[u8],
    wrapped: &BTreeMap<u64, Vec<u8>>,
) -> Result<Option<Arc<JwtKey>>, Refusal> {
    if let Some(known) = replica.jwt_keys().get(kid) {
        return Ok(Some(known));
    }
    let Some(mine) = wrapped.get(&replica.id()) else { return Ok(None) };
    let private = replica.keyring().unwrap_for(Purpose::JwtAuthority, mine).await?;
    let key = Arc::new(JwtKey::open(&private, spki)?);
    replica.jwt_keys().keep(&key);
    Ok(Some(key))
}

/// A fresh key, wrapped to every replica and published; its kid.
pub async fn make(replica: &Replica) -> Result<String, Refusal> {
    let key = JwtKey::generate()?;
    let to = replica.local(ambit_state::State::wrap_keys);
    let command = Command::PutJwtAuthority(key.spki().to_vec(), wrap_to(&to, &key)?);
    replica.propose_wrapped(to, command).await?.outcome?;
    Ok(key.kid().to_owned())
}

/// Any other's part: a leader whose wrap key changed cannot open what signs, and who can wraps it to him.
pub async fn wrap_to_leader(replica: &Replica, leader: u64) -> Result<(), Refusal> {
    match replica.local(ambit_state::State::jwt_due) {
        JwtDue::Wrap(_, members) if members.contains(&leader) => rotate_if_due(replica).await,
        _ => Ok(()),
    }
}

/// The leader's part, each second: a new authority where one is due, and what replicas cannot open wrapped to them.
pub async fn rotate_if_due(replica: &Replica) -> Result<(), Refusal> {
    match replica.local(ambit_state::State::jwt_due) {
        JwtDue::Nothing => Ok(()),
        JwtDue::Prepare => {
            let kid = make(replica).await?;
            tracing::info!(kid, "JWT authority made");
            Ok(())
        }
        JwtDue::Wrap(kid, members) => {
            let row = replica.local(|s| {
                let mut all = s.jwt_authorities();
                all.find(|row| row.kid == kid).map(|row| (row.spki_der.clone(), row.wrapped.clone()))
            });
            let Some((spki, wrapped)) = row else { return Ok(()) };
            // A leader that cannot open it either has a later term's leader do it, or the next authority.
            let Some(key) = open(replica, &kid, &spki, &wrapped).await? else { return Ok(()) };
            let mut to = replica.local(ambit_state::State::wrap_keys);
            to.retain(|id, _| members.contains(id));
            let command = Command::WrapJwtAuthority(kid, wrap_to(&to, &key)?);
            replica.propose_wrapped(to, command).await?.outcome.map(drop)
        }
    }
}

fn wrap_to(to: &BTreeMap<u64, Vec<u8>>, key: &JwtKey) -> Result<BTreeMap<u64, Vec<u8>>, Refusal> {
    let private = key.private()?;
    to.iter().map(|(id, public)| Ok((*id, wrap_for(Purpose::JwtAuthority, public, &private)?))).collect()
}
