//! What the Workload API and the Broker API have in common of JWT-SVIDs (SPIFFE_Workload_API.md section 6).

use crate::answers::{self, Answer};
use crate::follow::{self, Why, Workload};
use crate::issued::{Issued, Known};
use crate::tokens::Tokens;
use ambit_identity::document::jwks;
use ambit_identity::{JwtTrust, verify_jwt};
use ambit_model::refusal::Class;
use ambit_model::{Audience, EntryId, JwtAuthority, Refusal, Selector, SpiffeId, TrustDomain};
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use std::collections::{BTreeMap, BTreeSet};
use tonic::Status;

/// A token and whose it is.
#[derive(Debug)]
pub struct Identity {
    /// Who.
    pub id: SpiffeId,
    /// The compact JWS.
    pub token: Token,
    /// See [`answers::hints`].
    pub hint: String,
}

/// Shown to nobody but its workload.
pub struct Token(pub String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// Why there is none.
#[derive(Debug)]
pub enum NoToken {
    /// What was asked for makes no sense.
    Invalid(String),
    /// The caller may have none.
    Why(Why),
}

/// What a workload may sign and believe.
struct Entitled {
    own: Vec<(EntryId, SpiffeId, String)>,
    trust: JwtTrust,
    /// Keys of the own trust domain whose tokens are to be asked for anew.
    tainted: BTreeSet<String>,
}

/// Keys of JWT-SVIDs by trust domain, for whoever has the selectors `found`.
pub fn keys(known: &Known, found: &BTreeSet<Selector>) -> Answer<BTreeMap<TrustDomain, Vec<JwtAuthority>>> {
    let entries = answers::entries(known, found);
    let Some(view) = &known.view else { return Answer::Coming };
    if entries.is_empty() {
        return Answer::Nobody;
    }
    let named: BTreeSet<&TrustDomain> = entries.iter().flat_map(|e| &e.federates_with).collect();
    let foreign = view.foreign.iter().filter(|bundle| named.contains(bundle.trust_domain()));
    let foreign = foreign.map(|bundle| (bundle.trust_domain().clone(), bundle.jwt_authorities().to_vec()));
    Answer::Set(foreign.chain([(view.trust_domain.clone(), view.own.jwt_authorities().to_vec())]).collect())
}

/// The same as documents, by the SPIFFE ID of the trust domain. Of one whose keys cannot be read nothing is told, so that
/// nobody of it is believed.
pub fn documents(known: &Known, found: &BTreeSet<Selector>) -> Answer<BTreeMap<String, Vec<u8>>> {
    let document =
        |(td, keys): (TrustDomain, Vec<JwtAuthority>)| Some((answers::id(&td), jwks(&keys).ok()?.into_bytes()));
    keys(known, found).map(|all| all.into_iter().filter_map(document).collect())
}

/// The keys as the verifier takes them.
fn trusting(all: &BTreeMap<TrustDomain, Vec<JwtAuthority>>) -> JwtTrust {
    let mut trust = JwtTrust::default();
    for (td, keys) in all {
        if let Err(refusal) = trust.put(td, keys) {
            tracing::warn!(trust_domain = %td, %refusal, "JWT keys left out");
        }
    }
    trust
}

/// The tokens of a workload for an audience: of the identity `spiffe_id`, or of all if that is empty.
pub async fn fetch(
    issued: &Issued,
    tokens: &Tokens,
    mut workload: Workload,
    audience: Vec<String>,
    spiffe_id: &str,
) -> Result<Vec<Identity>, NoToken> {
    let invalid = |refusal: Refusal| NoToken::Invalid(refusal.to_string());
    let audience = Audience::new(audience).map_err(invalid)?;
    let only: Option<SpiffeId> = match spiffe_id {
        "" => None,
        id => Some(id.parse().map_err(invalid)?),
    };
    let entitled = |known: &Known, found: &BTreeSet<Selector>| {
        let entries = answers::entries(known, found);
        let named = entries.iter().zip(answers::hints(&entries));
        // What the cell refuses to certify it does not speak for either.
        let held = named.filter(|(entry, _)| !known.svids.get(&entry.id).is_some_and(Result::is_err));
        let own = held.map(|(entry, hint)| (entry.id.clone(), entry.spiffe_id.clone(), hint));
        let own: Vec<_> = own.filter(|(_, id, _)| only.as_ref().is_none_or(|only| only == id)).collect();
        let tainted = known.view.as_ref().map(|view| view.tainted_jwt.clone()).unwrap_or_default();
        keys(known, found).map(|keys| Entitled { own, trust: trusting(&keys), tainted })
    };
    let Entitled { own, trust, tainted } =
        match follow::once(issued, &mut workload, entitled).await.map_err(NoToken::Why)? {
            Answer::Set(entitled) | Answer::Part(entitled) => entitled,
            Answer::Coming => return Err(NoToken::Why(Why::Starting)),
            Answer::Nobody => return Err(NoToken::Why(Why::Nobody)),
        };
    let mut all = Vec::new();
    for (entry, id, hint) in own {
        match tokens.token(&entry, &id, &audience, &trust, &tainted).await {
            Ok(token) => all.push(Identity { id, token: Token(token.to_string()), hint }),
            Err(refusal) if refusal.code.class() == Class::Unavailable => {
                tracing::debug!(entry = %entry, %refusal, "JWT-SVID not issued now");
                return Err(NoToken::Why(Why::NotIssued));
            }
            Err(refusal) => tracing::warn!(entry = %entry, %refusal, "JWT-SVID denied"),
        }
    }
    // It may have ended while the cell was asked.
    follow::once(issued, &mut workload, |_, _| Answer::Set(())).await.map_err(NoToken::Why)?;
    if all.is_empty() { Err(NoToken::Why(Why::Nobody)) } else { Ok(all) }
}

/// Judges a token that somebody presented to the caller as `audience`.
pub async fn validate(
    issued: &Issued,
    tokens: &Tokens,
    mut workload: Workload,
    audience: &str,
    token: &str,
) -> Result<(SpiffeId, Struct), NoToken> {
    if audience.is_empty() || token.is_empty() {
        return Err(NoToken::Invalid("an audience and a JWT-SVID are required".to_owned()));
    }
    let trust = match follow::once(issued, &mut workload, |known, found| keys(known, found).map(|k| trusting(&k))).await
    {
        Ok(Answer::Set(trust) | Answer::Part(trust)) => trust,
        Ok(Answer::Coming) => return Err(NoToken::Why(Why::Starting)),
        Ok(Answer::Nobody) => return Err(NoToken::Why(Why::Nobody)),
        Err(why) => return Err(NoToken::Why(why)),
    };
    let svid = verify_jwt(token, audience, &trust, tokens.now());
    let svid = svid.map_err(|refusal| NoToken::Invalid(refusal.to_string()))?;
    let fields = svid.claims().iter().map(|(name, value)| (name.clone(), claim(value))).collect();
    Ok((svid.id().clone(), Struct { fields }))
}

/// A claim as protobuf has it.
fn claim(value: &serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(b) => Kind::BoolValue(*b),
        serde_json::Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or(f64::NAN)),
        serde_json::Value::String(text) => Kind::StringValue(text.clone()),
        serde_json::Value::Array(all) => Kind::ListValue(ListValue { values: all.iter().map(claim).collect() }),
        serde_json::Value::Object(map) => {
            let fields = map.iter().map(|(name, value)| (name.clone(), claim(value))).collect();
            Kind::StructValue(Struct { fields })
        }
    };
    Value { kind: Some(kind) }
}

impl NoToken {
    /// For the count of calls.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Why(why) => why.as_str(),
        }
    }
    /// The status of either service, which says by `refuse` why a caller may have none.
    pub fn status(self, refuse: fn(Why) -> Status) -> Status {
        match self {
            Self::Invalid(what) => Status::invalid_argument(what),
            Self::Why(why) => refuse(why),
        }
    }
}
