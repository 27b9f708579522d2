//! CRLs of the cell's issuers. Each is signed by the replica whose authority it is; another replica's endpoint asks that one.

use crate::replica::Replica;
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Mutex as AsyncMutex;

/// A reader that keeps a CRL knows of a revocation within this, as if the leaf had run out.
const VALID_MS: u64 = 3_600_000;
/// A CRL is signed, or asked for, this often at most, however many strangers fetch it.
const FRESH: Duration = Duration::from_secs(2);
const ASK_MAX: Duration = Duration::from_secs(2);

/// The CRL of an authority of this replica, of now: the one in use, or the one before.
pub fn own_crl(replica: &Replica, authority: &str) -> Result<Vec<u8>, Refusal> {
    let revoked = replica.local(|s| s.revoked_leaves(authority));
    replica.issuing(authority)?.crl(&revoked, VALID_MS)
}

type Answer = Result<Vec<u8>, Refusal>;
/// What was answered last, and when. Whoever asks waits for whoever asks already, and finds that one's answer.
type Last = Arc<AsyncMutex<Option<(Instant, Answer)>>>;

/// CRLs as they were last, by authority: no more of them than the cell has.
#[derive(Default)]
pub(super) struct Crls(Mutex<BTreeMap<String, Last>>);

impl Crls {
    /// The CRL of an authority of the cell. A replica that is silent holds up whoever asks for its own only.
    pub(super) async fn of(&self, replica: &Replica, authority: &str) -> Answer {
        let (known, found) = replica.local(|s| {
            let row = s.authority(authority);
            let member = row.and_then(|row| s.member(row.replica).map(|m| (row.replica, m.address.clone())));
            (s.authorities(), member)
        });
        let unknown = || Refusal::new(Code::NotFound, "an issuing authority of this cell", authority.to_owned());
        let (id, address) = found.ok_or_else(unknown)?;
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            slots.retain(|of, _| known.contains_key(of));
            slots.entry(authority.to_owned()).or_default().clone()
        };
        let mut last = slot.lock().await;
        if let Some((_, answer)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return answer.clone();
        }
        let answer =
            if id == replica.id() { own_crl(replica, authority) } else { ask(replica, id, &address, authority).await };
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

async fn ask(replica: &Replica, id: u64, address: &str, authority: &str) -> Result<Vec<u8>, Refusal> {
    let asked = async {
        let channel = replica.dial_replica(id, address).await?;
        let request = v1::GetCrlRequest { authority: authority.to_owned() };
        let mut client = v1::revocation_client::RevocationClient::new(channel);
        client.get_crl(request).await.map_err(|s| from_status(&s)).map(|answer| answer.into_inner().der)
    };
    let silence = |_| Refusal::new(Code::Unavailable, format!("replica {id}, whose authority it is"), "silence");
    tokio::time::timeout(ASK_MAX, asked).await.map_err(silence)?
}
