//! TPMT_PUBLIC (TPM 2.0 Part 2, 12.2.4), and the two kinds of key that this protocol knows: an EK and an AK.

use crate::ek::roca;
use crate::hash::{HashAlg, sha256};
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, NodeId, Refusal};

/// TPMA_OBJECT bits (Part 2, 8.3).
mod bit {
    pub(super) const FIXED_TPM: u32 = 1 << 1;
    pub(super) const FIXED_PARENT: u32 = 1 << 4;
    pub(super) const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    pub(super) const USER_WITH_AUTH: u32 = 1 << 6;
    pub(super) const RESTRICTED: u32 = 1 << 16;
    pub(super) const DECRYPT: u32 = 1 << 17;
    pub(super) const SIGN: u32 = 1 << 18;
}

const ALG_RSA: u16 = 0x0001;
const ALG_AES: u16 = 0x0006;
const ALG_NULL: u16 = 0x0010;
const ALG_RSASSA: u16 = 0x0014;
const ALG_RSAES: u16 = 0x0015;
const ALG_RSAPSS: u16 = 0x0016;
const ALG_ECDSA: u16 = 0x0018;
const ALG_ECDAA: u16 = 0x001a;
const ALG_ECC: u16 = 0x0023;
const ALG_CFB: u16 = 0x0043;
const CURVE_P256: u16 = 0x0003;
const CURVE_P384: u16 = 0x0004;

/// RSA-4096, the largest modulus read, in bytes.
const MODULUS_BYTES_MAX: usize = 512;
/// P-521, the largest coordinate read, in bytes.
const COORDINATE_BYTES_MAX: usize = 66;
/// TPM_RH_ENDORSEMENT: the qualified name of the hierarchy that EKs are primary in (Part 1, section 16 and 26.5).
const ENDORSEMENT_HIERARCHY: [u8; 4] = 0x4000_000bu32.to_be_bytes();

/// An elliptic curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
    /// Any other TPM_ECC_CURVE: read, never accepted.
    Other(u16),
}

impl Curve {
    /// Length of a coordinate in bytes, for the curves accepted.
    pub(crate) fn coordinate_size(self) -> usize {
        match self {
            Curve::P256 => 32,
            Curve::P384 => 48,
            Curve::Other(_) => COORDINATE_BYTES_MAX,
        }
    }
}

/// A public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// RSA with its modulus (no leading zero) and exponent.
    Rsa {
        /// Big-endian.
        modulus: Vec<u8>,
        /// 65537 where the TPM says 0.
        exponent: u32,
    },
    /// A point; coordinates padded to the curve's length.
    Ec {
        /// The curve.
        curve: Curve,
        /// Big-endian.
        x: Vec<u8>,
        /// Big-endian.
        y: Vec<u8>,
    },
}

/// A signing (or other) scheme fixed in a public area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// TPM_ALG_ID of the scheme.
    pub(crate) alg: u16,
    /// Its hash; none for a hash this crate does not know, or a scheme without.
    pub(crate) hash: Option<HashAlg>,
}

/// A parsed TPMT_PUBLIC, with the very bytes it came from: its name is over those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Public {
    raw: Vec<u8>,
    name_alg: HashAlg,
    attributes: u32,
    symmetric_bits: Option<u16>,
    scheme: Option<Scheme>,
    key: Key,
}

impl Public {
    /// The name: algorithm identifier, then the digest of the public area (Part 1, section 16).
    pub fn name(&self) -> Vec<u8> {
        name_of(self.name_alg, &[&self.raw])
    }

    /// The name of the TPMT_PUBLIC in `bytes`, for an attester that has only these.
    pub fn name_of(bytes: &[u8]) -> Result<Vec<u8>, Refusal> {
        Ok(Public::parse(bytes).map_err(|e| e.refuse(Code::EvidenceMalformed, "TPMT_PUBLIC"))?.name())
    }

    /// SubjectPublicKeyInfo (DER, RFC 5280 4.1.2.7; rsaEncryption or id-ecPublicKey).
    pub fn spki_der(&self) -> Vec<u8> {
        let (algorithm, key) = match &self.key {
            Key::Rsa { .. } => (der(0x30, &[&der(0x06, &[OID_RSA]), &der(0x05, &[])]), self.key_bits()),
            Key::Ec { curve, .. } => {
                let oid: &[u8] = match curve {
                    Curve::P256 => OID_P256,
                    Curve::P384 => OID_P384,
                    Curve::Other(_) => &[],
                };
                (der(0x30, &[&der(0x06, &[OID_EC]), &der(0x06, &[oid])]), self.key_bits())
            }
        };
        der(0x30, &[&algorithm, &der(0x03, &[&[0], &key])])
    }

