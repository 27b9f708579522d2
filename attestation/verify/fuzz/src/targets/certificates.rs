//! Certificates and certificate requests.

use crate::{SOON, Shape, Target, Verdict, golden};
use ambit_model::Refusal;
use ambit_verify::{
    BeginInput, EkClass, EkRoot, Endorsements, Expected, INTERMEDIATES_MAX, PresentedEk, csr as evidence_csr,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use std::sync::OnceLock;

/// An EK certificate as read from NV, of the recorded EK, under the recorded maker.
pub(super) const EK: Target = Target {
    name: "ek_certificate",
    len_max: 2048,
    cpu: SOON,
    heap: |n| 96 * 1024 + 128 * n,
    run: ek,
    shapes: CERTIFICATE_SHAPES,
};

const CERTIFICATE_SHAPES: &[Shape] = &[
    Shape { name: "padding", bytes: LARGEST, make: |n| padded(0xff, n) },
    Shape { name: "nested sequences", bytes: LARGEST, make: nested },
    Shape { name: "nested sequences without lengths", bytes: LARGEST, make: |n| [0x30, 0x80].repeat(n / 2) },
    Shape { name: "sequences without lengths, side by side", bytes: LARGEST, make: |n| indefinite(n, 1) },
    Shape { name: "the same, 14 deep", bytes: LARGEST, make: |n| indefinite(n, 14) },
    Shape { name: "null after null", bytes: LARGEST, make: |n| in_a_sequence(&[5, 0].repeat(n / 2 - 2)) },
    Shape { name: "zeros", bytes: LARGEST, make: |n| vec![0; n] },
];

/// The limit of one certificate or request.
const LARGEST: usize = ambit_verify::OBJECT_BYTES_MAX;

fn endorse(leaf: &[u8], intermediates: Vec<Vec<u8>>, endorsements: &Endorsements) -> Result<EkClass, Refusal> {
    let presented = PresentedEk::parse(BeginInput {
        cluster: "west".parse().expect("a name"),
        ek_certificate: leaf.to_vec(),
        ek_intermediates: intermediates,
        ek_public: golden::ek_public().to_vec(),
        ak_public: golden::AK_PUBLIC.to_vec(),
        agent_nonce: vec![7; 32],
    })?;
    // Not listed by hand: then an empty certificate would be none at all.
    let endorsed = presented.endorse(Expected::JoinToken([1; 32]), endorsements, golden::NOW)?;
    Ok(endorsed.class())
}

fn ek(input: &[u8]) -> Verdict {
    static ENDORSEMENTS: OnceLock<Endorsements> = OnceLock::new();
    let endorsed = endorse(input, vec![], ENDORSEMENTS.get_or_init(|| golden::endorsements(true)));
    if let Ok(class) = &endorsed {
        assert_eq!(*class, EkClass::Lab);
        // Nobody here can sign for the maker: what is accepted holds what the maker signed, to the letter. Around it,
        // BER may be written in other forms, and padding may follow.
        assert!(holds(input, recorded_tbs()), "another certificate is accepted");
        let padding = input.strip_prefix(recorded_leaf()).unwrap_or_default();
        assert!(padding.iter().all(|b| *b == 0) || padding.iter().all(|b| *b == 0xff), "{padding:02x?}");
    }
    Verdict::from(&endorsed)
}

fn holds(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

/// What the maker signed: the first element inside, whose length takes two bytes as well.
fn recorded_tbs() -> &'static [u8] {
    let inside = &recorded_leaf()[4..];
    &inside[..4 + usize::from(u16::from_be_bytes([inside[2], inside[3]]))]
}

/// The recorded certificate without its padding: a sequence whose length takes two bytes.
fn recorded_leaf() -> &'static [u8] {
    let length = u16::from_be_bytes([golden::EK_CERTIFICATE[2], golden::EK_CERTIFICATE[3]]);
    &golden::EK_CERTIFICATE[..4 + usize::from(length)]
}

/// The certificates between an EK's and a root. The input: how many roots the cluster has (16 bits), then each
/// certificate after its length (16 bits), the EK's first.
pub(super) const EK_CHAIN: Target = Target {
    name: "ek_chain",
    len_max: 8 * 1024,
    cpu: SOON,
    heap: |n| 512 * 1024 + 128 * n,
    run: ek_chain,
    shapes: &[
        Shape { name: "issuers of one name, 1 root", bytes: 0, make: |_| maze(1, false) },
        Shape { name: "issuers of one name, 256 roots", bytes: 0, make: |_| maze(256, false) },
        Shape { name: "issuers of the roots' name, 1 root", bytes: 0, make: |_| maze(1, true) },
        Shape { name: "issuers of the roots' name, 256 roots", bytes: 0, make: |_| maze(256, true) },
        Shape {
            name: "issuers of 16 KiB, 256 roots",
            bytes: 0,
            make: |_| chain_input(256, &vec![nested(LARGEST); INTERMEDIATES_MAX + 1]),
        },
    ],
};

