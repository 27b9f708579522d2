//! What an administrator mints: certificates and tokens for whom no node speaks. Each leaves a row with its name.

use super::issue::{ends, keep, lifetime, serial, signer_ends};
use super::{At, cell_row};
use crate::command::Reply;
use crate::committed::{Issuance, JwtIssuance, Subject};
use crate::state::State;
use ambit_model::{Code, DnsName, JwtTtl, Refusal, SpiffeId, SvidTtl};

/// Minted tokens remembered, newest last; certificates are, as all others, until they ended.
const MINTED_TOKENS_MAX: usize = 10_000;

/// A workload's identity of this trust domain: what replicas, nodes and administrators have is not minted.
fn mintable(s: &State, at: At, id: &SpiffeId) -> Result<u64, Refusal> {
    super::grant::unfenced(s, at)?;
    let cell = cell_row(s)?;
    if s.barred(id) {
        return Err(Refusal::new(Code::SvidRevoked, "an identity that is not denied", id.as_str()));
    }
    if id.trust_domain() == cell.trust_domain && !id.path().starts_with("/ambit/") {
        return Ok(cell.epoch);
    }
    let expected = format!("an identity of {} outside /ambit/", cell.trust_domain);
    Err(Refusal::new(Code::NotOwner, expected, id.as_str()))
}

/// What is asked for, of a certificate.
pub(super) struct X509<'a> {
    pub(super) spiffe_id: &'a SpiffeId,
    pub(super) dns_names: &'a [DnsName],
    pub(super) ttl: SvidTtl,
    pub(super) key_hash: [u8; 32],
    pub(super) authority: &'a str,
    pub(super) by: &'a str,
}

pub(super) fn x509(s: &mut State, at: At, asked: &X509<'_>) -> Result<Reply, Refusal> {
    let epoch = mintable(s, at, asked.spiffe_id)?;
    let issuance = Issuance {
        authority: asked.authority.to_owned(),
        serial: serial(epoch, at, 0),
        spiffe_id: asked.spiffe_id.clone(),
        subject: Subject::Minted(asked.by.to_owned(), asked.dns_names.to_vec()),
        binding: None,
        epoch,
        key_hash: asked.key_hash,
        lifetime: lifetime(s, at, asked.authority, asked.ttl.ms(), None)?,
        index: at.index,
    };
    keep(s, &issuance);
    Ok(Reply::Leaves(vec![Ok(issuance)]))
}

pub(super) fn jwt(
    s: &mut State,
    at: At,
    spiffe_id: &SpiffeId,
    audience_sha256: &[u8; 32],
    ttl: JwtTtl,
    kid: &str,
    by: &str,
) -> Result<Reply, Refusal> {
    let epoch = mintable(s, at, spiffe_id)?;
    let token = JwtIssuance {
        kid: kid.to_owned(),
        jti: serial(epoch, at, 0),
        spiffe_id: spiffe_id.clone(),
        subject: Subject::Minted(by.to_owned(), Vec::new()),
        binding: None,
        audience_sha256: *audience_sha256,
        stamp: at.stamp,
        not_after: ends(at, signer_ends(s, kid)?, ttl.ms(), None)?,
        index: at.index,
    };
    s.minted_tokens.put(&mut s.journal, at.index.0, token.clone());
    while s.minted_tokens.len() > MINTED_TOKENS_MAX {
        let Some(oldest) = s.minted_tokens.iter().next().map(|(k, _)| *k) else { break };
        s.minted_tokens.remove(&mut s.journal, &oldest);
    }
    Ok(Reply::Token(Box::new(token)))
}
