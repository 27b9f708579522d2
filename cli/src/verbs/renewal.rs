//! An administrator's certificate renews itself where it is used, past half of its life: after the verb, so that what was
//! asked for is not held up, and whatever comes of it the verb ends as it would have.

use crate::ask;
use crate::cell::{Cell, request_id};
use crate::output::Answer;
use crate::pair::{self, Age, Locked};
use crate::when::{now_ms, utc};
use ambit_identity::SvidKey;
use ambit_model::refusal::Class;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use rustls_pki_types::CertificateDer;
use std::time::Duration;

/// A cell that just answered answers this too, or it can wait for the next verb.
const RENEWAL_MAX: Duration = Duration::from_secs(3);

/// Ends a verb that asked `cell`.
pub(super) async fn after(cell: &Cell, done: Result<Answer, Refusal>) -> Result<Answer, Refusal> {
    match (cell.validity().age(now_ms()), done) {
        (Age::Young, done) => done,
        (Age::Ended, Err(refusal)) if not_let_in(&refusal) => Err(ended(cell)),
        (Age::Due | Age::Ended, Err(refusal)) => Err(refusal),
        (Age::Due | Age::Ended, Ok(answer)) => {
            let renewed = tokio::time::timeout(RENEWAL_MAX, renew(cell)).await;
            let late = |_| Refusal::new(Code::Unavailable, "an answer within 3 s", "none");
            Ok(match renewed.map_err(late).and_then(|renewed| renewed) {
                Ok(()) => answer,
                Err(refusal) => answer.note(format!(
                    "warning: your certificate ends {} and was not renewed: {refusal}",
                    utc(cell.validity().not_after_ms)
                )),
            })
        }
    }
}

/// Whether the cell did not take the certificate, as far as can be told: a handshake that is broken off looks like nobody.
fn not_let_in(refusal: &Refusal) -> bool {
    matches!(refusal.code.class(), Class::Unauthenticated | Class::Unavailable) || refusal.code == Code::SvidUntrusted
}

fn ended(cell: &Cell) -> Refusal {
    let found = format!("one that ended {} by this machine's clock", utc(cell.validity().not_after_ms));
    Refusal::new(Code::AdminExpired, "an administrator's certificate in time", found)
}

/// Somebody else who does, or did since this verb began, is enough.
async fn renew(cell: &Cell) -> Result<(), Refusal> {
    let folder = &cell.context().folder;
    let Some(locked) = Locked::at_once(folder)? else { return Ok(()) };
    let (chain, _) = pair::read(folder)?;
    if pair::Validity::of(&chain)? != cell.validity() {
        return Ok(());
    }
    renewed(cell, &locked).await.map(drop)
}

/// A new key, certified and in its place; when it ends.
pub(super) async fn renewed(cell: &Cell, locked: &Locked) -> Result<u64, Refusal> {
    let key = SvidKey::generate()?;
    let request = v1::RenewAdminRequest { request_id: request_id()?, csr: key.csr()? };
    let reply = ask!(cell, Svid.renew_admin(request))?;
    let chain: Vec<_> = reply.chain_der.into_iter().map(CertificateDer::from).collect();
    locked.install(&chain, &key)?;
    Ok(reply.not_after_ms)
}
