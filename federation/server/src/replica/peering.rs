//! Registering with another cell: both sides prove that they hold a record key which their root certified.
//!
//! The fingerprint that operators compare is of the root; the key set is certified by it, so that it need not be
//! compared again each time a replica joins.

use super::{Replica, random, ticket};
use ambit_identity::tls::{Expect, SharedTrust, Trust};
use ambit_identity::wrap::Purpose;
use ambit_identity::{KeySet, fingerprint};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::objects::{KeySetRow, PeerRow, PeerState};
use ambit_transport::{Dialer, Identity};
use std::net::SocketAddr;

const ADDRESSES_MAX: usize = 16;
/// A root with a P-256 key is some hundred bytes; a key set holds at most 64 keys of 32 bytes.
const ROOT_BYTES_MAX: usize = 8 * 1024;
/// Under an external root the signature brings the authority's chain along.
const KEY_SET_BYTES_MAX: usize = 4 * 1024 + ambit_state::external::CHAIN_MAX * ROOT_BYTES_MAX;
const NONCE: usize = 32;
/// A registration is two calls in a row; a session older than this is somebody else's.
const SESSION_MS: u64 = 30_000;

/// What both sides sign: who meets whom, over both nonces. The side that speaks is named, so that neither signature
/// stands for the other.
pub fn transcript(speaker: &TrustDomain, caller: &CardFacts, callee: &CardFacts, nonces: &[u8]) -> Vec<u8> {
    let mut out = b"ambit/peering/v1".to_vec();
    for part in [
        speaker.as_str().as_bytes(),
        caller.trust_domain.as_str().as_bytes(),
        &caller.fingerprint,
        callee.trust_domain.as_str().as_bytes(),
        &callee.fingerprint,
        nonces,
    ] {
        out.extend((part.len() as u64).to_be_bytes());
        out.extend(part);
    }
    out
}

/// A card that was checked: its key set is certified by its root.
pub struct CardFacts {
    /// Whose.
    pub trust_domain: TrustDomain,
    /// SHA-256 of the root.
    pub fingerprint: [u8; 32],
    /// The root, DER.
    pub root_der: Vec<u8>,
    /// Bundle sequence.
    pub sequence: u64,
    /// Where its replicas answer.
    pub addresses: Vec<String>,
    /// Its record keys.
    pub keys: KeySet,
    /// As it came.
    pub key_set: KeySetRow,
}

/// Checks a card on its own; whether it is the expected one is the caller's question.
pub fn check_card(card: Option<v1::CellCard>) -> Result<CardFacts, Refusal> {
    let bad = |expected: &str, found: String| Refusal::new(Code::BadRequest, expected, found);
    let card = card.ok_or_else(|| bad("a cell's card", "none".into()))?;
    let trust_domain: TrustDomain = card.trust_domain.parse()?;
    let bundle = card.bundle.ok_or_else(|| bad("a bundle", "none".into()))?;
    let [root] = bundle.roots_der.as_slice() else {
        return Err(bad("a bundle with one root", format!("{} roots", bundle.roots_der.len())));
    };
    if root.len() > ROOT_BYTES_MAX {
        return Err(bad("a root of at most 8 KiB", format!("{} bytes", root.len())));
    }
    if bundle.trust_domain != card.trust_domain || card.addresses.len() > ADDRESSES_MAX {
        return Err(bad("a bundle of the same trust domain and at most 16 addresses", bundle.trust_domain));
    }
    for address in &card.addresses {
        address.parse::<SocketAddr>().map_err(|_| bad("ip:port", address.clone()))?;
    }
    let set = card.key_set.ok_or_else(|| bad("a key set", "none".into()))?;
    if set.statement.len() > KEY_SET_BYTES_MAX || set.signature.len() > KEY_SET_BYTES_MAX {
        let found = format!("{} and {} bytes", set.statement.len(), set.signature.len());
        return Err(bad(&format!("a key set and its signature of at most {KEY_SET_BYTES_MAX} bytes each"), found));
    }
    let keys = KeySet::verify(&trust_domain, root, &set.statement, &set.signature)?;
    Ok(CardFacts {
        trust_domain,
        fingerprint: fingerprint(root),
        root_der: root.clone(),
        sequence: bundle.sequence,
        addresses: card.addresses,
        keys,
        key_set: KeySetRow { statement: set.statement, signature: set.signature },
    })
}

/// This cell's own card.
pub fn own_card(replica: &Replica) -> Result<v1::CellCard, Refusal> {
    replica.local(|s| {
        let cell = s.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
        let keys = s.key_set().cloned().unwrap_or_default();
        Ok(v1::CellCard {
            trust_domain: cell.trust_domain.to_string(),
            addresses: s.members().map(|(_, m)| m.address.clone()).collect(),
            bundle: Some(v1::Bundle {
                trust_domain: cell.trust_domain.to_string(),
                sequence: cell.bundle_sequence,
                roots_der: vec![cell.root_der.clone()],
                ..v1::Bundle::default()
            }),
            key_set: Some(v1::KeySet { statement: keys.statement, signature: keys.signature }),
        })
    })
}

