use super::*;
use crate::hash::sha256;
use crate::public::AttestationKey;
use crate::testdata::{AttestSpec, SoftwareAk, p256_public, tpm2b};

const QN: [u8; 34] = [7; 34];
const DATA: [u8; 32] = [4; 32];
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, sign.
const SIGNER: u32 = 0x0004_0072;
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, decrypt.
const AGREES: u32 = 0x0002_0072;

/// One certification, honest unless a row changes it.
struct Claim {
    attributes: u32,
    name_alg: u8,
    spec: AttestSpec,
    name: Option<Vec<u8>>,
    other_csr: bool,
    by_other_ak: bool,
    wrap: bool,
    edit: fn(&mut Vec<u8>, &mut Vec<u8>, &mut Vec<u8>),
}

impl Claim {
    fn honest() -> Claim {
        let mut spec = AttestSpec::quote(&QN, &[]);
        (spec.kind, spec.extra_data) = (0x8017, DATA.to_vec());
        Claim {
            attributes: SIGNER,
            name_alg: 0x0b,
            spec,
            name: None,
            other_csr: false,
            by_other_ak: false,
            wrap: false,
            edit: |_, _, _| {},
        }
    }

    fn judge(self) -> Result<Proven, Refusal> {
        let (ak, other) = (SoftwareAk::p256(), SoftwareAk::p256());
        let point = SoftwareAk::p256().point();
        let mut public = p256_public(self.attributes, &point);
        public[3] = self.name_alg;
        let name = self.name.unwrap_or_else(|| [&[0, 0x0b][..], &sha256(&public)].concat());
        let mut attest = [self.spec.head(), tpm2b(&name), tpm2b(&[1; 34])].concat();
        let mut signature = if self.by_other_ak { other.sign(&attest) } else { ak.sign(&attest) };
        (self.edit)(&mut public, &mut attest, &mut signature);
        let csr = if self.other_csr { other.public.clone() } else { p256_public(SIGNER, &point) };
        let csr_spki = Public::parse(&csr).unwrap().spki_der();
        let ak = AkVerifier::new(&AttestationKey::new(Public::parse(&ak.public).unwrap()).unwrap()).unwrap();
        let (key, none) = ((public, attest, signature), Default::default());
        let (svid, wrap) = if self.wrap { (none, key) } else { (key, none) };
        let proven = KeyHome::from_wire(svid, wrap).unwrap().judge(&ak, &QN, &DATA, &csr_spki)?;
        if let Proven::WrapKey(found) = &proven {
            assert_eq!(*found, point);
        }
        Ok(proven)
    }
}

#[test]
fn a_certified_key_is_in_the_tpm() {
    assert_eq!(Claim::honest().judge().unwrap(), Proven::SvidKey);
    // TPMs may add noDA; a signing key may be without userWithAuth.
    for attributes in [SIGNER | 1 << 10, SIGNER & !(1 << 6)] {
        assert_eq!(Claim { attributes, ..Claim::honest() }.judge().unwrap(), Proven::SvidKey);
    }
    for attributes in [AGREES, AGREES | 1 << 10, AGREES & !(1 << 6)] {
        let claim = Claim { attributes, wrap: true, other_csr: true, ..Claim::honest() };
        assert!(matches!(claim.judge().unwrap(), Proven::WrapKey(_)));
    }
}

