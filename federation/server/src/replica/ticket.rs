//! Sealing tickets, so that any replica can take the answer after a failover.

use super::Replica;
use ambit_identity::wrap::{Purpose, open, seal};
use ambit_model::{Code, Refusal};
use ambit_state::Command;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use zeroize::Zeroizing;

/// Ticket keys are replaced daily.
const ROTATE_MS: u64 = 24 * 3_600_000;

/// Keys held unwrapped: today's, yesterday's, and what a new replica made due.
const OPEN_KEYS_MAX: usize = 4;

/// Ticket keys as this replica unwrapped them, by what was wrapped to it: unwrapping costs a key agreement, at each end of
/// each ticket.
#[derive(Default)]
pub struct OpenKeys {
    keys: Mutex<Vec<OpenKey>>,
}

type OpenKey = (Vec<u8>, Zeroizing<[u8; 32]>);

impl OpenKeys {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<OpenKey>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn get(&self, wrapped: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
        self.lock().iter().find(|(w, _)| w == wrapped).map(|(_, key)| key.clone())
    }
    fn keep(&self, wrapped: &[u8], key: &Zeroizing<[u8; 32]>) {
        let mut keys = self.lock();
        if keys.len() >= OPEN_KEYS_MAX {
            keys.remove(0);
        }
        keys.push((wrapped.to_vec(), key.clone()));
    }
}

/// Seals under the newest key: number of the key (8 bytes), then nonce and sealed text.
pub async fn seal_ticket(replica: &Replica, purpose: Purpose, plain: &[u8]) -> Result<Vec<u8>, Refusal> {
    let newest = replica.local(|s| s.ticket_keys().next_back().map(|(n, row)| (n, row.wrapped.clone())));
    let (number, wrapped) =
        newest.ok_or_else(|| Refusal::new(Code::Unavailable, "a ticket key", "none yet: the cell is starting"))?;
    let key = unwrap(replica, &wrapped).await?;
    Ok([number.to_be_bytes().as_slice(), &seal(&key, purpose, plain)?].concat())
}

/// Opens what any replica of this cell sealed for this purpose.
pub async fn open_ticket(replica: &Replica, purpose: Purpose, ticket: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let bad = || Refusal::new(Code::TicketInvalid, "a ticket sealed by this cell", "another");
    let (number, sealed) = ticket.split_first_chunk::<8>().ok_or_else(bad)?;
    let number = u64::from_be_bytes(*number);
    let wrapped = replica.local(|s| s.ticket_keys().find(|(n, _)| *n == number).map(|(_, row)| row.wrapped.clone()));
    let key = unwrap(replica, &wrapped.ok_or_else(bad)?).await?;
    open(&key, purpose, sealed)
}

async fn unwrap(replica: &Replica, wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<Zeroizing<[u8; 32]>, Refusal> {
    let mine = wrapped
        .get(&replica.id())
        .ok_or_else(|| Refusal::new(Code::Unavailable, "a ticket key wrapped to this replica", "none yet"))?;
    if let Some(known) = replica.ticket_keys().get(mine) {
        return Ok(known);
    }
    let plain = replica.keyring().unwrap_for(Purpose::Key, mine).await?;
    let mut key = Zeroizing::new([0u8; 32]);
    if plain.len() != key.len() {
        return Err(Refusal::new(Code::Internal, "a ticket key of 32 bytes", plain.len().to_string()));
    }
    key.copy_from_slice(&plain);
    replica.ticket_keys().keep(mine, &key);
    Ok(key)
}

/// The leader's part: a new key when there is none, when it is a day old, or when a replica cannot open it.
pub async fn rotate_if_due(replica: &Replica) -> Result<(), Refusal> {
    let members = replica.local(ambit_state::State::wrap_keys);
    let due = replica.local(|s| match s.ticket_keys().next_back() {
        None => true,
        Some((_, row)) => {
            row.made.plus_ms(ROTATE_MS) < s.stamp() || members.keys().any(|id| !row.wrapped.contains_key(id))
        }
    });
    if !due || members.is_empty() {
        return Ok(());
    }
    rotate(replica).await
}

/// A new key, wrapped to every replica.
pub async fn rotate(replica: &Replica) -> Result<(), Refusal> {
    let to = replica.local(ambit_state::State::wrap_keys);
    let key = Zeroizing::new(super::random::<32>()?);
    let mut wrapped = BTreeMap::new();
    for (id, public) in &to {
        wrapped.insert(*id, ambit_identity::wrap::wrap(public, key.as_slice())?);
    }
    replica.propose_wrapped(to, Command::RotateTicketKey(wrapped)).await?.outcome?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_keys_stay_open_and_no_more() {
        let open = OpenKeys::default();
        for n in 0..=OPEN_KEYS_MAX as u8 {
            open.keep(&[n], &Zeroizing::new([n; 32]));
        }
        assert!(open.get(&[0]).is_none(), "the oldest went");
        for n in 1..=OPEN_KEYS_MAX as u8 {
            assert_eq!(*open.get(&[n]).unwrap(), [n; 32]);
        }
        assert_eq!(open.lock().len(), OPEN_KEYS_MAX);
    }
}
