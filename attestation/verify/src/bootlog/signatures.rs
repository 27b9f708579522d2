//! What the Secure Boot variables hold: EFI_SIGNATURE_LIST (UEFI 2.10, 32.4.1), and shim's SbatLevel.

use crate::hash::sha256;
use crate::wire::{Malformed, Reader};
use std::collections::BTreeMap;
use x509_parser::prelude::{FromDer, X509Certificate};

/// EFI_CERT_X509_GUID.
const X509: [u8; 16] = [0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72];
/// EFI_CERT_SHA256_GUID.
const SHA256: [u8; 16] =
    [0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28];
/// EFI_CERT_X509_SHA256_GUID: the hash of a revoked certificate's TBS part, then a time.
const X509_SHA256: [u8; 16] =
    [0x92, 0xa4, 0xd2, 0x3b, 0xc0, 0x96, 0x79, 0x40, 0xb4, 0x20, 0xfc, 0xf9, 0x8e, 0xf1, 0x03, 0xed];
/// Signature type, list size, header size, entry size.
const LIST_HEADER_BYTES: usize = 28;
/// The owner's GUID, before each entry's data.
const OWNER_BYTES: usize = 16;
/// Components of SbatLevel; shim's has three.
const COMPONENTS_MAX: usize = 64;

/// What an entry of PK, KEK, db or dbx is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureKind {
    /// An X.509 certificate.
    Certificate,
    /// The SHA-256 (authenticode) digest of an image.
    ImageDigest,
    /// The SHA-256 digest of a certificate.
    CertificateDigest,
    /// Any other kind.
    Other,
}

/// One entry of PK, KEK, db or dbx, or what verified an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignatureEntry {
    /// The GUID of whoever put it there, as text.
    pub owner: String,
    /// What it is.
    pub kind: SignatureKind,
    /// SHA-256 of a certificate or of an entry of another kind; a digest entry's own digest.
    pub sha256: [u8; 32],
    /// A certificate's subject, for people.
    pub subject: Option<String>,
}

impl SignatureEntry {
    fn new(owner: &[u8], kind: SignatureKind, data: &[u8]) -> SignatureEntry {
        let listed: Option<[u8; 32]> = match kind {
            SignatureKind::ImageDigest => data.try_into().ok(),
            SignatureKind::CertificateDigest => data.get(..32).and_then(|d| d.try_into().ok()),
            SignatureKind::Certificate | SignatureKind::Other => None,
        };
        let subject = if kind == SignatureKind::Certificate { subject(data) } else { None };
        SignatureEntry { owner: guid(owner), kind, sha256: listed.unwrap_or_else(|| sha256(data)), subject }
    }

    /// What verified an image, from the value of an EV_EFI_VARIABLE_AUTHORITY: an EFI_SIGNATURE_DATA (PFP 3.3.4.8),
    /// but older shims measure the bare certificate.
    pub(super) fn of_authority(value: &[u8]) -> SignatureEntry {
        if let Some((owner, data)) = value.split_at_checked(OWNER_BYTES) {
            if is_certificate(data) {
                return Self::new(owner, SignatureKind::Certificate, data);
            }
            if data.len() == 32 {
                return Self::new(owner, SignatureKind::ImageDigest, data);
            }
        }
        let kind = if is_certificate(value) { SignatureKind::Certificate } else { SignatureKind::Other };
        Self::new(&[0; OWNER_BYTES], kind, value)
    }
}

/// The entries of a variable: any number of EFI_SIGNATURE_LISTs.
pub(super) fn entries(value: &[u8]) -> Result<Vec<SignatureEntry>, Malformed> {
    let mut r = Reader::new(value);
    let mut out = Vec::new();
    while r.remaining() > 0 {
        let at = r.at();
        let bad = |what| Malformed::new(what, at);
        let kind = match r.array::<16>("signature type")? {
            X509 => SignatureKind::Certificate,
            SHA256 => SignatureKind::ImageDigest,
            X509_SHA256 => SignatureKind::CertificateDigest,
            _ => SignatureKind::Other,
        };
        let size = |n: u32| usize::try_from(n).map_err(|_| bad("signature list size"));
        let list = size(r.u32_le("signature list size")?)?;
        let header = size(r.u32_le("signature header size")?)?;
        let entry = size(r.u32_le("signature size")?)?;
        let body = list.checked_sub(LIST_HEADER_BYTES).and_then(|n| n.checked_sub(header));
        let body = body.ok_or(bad("signature list size"))?;
        let whole = body.checked_rem(entry) == Some(0);
        let fits = match kind {
            SignatureKind::ImageDigest => entry == OWNER_BYTES.saturating_add(32),
            SignatureKind::CertificateDigest => entry == OWNER_BYTES.saturating_add(48),
            SignatureKind::Certificate | SignatureKind::Other => entry > OWNER_BYTES,
        };
        if !whole || !fits {
            return Err(bad("signature size"));
        }
        r.take(header, "signature header")?;
        for one in r.take(body, "signatures")?.chunks_exact(entry) {
            let (owner, data) = one.split_at_checked(OWNER_BYTES).ok_or(bad("signature size"))?;
            out.push(SignatureEntry::new(owner, kind, data));
        }
    }
    Ok(out)
}

