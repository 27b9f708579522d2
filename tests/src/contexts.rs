//! Administrators' certificates of any age, signed with a replica's own issuing key: nobody waits eight hours.

use crate::cell::Cell;
use crate::process::{binary, run};
use ambit_identity::keys::certificates_to_pem;
use ambit_identity::tls::certified;
use ambit_identity::{Csr, IssuingKey, SvidKey};
use ambit_model::{Lifetime, Stamp, TrustDomain};
use ambit_transport::Identity;
use anyhow::{Context, Result};
use rustls::pki_types::CertificateDer;
use std::path::PathBuf;
use std::process::Output;
use std::time::{SystemTime, UNIX_EPOCH};

/// Runs `ambit` in a context.
///
/// # Panics
/// Where there is no such program.
#[allow(clippy::expect_used, reason = "a test cannot go on without its program")]
pub fn ambit(context: &str, args: &[&str]) -> Output {
    let program = binary("ambit").expect("a built ambit").display().to_string();
    run(&[&[program.as_str(), "--context", context], args].concat()).expect("a program that starts")
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// A founder whose certificate can be made of any age.
pub struct Expiring {
    issuer: IssuingKey,
    trust_domain: TrustDomain,
    folder: PathBuf,
}

impl Expiring {
    /// Of this cell, signed as by this replica.
    pub fn of(cell: &Cell, replica: usize) -> Result<Expiring> {
        let pem = std::fs::read_to_string(cell.seat_of(replica)?.data.join("identity/issuer.pem"))?;
        let upper = ambit_identity::keys::certificates_from_pem(&pem)?;
        let issuer = IssuingKey::new(SvidKey::from_pem(&pem)?, upper.into_iter().next().context("an intermediate")?)?;
        let folder = cell.admin_file("");
        Ok(Expiring { issuer, trust_domain: cell.trust_domain.clone(), folder })
    }
    /// A certificate that is valid so, milliseconds from now, and its key.
    fn pair(&self, from_ms: i64, to_ms: i64) -> Result<(Vec<CertificateDer<'static>>, SvidKey)> {
        let at = |ms: i64| Stamp(now_ms().saturating_add_signed(ms));
        let lifetime = Lifetime { not_before: at(from_ms), not_after: at(to_ms) };
        let key = SvidKey::generate()?;
        let csr = Csr::parse(&key.csr()?)?;
        Ok((self.issuer.founding_admin("founder", &self.trust_domain, lifetime, &csr)?, key))
    }
    /// Who shows it.
    pub fn identity(&self, from_ms: i64, to_ms: i64) -> Result<Identity> {
        let (chain, key) = self.pair(from_ms, to_ms)?;
        Ok(Identity::new(Some(certified(chain, &key)?)))
    }
    /// Puts it into the founder's folder, as former releases kept it.
    pub fn install(&self, from_ms: i64, to_ms: i64) -> Result<()> {
        let (chain, key) = self.pair(from_ms, to_ms)?;
        std::fs::write(self.folder.join("admin.pem"), certificates_to_pem(chain.iter().map(AsRef::as_ref)))?;
        std::fs::write(self.folder.join("admin.key"), key.pem().as_bytes())?;
        Ok(())
    }
}
