//! The golden boot, for tests.

use crate::chain::Counters;
use crate::hash::HashAlg;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256,
    RSA_PSS_SHA256, RsaEncoding, RsaKeyPair, RsaPssSaltLength, RsaSignatureEncoding,
};
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

/// A kind of AK that the verifier accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AkKind {
    P256,
    P384,
    RsaSsa(KeySize),
    RsaPss(KeySize),
    /// RSASSA-PSS with the longest salt.
    RsaPssLong(KeySize),
}

/// A key in memory that says it is an AK: it signs what no TPM would.
pub(crate) struct SoftwareAk {
    pub(crate) public: Vec<u8>,
    pub(crate) kind: AkKind,
    key: SoftwareKey,
}

enum SoftwareKey {
    Ec(EcdsaKeyPair),
    Rsa(Box<RsaKeyPair>),
}

const PSS_LONG: RsaSignatureEncoding = RSA_PSS_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);

impl SoftwareAk {
    pub(crate) fn p256() -> SoftwareAk {
        SoftwareAk::new(AkKind::P256)
    }

    pub(crate) fn new(kind: AkKind) -> SoftwareAk {
        let ec = |algorithm| {
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &SystemRandom::new()).expect("key");
            EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref()).expect("key")
        };
        let (public, key) = match kind {
            AkKind::P256 => {
                let key = ec(&ECDSA_P256_SHA256_FIXED_SIGNING);
                (p256_public(AK_ATTRIBUTES, key.public_key().as_ref()), SoftwareKey::Ec(key))
            }
            AkKind::P384 => {
                let key = ec(&ECDSA_P384_SHA384_FIXED_SIGNING);
                let mut public = vec![0x00, 0x23, 0x00, 0x0c];
                public.extend(AK_ATTRIBUTES.to_be_bytes());
                public.extend([0, 0, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0c, 0x00, 0x04, 0x00, 0x10]);
                key.public_key().as_ref()[1..].chunks(48).for_each(|c| public.extend(tpm2b(c)));
                (public, SoftwareKey::Ec(key))
            }
            AkKind::RsaSsa(size) | AkKind::RsaPss(size) | AkKind::RsaPssLong(size) => {
                let key = RsaKeyPair::generate(size).expect("key");
                let scheme = if matches!(kind, AkKind::RsaSsa(_)) { 0x14 } else { 0x16 };
                (rsa_public(AK_ATTRIBUTES, scheme, &modulus(&key)), SoftwareKey::Rsa(Box::new(key)))
            }
        };
        SoftwareAk { public, kind, key }
    }

    /// The public key, uncompressed.
    pub(crate) fn point(&self) -> Vec<u8> {
        match &self.key {
            SoftwareKey::Ec(key) => key.public_key().as_ref().to_vec(),
            SoftwareKey::Rsa(_) => panic!("no point"),
        }
    }

    /// The hash of its scheme.
    pub(crate) fn hash(&self) -> HashAlg {
        if self.kind == AkKind::P384 { HashAlg::Sha384 } else { HashAlg::Sha256 }
    }

    /// The signature's bare value: r || s, or the RSA number.
    pub(crate) fn sign_bare(&self, message: &[u8]) -> Vec<u8> {
        let rng = SystemRandom::new();
        match &self.key {
            SoftwareKey::Ec(key) => key.sign(&rng, message).expect("signature").as_ref().to_vec(),
            SoftwareKey::Rsa(key) => {
                let padding: &'static dyn RsaEncoding = match self.kind {
                    AkKind::RsaSsa(_) => &RSA_PKCS1_SHA256,
                    AkKind::RsaPssLong(_) => &PSS_LONG,
                    AkKind::RsaPss(_) | AkKind::P256 | AkKind::P384 => &RSA_PSS_SHA256,
                };
                let mut out = vec![0; key.public_modulus_len()];
                key.sign(padding, &rng, message, &mut out).expect("signature");
                out
            }
        }
    }

    /// TPMT_SIGNATURE.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let bare = self.sign_bare(message);
        match self.kind {
            AkKind::P256 => ecdsa_signature(&bare),
            AkKind::P384 => [&[0x00, 0x18, 0x00, 0x0c][..], &tpm2b(&bare[..48]), &tpm2b(&bare[48..])].concat(),
            AkKind::RsaSsa(_) => [&[0x00, 0x14, 0x00, 0x0b][..], &tpm2b(&bare)].concat(),
            AkKind::RsaPss(_) | AkKind::RsaPssLong(_) => [&[0x00, 0x16, 0x00, 0x0b][..], &tpm2b(&bare)].concat(),
        }
    }
}

/// TPMT_PUBLIC of an RSA key with SHA-256.
pub(crate) fn rsa_public(attributes: u32, scheme: u8, modulus: &[u8]) -> Vec<u8> {
    let mut out = vec![0x00, 0x01, 0x00, 0x0b];
    out.extend(attributes.to_be_bytes());
    out.extend([0, 0, 0x00, 0x10, 0x00, scheme, 0x00, 0x0b]);
    out.extend(((modulus.len() * 8) as u16).to_be_bytes());
    out.extend([0, 0, 0, 0]);
    out.extend(tpm2b(modulus));
    out
}

