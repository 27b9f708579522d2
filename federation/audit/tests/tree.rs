//! The tree against the words of RFC 6962, read as they stand, and against its published test vectors.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_audit::tree::empty_root;
use ambit_audit::{Frontier, Hash, Nodes, consistency, inclusion, leaf_hash, verify_consistency, verify_inclusion};
use sha2::{Digest, Sha256};

/// MTH of section 2.1, recursive, with nothing of the crate.
fn mth(d: &[Vec<u8>]) -> Hash {
    match d {
        [] => Sha256::digest(b"").into(),
        [one] => Sha256::digest([&[0u8], one.as_slice()].concat()).into(),
        _ => {
            let mut k = 1;
            while k * 2 < d.len() {
                k *= 2;
            }
            Sha256::digest([&[1u8], mth(&d[..k]).as_slice(), mth(&d[k..]).as_slice()].concat()).into()
        }
    }
}
/// PATH of section 2.1.1.
fn path(m: usize, d: &[Vec<u8>]) -> Vec<Hash> {
    if d.len() == 1 {
        return vec![];
    }
    let mut k = 1;
    while k * 2 < d.len() {
        k *= 2;
    }
    if m < k {
        [path(m, &d[..k]), vec![mth(&d[k..])]].concat()
    } else {
        [path(m - k, &d[k..]), vec![mth(&d[..k])]].concat()
    }
}
/// PROOF and SUBPROOF of section 2.1.2.
fn subproof(m: usize, d: &[Vec<u8>], b: bool) -> Vec<Hash> {
    if m == d.len() {
        return if b { vec![] } else { vec![mth(d)] };
    }
    let mut k = 1;
    while k * 2 < d.len() {
        k *= 2;
    }
    if m <= k {
        [subproof(m, &d[..k], b), vec![mth(&d[k..])]].concat()
    } else {
        [subproof(m - k, &d[k..], false), vec![mth(&d[..k])]].concat()
    }
}

/// Hashes computed from entries each time.
struct Naive(Vec<Vec<u8>>);
impl Nodes for Naive {
    type Error = String;
    fn node(&self, level: u32, index: u64) -> Result<Hash, String> {
        let (from, to) = ((index << level) as usize, ((index + 1) << level) as usize);
        self.0.get(from..to).map(mth).ok_or_else(|| format!("{level} {index}"))
    }
}

fn entries(n: usize) -> Vec<Vec<u8>> {
    (0..n).map(|i| vec![i as u8; i % 7]).collect()
}

#[test]
fn roots_and_proofs_are_those_of_the_rfc() {
    let all = entries(70);
    let mut frontier = Frontier::default();
    assert_eq!(frontier.root(), empty_root());
    for n in 1..=all.len() {
        frontier.push(leaf_hash(&all[n - 1]));
        let (d, root) = (&all[..n], mth(&all[..n]));
        assert_eq!((frontier.size(), frontier.root()), (n as u64, root));
        assert_eq!(Frontier::new(n as u64, frontier.peaks().to_vec()).as_ref(), Some(&frontier));
        let nodes = Naive(d.to_vec());
        for m in 0..n {
            let proof = inclusion(&nodes, m as u64, n as u64).unwrap();
            assert_eq!(proof, path(m, d), "{m} of {n}");
            verify_inclusion(&leaf_hash(&d[m]), m as u64, n as u64, &proof, &root).unwrap();
        }
        for m in 1..=n {
            let proof = consistency(&nodes, m as u64, n as u64).unwrap();
            assert_eq!(proof, subproof(m, d, true), "{m} to {n}");
            verify_consistency(m as u64, n as u64, &mth(&d[..m]), &root, &proof).unwrap();
        }
    }
}

/// Whatever is changed of a proof, it does not verify.
#[test]
fn altered_proofs_are_refused() {
    let d = entries(37);
    let (nodes, root) = (Naive(d.clone()), mth(&d));
    for m in 0..37u64 {
        let (leaf, proof) = (leaf_hash(&d[m as usize]), inclusion(&nodes, m, 37).unwrap());
        for other in (0..37).filter(|other| *other != m) {
            assert!(verify_inclusion(&leaf, other, 37, &proof, &root).is_err(), "{m} as {other}");
        }
        assert!(verify_inclusion(&leaf, m, 37, &proof[1..], &root).is_err());
        assert!(verify_inclusion(&leaf, m, 37, &[proof.clone(), vec![[0; 32]]].concat(), &root).is_err());
        assert!(verify_inclusion(&leaf_hash(b"other"), m, 37, &proof, &root).is_err());
        for i in 0..proof.len() {
            let mut altered = proof.clone();
            altered[i][5] ^= 1;
            assert!(verify_inclusion(&leaf, m, 37, &altered, &root).is_err());
        }
        assert!(verify_inclusion(&leaf, m + 37, 37, &proof, &root).is_err());
    }
    for m in 1..37u64 {
        let (old, proof) = (mth(&d[..m as usize]), consistency(&nodes, m, 37).unwrap());
        for i in 0..proof.len() {
            let mut altered = proof.clone();
            altered[i][9] ^= 1;
            assert!(verify_consistency(m, 37, &old, &root, &altered).is_err());
            assert!(verify_consistency(m, 37, &old, &root, &proof[..i]).is_err());
        }
        assert!(verify_consistency(m, 37, &[1; 32], &root, &proof).is_err());
        assert!(verify_consistency(m, 37, &old, &[1; 32], &proof).is_err());
        assert!(verify_consistency(m, 37, &old, &root, &[proof, vec![[0; 32]]].concat()).is_err());
    }
    assert!(verify_consistency(37, 37, &root, &[1; 32], &[]).is_err());
    assert!(verify_consistency(0, 37, &[1; 32], &root, &[]).is_err());
    assert!(verify_consistency(38, 37, &root, &root, &[]).is_err());
    verify_consistency(0, 37, &empty_root(), &root, &[]).unwrap();
}

/// Published with certificate-transparency (`merkletree/merkle_tree_test.cc`) and used by every implementation since.
#[test]
fn published_vectors() {
    let leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
    let roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];
    let mut frontier = Frontier::default();
    for (leaf, root) in leaves.iter().zip(roots) {
        frontier.push(leaf_hash(&hex::decode(leaf).unwrap()));
        assert_eq!(hex::encode(frontier.root()), root);
    }
}