    /// The content of the BIT STRING of a SubjectPublicKeyInfo: RSAPublicKey, or an uncompressed point.
    pub(crate) fn key_bits(&self) -> Vec<u8> {
        match &self.key {
            Key::Rsa { modulus, exponent } => {
                der(0x30, &[&der_unsigned(modulus), &der_unsigned(&exponent.to_be_bytes())])
            }
            Key::Ec { x, y, .. } => [&[4u8], x.as_slice(), y.as_slice()].concat(),
        }
    }

    /// The key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn name_alg(&self) -> HashAlg {
        self.name_alg
    }

    pub(crate) fn attributes(&self) -> u32 {
        self.attributes
    }

    /// Whether this is a key that its TPM made and keeps, and that signs anything but decrypts nothing.
    pub(crate) fn is_confined_signer(&self) -> bool {
        let must = bit::FIXED_TPM | bit::FIXED_PARENT | bit::SENSITIVE_DATA_ORIGIN | bit::SIGN;
        let must_not = bit::RESTRICTED | bit::DECRYPT;
        self.attributes & (must | must_not) == must && self.name_alg != HashAlg::Sha1
    }

    /// Whether this is a P-256 key that its TPM made and keeps, and that agrees on secrets but signs nothing.
    pub(crate) fn is_confined_to_agreement(&self) -> bool {
        let must = bit::FIXED_TPM | bit::FIXED_PARENT | bit::SENSITIVE_DATA_ORIGIN | bit::DECRYPT;
        let must_not = bit::RESTRICTED | bit::SIGN;
        let p256 = matches!(self.key, Key::Ec { curve: Curve::P256, .. });
        self.attributes & (must | must_not) == must && p256 && self.name_alg != HashAlg::Sha1
    }

    /// Parses the whole of `bytes`, which must be a TPMT_PUBLIC (no size in front) of an asymmetric key.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Public, Malformed> {
        let mut r = Reader::new(bytes);
        let kind = r.u16("type")?;
        let name_alg = HashAlg::from_id(r.u16("nameAlg")?).ok_or(Malformed::new("nameAlg", 2))?;
        let attributes = r.u32("objectAttributes")?;
        r.tpm2b(64, "authPolicy")?;
        let symmetric_bits = symmetric(&mut r)?;
        let scheme = scheme(&mut r)?;
        let key = match kind {
            ALG_RSA => rsa(&mut r)?,
            ALG_ECC => ecc(&mut r)?,
            _ => return Err(Malformed::new("type", 0)),
        };
        r.end("bytes after the public area")?;
        Ok(Public { raw: bytes.to_vec(), name_alg, attributes, symmetric_bits, scheme, key })
    }

    fn strong_key(&self) -> bool {
        match &self.key {
            Key::Rsa { modulus, .. } => modulus.len() >= 256,
            Key::Ec { curve, .. } => matches!(curve, Curve::P256 | Curve::P384),
        }
    }
}

fn name_of(alg: HashAlg, parts: &[&[u8]]) -> Vec<u8> {
    let mut name = alg.id().to_be_bytes().to_vec();
    name.extend(alg.digest(parts));
    name
}

fn symmetric(r: &mut Reader<'_>) -> Result<Option<u16>, Malformed> {
    let at = r.at();
    match r.u16("symmetric")? {
        ALG_NULL => Ok(None),
        ALG_AES => {
            let bits = r.u16("symmetric key bits")?;
            if r.u16("symmetric mode")? != ALG_CFB || !matches!(bits, 128 | 256) {
                return Err(Malformed::new("symmetric: not AES-128 or AES-256 in CFB mode", at));
            }
            Ok(Some(bits))
        }
        _ => Err(Malformed::new("symmetric", at)),
    }
}

fn scheme(r: &mut Reader<'_>) -> Result<Option<Scheme>, Malformed> {
    match r.u16("scheme")? {
        ALG_NULL => Ok(None),
        ALG_RSAES => Ok(Some(Scheme { alg: ALG_RSAES, hash: None })),
        alg => {
            let hash = HashAlg::from_id(r.u16("scheme hash")?);
            if alg == ALG_ECDAA {
                r.u16("ECDAA count")?;
            }
            Ok(Some(Scheme { alg, hash }))
        }
    }
}