/// Out of the RSAPublicKey: SEQUENCE and INTEGER each with a length of two octets, a zero, the modulus, the exponent.
fn modulus(key: &RsaKeyPair) -> Vec<u8> {
    key.public_key().as_ref()[9..][..key.public_modulus_len()].to_vec()
}

/// TPMT_SIGNATURE of `rs` (r || s), ECDSA with SHA-256.
pub(crate) fn ecdsa_signature(rs: &[u8]) -> Vec<u8> {
    let mut out = vec![0x00, 0x18, 0x00, 0x0b];
    rs.chunks(32).for_each(|part| out.extend(tpm2b(part)));
    out
}

/// Writes `case NN  <what>  -> <code>` for the table of the adversarial list, which `cargo xtask test` prints. One file
/// a row, so that tests that run at once, or again, write the same table.
pub(crate) fn table_row(case: u8, what: &str, code: &str) {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target"));
    let folder = target.join("adversarial");
    std::fs::create_dir_all(&folder).expect("the table's folder");
    let slug: String = what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let line = format!("case {case:02}  {what}  -> {code}\n");
    std::fs::write(folder.join(format!("{case:02}-verifier-{slug}.txt")), line).expect("a row of the table");
}

/// Little schoolbook arithmetic over 32-bit limbs, least significant first: none of it is in the code under test.
pub(crate) mod number {
    use aws_lc_rs::rand::{SecureRandom, SystemRandom};

    pub(crate) fn multiply(a: &[u32], b: &[u32]) -> Vec<u32> {
        let mut out = vec![0u32; a.len() + b.len()];
        for (i, x) in a.iter().enumerate() {
            let mut carry = 0u64;
            for (j, y) in b.iter().enumerate() {
                let sum = u64::from(out[i + j]) + u64::from(*x) * u64::from(*y) + carry;
                (out[i + j], carry) = (sum as u32, sum >> 32);
            }
            out[i + b.len()] = carry as u32;
        }
        out
    }

    pub(crate) fn add(a: &[u32], b: &[u32]) -> Vec<u32> {
        let mut carry = 0u64;
        let mut out = Vec::new();
        for i in 0..a.len().max(b.len()) {
            let sum = u64::from(*a.get(i).unwrap_or(&0)) + u64::from(*b.get(i).unwrap_or(&0)) + carry;
            out.push(sum as u32);
            carry = sum >> 32;
        }
        out.push(carry as u32);
        out
    }

    pub(crate) fn bytes(limbs: &[u32]) -> Vec<u8> {
        let all: Vec<u8> = limbs.iter().rev().flat_map(|l| l.to_be_bytes()).collect();
        let zeros = all.iter().take_while(|b| **b == 0).count();
        all[zeros..].to_vec()
    }

    pub(crate) fn random(limbs: usize) -> Vec<u32> {
        let mut raw = vec![0u8; limbs * 4];
        SystemRandom::new().fill(&mut raw).unwrap();
        raw.chunks(4).map(|c| u32::from_be_bytes(c.try_into().unwrap())).collect()
    }

    /// A number of the form `k * M + 65537^a`, a so small that no reduction modulo M is needed.
    pub(crate) fn flawed(primes_to: u32, a: usize, limbs: usize) -> Vec<u32> {
        with_factor(primes_to, a, &random(limbs))
    }

    fn with_factor(primes_to: u32, a: usize, k: &[u32]) -> Vec<u32> {
        let primes = (2..=primes_to).filter(|n| (2..*n).all(|d| n % d != 0));
        let m = primes.fold(vec![1u32], |m, p| multiply(&m, &[p]));
        let power = (0..a).fold(vec![1u32], |n, _| multiply(&n, &[65537]));
        add(&multiply(k, &m), &power)
    }

    /// A modulus of 2048 bits that carries the fingerprint of CVE-2017-15361.
    pub(crate) fn flawed_modulus() -> Vec<u8> {
        loop {
            // M has 220 bits: a factor of 1829 fills up to 2048, or nearly.
            let mut k = random(58);
            k[57] &= 0x1f;
            let modulus = bytes(&with_factor(167, 5, &k));
            if modulus.len() == 256 && modulus[0] & 0x80 != 0 {
                return modulus;
            }
        }
    }
}

/// Every file of a recorded machine: `tests/KIND/NAME`.
pub(crate) fn folder(kind: &str, name: &str) -> BTreeMap<String, Vec<u8>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join(kind).join(name);
    let entries = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let read = |e: std::fs::DirEntry| {
        let bytes = std::fs::read(e.path()).expect("a readable file");
        (e.file_name().into_string().expect("text"), bytes)
    };
    entries.map(|e| read(e.expect("an entry"))).collect()
}

/// A PEM certificate of the golden manufacturer CA.
pub(crate) fn ca_pem(name: &str) -> Vec<u8> {
    read("ca", name)
}