#[test]
fn each_lie_of_a_wrap_key_is_refused() {
    type Row = (&'static str, &'static str, fn(&mut Claim));
    let rows: &[Row] = &[
        ("not fixedTPM", "attributes", |c| c.attributes ^= 1 << 1),
        ("not fixedParent", "attributes", |c| c.attributes ^= 1 << 4),
        ("imported", "attributes", |c| c.attributes ^= 1 << 5),
        ("restricted", "attributes", |c| c.attributes |= 1 << 16),
        ("does not decrypt", "attributes", |c| c.attributes ^= 1 << 17),
        ("signs too", "attributes", |c| c.attributes |= 1 << 18),
        ("name by SHA-1", "name by sha1", |c| c.name_alg = 4),
        ("by another AK", "does not verify", |c| c.by_other_ak = true),
        ("under another EK", "qualified signer", |c| c.spec.signer[9] ^= 1),
        ("of another session", "extraData", |c| c.spec.extra_data[0] ^= 1),
        ("of another object", "another name", |c| c.name = Some([&[0, 0x0b][..], &[1; 32]].concat())),
    ];
    for (what, found, change) in rows {
        let mut claim = Claim { attributes: AGREES, wrap: true, ..Claim::honest() };
        change(&mut claim);
        let refusal = claim.judge().expect_err(what);
        assert_eq!(refusal.code, Code::KeyNotCertified, "{what}");
        assert!(refusal.found.contains(found), "{what}: {}", refusal.found);
    }
}

#[test]
fn each_lie_is_refused() {
    type Row = (&'static str, &'static str, fn(&mut Claim));
    let rows: &[Row] = &[
        ("not fixedTPM", "attributes", |c| c.attributes ^= 1 << 1),
        ("not fixedParent", "attributes", |c| c.attributes ^= 1 << 4),
        ("imported", "attributes", |c| c.attributes ^= 1 << 5),
        ("restricted", "attributes", |c| c.attributes |= 1 << 16),
        ("decrypts too", "attributes", |c| c.attributes |= 1 << 17),
        ("does not sign", "attributes", |c| c.attributes ^= 1 << 18),
        ("name by SHA-1", "name by sha1", |c| c.name_alg = 4),
        ("key of another CSR", "another key", |c| c.other_csr = true),
        ("by another AK", "does not verify", |c| c.by_other_ak = true),
        ("changed after signing", "does not verify", |c| c.edit = |_, attest, _| attest[50] ^= 1),
        ("magic 0", "0x00000000", |c| c.spec.magic = 0),
        ("a quote", "0x8018", |c| c.spec.kind = 0x8018),
        ("under another EK", "qualified signer", |c| c.spec.signer[9] ^= 1),
        ("of another session", "extraData", |c| c.spec.extra_data[0] ^= 1),
        ("of another object", "another name", |c| c.name = Some([&[0, 0x0b][..], &[1; 32]].concat())),
        ("public area cut", "at byte", |c| c.edit = |public, _, _| public.truncate(50)),
        ("signature cut", "at byte", |c| c.edit = |_, _, signature| signature.truncate(50)),
        ("bytes after it", "does not verify", |c| c.edit = |_, attest, _| attest.push(0)),
    ];
    for (what, found, change) in rows {
        let mut claim = Claim::honest();
        change(&mut claim);
        let refusal = claim.judge().expect_err(what);
        assert_eq!(refusal.code, Code::KeyNotCertified, "{what}");
        assert!(refusal.found.contains(found), "{what}: {}", refusal.found);
    }
}

#[test]
fn a_claim_is_whole_or_absent() {
    let none = WireKey::default;
    assert_eq!(KeyHome::from_wire(none(), none()).unwrap(), KeyHome::InMemory);
    for n in 1..7 {
        let part = |bit: u8| if n & bit != 0 { vec![1] } else { vec![] };
        let key = || (part(1), part(2), part(4));
        assert_eq!(KeyHome::from_wire(key(), none()).unwrap_err().code, Code::EvidenceMalformed);
        assert_eq!(KeyHome::from_wire(none(), key()).unwrap_err().code, Code::EvidenceMalformed);
    }
    let whole = || (vec![1], vec![1], vec![1]);
    assert_eq!(KeyHome::from_wire(whole(), whole()).unwrap_err().code, Code::EvidenceMalformed);
    for (svid, wrap) in [(whole(), none()), (none(), whole())] {
        assert_eq!(KeyHome::from_wire(svid.clone(), wrap.clone()).unwrap().to_wire(), (svid, wrap));
    }
}