fn rsa(r: &mut Reader<'_>) -> Result<Key, Malformed> {
    let at = r.at();
    let bits = usize::from(r.u16("RSA key bits")?);
    // 0 stands for 2^16 + 1 (Part 2, 12.2.3.5). Nothing else is in use, and small exponents invite trouble.
    let exponent = match r.u32("RSA exponent")? {
        0 | 65537 => 65537,
        _ => return Err(Malformed::new("RSA exponent", at)),
    };
    let modulus = r.tpm2b(MODULUS_BYTES_MAX, "RSA modulus")?.to_vec();
    if bits.checked_div(8) != Some(modulus.len()) || modulus.first().is_none_or(|b| b & 0x80 == 0) {
        return Err(Malformed::new("RSA modulus: not as long as the key bits say", at));
    }
    if modulus.last().is_none_or(|b| b & 1 == 0) {
        return Err(Malformed::new("RSA modulus: even", at));
    }
    Ok(Key::Rsa { modulus, exponent })
}

fn ecc(r: &mut Reader<'_>) -> Result<Key, Malformed> {
    let curve = match r.u16("curve")? {
        CURVE_P256 => Curve::P256,
        CURVE_P384 => Curve::P384,
        other => Curve::Other(other),
    };
    if r.u16("KDF scheme")? != ALG_NULL {
        r.u16("KDF hash")?;
    }
    let n = curve.coordinate_size();
    let x = padded(r.tpm2b(n, "x")?, n);
    let y = padded(r.tpm2b(n, "y")?, n);
    Ok(Key::Ec { curve, x, y })
}

/// `bytes` with leading zeros up to `n` bytes: TPMs may strip them, everything else needs them.
pub(crate) fn padded(bytes: &[u8], n: usize) -> Vec<u8> {
    let mut out = vec![0; n.saturating_sub(bytes.len())];
    out.extend_from_slice(bytes);
    out
}

/// The node id of the machine whose EK has the TPMT_PUBLIC in `ek_public`: SHA-256 of its SubjectPublicKeyInfo.
pub fn node_id(ek_public: &[u8]) -> Result<NodeId, Refusal> {
    let public = Public::parse(ek_public).map_err(|e| e.refuse(Code::EkMalformed, "TPMT_PUBLIC"))?;
    Ok(NodeId(sha256(&public.spki_der())))
}

/// A public area that is an EK's: a restricted decryption key that never left its TPM.
#[derive(Clone, Debug)]
pub(crate) struct EndorsementKey(Public);

impl EndorsementKey {
    pub(crate) fn new(public: Public) -> Result<EndorsementKey, Refusal> {
        let refuse = |expected: &str, found: String| Err(Refusal::new(Code::EkMalformed, expected, found));
        let must = bit::FIXED_TPM | bit::FIXED_PARENT | bit::SENSITIVE_DATA_ORIGIN | bit::RESTRICTED | bit::DECRYPT;
        if public.attributes & must != must || public.attributes & bit::SIGN != 0 {
            return refuse("an EK: restricted, decrypting, fixed to its TPM", format!("{:#010x}", public.attributes));
        }
        if !public.strong_key() || public.name_alg == HashAlg::Sha1 {
            return refuse("an EK of RSA >= 2048, P-256 or P-384 with SHA-256 or better", "a weaker one".into());
        }
        if public.symmetric_bits.is_none() || public.scheme.is_some() {
            return refuse("an EK that is a storage key (AES-CFB, no scheme)", "another scheme".into());
        }
        Ok(EndorsementKey(public))
    }

    pub(crate) fn public(&self) -> &Public {
        &self.0
    }

    /// Key length of the symmetric protection, in bytes.
    pub(crate) fn symmetric_bytes(&self) -> usize {
        if self.0.symmetric_bits == Some(256) { 32 } else { 16 }
    }

    /// The qualified name of `child` under this EK, itself primary in the endorsement hierarchy (Part 1, 16):
    /// QN = H(QN of the parent || name), and a hierarchy's QN is its handle.
    pub(crate) fn qualify(&self, child: &Public) -> Vec<u8> {
        let own = name_of(self.0.name_alg, &[&ENDORSEMENT_HIERARCHY, &self.0.name()]);
        name_of(child.name_alg, &[&own, &child.name()])
    }
}

/// How an accepted AK signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AkScheme {
    Ecdsa,
    RsaSsa,
    RsaPss,
}

/// A public area that is an AK's: a key that signs only what its TPM itself made, and never left it.
#[derive(Clone, Debug)]
pub(crate) struct AttestationKey {
    public: Public,
    scheme: AkScheme,
    hash: HashAlg,
}

