//! Chains while a root is replaced, by this crate and by OpenSSL, and what a thief of an intermediate can say.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use ambit_identity::svid::{Presented, verify_pinned};
use ambit_identity::{Csr, IssuingKey, Named, Root, SvidKey, TrustStore, fingerprint, verify_svid};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{Code, Lifetime, RaftIndex, Stamp, TrustDomain};
use ambit_state::objects::{CellRow, KeySetRow, Member};
use ambit_state::{Applied, Command, LogEntry, State};
use rustls_pki_types::CertificateDer;

const NOW: Stamp = Stamp(1_800_000_000_000);
const DAY_MS: u64 = 86_400_000;

/// A cell in the middle of a rotation: the new root is active and one replica is under each.
struct Rotating {
    td: TrustDomain,
    old: Root,
    new: Root,
    /// Under the old root.
    former: IssuingKey,
    /// Under the new one, with what leads to the old.
    issuer: IssuingKey,
}

fn csr(key: &SvidKey) -> Csr {
    Csr::parse(&key.csr().unwrap()).unwrap()
}

fn run(state: &mut State, command: Command) -> Applied {
    let index = RaftIndex(state.applied().0 + 1);
    state.apply(index, &LogEntry { stamp: NOW, client: [0; 32], request: [0; 16], command })
}

fn rotating() -> Rotating {
    let td: TrustDomain = "west".parse().unwrap();
    let (old, new) = (Root::create(&td, NOW, [1; 16]).unwrap(), Root::create(&td, NOW, [2; 16]).unwrap());
    let key = SvidKey::generate().unwrap();
    let lifetime = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(DAY_MS) };
    let intermediate = old.found(1, &csr(&key), lifetime).unwrap();
    let former = IssuingKey::new(key, intermediate).unwrap();
    let mut state = State::new();
    let row = CellRow::founded(td.clone(), old.der().to_vec());
    let member = Member {
        address: String::new(),
        authority: former.authority().to_owned(),
        authority_not_after: former.not_after(),
        wrap_key: vec![],
        record_key: [0; 32],
    };
    run(&mut state, Command::FoundCell(row, 1, member, KeySetRow::default())).outcome.unwrap();
    let prepare = Command::PrepareRoot(new.der().to_vec(), [(1, vec![1])].into());
    let prepared = run(&mut state, prepare).into_root().unwrap();
    assert_eq!(new.cross_sign(&prepared, new.der()).unwrap_err().code, Code::AuthorityMismatch, "by itself");
    assert_eq!(old.cross_sign(&prepared, old.der()).unwrap_err().code, Code::AuthorityMismatch, "another root");
    let cross = old.cross_sign(&prepared, new.der()).unwrap();
    run(&mut state, Command::CrossSignRoot(fingerprint(new.der()), cross.to_vec())).outcome.unwrap();
    run(&mut state, Command::ActivateRoot(fingerprint(new.der()), KeySetRow::default())).outcome.unwrap();
    let key = SvidKey::generate().unwrap();
    let renew = Command::RenewAuthority { replica: 1, key_hash: csr(&key).spki_sha256(), lifetime_ms: DAY_MS };
    let committed = run(&mut state, renew).into_authority().unwrap();
    assert_eq!(old.renewed(&committed, &csr(&key)).unwrap_err().code, Code::AuthorityMismatch, "by the old root");
    let another = csr(&SvidKey::generate().unwrap());
    assert_eq!(new.renewed(&committed, &another).unwrap_err().code, Code::AuthorityMismatch, "for another key");
    let issuer = IssuingKey::new_of(key, &new, &committed).under(vec![cross]);
    Rotating { td, old, new, former, issuer }
}

trait NewOf {
    fn new_of(
        key: SvidKey,
        root: &Root,
        committed: &ambit_state::Committed<ambit_state::committed::ReplicaAuthority>,
    ) -> Self;
}
impl NewOf for IssuingKey {
    fn new_of(
        key: SvidKey,
        root: &Root,
        committed: &ambit_state::Committed<ambit_state::committed::ReplicaAuthority>,
    ) -> Self {
        let intermediate = root.renewed(committed, &csr(&key)).unwrap();
        IssuingKey::new(key, intermediate).unwrap()
    }
}

fn leaf(r: &Rotating, issuer: &IssuingKey, replica: u64) -> Vec<CertificateDer<'static>> {
    let lifetime = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(3_600_000) };
    issuer.replica_leaf(replica, &r.td, lifetime, &csr(&SvidKey::generate().unwrap())).unwrap()
}

fn store(r: &Rotating, roots: &[&Root]) -> TrustStore {
    let roots = roots.iter().map(|root| root.der().to_vec()).collect();
    TrustStore::new(&Bundle::<Own>::new(r.td.clone(), 1, roots)).unwrap()
}

