//! Private keys where none should be: in the memory of live processes and in logs, found by their forms and by their bytes.

use anyhow::{Context, Result, ensure};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use memchr::memmem;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The 32 bytes of a P-256 or Ed25519 private key, big-endian.
pub type Secret = [u8; 32];

/// ECPrivateKey of version 1 with 32 bytes (RFC 5915): in PKCS#8 and by itself.
const P256: &[u8] = &[2, 1, 1, 4, 32];
/// CurvePrivateKey of 32 bytes (RFC 8410).
const ED25519: &[u8] = &[4, 34, 4, 32];
const PEM: &str = "PRIVATE KEY-----";
/// Read at once; forms that lie across are found by what is read again.
const PIECE: u64 = 8 << 20;
const AGAIN: u64 = 4096;
const PAGE: u64 = 4096;
/// A key's bytes are random: fewer different ones are something else that happens to follow the form's first bytes.
const DIFFERENT_MIN: usize = 20;

/// What a text or an image says by the forms in which keys are written: DER, or PEM around it.
pub fn by_form(bytes: &[u8]) -> BTreeSet<Secret> {
    let mut out = der(bytes);
    for at in memmem::find_iter(bytes, PEM) {
        let body = bytes[at + PEM.len()..].iter().take(AGAIN as usize);
        let base64: Vec<u8> = body.filter(|b| !b.is_ascii_whitespace()).take_while(|b| **b != b'-').copied().collect();
        // Cut short it still holds the key, which comes first.
        let whole = base64.len() / 4 * 4;
        out.extend(STANDARD.decode(&base64[..whole]).iter().flat_map(|decoded| der(decoded)));
    }
    out
}

fn der(bytes: &[u8]) -> BTreeSet<Secret> {
    let of = |form: &'static [u8]| memmem::find_iter(bytes, form).map(move |at| at + form.len());
    let secrets = of(P256).chain(of(ED25519)).filter_map(|at| bytes.get(at..at + 32)?.try_into().ok());
    secrets.filter(|s: &Secret| s.iter().collect::<BTreeSet<_>>().len() >= DIFFERENT_MIN).collect()
}

/// Whether the bytes themselves are there, in either order: libraries compute with little-endian words.
pub fn by_bytes(bytes: &[u8], secret: &Secret) -> bool {
    let mut turned = *secret;
    turned.reverse();
    memmem::find(bytes, secret).is_some() || memmem::find(bytes, &turned).is_some()
}

/// The key in a file: PEM or DER.
pub fn in_file(path: &Path) -> Result<Secret> {
    let found = by_form(&std::fs::read(path).with_context(|| path.display().to_string())?);
    ensure!(found.len() == 1, "{} keys in {}", found.len(), path.display());
    found.into_iter().next().context("a key")
}

/// The public point of a P-256 key, uncompressed.
pub fn point(secret: &Secret) -> Result<Vec<u8>> {
    let key = PrivateKey::from_private_key(&ECDH_P256, secret).context("a scalar of P-256")?;
    Ok(key.compute_public_key().context("a point of P-256")?.as_ref().to_vec())
}

/// The readable memory of a process, piece by piece: a dump as root could take it.
pub fn each_piece(pid: u32, mut look: impl FnMut(&[u8])) -> Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).context("the maps of a process")?;
    let memory = File::open(format!("/proc/{pid}/mem")).context("the memory of a process, as root")?;
    let (mut piece, mut all) = (vec![0; PIECE as usize], 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some((from, to)), Some(how)) = (words.next().and_then(|range| range.split_once('-')), words.next()) else {
            continue;
        };
        let (mut at, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        // What the kernel shows of itself can be read by the process only.
        if !how.starts_with('r') || line.ends_with("[vvar]") || line.ends_with("[vsyscall]") {
            continue;
        }
        while at < to {
            let length = usize::try_from((to - at).min(PIECE))?;
            // A part of it may be given back meanwhile, or be nobody's to read.
            let read = memory.read_at(&mut piece[..length], at).unwrap_or_default();
            if read == 0 {
                at += PAGE;
                continue;
            }
            look(&piece[..read]);
            all += read as u64;
            at += if read as u64 > AGAIN && at + (read as u64) < to { read as u64 - AGAIN } else { read as u64 };
        }
    }
    Ok(all)
}

