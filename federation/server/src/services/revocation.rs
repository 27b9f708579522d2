//! Revoking SVIDs: by identity, one by one, and what outsiders read of it.

use super::{OrStatus, request_id};
use crate::authorise::actor;
use crate::replica::Replica;
use ambit_model::{Code, IdDenial, LeafDenial, Refusal, SpiffeId, TrustDomain, serial_number};
use ambit_proto::v1;
use ambit_state::{Command, IdVerb};
use tonic::{Request, Response, Status};

pub(crate) struct Revocations(pub(crate) Replica);

#[tonic::async_trait]
impl v1::revocation_server::Revocation for Revocations {
    async fn deny_id(&self, request: Request<v1::DenyIdRequest>) -> Result<Response<v1::DeniedId>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let request = request_id(&m.request_id)?;
        let id: SpiffeId = m.spiffe_id.parse().or_status()?;
        let verb = match m.verb.as_str() {
            "revoke" => IdVerb::Revoke,
            "bar" => IdVerb::Bar,
            "lift" => IdVerb::Lift,
            other => return Err(Refusal::new(Code::BadRequest, "revoke, bar or lift", other)).or_status(),
        };
        let command = Command::DenyId(id.clone(), verb);
        self.0.propose(actor.client, request, command).await.or_status()?.outcome.or_status()?;
        let key = (self.0.trust_domain().clone(), id);
        let row = self
            .0
            .local(|s| s.id_denials().find(|(known, _)| **known == key).map(|(_, denial)| id_message(&key, denial)));
        row.map(Response::new).ok_or_else(|| Refusal::new(Code::Internal, "the denial written", "none")).or_status()
    }

    async fn deny_svid(&self, request: Request<v1::DenySvidRequest>) -> Result<Response<v1::DeniedSvid>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let request = request_id(&m.request_id)?;
        let serial = serial(&m.serial).or_status()?;
        let command = Command::DenyLeaf(m.authority.clone(), serial.clone());
        self.0.propose(actor.client, request, command).await.or_status()?.outcome.or_status()?;
        let key = (self.0.trust_domain().clone(), m.authority, serial);
        let row = self.0.local(|s| {
            s.leaf_denials().find(|(known, _)| **known == key).map(|(_, denial)| leaf_message(&key, denial))
        });
        row.map(Response::new).ok_or_else(|| Refusal::new(Code::Internal, "the denial written", "none")).or_status()
    }

    async fn list_denials(
        &self,
        _: Request<v1::ListDenialsRequest>,
    ) -> Result<Response<v1::ListDenialsResponse>, Status> {
        let read = |s: &ambit_state::State| v1::ListDenialsResponse {
            ids: s.id_denials().map(|(key, denial)| id_message(key, denial)).collect(),
            svids: s.leaf_denials().map(|(key, denial)| leaf_message(key, denial)).collect(),
        };
        self.0.read(read).await.or_status().map(Response::new)
    }

    async fn get_crl(&self, request: Request<v1::GetCrlRequest>) -> Result<Response<v1::GetCrlResponse>, Status> {
        let authority = request.into_inner().authority;
        let der = crate::outside::own_crl(&self.0, &authority).or_status()?;
        Ok(Response::new(v1::GetCrlResponse { der }))
    }
}

/// As openssl and `ambit identity list` show it: hexadecimal digits, with or without colons.
fn serial(text: &str) -> Result<Vec<u8>, Refusal> {
    let bad = || Refusal::new(Code::BadRequest, "a serial in hexadecimal digits", text.to_owned());
    hex::decode(text.replace(':', "")).map(|bytes| serial_number(&bytes).to_vec()).map_err(|_| bad())
}

fn id_message((origin, id): &(TrustDomain, SpiffeId), denial: &IdDenial) -> v1::DeniedId {
    v1::DeniedId {
        spiffe_id: id.to_string(),
        barred: denial.barred,
        up_to: hex::encode(denial.up_to),
        since_ms: denial.since.0,
        until_ms: denial.until.0,
        origin: origin.to_string(),
    }
}

fn leaf_message((td, authority, serial): &(TrustDomain, String, Vec<u8>), denial: &LeafDenial) -> v1::DeniedSvid {
    v1::DeniedSvid {
        trust_domain: td.to_string(),
        authority: authority.clone(),
        serial: hex::encode(serial),
        since_ms: denial.since.0,
        until_ms: denial.until.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_its_number_however_it_is_written() {
        for (text, number) in [
            ("40aa", Some(&[0x40, 0xaa][..])),
            ("F1:00", Some(&[0xf1, 0])),
            ("00:f1:00", Some(&[0xf1, 0])),
            ("f1x", None),
        ] {
            assert_eq!(serial(text).ok().as_deref(), number, "{text}");
        }
    }
}