#[test]
fn every_leaf_verifies_by_either_bundle_while_the_old_root_is_relied_on() {
    let r = rotating();
    let (under_old, under_new) = (leaf(&r, &r.former, 1), leaf(&r, &r.issuer, 1));
    for (what, chain, roots, good) in [
        ("old by old", &under_old, &[&r.old][..], true),
        ("old by both", &under_old, &[&r.old, &r.new], true),
        ("old by new", &under_old, &[&r.new], false),
        ("new by old, which certified its root's key", &under_new, &[&r.old], true),
        ("new by both", &under_new, &[&r.new, &r.old], true),
        ("new by new", &under_new, &[&r.new], true),
        ("new by none", &under_new, &[], false),
    ] {
        let verified = verify_svid(chain, &store(&r, roots), NOW);
        assert_eq!(verified.is_ok(), good, "{what}: {verified:?}");
    }
    let without = &under_new[..2];
    assert_eq!(verify_svid(without, &store(&r, &[&r.old]), NOW).unwrap_err().code, Code::SvidUntrusted);
    let named = verify_svid(&under_new, &store(&r, &[&r.new]), NOW).unwrap().issuer();
    assert_eq!(named, Some(Named { replica: 1, epoch: 1 }));
}

#[test]
fn openssl_takes_the_crossed_chain_by_the_old_root_alone() {
    let r = rotating();
    let chain = leaf(&r, &r.issuer, 1);
    let x509 = |der: &[u8]| openssl::x509::X509::from_der(der).unwrap();
    for (root, between, good) in
        [(&r.old, &chain[1..], true), (&r.new, &chain[1..2], true), (&r.old, &chain[1..2], false)]
    {
        let mut roots = openssl::x509::store::X509StoreBuilder::new().unwrap();
        roots.add_cert(x509(root.der())).unwrap();
        let mut param = openssl::x509::verify::X509VerifyParam::new().unwrap();
        param.set_time((NOW.0 / 1000) as i64);
        param.set_flags(openssl::x509::verify::X509VerifyFlags::X509_STRICT).unwrap();
        roots.set_param(&param).unwrap();
        let mut stack = openssl::stack::Stack::new().unwrap();
        for der in between {
            stack.push(x509(der)).unwrap();
        }
        let mut context = openssl::x509::X509StoreContext::new().unwrap();
        let verified = context.init(&roots.build(), &x509(&chain[0]), &stack, |c| c.verify_cert()).unwrap();
        assert_eq!(verified, good, "{}", context.error());
    }
}

#[test]
fn whoever_pinned_either_root_recognises_a_replica_and_nobody_else_does() {
    let r = rotating();
    let mut chain = leaf(&r, &r.issuer, 1);
    chain.extend([r.new.der().clone(), r.old.der().clone()]);
    let other = Root::create(&r.td, NOW, [3; 16]).unwrap();
    for (what, pinned, good) in
        [("old", &r.old, None), ("new", &r.new, None), ("other", &other, Some(Code::FingerprintMismatch))]
    {
        let outcome = verify_pinned(&chain, &r.td, &fingerprint(pinned.der()), NOW);
        assert_eq!(outcome.err().map(|e| e.code), good, "{what}");
    }
    // A root that merely goes along vouches for nothing.
    let mut posing = leaf(&r, &r.former, 1);
    posing.extend([r.new.der().clone()]);
    let outcome = verify_pinned(&posing, &r.td, &fingerprint(r.new.der()), NOW);
    assert_eq!(outcome.unwrap_err().code, Code::SvidUntrusted);
}

#[test]
fn a_revoked_intermediate_is_known_by_its_key_whatever_its_leaves_say() {
    let r = rotating();
    let mut trust = store(&r, &[&r.old, &r.new]);
    trust.deny_authorities([(r.td.clone(), r.former.authority().to_owned())]);
    assert_eq!(verify_svid(&leaf(&r, &r.former, 1), &trust, NOW).unwrap_err().code, Code::SvidUntrusted);
    verify_svid(&leaf(&r, &r.issuer, 1), &trust, NOW).unwrap();
    // A root has a name of the same kind, and is in every chain: it ends with its bundle and not by this.
    let mut roots = store(&r, &[&r.old, &r.new]);
    roots.deny_authorities([&r.old, &r.new].map(|root| (r.td.clone(), ambit_identity::name_of(root.der()).unwrap())));
    let mut chain = leaf(&r, &r.former, 1);
    chain.push(r.old.der().clone());
    verify_svid(&chain, &roots, NOW).unwrap();
    let mut elsewhere = store(&r, &[&r.old, &r.new]);
    elsewhere.deny_authorities([("east".parse().unwrap(), r.former.authority().to_owned())]);
    verify_svid(&leaf(&r, &r.former, 1), &elsewhere, NOW).unwrap();

    // The thief of the former names the other intermediate as the one that signed, and sends that one along, first.
    let said = forged(&r);
    let chain = vec![said.clone(), r.issuer.intermediate().clone(), r.former.intermediate().clone()];
    let believed = verify_svid(&chain, &store(&r, &[&r.old, &r.new]), NOW).unwrap();
    assert_eq!(believed.authority(), r.former.authority(), "whose key signed it, not whom it names");
    assert_eq!(verify_svid(&chain, &trust, NOW).unwrap_err().code, Code::SvidUntrusted);
    // Who keeps what was shown can tell as much, for a list that comes later.
    let above = [&r.issuer, &r.former].map(|key| key.authority().to_owned());
    assert_eq!(Presented::of(&chain).unwrap().above, above);
    assert_eq!(Presented::of(&chain[..1]).unwrap().above, [""; 0]);
}

