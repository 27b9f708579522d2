//! Certificates as makers write them, made by hand, each also read by OpenSSL so that they are what they seem.

use super::*;
use crate::chain::{BeginInput, Expected, PresentedEk};
use crate::hash::sha256;
use crate::testdata::{SoftwareAk, golden, table_row};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

/// 2026-11-25.
const NOW: Stamp = Stamp(1_795_600_000_000);

/// How lengths and truth are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Der,
    /// Four octets for every length.
    Long,
    /// Constructed elements end with a marker; truth is 1.
    Indefinite,
}

impl Form {
    fn tlv(self, tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let mut out = vec![tag];
        match self {
            // OpenSSL reads no empty element of such a length.
            Form::Long if !content.is_empty() => {
                out.extend([&[0x84][..], &(content.len() as u32).to_be_bytes()].concat())
            }
            Form::Indefinite if tag & 0x20 != 0 => return [&[tag, 0x80][..], &content, &[0, 0]].concat(),
            Form::Der | Form::Long | Form::Indefinite => match content.len() {
                n @ 0..=0x7f => out.push(n as u8),
                n @ 0..=0xff => out.extend([0x81, n as u8]),
                n => out.extend([&[0x82][..], &(n as u16).to_be_bytes()].concat()),
            },
        }
        [out, content].concat()
    }

    fn truth(self) -> Vec<u8> {
        self.tlv(0x01, &[&[if self == Form::Indefinite { 1 } else { 0xff }]])
    }

    fn extension(self, oid: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
        let critical = if critical { self.truth() } else { vec![] };
        self.tlv(0x30, &[&self.tlv(0x06, &[oid]), &critical, &self.tlv(0x04, &[value])])
    }

    fn attribute(self, last_arc: u8, text: &str) -> Vec<u8> {
        let oid = self.tlv(0x06, &[&[0x67, 0x81, 0x05, 0x02, last_arc]]);
        self.tlv(0x31, &[&self.tlv(0x30, &[&oid, &self.tlv(0x0c, &[text.as_bytes()])])])
    }
}

/// An EK certificate, good unless a row changes it.
#[derive(Clone)]
struct Cert {
    form: Form,
    serial: Vec<u8>,
    not_after: &'static str,
    spki: fn(Form) -> Vec<u8>,
    eku: &'static [u8],
    is_ca: bool,
    aki: bool,
    manufacturer: &'static str,
    more: fn(Form) -> Vec<u8>,
    by_stranger: bool,
    touched: bool,
    padding: &'static [u8],
}

const OID_OAEP: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x07];
const OID_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];

fn ek_public() -> Vec<u8> {
    golden("ek.tpm2b_public")[2..].to_vec()
}

/// The golden EK's modulus: the last 256 octets of its public area.
fn modulus() -> Vec<u8> {
    ek_public()[ek_public().len() - 256..].to_vec()
}

fn spki(form: Form, oid: &[u8], modulus: &[u8]) -> Vec<u8> {
    // RSAPublicKey is in a BIT STRING, whose content signers leave in DER.
    let key = Form::Der.tlv(0x30, &[&Form::Der.tlv(0x02, &[modulus]), &[0x02, 3, 1, 0, 1]]);
    let algorithm = form.tlv(0x30, &[&form.tlv(0x06, &[oid]), &form.tlv(0x05, &[])]);
    form.tlv(0x30, &[&algorithm, &form.tlv(0x03, &[&[0], &key])])
}

impl Cert {
    fn good() -> Cert {
        Cert {
            form: Form::Der,
            serial: vec![0x2a],
            not_after: "99991231235959Z",
            spki: |form| spki(form, OID_RSA, &[&[0], modulus().as_slice()].concat()),
            eku: &[0x67, 0x81, 0x05, 0x08, 0x01],
            is_ca: false,
            aki: true,
            manufacturer: "id:49465800",
            more: |_| vec![],
            by_stranger: false,
            touched: false,
            padding: &[],
        }
    }

