//! The whole chain, with a software key in the place of a TPM's AK: so that every field a TPM would never put wrong can
//! be put wrong. (The `ambit-tpm` crate runs the same chain against a real TPM.)

mod attempt;
mod lies;

use self::attempt::{Attempt, JUDGED_UNDER};
use super::*;
use crate::attest::Attest;
use crate::credential;
use crate::ek::{EkRoot, Endorsements};
use crate::hash::sha256;
use crate::public::{AttestationKey, EndorsementKey, Public};
use crate::quote::Quote;
use crate::signature::AkVerifier;
use crate::testdata::{AK_ATTRIBUTES, ca, golden, mutant, p256_public, quoted_pcrs};
use crate::{Bank, EkClass, TicketBody, csr};
use ambit_model::{Code, Revision, Stamp};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SubjectPublicKeyInfo,
};

/// 2026-11-25, two days after the golden boot.
const NOW: Stamp = Stamp(1_795_600_000_000);
/// PCRs 0-10 and 14, as the golden quote.
const MASK: u32 = 0x47ff;

fn golden_ek_public() -> Vec<u8> {
    golden("ek.tpm2b_public")[2..].to_vec()
}

fn golden_endorsements() -> Endorsements {
    let root = EkRoot { der: ca("swtpm-localca-rootca-cert.pem"), class: EkClass::Lab };
    Endorsements { roots: vec![root], intermediates: vec![ca("issuercert.pem")], denied: vec![] }
}

fn key(public: Vec<u8>) -> (EndorsementKey, AttestationKey) {
    let ek = EndorsementKey::new(Public::parse(&golden_ek_public()).unwrap()).unwrap();
    (ek, AttestationKey::new(Public::parse(&public).unwrap()).unwrap())
}

#[test]
fn the_golden_quote_is_accepted_and_forgeries_are_not() {
    let nonce: Vec<u8> = (0..2).flat_map(|_| (0..16u8).map(|n| n * 0x11)).collect();
    let pcrs = quoted_pcrs();
    let (ek, ak) = key(golden("ak.tpmt_public"));
    assert_eq!(ak.public().name(), golden("ak.name"));
    let judge = |attest: &[u8], signature: &[u8], ak: &AttestationKey, extra_data: [u8; 32]| {
        let signer = ek.qualify(ak.public());
        let quote =
            Quote { attest, signature, pcrs: &pcrs, signer: &signer, extra_data, bank: Bank::Sha256, pcr_mask: MASK };
        quote.judge(&AkVerifier::new(ak).unwrap()).map(|_| ()).map_err(|r| r.code)
    };
    let (attest, signature) = (golden("quote.tpms_attest"), golden("quote.tpmt_signature"));
    let nonce: [u8; 32] = nonce.try_into().unwrap();
    assert_eq!(judge(&attest, &signature, &ak, nonce), Ok(()));
    assert_eq!(judge(&attest, &signature, &ak, [0; 32]), Err(Code::QuoteNonce));

    let pem = String::from_utf8(mutant("forged-software-key.pem")).unwrap();
    let spki = {
        use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
        SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
    };
    let (_, forger) = key(p256_public(AK_ATTRIBUTES, &spki[26..]));
    for (name, by_ak, by_forger) in [
        ("forged-fk_ok", Code::QuoteSignature, Code::QuoteSigner),
        ("forged-fk_magic", Code::QuoteSignature, Code::QuoteMagic),
    ] {
        let (attest, signature) = (mutant(&format!("{name}.tpms_attest")), mutant(&format!("{name}.tpmt_signature")));
        assert_eq!(judge(&attest, &signature, &ak, [0xab; 32]), Err(by_ak), "{name}");
        // Even where the software key itself was presented as an AK: it is under no EK.
        assert_eq!(judge(&attest, &signature, &forger, [0xab; 32]), Err(by_forger), "{name}");
    }
}

