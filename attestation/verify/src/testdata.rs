//! The golden boot, for tests.

use crate::hash::HashAlg;
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