impl AttestationKey {
    pub(crate) fn new(public: Public) -> Result<AttestationKey, Refusal> {
        let exactly = bit::FIXED_TPM
            | bit::FIXED_PARENT
            | bit::SENSITIVE_DATA_ORIGIN
            | bit::USER_WITH_AUTH
            | bit::RESTRICTED
            | bit::SIGN;
        if public.attributes != exactly {
            let found = format!("{:#010x}", public.attributes);
            return Err(Refusal::new(Code::AkAttributes, format!("attributes exactly {exactly:#010x}"), found));
        }
        if public.symmetric_bits.is_some() {
            return Err(Refusal::new(Code::AkAttributes, "no symmetric scheme", "one"));
        }
        let weak =
            |found: &str| Refusal::new(Code::AkWeak, "P-256, P-384 or RSA >= 2048 with SHA-256 or better", found);
        if !public.strong_key() {
            return Err(weak("a weaker key"));
        }
        if public.name_alg == HashAlg::Sha1 {
            return Err(weak("name algorithm sha1"));
        }
        if let Key::Rsa { modulus, .. } = &public.key
            && roca::is_fingerprinted(modulus)
        {
            return Err(weak("an RSA key with the fingerprint of CVE-2017-15361"));
        }
        let fixed = public.scheme.ok_or_else(|| Refusal::new(Code::AkAttributes, "a fixed signing scheme", "none"))?;
        let scheme = match (&public.key, fixed.alg) {
            (Key::Ec { .. }, ALG_ECDSA) => AkScheme::Ecdsa,
            (Key::Rsa { .. }, ALG_RSASSA) => AkScheme::RsaSsa,
            (Key::Rsa { .. }, ALG_RSAPSS) => AkScheme::RsaPss,
            (_, alg) => {
                let found = format!("scheme {alg:#06x}");
                return Err(Refusal::new(Code::AkAttributes, "ECDSA, RSASSA or RSAPSS", found));
            }
        };
        let hash = fixed.hash.filter(|h| *h != HashAlg::Sha1).ok_or_else(|| weak("a weak or unknown scheme hash"))?;
        if let Key::Ec { curve, .. } = &public.key
            && !matches!((curve, hash), (Curve::P256, HashAlg::Sha256) | (Curve::P384, HashAlg::Sha384))
        {
            return Err(weak("a scheme hash that does not fit the curve"));
        }
        Ok(AttestationKey { public, scheme, hash })
    }

    pub(crate) fn public(&self) -> &Public {
        &self.public
    }
    pub(crate) fn scheme(&self) -> AkScheme {
        self.scheme
    }
    pub(crate) fn scheme_hash(&self) -> HashAlg {
        self.hash
    }
}

impl AkScheme {
    /// The TPM_ALG_ID that a signature of this scheme carries.
    pub(crate) fn alg(self) -> u16 {
        match self {
            AkScheme::Ecdsa => ALG_ECDSA,
            AkScheme::RsaSsa => ALG_RSASSA,
            AkScheme::RsaPss => ALG_RSAPSS,
        }
    }

    /// The scheme with this TPM_ALG_ID.
    pub(crate) fn from_alg(alg: u16) -> Option<AkScheme> {
        [AkScheme::Ecdsa, AkScheme::RsaSsa, AkScheme::RsaPss].into_iter().find(|s| s.alg() == alg)
    }
}

const OID_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const OID_EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const OID_P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const OID_P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];

/// One DER element of at most 64 KiB.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = vec![tag];
    let [high, low] = u16::try_from(content.len()).unwrap_or(u16::MAX).to_be_bytes();
    match (high, low) {
        (0, n @ 0..=0x7f) => out.push(n),
        (0, n) => out.extend([0x81, n]),
        (h, l) => out.extend([0x82, h, l]),
    }
    out.extend(content);
    out
}

/// A non-negative INTEGER in its shortest form.
fn der_unsigned(bytes: &[u8]) -> Vec<u8> {
    let skip = bytes.iter().take_while(|b| **b == 0).count();
    let digits = bytes.get(skip..).unwrap_or_default();
    if digits.first().is_none_or(|b| b & 0x80 != 0) { der(0x02, &[&[0], digits]) } else { der(0x02, &[digits]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata::golden;

    #[test]
    fn an_ek_is_a_restricted_decryption_key() {
        let golden = golden("ek.tpm2b_public")[2..].to_vec();
        let attributes = u32::from_be_bytes(golden[4..8].try_into().unwrap());
        let judge = |attributes: u32| {
            let mut public = golden.clone();
            public[4..8].copy_from_slice(&attributes.to_be_bytes());
            EndorsementKey::new(Public::parse(&public).unwrap()).map(|_| ()).map_err(|r| r.code)
        };
        assert_eq!(judge(attributes), Ok(()));
        for wrong in
            [bit::FIXED_TPM, bit::FIXED_PARENT, bit::SENSITIVE_DATA_ORIGIN, bit::RESTRICTED, bit::DECRYPT, bit::SIGN]
        {
            assert_eq!(judge(attributes ^ wrong), Err(Code::EkMalformed), "{wrong:#x}");
        }
    }
}