    fn der(&self, maker: &Maker) -> Vec<u8> {
        let f = self.form;
        let algorithm = f.tlv(0x30, &[&f.tlv(0x06, &[&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02]])]);
        let validity = f.tlv(0x30, &[&f.tlv(0x17, &[b"200101000000Z"]), &f.tlv(0x18, &[self.not_after.as_bytes()])]);
        let names = [f.attribute(1, self.manufacturer), f.attribute(2, "SLB9665"), f.attribute(3, "id:0007")].concat();
        let san = f.tlv(0x30, &[&f.tlv(0xa4, &[&f.tlv(0x30, &[&names])])]);
        let basic = if self.is_ca { f.tlv(0x30, &[&f.truth()]) } else { f.tlv(0x30, &[]) };
        let mut extensions = f.extension(&[0x55, 0x1d, 0x11], true, &san);
        extensions.extend(f.extension(&[0x55, 0x1d, 0x13], true, &basic));
        if !self.eku.is_empty() {
            let value = f.tlv(0x30, &[&f.tlv(0x06, &[self.eku])]);
            extensions.extend(f.extension(&[0x55, 0x1d, 0x25], false, &value));
        }
        if self.aki {
            let value = f.tlv(0x30, &[&f.tlv(0x80, &[&[7; 20]])]);
            extensions.extend(f.extension(&[0x55, 0x1d, 0x23], false, &value));
        }
        extensions.extend((self.more)(f));
        let tbs = f.tlv(
            0x30,
            &[
                &f.tlv(0xa0, &[&f.tlv(0x02, &[&[2]])]),
                &f.tlv(0x02, &[&self.serial]),
                &algorithm,
                &maker.name,
                &validity,
                &f.tlv(0x30, &[]),
                &(self.spki)(f),
                &f.tlv(0xa3, &[&f.tlv(0x30, &[&extensions])]),
            ],
        );
        let key = if self.by_stranger { &maker.stranger } else { &maker.key };
        let signature = key.sign(&SystemRandom::new(), &tbs).unwrap();
        let tbs = if self.touched {
            // A bit of the model's name.
            let at = tbs.windows(7).position(|w| w == b"SLB9665").unwrap();
            let mut touched = tbs.clone();
            touched[at + 6] ^= 1;
            touched
        } else {
            tbs
        };
        f.tlv(0x30, &[&tbs, &algorithm, &f.tlv(0x03, &[&[0], signature.as_ref()])])
    }

    fn judge(&self, maker: &Maker) -> Result<Vouched, Code> {
        let ek = Public::parse(&ek_public()).unwrap();
        let padded = [self.der(maker).as_slice(), self.padding].concat();
        judge(&padded, &[], &ek, &maker.endorsements(), NOW).map_err(|r| r.code)
    }
}

struct Maker {
    root: Vec<u8>,
    issuing: Vec<u8>,
    name: Vec<u8>,
    key: EcdsaKeyPair,
    stranger: EcdsaKeyPair,
}

impl Maker {
    /// A root, and a CA under it that issues.
    fn new() -> Maker {
        let key = || KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let (root_key, issuing_key, stranger) = (key(), key(), key());
        let ca = |name: &str| {
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params
        };
        let root = ca("root").self_signed(&root_key).unwrap().der().to_vec();
        let issuer = rcgen::Issuer::new(ca("root"), &root_key);
        let issuing = ca("issuing").signed_by(&issuing_key, &issuer).unwrap().der().to_vec();
        let name = X509Certificate::from_der(&issuing).unwrap().1.subject().as_raw().to_vec();
        let pair = |k: &KeyPair| EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &k.serialize_der()).unwrap();
        Maker { root, issuing, name, key: pair(&issuing_key), stranger: pair(&stranger) }
    }

    fn endorsements(&self) -> Endorsements {
        let root = EkRoot { der: self.root.clone(), class: EkClass::Hardware };
        Endorsements { roots: vec![root], intermediates: vec![self.issuing.clone()], ..Default::default() }
    }
}

type Change = fn(&mut Cert);