#[test]
fn an_honest_node_is_verified() {
    let mut attempt = Attempt::honest();
    attempt.expected = Expected::JoinToken([9; 32]);
    let verified = attempt.run().unwrap();
    assert_eq!(verified.ek_class, EkClass::Lab);
    assert_eq!(verified.cluster.as_str(), "west");
    assert_eq!(verified.join_token, Some([9; 32]));
    assert_eq!(verified.pcrs.len(), 12);
    assert_eq!((verified.boot.events, verified.appraised.checkpoint.entries), (48, 41));
    assert_eq!((verified.endorsement_revision, verified.policy_revision), (Revision(4), JUDGED_UNDER));
    let spki = Public::parse(&golden_ek_public()).unwrap().spki_der();
    assert_eq!(verified.node.0, sha256(&spki));
    let claims: serde_json::Value = serde_json::from_str(&verified.claims_json(NOW)).unwrap();
    let node = &claims["submods"]["node"];
    assert_eq!(node["ear.status"], "warning", "a lab TPM is never affirming");
    assert_eq!(node["ambit.boot"]["secure_boot"], true);
    assert_eq!(node["ambit.ima"]["extended_as"], "native");
    assert_eq!(node["ambit.policy-revision"], JUDGED_UNDER.0, "not the one it began at");
    assert_eq!(claims["iat"], 1_795_600_000);
}

/// Certificates of the golden EK's key by a CA of our own: what webpki lets through and we must not, and the reverse.
#[test]
fn an_ek_certificate_must_be_one() {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca_params = CertificateParams::new(vec![]).unwrap();
    ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_cert = ca_params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca_params, &ca_key);
    let key = SubjectPublicKeyInfo::from_der(&Public::parse(&golden_ek_public()).unwrap().spki_der()).unwrap();
    let ek_use = ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1]);
    for (what, is_ca, uses, code) in [
        ("good", false, vec![ek_use.clone()], None),
        ("no use named", false, vec![], Some(Code::EkChainUntrusted)),
        ("for TLS servers", false, vec![ExtendedKeyUsagePurpose::ServerAuth], Some(Code::EkChainUntrusted)),
        ("a CA", true, vec![ek_use], Some(Code::EkChainUntrusted)),
    ] {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.extended_key_usages = uses;
        if is_ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let mut attempt = Attempt::honest();
        attempt.begin.ek_certificate = params.signed_by(&key, &issuer).unwrap().der().to_vec();
        attempt.endorsements = Endorsements {
            roots: vec![EkRoot { der: ca_cert.der().to_vec(), class: EkClass::Hardware }],
            ..Default::default()
        };
        let outcome = attempt.run();
        assert_eq!(outcome.as_ref().err().map(|d| d.refusal.code), code, "{what}: {outcome:?}");
        if let Ok(verified) = outcome {
            let claims: serde_json::Value = serde_json::from_str(&verified.claims_json(NOW)).unwrap();
            assert_eq!(claims["submods"]["node"]["ear.status"], "affirming");
        }
        // The same certificate under the golden CA's root only.
        attempt.endorsements = golden_endorsements();
        assert_eq!(attempt.run().unwrap_err().refusal.code, Code::EkChainUntrusted, "{what}");
    }
}

/// A point that is not on its curve is found at Begin: nobody pays for a credential that nothing can open.
#[test]
fn an_invalid_ak_gets_no_credential() {
    let mut attempt = Attempt::honest();
    *attempt.begin.ak_public.last_mut().unwrap() ^= 1;
    assert_eq!(attempt.begin().unwrap_err().refusal.code, Code::EvidenceMalformed);
}

#[test]
fn tickets_have_one_encoding() {
    let bytes = Attempt::honest().begin().unwrap().encode();
    assert_eq!(TicketBody::decode(&bytes).unwrap().encode(), bytes);
    for n in 0..bytes.len() {
        assert_eq!(TicketBody::decode(&bytes[..n]).unwrap_err().code, Code::TicketInvalid, "{n} bytes");
    }
    assert!(TicketBody::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    assert!(!format!("{:?}", TicketBody::decode(&bytes).unwrap()).contains("secret"));
}

/// Cut or corrupt every structure at every byte: an answer, never a panic.
#[test]
fn no_corruption_panics() {
    let (ek, _) = key(golden("ak.tpmt_public"));
    for bytes in
        [golden("quote.tpms_attest"), golden("quote.tpmt_signature"), golden("ak.tpmt_public"), golden_ek_public()]
    {
        for n in 0..bytes.len() {
            for changed in [bytes[..n].to_vec(), {
                let mut b = bytes.clone();
                b[n] ^= 0xff;
                b
            }] {
                let _ = Attest::parse(&changed);
                let _ = crate::signature::Signature::parse(&changed);
                if let Ok(public) = Public::parse(&changed) {
                    let _ = (public.spki_der(), public.name());
                    if let Ok(broken) = EndorsementKey::new(public) {
                        let _ = credential::make(&broken, &ek.public().name(), &[0; 32], &[0; 64]);
                    }
                }
                let _ = csr::p256_spki(&changed);
            }
        }
    }
}
