//! How a service is stored: as it always was, unless its backends have weights.

use crate::policy::{Order, Service};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Added to the order's number where weights follow: a reader of the former form knows no such order and refuses the service,
/// rather than sending calls to what is drained.
const WEIGHTS_FOLLOW: u32 = 16;
/// Of what follows.
const WEIGHTS_VERSION: u8 = 1;
const FIELDS: &[&str] = &["name", "address", "port", "backends", "order", "weights"];

impl Serialize for Service {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let order = match self.order {
            Order::LocalFirst => 0,
            Order::FirstBackend => 1,
        };
        let follows = !self.weights.is_empty();
        let mut out = serializer.serialize_struct("Service", FIELDS.len())?;
        out.serialize_field("name", &self.name)?;
        out.serialize_field("address", &self.address)?;
        out.serialize_field("port", &self.port)?;
        out.serialize_field("backends", &self.backends)?;
        // An enum's variant is stored as such a number.
        out.serialize_field("order", &(order + if follows { WEIGHTS_FOLLOW } else { 0 }))?;
        if follows {
            out.serialize_field("weights", &(WEIGHTS_VERSION, &self.weights))?;
        }
        out.end()
    }
}

impl<'de> Deserialize<'de> for Service {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_struct("Service", FIELDS, Stored)
    }
}

struct Stored;

impl<'de> Visitor<'de> for Stored {
    type Value = Service;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a service as it is stored")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Service, A::Error> {
        let (name, address, port) = (next(&mut seq, 0)?, next(&mut seq, 1)?, next(&mut seq, 2)?);
        let (backends, order) = (next(&mut seq, 3)?, next::<u32, A>(&mut seq, 4)?);
        let follows = order >= WEIGHTS_FOLLOW;
        let order = match if follows { order - WEIGHTS_FOLLOW } else { order } {
            0 => Order::LocalFirst,
            1 => Order::FirstBackend,
            other => return Err(A::Error::custom(format!("order {other}"))),
        };
        let weights = match follows.then(|| next::<(u8, Vec<u32>), A>(&mut seq, 5)).transpose()? {
            None => Vec::new(),
            Some((WEIGHTS_VERSION, weights)) if !weights.is_empty() => weights,
            Some((version, _)) => return Err(A::Error::custom(format!("weights of version {version}, or none"))),
        };
        Ok(Service { name, address, port, backends, order, weights })
    }
}

fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A, at: usize) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &"a service as it is stored"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;
    use crate::policy::Peers;

    /// As release 0.1 had it.
    #[derive(Serialize, Deserialize)]
    struct Former {
        name: String,
        address: Address,
        port: u16,
        backends: Vec<Peers>,
        order: Order,
    }

    fn service(order: Order, weights: &[u32]) -> Service {
        let backends = ["spiffe://west/a", "spiffe://west/b"].map(|set| set.parse().unwrap()).into();
        let (name, address) = ("s".parse().unwrap(), "10.96.0.1".parse().unwrap());
        Service { name, address, port: 80, backends, order, weights: weights.into() }
    }

    #[test]
    fn what_a_former_release_could_say_is_stored_as_it_did() {
        for order in [Order::LocalFirst, Order::FirstBackend] {
            let now = service(order, &[]);
            let Service { address, port, backends, order, .. } = now.clone();
            let former = Former { name: "s".into(), address, port, backends, order };
            let bytes = postcard::to_stdvec(&now).unwrap();
            assert_eq!(bytes, postcard::to_stdvec(&former).unwrap());
            assert_eq!(postcard::from_bytes::<Service>(&bytes).unwrap(), now);
        }
    }

    #[test]
    fn what_it_could_not_say_it_refuses_and_this_one_reads_in_the_middle_of_others() {
        let now = service(Order::FirstBackend, &[90, 10]);
        let bytes = postcard::to_stdvec(&now).unwrap();
        assert!(hex::encode(&bytes).ends_with("1101025a0a"), "{}", hex::encode(&bytes));
        assert!(postcard::take_from_bytes::<Former>(&bytes).is_err());
        let three = vec![now.clone(), service(Order::LocalFirst, &[]), now];
        assert_eq!(postcard::from_bytes::<Vec<Service>>(&postcard::to_stdvec(&three).unwrap()).unwrap(), three);
        let mut none = postcard::to_stdvec(&service(Order::LocalFirst, &[])).unwrap();
        *none.last_mut().unwrap() = 16;
        none.extend([1, 0]);
        assert!(postcard::from_bytes::<Service>(&none).is_err(), "weights, and none");
    }
}