/// What is found of `known` by their bytes, and of all keys by their forms.
pub fn search(pid: u32, known: &[(String, Secret)]) -> Result<(BTreeSet<&str>, BTreeSet<Secret>)> {
    let (mut names, mut forms) = (BTreeSet::new(), BTreeSet::new());
    let bytes = each_piece(pid, |piece| {
        names.extend(known.iter().filter(|(_, secret)| by_bytes(piece, secret)).map(|(name, _)| name.as_str()));
        forms.extend(by_form(piece));
    })?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let resident: u64 = resident.context("VmRSS")?.trim().parse()?;
    ensure!(bytes >= resident * 1024, "only {bytes} bytes of {pid} were read, of {resident} kB");
    Ok((names, forms))
}

/// Keys in the files below a folder whose names end with `.log`, each with the file.
pub fn in_logs(folder: &Path) -> Result<Vec<String>> {
    let mut out = Vec::new();
    let Some(entries) = unless_gone(std::fs::read_dir(folder), folder)? else { return Ok(out) };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            out.extend(in_logs(&path)?);
        } else if path.extension().is_some_and(|e| e == "log")
            && let Some(text) = unless_gone(std::fs::read(&path), &path)?
            && in_text(&text)
        {
            out.push(path.display().to_string());
        }
    }
    Ok(out)
}

/// What vanished meanwhile holds nothing any more.
fn unless_gone<T>(found: std::io::Result<T>, path: &Path) -> Result<Option<T>> {
    match found {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some).with_context(|| path.display().to_string()),
    }
}

/// Whether a text holds a private key as programs write one: PEM, or the bytes of DER raw, as base64, as hexadecimal or as Rust
/// shows them.
pub fn in_text(text: &[u8]) -> bool {
    // The beginning of PKCS#8 for P-256 and for Ed25519, and of SEC 1, as base64 that starts there.
    let written: [&[u8]; 7] = [
        b"MIGHAgEAMBMGByqGSM49",
        b"MC4CAQAwBQYDK2Vw",
        b"MHcCAQEEI",
        b"0201010420",
        b"04220420",
        b"2, 1, 1, 4, 32, ",
        b"4, 34, 4, 32, ",
    ];
    !by_form(text).is_empty() || written.iter().any(|form| memmem::find(text, form).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_identity::{RecordKey, SvidKey};

    #[test]
    fn a_key_is_found_in_every_form_and_nothing_in_what_has_none() {
        let key = SvidKey::generate().unwrap();
        let (der, pem) = (key.pkcs8(), key.pem());
        let secret = *by_form(&der).first().unwrap();
        assert_eq!(by_form(pem.as_bytes()), [secret].into());
        let turned: Vec<u8> = secret.iter().rev().copied().collect();
        for (text, found) in [
            (der.to_vec(), true),
            (pem.as_bytes().to_vec(), true),
            (STANDARD.encode(&*der).into_bytes(), true),
            (hex::encode(&*der).into_bytes(), true),
            (format!("{:?}", &**der).into_bytes(), true),
            (format!("{:?}", RecordKey::generate().unwrap().pkcs8()).into_bytes(), true),
            (RecordKey::generate().unwrap().pkcs8().to_vec(), true),
            (b"-----BEGIN PRIVATE KEY----- is what a key begins with".to_vec(), false),
            (vec![2, 1, 1, 4, 32, 0, 0], false),
        ] {
            assert_eq!(in_text(&text), found, "{}", String::from_utf8_lossy(&text));
        }
        assert!(by_bytes(&[&[7; 100], turned.as_slice()].concat(), &secret) && !by_bytes(&[7; 100], &secret));
    }
}
