//! The trust domain's JWT authorities, at an operator's word. By time they are made and replaced without one
//! ([`crate::replica::jwt`]).

use super::holders::Survey;
use super::{Asked, Authorities, Named};
use crate::replica::jwt;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use ambit_state::objects::{JwtAuthorityRow, JwtAuthorityState};
use ambit_state::{Command, State};

/// The same fields under the name that SPIRE's operators know: one reading of both.
pub(super) fn as_x509(m: v1::JwtAuthorityRequest) -> v1::X509AuthorityRequest {
    let v1::JwtAuthorityRequest { request_id, authority, without_acks, dry_run } = m;
    v1::X509AuthorityRequest { request_id, authority, without_acks, dry_run, ..Default::default() }
}

/// The key that was named, or the one in that state.
fn named(asked: &Asked, s: &State, state: JwtAuthorityState) -> Result<JwtAuthorityRow, Refusal> {
    let kid = match asked.name()? {
        None => None,
        Some(Named::Jwt(kid)) => Some(kid),
        Some(Named::Root(_) | Named::Intermediate(_)) => {
            return Err(Refusal::new(Code::BadRequest, "a JWT authority's kid (32 hex digits)", &asked.m.authority));
        }
    };
    let found = match &kid {
        Some(kid) => s.jwt_authorities().find(|row| row.kid == *kid),
        None => s.jwt_authorities().find(|row| row.state == state),
    };
    found.cloned().ok_or_else(|| match kid {
        Some(kid) => Refusal::new(Code::NotFound, "a JWT authority of this trust domain", kid),
        None => Refusal::new(Code::RootState, format!("a JWT authority that is {}", state.as_str()), "none"),
    })
}

impl Authorities {
    pub(super) async fn jwt_answer(
        &self,
        missing: Vec<String>,
    ) -> Result<tonic::Response<v1::JwtAuthorityResponse>, Refusal> {
        let state = Some(self.jwt_state().await?);
        Ok(tonic::Response::new(v1::JwtAuthorityResponse { state, missing }))
    }

    pub(super) async fn jwt_state(&self) -> Result<v1::JwtAuthorityState, Refusal> {
        let survey = Survey::of(&self.0).await?;
        self.0.read(|s| survey.jwt_state(s)).await
    }

    /// A new key, in every bundle from the entry on. One that was prepared before, by time or by word, is as good.
    pub(super) async fn jwt_prepare(&self, asked: &Asked) -> Result<(), Refusal> {
        let prepared = self.0.read(|s| s.jwt_authorities().any(|row| row.state == JwtAuthorityState::Prepared)).await?;
        if prepared || asked.m.dry_run {
            return Ok(());
        }
        let kid = jwt::make(&self.0).await?;
        tracing::info!(kid, "JWT authority prepared");
        Ok(())
    }

    pub(super) async fn jwt_activate(&self, asked: &Asked) -> Result<Vec<String>, Refusal> {
        let survey = Survey::of(&self.0).await?;
        let decide = |s: &State| {
            let row = named(asked, s, JwtAuthorityState::Prepared)?;
            let missing = survey.missing_jwt(s, &row);
            Ok::<_, Refusal>((row.kid, missing))
        };
        let (kid, missing) = self.0.read(decide).await??;
        asked.waits(Code::AcksMissing, "every replica, live node and active peer to hold the key", &missing)?;
        if !asked.m.dry_run {
            let command = Command::ActivateJwtAuthority(kid.clone());
            self.0.propose(asked.client.clone(), asked.then("activate"), command).await?.outcome?;
            tracing::info!(kid, "JWT authority activated");
        }
        Ok(missing)
    }

    pub(super) async fn jwt_taint(&self, asked: &Asked) -> Result<(), Refusal> {
        let kid = self.0.read(|s| named(asked, s, JwtAuthorityState::Old)).await??.kid;
        if !asked.m.dry_run {
            let command = Command::TaintJwtAuthority(kid.clone());
            self.0.propose(asked.client.clone(), asked.then("taint"), command).await?.outcome?;
            tracing::info!(kid, "JWT authority tainted");
        }
        Ok(())
    }

    /// Waits for whoever would be left without a key to believe by, or has not heard that it is to ask for tokens anew.
    /// Bearers of its tokens nobody knows: to refuse those is what it is for.
    pub(super) async fn jwt_revoke(&self, asked: &Asked) -> Result<Vec<String>, Refusal> {
        let survey = Survey::of(&self.0).await?;
        let decide = |s: &State| {
            let row = named(asked, s, JwtAuthorityState::Tainted)?;
            // What never signed nobody needs.
            let signer = s.jwt_signer().filter(|_| row.state != JwtAuthorityState::Prepared);
            let missing = signer.map(|signer| survey.missing_jwt(s, signer)).unwrap_or_default();
            Ok::<_, Refusal>((row.kid, missing))
        };
        let (kid, missing) = self.0.read(decide).await??;
        asked.waits(Code::AcksMissing, "all to hold the key that signs now", &missing)?;
        if !asked.m.dry_run {
            let command = Command::RevokeJwtAuthority(kid.clone());
            self.0.propose(asked.client.clone(), asked.then("revoke"), command).await?.outcome?;
            tracing::info!(kid, "JWT authority revoked");
        }
        Ok(missing)
    }
}