#[test]
fn an_authority_keeps_its_name_in_whatever_order_its_chain_is_sent() {
    let r = rotating();
    let [under_old, under_new] = [&r.former, &r.issuer].map(|issuer| leaf(&r, issuer, 1));
    let junk = Root::create(&r.td, NOW, [9; 16]).unwrap();
    let (old, new, junk) = (r.old.der(), r.new.der(), junk.der());
    let (former, issuer) = (r.former.intermediate(), r.issuer.intermediate());
    let (first, second, cross) = (&under_old[0], &under_new[0], &under_new[2]);
    let trust = store(&r, &[&r.old, &r.new]);
    for (what, chain, authority, pinned) in [
        ("as it should be", vec![first, former, old], &r.former, &r.old),
        ("the root first", vec![first, old, former], &r.former, &r.old),
        ("a certificate of no use first", vec![first, junk, former, old], &r.former, &r.old),
        ("another's intermediate first", vec![first, issuer, former, old], &r.former, &r.old),
        ("the crossed root first", vec![second, cross, issuer, old], &r.issuer, &r.old),
        ("both roots first", vec![second, old, new, issuer], &r.issuer, &r.new),
        ("all but its own first", vec![second, junk, junk, issuer, new], &r.issuer, &r.new),
    ] {
        let chain: Vec<_> = chain.into_iter().cloned().collect();
        let verified = verify_svid(&chain, &trust, NOW).unwrap();
        assert_eq!(verified.authority(), authority.authority(), "{what}");
        let verified = verify_pinned(&chain, &r.td, &fingerprint(pinned.der()), NOW).unwrap();
        assert_eq!(verified.authority(), authority.authority(), "{what}, pinned");
    }
}

#[test]
fn a_root_that_signs_leaves_itself_has_a_name_too() {
    let r = rotating();
    let signed = forged_by(r.former.authority(), r.old.der(), r.old.key());
    for chain in
        [vec![signed.clone(), r.old.der().clone()], vec![signed, r.former.intermediate().clone(), r.old.der().clone()]]
    {
        let name = authority_of(r.old.key());
        assert_eq!(verify_svid(&chain, &store(&r, &[&r.old]), NOW).unwrap().authority(), name);
        assert_eq!(verify_pinned(&chain, &r.td, &fingerprint(r.old.der()), NOW).unwrap().authority(), name);
    }
}

fn authority_of(key: &SvidKey) -> String {
    ambit_identity::authority::authority_id(&csr(key))
}

/// Signed by the former intermediate's key, with the key identifier of the other.
fn forged(r: &Rotating) -> CertificateDer<'static> {
    forged_by(r.issuer.authority(), r.former.intermediate(), r.former.key())
}

/// Signed by `thief`, the key of `certificate`, with the key identifier `said`.
fn forged_by(said: &str, certificate: &CertificateDer<'_>, thief: &SvidKey) -> CertificateDer<'static> {
    use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = time::OffsetDateTime::from_unix_timestamp((NOW.0 / 1000) as i64 - 60).unwrap();
    params.not_after = time::OffsetDateTime::from_unix_timestamp((NOW.0 / 1000) as i64 + 600).unwrap();
    params.subject_alt_names = vec![SanType::URI("spiffe://west/ambit/replica/1".try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let mut identifier = vec![0x30, 0x16, 0x80, 0x14];
    identifier.extend(hex::decode(said).unwrap());
    params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 35], identifier));
    let key = rcgen::KeyPair::generate().unwrap();
    let thief = rcgen::KeyPair::try_from(thief.pkcs8().as_slice()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(certificate, &thief).unwrap();
    params.signed_by(&key, &issuer).unwrap().der().clone()
}
