//! Roots of EK certificates from a PEM file.

use crate::ek::{EkClass, EkRoot, Endorsements, check_root};
use ambit_model::{Code, Refusal};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The endorsements in a PEM file: its self-issued certificates are roots, the others intermediates. A file without a
/// self-issued one names the points of trust itself.
///
/// # Errors
/// [`Code::BadRequest`] for a file without a certificate; [`Code::EkMalformed`] for one that cannot be a root.
pub fn roots_of_pem(pem: &[u8], class: EkClass) -> Result<Endorsements, Refusal> {
    let bad = |found: String| Refusal::new(Code::BadRequest, "certificates in PEM", found);
    let certificates: Vec<CertificateDer<'_>> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| bad(e.to_string()))?;
    if certificates.is_empty() {
        return Err(bad("none".to_owned()));
    }
    let (roots, others): (Vec<_>, Vec<_>) = certificates.iter().partition(|der| is_self_issued(der));
    let (roots, intermediates) = if roots.is_empty() { (others, Vec::new()) } else { (roots, others) };
    for root in &roots {
        check_root(root)?;
    }
    let roots = roots.into_iter().map(|der| EkRoot { der: der.to_vec(), class }).collect();
    let intermediates = intermediates.into_iter().map(|der| der.to_vec()).collect();
    Ok(Endorsements { roots, intermediates, denied: Vec::new() })
}

fn is_self_issued(der: &[u8]) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, c)| c.subject().as_raw() == c.issuer().as_raw())
}