/// Quirks, and what is told of each.
const ODD: &[(&str, Change, &[Quirk])] = &[
    ("otherwise right", |_| {}, &[]),
    ("padded with FF", |c| c.padding = &[0xff; 700], &[Quirk::Padded]),
    ("padded with 00", |c| c.padding = &[0; 3], &[Quirk::Padded]),
    ("negative serial", |c| c.serial = vec![0xf0, 1], &[Quirk::OddSerial]),
    ("serial 0", |c| c.serial = vec![0], &[Quirk::OddSerial]),
    ("serial of 25 octets", |c| c.serial = vec![0x11; 25], &[Quirk::OddSerial]),
    ("no authority key identifier", |c| c.aki = false, &[Quirk::NoAuthorityKeyIdentifier]),
    (
        "key for RSAES-OAEP",
        |c| c.spki = |f| spki(f, OID_OAEP, &[&[0], modulus().as_slice()].concat()),
        &[Quirk::KeyForOaep],
    ),
    ("modulus without its zero", |c| c.spki = |f| spki(f, OID_RSA, &modulus()), &[Quirk::OddModulus]),
    ("long lengths", |c| c.form = Form::Long, &[Quirk::NotDer]),
    ("indefinite lengths", |c| c.form = Form::Indefinite, &[Quirk::NotDer]),
    (
        "all at once",
        |c| {
            (c.form, c.serial, c.aki, c.padding) = (Form::Indefinite, vec![0x80], false, &[0xff; 9]);
            c.spki = |f| spki(f, OID_OAEP, &modulus());
        },
        &[
            Quirk::Padded,
            Quirk::NotDer,
            Quirk::OddModulus,
            Quirk::KeyForOaep,
            Quirk::OddSerial,
            Quirk::NoAuthorityKeyIdentifier,
        ],
    ),
];

/// What no quirk may excuse.
const LIES: &[(&str, Change, Code)] = &[
    ("a CA", |c| c.is_ca = true, Code::EkChainUntrusted),
    ("no use named", |c| c.eku = &[], Code::EkChainUntrusted),
    ("for TLS servers", |c| c.eku = &[0x2b, 6, 1, 5, 5, 7, 3, 1], Code::EkChainUntrusted),
    ("expired", |c| c.not_after = "20261101000000Z", Code::EkChainUntrusted),
    ("signed by a stranger", |c| c.by_stranger = true, Code::EkChainUntrusted),
    ("changed after signing", |c| c.touched = true, Code::EkChainUntrusted),
    (
        "of another key",
        |c| {
            c.spki = |f| {
                let mut other = modulus();
                other[255] ^= 2;
                spki(f, OID_RSA, &[&[0], other.as_slice()].concat())
            }
        },
        Code::EkMismatch,
    ),
    ("with an unknown critical extension", |c| c.more = |f| f.extension(&[0x2a, 3], true, &[5, 0]), Code::EkMalformed),
    (
        "with two key usages",
        |c| {
            c.more = |f| {
                f.extension(
                    &[0x55, 0x1d, 0x25],
                    false,
                    &f.tlv(0x30, &[&f.tlv(0x06, &[&[0x67, 0x81, 0x05, 0x08, 0x01]])]),
                )
            }
        },
        Code::EkMalformed,
    ),
    ("padded with something else", |c| c.padding = b"\0\0more", Code::EkMalformed),
];

#[test]
fn odd_certificates_are_read_and_told() {
    let maker = Maker::new();
    for (what, change, quirks) in ODD {
        let mut cert = Cert::good();
        change(&mut cert);
        // OpenSSL reads the same certificate out of it, under the same key.
        let oracle = openssl::x509::X509::from_der(&cert.der(&maker)).unwrap_or_else(|e| panic!("{what}: {e}"));
        let ca = openssl::x509::X509::from_der(&maker.issuing).unwrap().public_key().unwrap();
        assert!(oracle.verify(&ca).unwrap(), "{what}");
        let named = oracle.subject_alt_names().unwrap();
        let entries: Vec<_> =
            named[0].directory_name().unwrap().entries().map(|e| e.data().as_slice().to_vec()).collect();

        let vouched = cert.judge(&maker).unwrap_or_else(|code| panic!("{what}: {code}"));
        assert_eq!((vouched.class, vouched.root_sha256), (EkClass::Hardware, sha256(&maker.root)), "{what}");
        assert_eq!(vouched.make.manufacturer().as_bytes(), entries[0], "{what}");
        assert_eq!(vouched.make.model().as_bytes(), entries[1], "{what}");
        assert_eq!(vouched.quirks, *quirks, "{what}");
    }
}