/// Component and generation of each line of shim's SbatLevel (shim's SBAT.md): `component,generation[,anything]`.
pub(super) fn sbat_level(text: &[u8]) -> Option<BTreeMap<String, u32>> {
    let text = std::str::from_utf8(text).ok()?;
    let mut out: BTreeMap<String, u32> = BTreeMap::new();
    for line in text.trim_end_matches('\0').lines().filter(|l| !l.is_empty()) {
        let mut fields = line.split(',');
        let (component, generation): (&str, u32) = (fields.next()?, fields.next()?.parse().ok()?);
        // Of a repeated component only the lower generation can be relied on.
        let kept = out.entry(component.to_owned()).or_insert(generation);
        *kept = generation.min(*kept);
        if out.len() > COMPONENTS_MAX {
            return None;
        }
    }
    Some(out)
}

/// A GUID as people write it: the first three parts are little-endian.
fn guid(bytes: &[u8]) -> String {
    let &[a, b, c, d, e, f, g, h, ref rest @ ..] = bytes else { return hex::encode(bytes) };
    let (clock, node) = rest.split_at(rest.len().min(2));
    let head = [hex::encode([d, c, b, a]), hex::encode([f, e]), hex::encode([h, g])];
    format!("{}-{}-{}", head.join("-"), hex::encode(clock), hex::encode(node))
}

fn is_certificate(der: &[u8]) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(rest, _)| rest.is_empty())
}

/// The common name, or the whole subject where there is none.
fn subject(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next().and_then(|cn| cn.as_str().ok()).map(str::to_owned);
    Some(name.unwrap_or_else(|| subject.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(kind: [u8; 16], header: &[u8], entries: &[&[u8]]) -> Vec<u8> {
        let entry = entries.first().map_or(0, |e| e.len());
        let size = LIST_HEADER_BYTES + header.len() + entry * entries.len();
        let sizes = [size as u32, header.len() as u32, entry as u32];
        let mut out = kind.to_vec();
        out.extend(sizes.iter().flat_map(|n| n.to_le_bytes()));
        out.extend_from_slice(header);
        out.extend(entries.concat());
        out
    }

    #[test]
    fn lists_are_read_and_broken_ones_refused() {
        let digest = [[9u8; 16].as_slice(), &[7; 32]].concat();
        let good = list(SHA256, &[], &[&digest, &digest]);
        let read = entries(&good).unwrap();
        assert_eq!((read.len(), read[0].kind, read[0].sha256), (2, SignatureKind::ImageDigest, [7; 32]));
        assert_eq!(read[0].owner, "09090909-0909-0909-0909-090909090909");
        assert_eq!(entries(&[]).unwrap(), vec![]);
        assert_eq!(entries(&[good.as_slice(), &good].concat()).unwrap().len(), 4);
        let with = |at: usize, value: u32| {
            let mut out = good.clone();
            out[at..at + 4].copy_from_slice(&value.to_le_bytes());
            out
        };
        for (what, bytes) in [
            ("cut", good[..good.len() - 1].to_vec()),
            ("list too short for its header", with(16, 27)),
            ("list larger than the value", with(16, u32::MAX)),
            ("header larger than the list", with(20, u32::MAX)),
            ("entries of no size", with(24, 0)),
            ("entries of another size", with(24, 47)),
            ("trailing byte", [good.as_slice(), &[0]].concat()),
        ] {
            assert!(entries(&bytes).is_err(), "{what}");
        }
    }

    #[test]
    fn sbat_generations_compare_as_numbers() {
        let level = sbat_level(b"sbat,1,2025021800\nshim,10\ngrub,5\n\0").unwrap();
        assert_eq!(level["shim"], 10);
        assert_eq!(sbat_level(b"shim,4\nshim,2\n").unwrap()["shim"], 2);
        assert!(sbat_level(b"shim\n").is_none());
        assert!(sbat_level(b"shim,x\n").is_none());
        assert!(sbat_level(&[0xff, 0xfe]).is_none());
    }
}
