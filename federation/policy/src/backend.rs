//! A backend of a service as it is written: a set of identities, alone or with a weight.

use crate::scalar::Text;
use ambit_model::policy::{Peers, WEIGHT_MAX};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Unexpected, Visitor, value::StrDeserializer};
use std::fmt;

/// `spiffe://west/shop`, or `{id: spiffe://west/shop, weight: 90}`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Backend {
    pub(crate) set: Peers,
    weight: Option<u32>,
}

/// Weights of all backends; none where none has one.
///
/// # Errors
/// What was expected, where some have one and others do not, all are 0, or one backend stands there twice.
pub(crate) fn weights(backends: &[Backend]) -> Result<Vec<u32>, &'static str> {
    let weights: Vec<u32> = backends.iter().filter_map(|backend| backend.weight).collect();
    if weights.is_empty() {
        return Ok(weights);
    }
    if weights.len() < backends.len() {
        return Err("a weight of some backends: expected one of each, or of none");
    }
    if weights.iter().all(|weight| *weight == 0) {
        return Err("weight 0 of all backends: expected one at least to which calls go");
    }
    let repeated =
        backends.iter().enumerate().any(|(at, one)| backends.iter().take(at).any(|other| other.set == one.set));
    if repeated { Err("one backend with two weights: expected each once") } else { Ok(weights) }
}

impl<'de> Deserialize<'de> for Backend {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Written)
    }
}

struct Written;

impl<'de> Visitor<'de> for Written {
    type Value = Backend;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a set of identities, or {id: SET, weight: N}")
    }
    fn visit_str<E: Error>(self, text: &str) -> Result<Backend, E> {
        let set = Text::<Peers>::deserialize(StrDeserializer::new(text))?.0;
        Ok(Backend { set, weight: None })
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Backend, A::Error> {
        let (mut set, mut weight) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "id" if set.is_none() => set = Some(map.next_value::<Text<Peers>>()?.0),
                "weight" if weight.is_none() => weight = Some(map.next_value::<Weight>()?.0),
                "id" | "weight" => return Err(A::Error::custom(format_args!("duplicate field `{key}`"))),
                other => return Err(A::Error::unknown_field(other, &["id", "weight"])),
            }
        }
        let set = set.ok_or_else(|| A::Error::missing_field("id"))?;
        let weight = weight.ok_or_else(|| A::Error::missing_field("weight"))?;
        Ok(Backend { set, weight: Some(weight) })
    }
}

struct Weight(u32);

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Weight;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a weight of 0-{WEIGHT_MAX}")
            }
            fn visit_u64<E: Error>(self, n: u64) -> Result<Weight, E> {
                let weight = u32::try_from(n).ok().filter(|n| *n <= WEIGHT_MAX);
                weight.map(Weight).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(n), &self))
            }
        }
        d.deserialize_u32(V)
    }
}