/// A peer as it is kept before its approval.
pub fn row(facts: CardFacts) -> PeerRow {
    PeerRow {
        state: PeerState::Pending,
        fingerprint: facts.fingerprint,
        addresses: facts.addresses,
        root_der: facts.root_der,
        bundle_sequence: facts.sequence,
        key_set: facts.key_set,
        epoch: 0,
        seq: 0,
        hash: [0; 32],
        trouble: String::new(),
    }
}

/// The calling side: registers this cell with the one at `addresses`, whose fingerprint the operator was told.
pub async fn register(
    replica: &Replica,
    addresses: &[SocketAddr],
    td: &TrustDomain,
    expected: &[u8; 32],
    token: &str,
) -> Result<PeerRow, Refusal> {
    let trust = SharedTrust::new(Trust::Pinned(td.clone(), *expected));
    let dialer = Dialer::new(trust, Identity::default());
    let mut last = Refusal::new(Code::BadRequest, "at least one address", "none");
    for address in addresses {
        let channel = match dialer.channel(*address, Expect::ReplicaOf(td.clone())).await {
            Ok(channel) => channel,
            Err(refusal) => {
                last = refusal;
                continue;
            }
        };
        return converse(replica, channel, td, expected, token).await;
    }
    Err(last)
}

async fn converse(
    replica: &Replica,
    channel: tonic::transport::Channel,
    td: &TrustDomain,
    expected: &[u8; 32],
    token: &str,
) -> Result<PeerRow, Refusal> {
    let mut link = v1::peer_link_client::PeerLinkClient::new(channel);
    let nonce = random::<NONCE>()?;
    let mine = own_card(replica)?;
    let hello = v1::HelloRequest { nonce: nonce.to_vec(), card: Some(mine.clone()) };
    let answer = link.hello(hello).await.map_err(|s| from_status(&s))?.into_inner();
    let theirs = check_card(answer.card)?;
    if theirs.trust_domain != *td || theirs.fingerprint != *expected {
        return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(expected), hex::encode(theirs.fingerprint)));
    }
    let me = check_card(Some(mine.clone()))?;
    let nonces = [nonce.as_slice(), &answer.nonce].concat();
    theirs.keys.verify_possession(&transcript(td, &me, &theirs, &nonces), &answer.signature)?;
    let signature = replica.record().prove(&transcript(&me.trust_domain, &me, &theirs, &nonces));
    let prove = v1::ProveRequest {
        session: answer.session,
        token: token.to_owned(),
        signature,
        card: Some(mine),
        nonce: nonce.to_vec(),
        server_nonce: answer.nonce,
    };
    link.prove(prove).await.map_err(|s| from_status(&s))?;
    Ok(row(theirs))
}

/// The called side, first half: proves possession and seals the session.
pub async fn hello(replica: &Replica, request: v1::HelloRequest) -> Result<v1::HelloResponse, Refusal> {
    if request.nonce.len() != NONCE {
        return Err(Refusal::new(Code::BadRequest, "a nonce of 32 bytes", request.nonce.len().to_string()));
    }
    let caller = check_card(request.card)?;
    let card = own_card(replica)?;
    let me = check_card(Some(card.clone()))?;
    let nonce = random::<NONCE>()?;
    let nonces = [request.nonce.as_slice(), &nonce].concat();
    let signature = replica.record().prove(&transcript(&me.trust_domain, &caller, &me, &nonces));
    let deadline = replica.now().plus_ms(SESSION_MS);
    let session = [b"peering".as_slice(), &deadline.0.to_be_bytes(), &caller.fingerprint, &nonces].concat();
    let session = ticket::seal_ticket(replica, Purpose::Peering, &session).await?;
    Ok(v1::HelloResponse { nonce: nonce.to_vec(), card: Some(card), signature, session })
}

/// The called side, second half: the caller's possession, its token's scope, and then a pending peer.
pub async fn prove(replica: &Replica, request: v1::ProveRequest) -> Result<(TrustDomain, PeerRow, [u8; 32]), Refusal> {
    let caller = check_card(request.card)?;
    let nonces = [request.nonce.as_slice(), &request.server_nonce].concat();
    let session = ticket::open_ticket(replica, Purpose::Peering, &request.session).await?;
    let wanted = |deadline: &[u8]| [b"peering".as_slice(), deadline, &caller.fingerprint, &nonces].concat();
    let deadline = session.get(7..15).unwrap_or_default();
    let expires = <[u8; 8]>::try_from(deadline).map_or(0, u64::from_be_bytes);
    if *session != wanted(deadline) || replica.now().0 > expires {
        return Err(Refusal::new(Code::TicketInvalid, "the session of this registration", "another or an old one"));
    }
    let me = check_card(Some(own_card(replica)?))?;
    caller.keys.verify_possession(&transcript(&caller.trust_domain, &caller, &me, &nonces), &request.signature)?;
    let token = crate::services::token_sha256(&request.token);
    Ok((caller.trust_domain.clone(), row(caller), token))
}
