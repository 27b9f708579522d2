//! The golden boot, for tests.

use crate::chain::Counters;
use crate::hash::HashAlg;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use std::collections::BTreeMap;
use std::path::PathBuf;

fn read(folder: &str, name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder).join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(crate) fn golden(name: &str) -> Vec<u8> {
    read("secureboot-grub", name)
}

pub(crate) fn mutant(name: &str) -> Vec<u8> {
    read("mutants", name)
}

/// DER of a PEM certificate of the golden manufacturer CA.
pub(crate) fn ca(name: &str) -> Vec<u8> {
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    CertificateDer::from_pem_slice(&read("ca", name)).expect("PEM").to_vec()
}

/// All PCRs as the kernel showed them.
pub(crate) fn golden_pcrs(hash: HashAlg) -> BTreeMap<u32, Vec<u8>> {
    String::from_utf8(golden(&format!("pcrs.{hash}")))
        .expect("text")
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(n, v)| (n.parse().expect("index"), hex::decode(v).expect("hex")))
        .collect()
}

/// The PCRs of the golden quote, as sent: 0-10 and 14.
pub(crate) fn quoted_pcrs() -> Vec<(u32, Vec<u8>)> {
    golden_pcrs(HashAlg::Sha256).into_iter().filter(|(n, _)| 0x47ff & (1 << n) != 0).collect()
}

/// Every field of a TPMS_ATTEST, so that each can be wrong.
#[derive(Clone)]
pub(crate) struct AttestSpec {
    pub(crate) magic: u32,
    pub(crate) kind: u16,
    pub(crate) signer: Vec<u8>,
    pub(crate) extra_data: Vec<u8>,
    pub(crate) counters: Counters,
    pub(crate) firmware_version: u64,
    pub(crate) selections: Vec<(u16, Vec<u8>)>,
    pub(crate) digest: Vec<u8>,
}

impl AttestSpec {
    pub(crate) fn quote(signer: &[u8], pcrs: &[(u32, Vec<u8>)]) -> AttestSpec {
        AttestSpec {
            magic: 0xff54_4347,
            kind: 0x8018,
            signer: signer.to_vec(),
            extra_data: vec![],
            counters: Counters { reset: 5, restart: 2, clock_ms: 1000, safe: true },
            firmware_version: 0x2019_0802_0016_3636,
            selections: vec![(0x000b, vec![0xff, 0x47, 0x00])],
            digest: HashAlg::Sha256.digest(&pcrs.iter().map(|(_, v)| v.as_slice()).collect::<Vec<_>>()),
        }
    }

    /// What is common to quotes and certifications.
    pub(crate) fn head(&self) -> Vec<u8> {
        let mut out = self.magic.to_be_bytes().to_vec();
        out.extend(self.kind.to_be_bytes());
        out.extend(tpm2b(&self.signer));
        out.extend(tpm2b(&self.extra_data));
        out.extend(self.counters.clock_ms.to_be_bytes());
        out.extend(self.counters.reset.to_be_bytes());
        out.extend(self.counters.restart.to_be_bytes());
        out.push(u8::from(self.counters.safe));
        out.extend(self.firmware_version.to_be_bytes());
        out
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.head();
        out.extend((self.selections.len() as u32).to_be_bytes());
        for (alg, select) in &self.selections {
            out.extend(alg.to_be_bytes());
            out.push(select.len() as u8);
            out.extend(select);
        }
        out.extend(tpm2b(&self.digest));
        out
    }
}

pub(crate) fn tpm2b(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
}

/// TPMT_PUBLIC of a P-256 ECDSA-SHA256 key with these attributes; `point` is uncompressed.
pub(crate) fn p256_public(attributes: u32, point: &[u8]) -> Vec<u8> {
    let mut out = vec![0x00, 0x23, 0x00, 0x0b];
    out.extend(attributes.to_be_bytes());
    out.extend([0, 0, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0b, 0x00, 0x03, 0x00, 0x10]);
    point[1..].chunks(32).for_each(|coordinate| out.extend(tpm2b(coordinate)));
    out
}

/// The attributes of an AK.
pub(crate) const AK_ATTRIBUTES: u32 = 0x0005_0072;

/// A key in memory that says it is an AK: it signs what no TPM would.
pub(crate) struct SoftwareAk {
    pub(crate) public: Vec<u8>,
    key: EcdsaKeyPair,
}

impl SoftwareAk {
    pub(crate) fn p256() -> SoftwareAk {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).expect("key");
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref()).expect("key");
        SoftwareAk { public: p256_public(AK_ATTRIBUTES, key.public_key().as_ref()), key }
    }

    /// The public key, uncompressed.
    pub(crate) fn point(&self) -> Vec<u8> {
        self.key.public_key().as_ref().to_vec()
    }

    /// r || s.
    pub(crate) fn sign_fixed(&self, message: &[u8]) -> Vec<u8> {
        self.key.sign(&SystemRandom::new(), message).expect("signature").as_ref().to_vec()
    }

    /// TPMT_SIGNATURE.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        ecdsa_signature(&self.sign_fixed(message))
    }
}

/// TPMT_SIGNATURE of `rs` (r || s), ECDSA with SHA-256.
pub(crate) fn ecdsa_signature(rs: &[u8]) -> Vec<u8> {
    let mut out = vec![0x00, 0x18, 0x00, 0x0b];
    rs.chunks(32).for_each(|part| out.extend(tpm2b(part)));
    out
}
