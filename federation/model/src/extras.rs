//! What only some entries say, and how an entry is stored: those that say nothing of it are stored as they always were.

use crate::entry::Entry;
use crate::id::{ObjectName, TrustDomain};
use crate::jwt::JwtTtl;
use crate::peers::{LABELS_MAX, Labels, label};
use crate::refusal::{Code, Refusal};
use crate::time::{Stamp, SvidTtl};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

/// A DNS name that a leaf carries beside its SPIFFE ID, for clients that know no SPIFFE (RFC 1123 2.1, RFC 6125 6.4.3):
/// lower case, no dot at its end; the first label may be `*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DnsName(String);

impl DnsName {
    /// As it stands in the certificate.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DnsName {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // A wildcard for a whole top-level domain is nobody's; a last label of digits alone would be an address.
        let below = s.strip_prefix("*.").filter(|rest| rest.contains('.'));
        let named = below.unwrap_or(s);
        let numbers = named.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if s.len() <= 253 && named.split('.').all(label) && !numbers {
            return Ok(Self(s.to_owned()));
        }
        Err(Refusal::new(Code::BadRequest, "a DNS name in lower case, perhaps with *. before it", s))
    }
}
impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl TryFrom<String> for DnsName {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        s.parse()
    }
}
impl From<DnsName> for String {
    fn from(name: DnsName) -> String {
        name.0
    }
}

/// DNS names of one leaf.
pub const DNS_NAMES_MAX: usize = 16;
/// Federation groups that one entry names.
pub const GROUPS_MAX: usize = 32;
/// Bytes of a hint.
const HINT_BYTES_MAX: usize = 256;

/// What most entries leave as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryExtras {
    /// How the workload is told apart which of several identities this is (SPIFFE Workload API 5.2.1); empty for none.
    pub hint: String,
    /// DNS names of its X.509-SVIDs, in this order.
    pub dns_names: Vec<DnsName>,
    /// Longest lifetime of a JWT-SVID of it.
    pub jwt_ttl: JwtTtl,
    /// Nothing is issued under it from then on, nothing issued lasts longer, and it goes; without end for most.
    pub expires_at: Stamp,
    /// Whoever shows an SVID of it may have a downstream authority: it issues SVIDs of this trust domain by itself.
    pub downstream: bool,
    /// Whoever shows an SVID of it is an administrator, with the roles that its SPIFFE ID was given.
    pub admin: bool,
    /// Groups of trust domains whose bundles the workload also gets; they may come to be later.
    pub federates_with_groups: BTreeSet<ObjectName>,
    /// What policies may find it by.
    pub labels: Labels,
}

impl EntryExtras {
    /// What an entry says that says nothing.
    pub const NONE: EntryExtras = EntryExtras {
        hint: String::new(),
        dns_names: Vec::new(),
        jwt_ttl: JwtTtl::DEFAULT,
        expires_at: Stamp(u64::MAX),
        downstream: false,
        admin: false,
        federates_with_groups: BTreeSet::new(),
        labels: Labels::new(),
    };

    /// Whether its holder is more than a workload: only who administers the whole cell makes such an entry, or changes it.
    pub fn is_privileged(&self) -> bool {
        self.downstream || self.admin
    }

    /// Bounded, and each name once.
    fn check(&self) -> Result<(), Refusal> {
        if self.hint.len() > HINT_BYTES_MAX || self.hint.chars().any(char::is_control) {
            let expected = format!("a hint of at most {HINT_BYTES_MAX} bytes without control characters");
            return Err(Refusal::new(Code::BadRequest, expected, format!("{} bytes", self.hint.len())));
        }
        let distinct: BTreeSet<&DnsName> = self.dns_names.iter().collect();
        if self.dns_names.len() > DNS_NAMES_MAX || distinct.len() != self.dns_names.len() {
            let found = format!("{} names, {} of them different", self.dns_names.len(), distinct.len());
            return Err(Refusal::new(Code::BadRequest, format!("at most {DNS_NAMES_MAX} DNS names, each once"), found));
        }
        if self.admin && self.downstream {
            let expected = "an entry marked admin or downstream: who issues for a cluster does not administer the cell";
            return Err(Refusal::new(Code::BadRequest, expected, "both"));
        }
        if self.federates_with_groups.len() > GROUPS_MAX {
            let found = format!("{}", self.federates_with_groups.len());
            return Err(Refusal::new(Code::BadRequest, format!("at most {GROUPS_MAX} federation groups"), found));
        }
        if self.labels.len() > LABELS_MAX {
            let found = format!("{}", self.labels.len());
            return Err(Refusal::new(Code::BadRequest, format!("at most {LABELS_MAX} labels"), found));
        }
        self.labels.iter().try_for_each(|(key, value)| label(&format!("{key}={value}")).map(drop))
    }
}