fn ek_chain(input: &[u8]) -> Verdict {
    let Some((roots, mut rest)) = input.split_first_chunk() else { return Verdict::Refused };
    let mut sent = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk() {
        let (one, next) = tail.split_at(usize::from(u16::from_be_bytes(*length)).min(tail.len()));
        sent.push(one.to_vec());
        rest = next;
    }
    if sent.is_empty() {
        return Verdict::Refused;
    }
    let leaf = sent.remove(0);
    let roots = usize::from(u16::from_be_bytes(*roots)).clamp(1, 256);
    let endorsements = &all_roots()[usize::from(roots > 1)];
    let endorsed = endorse(&leaf, sent.clone(), endorsements);
    if let Ok(class) = &endorsed {
        assert_eq!(*class, EkClass::Lab, "the class of a root that did not sign");
        assert!(holds(&leaf, recorded_tbs()), "another certificate is accepted");
        assert!(sent.contains(&golden::issuer()), "accepted without its issuer");
    }
    Verdict::from(&endorsed)
}

/// One root, and that one after 255 others.
fn all_roots() -> &'static [Endorsements; 2] {
    static ROOTS: OnceLock<[Endorsements; 2]> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let one = golden::endorsements(false);
        let key = KeyPair::generate().expect("a key");
        let other = authority(ROOT_NAME).self_signed(&key).expect("a root").der().to_vec();
        let mut all = vec![EkRoot { der: other, class: EkClass::Hardware }; 255];
        all.extend(one.roots.iter().cloned());
        [one, Endorsements { roots: all, intermediates: vec![], denied: vec![] }]
    })
}

const ROOT_NAME: &str = "a root";

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn chain_input(roots: u16, certificates: &[Vec<u8>]) -> Vec<u8> {
    let mut out = roots.to_be_bytes().to_vec();
    for one in certificates {
        let one = &one[..one.len().min(LARGEST)];
        out.extend(u16::try_from(one.len()).expect("short").to_be_bytes());
        out.extend(one);
    }
    out
}

/// A certificate whose issuer's name all issuers bear, each of which may be the issuer of each other: so many paths
/// that only a budget ends the search (RFC 5280 has none; webpki has).
fn maze(roots: u16, under_a_root: bool) -> Vec<u8> {
    let name = if under_a_root { ROOT_NAME } else { "an issuer" };
    let keys: Vec<_> = (0..INTERMEDIATES_MAX).map(|_| KeyPair::generate().expect("a key")).collect();
    let parent = authority(name);
    let signing = Issuer::from_params(&parent, &keys[0]);
    let mut all = vec![];
    let leaf_key = KeyPair::generate().expect("a key");
    let mut leaf = CertificateParams::default();
    leaf.distinguished_name.push(DnType::CommonName, "an EK");
    leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
    all.push(leaf.signed_by(&leaf_key, &signing).expect("a certificate").der().to_vec());
    for key in &keys {
        let one = authority(name).signed_by(key, &signing).expect("a certificate");
        all.push(one.der().to_vec());
    }
    chain_input(roots, &all)
}

fn padded(with: u8, n: usize) -> Vec<u8> {
    let mut out = recorded_leaf().to_vec();
    out.resize(n.max(out.len()), with);
    out
}

/// Sequences in sequences, each with a length of two bytes.
fn nested(n: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(n);
    while out.len() + 4 <= n {
        let left = u16::try_from(n - out.len() - 4).expect("short");
        out.extend([0x30, 0x82]);
        out.extend(left.to_be_bytes());
    }
    out
}

fn in_a_sequence(content: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(content.len()).expect("short").to_be_bytes();
    [&[0x30, 0x82, high, low], content].concat()
}

/// Empty sequences of indefinite length side by side, inside of `depth` others.
fn indefinite(n: usize, depth: usize) -> Vec<u8> {
    let inside = [0x30, 0x80, 0, 0].repeat((n - 4 - depth * 4) / 4);
    in_a_sequence(&[[0x30, 0x80].repeat(depth), inside, vec![0; depth * 2]].concat())
}

/// Certificate requests of nodes (in evidence) and of workloads and replicas (issuing).
pub(super) const CSR: Target = Target {
    name: "csr",
    len_max: 2048,
    cpu: SOON,
    heap: |n| 96 * 1024 + 128 * n,
    run: csr,
    shapes: &[
        Shape { name: "nested sequences", bytes: LARGEST, make: nested },
        Shape { name: "zeros", bytes: LARGEST, make: |n| vec![0; n] },
    ],
};

fn csr(input: &[u8]) -> Verdict {
    let of_node = evidence_csr::p256_spki(input);
    if let Ok(spki) = &of_node {
        assert!(input.windows(spki.len()).any(|window| window == spki), "a key that the request does not hold");
    }
    let of_workload = ambit_identity::Csr::parse(input);
    if let Ok(csr) = &of_workload {
        // The stricter of the two: what it takes the other takes, and reads the same key.
        assert_eq!(of_node.as_deref(), Ok(csr.spki()));
    }
    Verdict::from(&of_node)
}
