//! How a policy is stored: as it always was, unless it says what was not to be said then.

use crate::policy::{Action, Peers, Policy, PolicyExtras};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Added to the action's number where extras follow: a reader of the former form knows no such action and refuses the
/// policy, rather than taking it for one without end.
const EXTRAS_FOLLOW: u32 = 16;
/// Of what follows.
const EXTRAS_VERSION: u8 = 1;
const FIELDS: &[&str] = &["name", "target", "action", "from", "ports", "extras"];

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let extras = (self.extras != PolicyExtras::default()).then_some(&self.extras);
        let action = match self.action {
            Action::Allow => 0,
            Action::Deny => 1,
            Action::Audit => 2,
        };
        let mut out = serializer.serialize_struct("Policy", FIELDS.len())?;
        out.serialize_field("name", &self.name)?;
        out.serialize_field("target", &self.target)?;
        // An enum's variant is stored as such a number.
        out.serialize_field("action", &(action + extras.map_or(0, |_| EXTRAS_FOLLOW)))?;
        out.serialize_field("from", &self.from)?;
        out.serialize_field("ports", &self.ports)?;
        if let Some(extras) = extras {
            out.serialize_field("extras", &(EXTRAS_VERSION, extras))?;
        }
        out.end()
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_struct("Policy", FIELDS, Stored)
    }
}

struct Stored;

impl<'de> Visitor<'de> for Stored {
    type Value = Policy;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a policy as it is stored")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Policy, A::Error> {
        let (name, target, action) = (next(&mut seq, 0)?, next::<Peers, A>(&mut seq, 1)?, next::<u32, A>(&mut seq, 2)?);
        let (from, ports) = (next(&mut seq, 3)?, next(&mut seq, 4)?);
        let follows = action >= EXTRAS_FOLLOW;
        let action = match if follows { action - EXTRAS_FOLLOW } else { action } {
            0 => Action::Allow,
            1 => Action::Deny,
            2 => Action::Audit,
            other => return Err(A::Error::custom(format!("action {other}"))),
        };
        let extras = match follows.then(|| next::<(u8, PolicyExtras), A>(&mut seq, 5)).transpose()? {
            None => PolicyExtras::default(),
            Some((EXTRAS_VERSION, extras)) if !extras.protocols.is_empty() => extras,
            Some((version, _)) => return Err(A::Error::custom(format!("extras of version {version}, or empty"))),
        };
        Ok(Policy { name, target, action, from, ports, extras })
    }
}

fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A, at: usize) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &"a policy as it is stored"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Protocol;
    use crate::time::Stamp;

    /// As release 0.1 had it.
    #[derive(Serialize, Deserialize)]
    struct Former {
        name: String,
        target: Peers,
        action: FormerAction,
        from: Vec<Peers>,
        ports: Vec<u16>,
    }
    #[derive(Serialize, Deserialize)]
    enum FormerAction {
        Allow,
        Deny,
    }

    fn policy(action: Action, extras: PolicyExtras) -> Policy {
        let (name, target) = ("p".parse().unwrap(), "spiffe://west/db".parse().unwrap());
        Policy { name, target, action, from: vec!["spiffe://east/*".parse().unwrap()], ports: vec![8080], extras }
    }

    #[test]
    fn what_a_former_release_could_say_is_stored_as_it_did() {
        for (action, former) in [(Action::Allow, FormerAction::Allow), (Action::Deny, FormerAction::Deny)] {
            let now = policy(action, PolicyExtras::default());
            let (name, target) = ("p".to_owned(), now.target.clone());
            let former = Former { name, target, action: former, from: now.from.clone(), ports: now.ports.clone() };
            let bytes = postcard::to_stdvec(&now).unwrap();
            assert_eq!(bytes, postcard::to_stdvec(&former).unwrap());
            assert_eq!(postcard::from_bytes::<Policy>(&bytes).unwrap(), now);
        }
    }

    /// Rows in stores and records at peers: a change of these bytes is a change of format, and takes a version.
    #[test]
    fn stored_bytes_are_what_they_were() {
        let extras = PolicyExtras {
            expires_at: Stamp(300),
            protocols: [Protocol::Tcp, Protocol::Udp].into(),
            unmeshed: vec!["10.0.0.0/8".parse().unwrap()],
        };
        for (stored, want) in [
            (
                policy(Action::Deny, PolicyExtras::default()),
                "017000107370696666653a2f2f776573742f6462010102046561737401903f",
            ),
            (
                policy(Action::Allow, extras),
                "017000107370696666653a2f2f776573742f6462100102046561737401903f01ac0202000101000a00000008",
            ),
            (
                policy(Action::Audit, PolicyExtras::default()),
                "017000107370696666653a2f2f776573742f6462020102046561737401903f",
            ),
        ] {
            assert_eq!(hex::encode(postcard::to_stdvec(&stored).unwrap()), want, "{stored:?}");
        }
        let sets = ["cluster:w/c", "group:w/g", "labels:w/a=1&b=2"].map(|text| text.parse::<Peers>().unwrap());
        let group = crate::policy::Group { name: "g".parse().unwrap(), members: sets.into() };
        assert_eq!(
            hex::encode(postcard::to_stdvec(&group).unwrap()),
            "01670303017701630401770167050177020161013101620132"
        );
        let told = Peers::from_wire("ids:w /a /b").unwrap();
        assert_eq!(
            hex::encode(postcard::to_stdvec(&told).unwrap()),
            "060177020c7370696666653a2f2f772f610c7370696666653a2f2f772f62"
        );
    }

    #[test]
    fn what_it_could_not_say_it_refuses_and_this_one_reads() {
        let ending = PolicyExtras { expires_at: Stamp(7), ..PolicyExtras::default() };
        let udp = PolicyExtras { protocols: [Protocol::Udp].into(), ..PolicyExtras::default() };
        let unmeshed = PolicyExtras { unmeshed: vec!["10.0.0.0/8".parse().unwrap()], ..PolicyExtras::default() };
        for (action, extras) in [
            (Action::Allow, ending.clone()),
            (Action::Deny, udp),
            (Action::Audit, PolicyExtras::default()),
            (Action::Audit, ending),
            (Action::Allow, unmeshed),
        ] {
            let now = policy(action, extras);
            let bytes = postcard::to_stdvec(&now).unwrap();
            assert_eq!(postcard::take_from_bytes::<Policy>(&bytes).unwrap(), (now, &[][..]));
            assert!(postcard::take_from_bytes::<Former>(&bytes).is_err());
        }
    }
}