/// [`EntryExtras`] that take no room where there are none: a cell has a hundred thousand entries.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Extras(Option<Box<EntryExtras>>);

impl Extras {
    /// Bounded extras.
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub fn new(extras: EntryExtras) -> Result<Extras, Refusal> {
        extras.check()?;
        Ok(Extras((extras != EntryExtras::NONE).then(|| Box::new(extras))))
    }
}
impl Deref for Extras {
    type Target = EntryExtras;
    fn deref(&self) -> &EntryExtras {
        static NONE: EntryExtras = EntryExtras::NONE;
        self.0.as_deref().unwrap_or(&NONE)
    }
}
impl fmt::Debug for Extras {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        EntryExtras::fmt(self, f)
    }
}

/// Set in the stored TTL, which is far below it, where extras follow: a reader of the former form refuses such an entry
/// for its TTL and never takes it for one without them.
const EXTRAS_FOLLOW: u32 = 1 << 31;
/// Of what follows: the first form that says all there is to say. Another is refused.
const EXTRAS_FIRST: u8 = 1;
const EXTRAS_SECOND: u8 = 2;
const EXTRAS_THIRD: u8 = 3;

/// [`EntryExtras`] as version 1 stores them.
#[derive(Serialize, Deserialize)]
struct First {
    hint: String,
    dns_names: Vec<DnsName>,
    jwt_ttl: JwtTtl,
    expires_at: Stamp,
}

/// What version 2 adds.
#[derive(Default, PartialEq, Serialize, Deserialize)]
struct Second {
    downstream: bool,
    admin: bool,
    federates_with_groups: BTreeSet<ObjectName>,
}

struct StoredExtras(EntryExtras);

impl Serialize for StoredExtras {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let EntryExtras { hint, dns_names, jwt_ttl, expires_at, downstream, admin, federates_with_groups, labels } =
            self.0.clone();
        let first = First { hint, dns_names, jwt_ttl, expires_at };
        let second = Second { downstream, admin, federates_with_groups };
        if !labels.is_empty() {
            (EXTRAS_THIRD, first, second, labels).serialize(serializer)
        } else if second == Second::default() {
            (EXTRAS_FIRST, first).serialize(serializer)
        } else {
            (EXTRAS_SECOND, first, second).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for StoredExtras {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Versioned;
        impl<'de> Visitor<'de> for Versioned {
            type Value = StoredExtras;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("extras as they are stored")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<StoredExtras, A::Error> {
                let version: u8 = next(&mut seq, 0)?;
                if !matches!(version, EXTRAS_FIRST | EXTRAS_SECOND | EXTRAS_THIRD) {
                    return Err(A::Error::custom(format!("extras of version {version}")));
                }
                let First { hint, dns_names, jwt_ttl, expires_at } = next(&mut seq, 1)?;
                let second = if version == EXTRAS_FIRST { Second::default() } else { next(&mut seq, 2)? };
                let Second { downstream, admin, federates_with_groups } = second;
                let labels = if version == EXTRAS_THIRD { next(&mut seq, 3)? } else { Labels::new() };
                Ok(StoredExtras(EntryExtras {
                    hint,
                    dns_names,
                    jwt_ttl,
                    expires_at,
                    downstream,
                    admin,
                    federates_with_groups,
                    labels,
                }))
            }
        }
        deserializer.deserialize_tuple(4, Versioned)
    }
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let extras = self.extras.0.as_deref();
        let mut out = serializer.serialize_struct("Entry", 8)?;
        out.serialize_field("id", &self.id)?;
        out.serialize_field("spiffe_id", &self.spiffe_id)?;
        out.serialize_field("cluster", &self.cluster)?;
        out.serialize_field("nodes", &self.nodes)?;
        out.serialize_field("selectors", &self.selectors)?;
        out.serialize_field("ttl", &(self.ttl.seconds() | extras.map_or(0, |_| EXTRAS_FOLLOW)))?;
        out.serialize_field("federates_with", &self.federates_with)?;
        if let Some(extras) = extras {
            out.serialize_field("extras", &StoredExtras(extras.clone()))?;
        }
        out.end()
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const FIELDS: &[&str] =
            &["id", "spiffe_id", "cluster", "nodes", "selectors", "ttl", "federates_with", "extras"];
        deserializer.deserialize_struct("Entry", FIELDS, Stored)
    }
}

fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A, at: usize) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &"an entry as it is stored"))
}

struct Stored;

impl<'de> Visitor<'de> for Stored {
    type Value = Entry;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an entry as it is stored")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Entry, A::Error> {
        let (id, spiffe_id, cluster) = (next(&mut seq, 0)?, next(&mut seq, 1)?, next(&mut seq, 2)?);
        let (nodes, selectors) = (next(&mut seq, 3)?, next(&mut seq, 4)?);
        let ttl: u32 = next(&mut seq, 5)?;
        let federates_with: BTreeSet<TrustDomain> = next(&mut seq, 6)?;
        let extras = if ttl & EXTRAS_FOLLOW == 0 {
            Extras::default()
        } else {
            let StoredExtras(extras) = next(&mut seq, 7)?;
            Extras::new(extras).map_err(A::Error::custom)?
        };
        let ttl = SvidTtl::try_from(ttl & !EXTRAS_FOLLOW).map_err(A::Error::custom)?;
        Ok(Entry { id, spiffe_id, cluster, nodes, selectors, ttl, federates_with, extras })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Selector, Selectors};
    use crate::id::{ClusterId, NodeId, ObjectName, SpiffeId};

    /// The form of release 0.1, as it was derived then.
    #[derive(Serialize, Deserialize)]
    struct Former {
        id: ObjectName,
        spiffe_id: SpiffeId,
        cluster: ClusterId,
        nodes: BTreeSet<NodeId>,
        selectors: Selectors,
        ttl: SvidTtl,
        federates_with: BTreeSet<TrustDomain>,
    }

    fn former() -> Former {
        Former {
            id: "web".parse().unwrap(),
            spiffe_id: "spiffe://west/web".parse().unwrap(),
            cluster: "west".parse().unwrap(),
            nodes: [NodeId([3; 32])].into(),
            selectors: [Selector::UnixUid(7)].into(),
            ttl: 90.try_into().unwrap(),
            federates_with: ["east".parse().unwrap()].into(),
        }
    }

    #[test]
    fn an_entry_without_extras_is_stored_as_it_always_was() {
        // With what follows it in a row.
        let bytes = postcard::to_stdvec(&(former(), 17u64)).unwrap();
        let (entry, after): (Entry, u64) = postcard::from_bytes(&bytes).unwrap();
        assert_eq!((entry.ttl.seconds(), &*entry.extras, after), (90, &EntryExtras::NONE, 17));
        assert_eq!(postcard::to_stdvec(&(entry, 17u64)).unwrap(), bytes);
    }

    #[test]
    fn extras_are_stored_and_a_former_reader_refuses_them() {
        let bytes = postcard::to_stdvec(&former()).unwrap();
        let plain: Entry = postcard::from_bytes(&bytes).unwrap();
        let extras = EntryExtras {
            hint: "internal".into(),
            dns_names: vec!["web.west.example".parse().unwrap(), "*.west.example".parse().unwrap()],
            jwt_ttl: 60.try_into().unwrap(),
            expires_at: Stamp(1_900_000_000_000),
            ..EntryExtras::NONE
        };
        // Version 1, as it was derived before there was another.
        let first = (1u8, "internal", ["web.west.example", "*.west.example"].to_vec(), 60u32, 1_900_000_000_000u64);
        let entry = Entry { extras: Extras::new(extras.clone()).unwrap(), ..plain.clone() };
        let bytes = postcard::to_stdvec(&(&entry, 17u64)).unwrap();
        assert!(bytes.ends_with(&postcard::to_stdvec(&(first, 17u64)).unwrap()));
        assert_eq!(postcard::from_bytes::<(Entry, u64)>(&bytes).unwrap(), (entry, 17));
        assert!(postcard::from_bytes::<Former>(&bytes).is_err());
        let second = EntryExtras {
            downstream: true,
            federates_with_groups: ["partners".parse().unwrap()].into(),
            ..extras.clone()
        };
        let labels: Labels = [label("app=db").unwrap()].into();
        for extras in [
            second.clone(),
            EntryExtras { admin: true, ..EntryExtras::NONE },
            EntryExtras { labels: labels.clone(), ..EntryExtras::NONE },
            EntryExtras { labels, ..second.clone() },
        ] {
            let entry = Entry { extras: Extras::new(extras).unwrap(), ..plain.clone() };
            let bytes = postcard::to_stdvec(&(&entry, 17u64)).unwrap();
            assert_eq!(postcard::from_bytes::<(Entry, u64)>(&bytes).unwrap(), (entry, 17));
        }
        // A fourth version is nobody's.
        let entry = Entry { extras: Extras::new(second).unwrap(), ..plain.clone() };
        let mut bytes = postcard::to_stdvec(&entry).unwrap();
        let at = bytes.windows(2).rposition(|two| two == [2, 8]).unwrap();
        bytes[at] = 4;
        assert!(postcard::from_bytes::<Entry>(&bytes).unwrap_err().to_string().contains("Serde"), "refused");
        let said_nothing = Entry { extras: Extras::new(EntryExtras::NONE).unwrap(), ..plain.clone() };
        assert_eq!(said_nothing, plain);
    }

    #[test]
    fn dns_names_are_lower_case_names_and_no_addresses() {
        let long = format!("{}.example", "a".repeat(63));
        for good in
            ["web", "localhost", "web.west.example", "*.west.example", "xn--bcher-kva.example", "1.example", &long]
        {
            assert_eq!(good.parse::<DnsName>().unwrap().as_str(), good);
        }
        let label = format!("{}.example", "a".repeat(64));
        let name = format!("{}example", "a.".repeat(130));
        for bad in [
            "",
            ".",
            "web.",
            ".web",
            "a..b",
            "Web",
            "web_1",
            "-a",
            "a-",
            "*",
            "*.",
            "*.example",
            "w*.example",
            "a.*.b",
            "10.0.0.1",
            "127.1",
            "a b",
            "web:80",
            "b\u{fc}cher.example",
            &label,
            &name,
        ] {
            assert!(bad.parse::<DnsName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn extras_are_bounded() {
        let with = |change: fn(&mut EntryExtras)| {
            let mut extras = EntryExtras::NONE;
            change(&mut extras);
            Extras::new(extras).is_ok()
        };
        assert!(with(|e| e.hint = "a".repeat(256)));
        assert!(!with(|e| e.hint = "a".repeat(257)));
        assert!(!with(|e| e.hint = "a\n".into()));
        assert!(!with(|e| e.dns_names = vec!["a".parse().unwrap(); 2]));
        assert!(!with(|e| (e.admin, e.downstream) = (true, true)));
        let groups = |n: usize| (0..n).map(|n| format!("g{n}").parse().unwrap()).collect();
        assert!(Extras::new(EntryExtras { federates_with_groups: groups(32), ..EntryExtras::NONE }).is_ok());
        assert!(Extras::new(EntryExtras { federates_with_groups: groups(33), ..EntryExtras::NONE }).is_err());
        assert!(!with(|e| e.dns_names = (0..17).map(|n| format!("a{n}").parse().unwrap()).collect()));
    }
}
