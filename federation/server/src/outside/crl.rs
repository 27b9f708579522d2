//! CRLs of the cell's issuers. Each is signed by the replica whose authority it is; another replica's endpoint asks that one.

use crate::replica::Replica;
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::sync::Mutex as AsyncMutex;

/// A reader that keeps a CRL knows of a revocation within this, as if the leaf had run out.
const VALID_MS: u64 = 3_600_000;
/// A CRL is signed, or asked for, this often at most, however many strangers fetch it.
const FRESH: Duration = Duration::from_secs(2);
const ASK_MAX: Duration = Duration::from_secs(2);

/// The CRL of this replica's own authority, of now.
pub fn own_crl(replica: &Replica, authority: &str) -> Result<Vec<u8>, Refusal> {
    let revoked = replica.local(|s| s.revoked_leaves(authority));
    replica.issuer().crl(&revoked, VALID_MS)
}

/// CRLs as they were last, by authority: no more of them than replicas.
#[derive(Default)]
pub(super) struct Crls {
    last: Mutex<BTreeMap<String, (Instant, Vec<u8>)>>,
    asking: AsyncMutex<()>,
}

impl Crls {
    /// The CRL of an authority of the cell.
    pub(super) async fn of(&self, replica: &Replica, authority: &str) -> Result<Vec<u8>, Refusal> {
        let members = replica
            .local(|s| s.members().map(|(id, m)| (id, m.address.clone(), m.authority.clone())).collect::<Vec<_>>());
        let unknown = || Refusal::new(Code::NotFound, "an issuing authority of this cell", authority.to_owned());
        let (id, address, _) = members.iter().find(|(_, _, of)| of == authority).ok_or_else(unknown)?;
        // One at a time: who waited finds what the one before fetched.
        let _one = self.asking.lock().await;
        if let Some(der) = self.fresh(authority) {
            return Ok(der);
        }
        let der = if *id == replica.id() {
            own_crl(replica, authority)?
        } else {
            ask(replica, *id, address, authority).await?
        };
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        last.retain(|of, _| members.iter().any(|(_, _, known)| known == of));
        last.insert(authority.to_owned(), (Instant::now(), der.clone()));
        Ok(der)
    }

    fn fresh(&self, authority: &str) -> Option<Vec<u8>> {
        let last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        last.get(authority).filter(|(at, _)| at.elapsed() < FRESH).map(|(_, der)| der.clone())
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
