//! A reader of BER (X.690) for EK certificates whose maker did not write DER, and the DER of what it read.
//!
//! Strict parsers run first. Where they fail, the certificate is written again in DER, and the strict parsers, with all
//! their checks, judge that. Only the signature is still taken over the octets that the maker signed.

use crate::OBJECT_BYTES_MAX;

/// Deepest nesting: an EK certificate needs nine.
const DEPTH_MAX: usize = 16;

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const SEQUENCE: u8 = 0x30;
const CONSTRUCTED: u8 = 0x20;
const EXTENSIONS: u8 = 0xa3;

/// One element, its length in any form that BER knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Element<'a> {
    /// Identifier octet; numbers above 30 are not read.
    pub(super) tag: u8,
    /// Content octets, without the end marker of an indefinite length.
    pub(super) content: &'a [u8],
    /// All of it.
    pub(super) whole: &'a [u8],
}

/// A certificate in DER, and what its maker signed.
#[derive(Debug)]
pub(super) struct Reencoded {
    pub(super) der: Vec<u8>,
    pub(super) tbs_der: Vec<u8>,
    pub(super) tbs_signed: Vec<u8>,
}

/// The first element of `bytes`, and the rest.
pub(super) fn element(bytes: &[u8]) -> Option<(Element<'_>, &[u8])> {
    read(bytes, DEPTH_MAX)
}

/// The elements that fill `content`, at most as many as a certificate can have.
pub(super) fn children(mut content: &[u8]) -> Option<Vec<Element<'_>>> {
    let mut out = Vec::new();
    while !content.is_empty() {
        let (child, rest) = element(content)?;
        out.push(child);
        content = rest;
    }
    Some(out)
}

/// The certificate in `bytes`, written in DER.
pub(super) fn reencode(bytes: &[u8]) -> Option<Reencoded> {
    let (certificate, rest) = element(bytes)?;
    if certificate.tag != SEQUENCE || !rest.is_empty() || bytes.len() > OBJECT_BYTES_MAX {
        return None;
    }
    let parts = children(certificate.content)?;
    let [tbs, algorithm, signature] = parts.as_slice() else { return None };
    let tbs_der = tbs_to_der(tbs)?;
    let content = [tbs_der.as_slice(), &to_der(algorithm, DEPTH_MAX)?, &to_der(signature, DEPTH_MAX)?].concat();
    Some(Reencoded { der: der(SEQUENCE, &content)?, tbs_der, tbs_signed: tbs.whole.to_vec() })
}

fn read(bytes: &[u8], depth: usize) -> Option<(Element<'_>, &[u8])> {
    let (&tag, after_tag) = bytes.split_first()?;
    if tag & 0x1f == 0x1f {
        return None;
    }
    let (&first, after_length) = after_tag.split_first()?;
    let (content, rest) = match first {
        0x80 => until_end(tag, after_length, depth)?,
        0x81..=0x84 => {
            let (length, content) = after_length.split_at_checked(usize::from(first & 0x7f))?;
            let n = length.iter().try_fold(0usize, |n, b| n.checked_mul(256)?.checked_add(usize::from(*b)))?;
            content.split_at_checked(n)?
        }
        0..0x80 => after_length.split_at_checked(usize::from(first))?,
        0x85.. => return None,
    };
    let whole = bytes.get(..bytes.len().checked_sub(rest.len())?)?;
    Some((Element { tag, content, whole }, rest))
}

/// The content of an indefinite length: elements up to two zero octets (X.690, 8.1.3.6).
fn until_end(tag: u8, content: &[u8], depth: usize) -> Option<(&[u8], &[u8])> {
    if tag & CONSTRUCTED == 0 {
        return None;
    }
    let depth = depth.checked_sub(1)?;
    let mut rest = content;
    loop {
        if let Some(after) = rest.strip_prefix(&[0, 0]) {
            return Some((content.get(..content.len().checked_sub(rest.len())?)?, after));
        }
        (_, rest) = read(rest, depth)?;
    }
}

/// Values of extensions are DER inside an OCTET STRING, so a maker's BER goes on in there.
fn tbs_to_der(tbs: &Element<'_>) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for field in children(tbs.content)? {
        if field.tag != EXTENSIONS {
            out.extend(to_der(&field, DEPTH_MAX)?);
            continue;
        }
        let list = children(field.content)?;
        let [list] = list.as_slice() else { return None };
        let mut extensions = Vec::new();
        for extension in children(list.content)? {
            let mut parts = Vec::new();
            for part in children(extension.content)? {
                let part_der = to_der(&part, DEPTH_MAX)?;
                parts.extend(if part.tag & !CONSTRUCTED == OCTET_STRING { value_to_der(&part_der)? } else { part_der });
            }
            extensions.extend(der(SEQUENCE, &parts)?);
        }
        out.extend(der(EXTENSIONS, &der(list.tag, &extensions)?)?);
    }
    der(tbs.tag, &out)
}

/// An OCTET STRING with the DER of the one element in it.
fn value_to_der(octets: &[u8]) -> Option<Vec<u8>> {
    let (string, _) = element(octets)?;
    let (value, rest) = element(string.content)?;
    if !rest.is_empty() {
        return None;
    }
    der(OCTET_STRING, &to_der(&value, DEPTH_MAX)?)
}

fn to_der(e: &Element<'_>, depth: usize) -> Option<Vec<u8>> {
    let depth = depth.checked_sub(1)?;
    if e.tag == OCTET_STRING | CONSTRUCTED {
        let pieces = children(e.content)?;
        // Strings in strings in strings are nobody's habit.
        let whole = pieces.iter().all(|p| p.tag == OCTET_STRING);
        let joined = pieces.iter().map(|p| p.content).collect::<Vec<_>>().concat();
        return if whole { der(OCTET_STRING, &joined) } else { None };
    }
    if e.tag & CONSTRUCTED != 0 {
        let mut out = Vec::new();
        for child in children(e.content)? {
            out.extend(to_der(&child, depth)?);
        }
        return der(e.tag, &out);
    }
    match (e.tag, e.content) {
        (BOOLEAN, [value]) => der(BOOLEAN, &[if *value == 0 { 0 } else { 0xff }]),
        (BOOLEAN, _) => None,
        (INTEGER, mut content) => {
            while let [0, next @ ..] = content
                && next.first().is_some_and(|b| b & 0x80 == 0)
            {
                content = next;
            }
            der(INTEGER, content)
        }
        (tag, content) => der(tag, content),
    }
}

/// One element with its length in the shortest form.
fn der(tag: u8, content: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![tag];
    let [high, low] = u16::try_from(content.len()).ok()?.to_be_bytes();
    match (high, low) {
        (0, n @ 0..=0x7f) => out.push(n),
        (0, n) => out.extend([0x81, n]),
        (h, l) => out.extend([0x82, h, l]),
    }
    out.extend_from_slice(content);
    Some(out)
}