#[test]
fn no_oddity_excuses_a_lie() {
    let maker = Maker::new();
    for (odd, make_odd, _) in ODD {
        for (lie, tell, code) in LIES {
            let mut cert = Cert::good();
            make_odd(&mut cert);
            tell(&mut cert);
            assert_eq!(cert.judge(&maker).map(|_| ()), Err(*code), "{odd}, {lie}");
            if *code == Code::EkChainUntrusted && *odd == "otherwise right" {
                table_row(24, &format!("EK certificate {lie}"), code.as_str());
            }
        }
    }
    let nobody = Endorsements { roots: vec![], ..maker.endorsements() };
    let ek = Public::parse(&ek_public()).unwrap();
    let refusal = judge(&Cert::good().der(&maker), &[], &ek, &nobody, NOW).unwrap_err();
    assert_eq!(refusal.code, Code::EkChainUntrusted);
}

#[test]
fn makers_are_read_wherever_they_stand() {
    let make = |change: Change| {
        let mut cert = Cert::good();
        change(&mut cert);
        cert.judge(&Maker::new()).unwrap().make
    };
    let named = |m: &str| EkMake::Named { manufacturer: m.into(), model: "SLB9665".into() };
    assert_eq!(make(|_| {}), named("id:49465800"));
    assert_eq!(make(|c| c.manufacturer = "id:4e544300"), named("id:4E544300"));
    assert_eq!(make(|c| c.manufacturer = "NTC"), named("id:4E544300"));
    assert_eq!(make(|c| c.manufacturer = "id:49 46"), EkMake::Unreadable);
    let swtpm = golden("ek-rsa2048.nv.der");
    assert_eq!(
        EkMake::of(&X509Certificate::from_der(&swtpm).unwrap().1),
        EkMake::Named { manufacturer: "id:00001014".into(), model: "swtpm".into() }
    );
}

#[test]
fn denied_makers_get_no_credential() {
    let (maker, ak) = (Maker::new(), SoftwareAk::p256());
    let endorse = |manufacturer: &'static str, rule: (&str, &str, u64)| {
        let cert = Cert { manufacturer, ..Cert::good() };
        let input = BeginInput {
            cluster: "west".parse().unwrap(),
            ek_certificate: cert.der(&maker),
            ek_intermediates: vec![],
            ek_public: ek_public(),
            ak_public: ak.public.clone(),
            agent_nonce: vec![7; 32],
        };
        let denied = vec![EkDenyRule::new("weak", rule.0, rule.1, rule.2).unwrap()];
        let endorsements = Endorsements { denied, ..maker.endorsements() };
        PresentedEk::parse(input)
            .unwrap()
            .endorse(Expected::AllowListed, &endorsements, NOW)
            .map(|_| ())
            .map_err(|r| r.code)
    };
    assert_eq!(endorse("id:49465800", ("IFX", "SLB9665", u64::MAX)), Err(Code::EkDenied));
    assert_eq!(endorse("id:49465800", ("STM", "", u64::MAX)), Ok(()));
    assert_eq!(endorse("who is it", ("STM", "", u64::MAX)), Err(Code::EkDenied), "an odd name hides nothing");
    assert_eq!(endorse("id:49465800", ("IFX", "SLB9665", 5)), Ok(()), "firmware is judged after the quote");
}

/// Cut or corrupt it at every byte: an answer in time, never a panic.
#[test]
fn no_corruption_panics() {
    let maker = Maker::new();
    for form in [Form::Der, Form::Long, Form::Indefinite] {
        let der = Cert { form, ..Cert::good() }.der(&maker);
        for n in 0..der.len() {
            let _ = ber::reencode(&der[..n]);
            for byte in [0, 0x80, 0xff, der[n] ^ 1] {
                let mut changed = der.clone();
                changed[n] = byte;
                let _ = ber::reencode(&changed);
            }
        }
    }
    let nested = [0x30, 0x80].repeat(8000);
    assert!(ber::element(&nested).is_none() && ber::reencode(&nested).is_none());
    assert!(ber::element(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]).is_none());
}
