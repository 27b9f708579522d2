//! The recorded boot (`../tests/golden`), compiled in: a target needs no file but its input.

use ambit_model::Stamp;
use ambit_verify::{EkClass, EkRoot, Endorsements, HashAlg};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::collections::BTreeMap;
use std::sync::OnceLock;

macro_rules! recorded {
    ($name:literal) => {
        include_bytes!(concat!("../../tests/golden/", $name))
    };
}

pub(crate) const BOOT_LOG: &[u8] = recorded!("secureboot-grub/binary_bios_measurements");
pub(crate) const IMA_LOG: &[u8] = recorded!("secureboot-grub/ima_binary_runtime_measurements");
pub(crate) const AK_PUBLIC: &[u8] = recorded!("secureboot-grub/ak.tpmt_public");
pub(crate) const EK_CERTIFICATE: &[u8] = recorded!("secureboot-grub/ek-rsa2048.nv.der");
const EK_TPM2B: &[u8] = recorded!("secureboot-grub/ek.tpm2b_public");
const ROOT: &[u8] = recorded!("ca/swtpm-localca-rootca-cert.pem");
const ISSUER: &[u8] = recorded!("ca/issuercert.pem");

/// 2026-11-25, two days after the boot.
pub(crate) const NOW: Stamp = Stamp(1_795_600_000_000);
/// PCRs 0-10 and 14.
pub(crate) const MASK: u32 = 0x47ff;

/// TPMT_PUBLIC of the EK.
pub(crate) fn ek_public() -> &'static [u8] {
    &EK_TPM2B[2..]
}

fn der(pem: &[u8]) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem).expect("a recorded certificate").to_vec()
}

pub(crate) fn issuer() -> Vec<u8> {
    der(ISSUER)
}

/// The maker's root; its issuing certificate only where `with_issuer`.
pub(crate) fn endorsements(with_issuer: bool) -> Endorsements {
    let root = EkRoot { der: der(ROOT), class: EkClass::Lab };
    let intermediates = if with_issuer { vec![issuer()] } else { vec![] };
    Endorsements { roots: vec![root], intermediates, denied: vec![] }
}

/// PCRs of the mask as the kernel showed them.
pub(crate) fn pcrs(hash: HashAlg) -> &'static BTreeMap<u32, Vec<u8>> {
    static BANKS: OnceLock<Vec<BTreeMap<u32, Vec<u8>>>> = OnceLock::new();
    let banks = BANKS.get_or_init(|| {
        let shown: [&str; 3] = [
            include_str!("../../tests/golden/secureboot-grub/pcrs.sha1"),
            include_str!("../../tests/golden/secureboot-grub/pcrs.sha256"),
            include_str!("../../tests/golden/secureboot-grub/pcrs.sha384"),
        ];
        shown.iter().map(|text| read_pcrs(text)).collect()
    });
    &banks[match hash {
        HashAlg::Sha1 => 0,
        HashAlg::Sha256 => 1,
        HashAlg::Sha384 | HashAlg::Sha512 => 2,
    }]
}

fn read_pcrs(text: &str) -> BTreeMap<u32, Vec<u8>> {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    let all = lines.map(|(n, value)| (n.parse::<u32>().expect("an index"), unhex(value.trim())));
    all.filter(|(n, _)| MASK & (1 << n) != 0).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).expect("text"));
    digits.map(|pair| u8::from_str_radix(pair, 16).expect("hexadecimal digits")).collect()
}
