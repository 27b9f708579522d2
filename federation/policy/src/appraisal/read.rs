//! The written form, and what it means.

use crate::scalar::{Listed, Text};
use ambit_model::appraisal::{
    AppraisalPolicy, CommandLine, Digests, EndorsementClass, HexDigest, ImaFile, ImaRules, KeyVariable, POLICED_PCRS,
    PcrBank,
};
use ambit_model::{ClusterId, Code, ObjectName, Refusal};
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

/// Values in one list. dbx alone holds some 400 today.
const LIST_MAX: usize = 4096;
/// Characters of one pattern or text: kernels cut their command line at 4096.
const TEXT_MAX: usize = 8192;

/// Parses one document.
pub(super) fn policy<'de, D: Deserializer<'de>>(document: D) -> Result<AppraisalPolicy, D::Error> {
    Ok(Written::deserialize(document)?.into_policy())
}

#[derive(Deserialize)]
enum Kind {
    AppraisalPolicy,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(rename = "kind")]
    _kind: Kind,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: Text<ObjectName>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum BootLog {
    #[default]
    Required,
    Optional,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SecureBoot {
    #[default]
    Required,
    Any,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Violations {
    #[default]
    Refuse,
    Tolerate,
}

/// A list that may be empty: it allows nothing, or asks for nothing.
#[derive(Deserialize)]
#[serde(transparent)]
struct Any<T: Ord>(BTreeSet<T>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    clusters: Listed<Text<ClusterId>, LIST_MAX>,
    endorsement: Option<Listed<Text<EndorsementClass>, 4>>,
    #[serde(default)]
    boot_log: BootLog,
    #[serde(default)]
    secure_boot: SecureBoot,
    #[serde(default)]
    keys: Keys,
    dbx_includes: Option<Any<Text<HexDigest>>>,
    sbat_level: Option<Unique<String, u32>>,
    authorities: Option<Any<Text<HexDigest>>>,
    images: Option<Any<Text<HexDigest>>>,
    files: Option<Any<Text<HexDigest>>>,
    mok: Option<Any<Text<HexDigest>>>,
    grub_commands: Option<Any<Text<Line>>>,
    command_line: Option<WrittenCommandLine>,
    #[serde(default)]
    events: Unique<Pcr, Any<Text<HexDigest>>>,
    #[serde(default)]
    pcrs: Banks,
    #[serde(default = "none")]
    unpoliced: Any<Pcr>,
    ima: Option<WrittenIma>,
}

fn none<T: Ord>() -> Any<T> {
    Any(BTreeSet::new())
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    #[serde(rename = "PK")]
    pk: Option<Any<Text<HexDigest>>>,
    #[serde(rename = "KEK")]
    kek: Option<Any<Text<HexDigest>>>,
    db: Option<Any<Text<HexDigest>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenCommandLine {
    #[serde(default = "none")]
    patterns: Any<Text<Line>>,
    #[serde(default = "none")]
    exact: Any<Text<Line>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Banks {
    sha256: Option<Unique<Pcr, Any<Text<Value<32>>>>>,
    sha384: Option<Unique<Pcr, Any<Text<Value<48>>>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenIma {
    #[serde(default = "none")]
    allow_lists: Any<Text<Value<32>>>,
    #[serde(default = "none")]
    files: Any<Text<File>>,
    #[serde(default = "none")]
    exceptions: Any<Text<Line>>,
    #[serde(default)]
    violations: Violations,
}

/// A policed PCR, as the key of a mapping or a number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pcr(u32);

impl<'de> Deserialize<'de> for Pcr {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Pcr;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a policed PCR (0-9 or 14)")
            }
            fn visit_u64<E: Error>(self, n: u64) -> Result<Pcr, E> {
                let known = u32::try_from(n).ok().filter(|n| POLICED_PCRS.contains(n));
                known.map(Pcr).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(n), &self))
            }
            // Keys are often written in quotes.
            fn visit_str<E: Error>(self, s: &str) -> Result<Pcr, E> {
                let known = POLICED_PCRS.into_iter().find(|n| n.to_string() == s);
                known.map(Pcr).ok_or_else(|| E::invalid_value(Unexpected::Str(s), &self))
            }
        }
        d.deserialize_any(V)
    }
}

/// A mapping in which no key stands twice: of two values for one PCR neither is surely meant.
struct Unique<K, T>(BTreeMap<K, T>);

impl<K, T> Default for Unique<K, T> {
    fn default() -> Self {
        Unique(BTreeMap::new())
    }
}

impl<'de, K: Deserialize<'de> + Ord, T: Deserialize<'de>> Deserialize<'de> for Unique<K, T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<K, T>(PhantomData<(K, T)>);
        impl<'de, K: Deserialize<'de> + Ord, T: Deserialize<'de>> Visitor<'de> for V<K, T> {
            type Value = Unique<K, T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut out = BTreeMap::new();
                while let Some(key) = map.next_key()? {
                    if out.contains_key(&key) {
                        return Err(A::Error::custom("a key that stands twice"));
                    }
                    out.insert(key, map.next_value()?);
                }
                Ok(Unique(out))
            }
        }
        d.deserialize_map(V(PhantomData))
    }
}

/// A text of a sensible length.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Line(String);

impl FromStr for Line {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        if s.is_empty() || s.len() > TEXT_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("1-{TEXT_MAX} bytes"), format!("{}", s.len())));
        }
        Ok(Line(s.to_owned()))
    }
}

/// A digest of one length.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Value<const N: usize>(HexDigest);

impl<const N: usize> FromStr for Value<N> {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let digest: HexDigest = s.parse()?;
        if digest.as_bytes().len() == N {
            return Ok(Value(digest));
        }
        Err(Refusal::new(Code::BadRequest, format!("{} hexadecimal digits", N * 2), s))
    }
}

/// `DIGEST PATH` or `DIGEST *`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct File(ImaFile);

impl FromStr for File {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "DIGEST PATH or DIGEST *", s);
        let (digest, path) = s.split_once(' ').ok_or_else(bad)?;
        if path.is_empty() {
            return Err(bad());
        }
        let path = (path != "*").then(|| path.to_owned());
        Ok(File(ImaFile { digest: digest.parse()?, path }))
    }
}

fn digests(list: Any<Text<HexDigest>>) -> Digests {
    list.0.into_iter().map(|d| d.0).collect()
}

fn lines(list: Any<Text<Line>>) -> BTreeSet<String> {
    list.0.into_iter().map(|l| l.0.0).collect()
}

fn values<const N: usize>(bank: Unique<Pcr, Any<Text<Value<N>>>>) -> BTreeMap<u32, Digests> {
    bank.0.into_iter().map(|(pcr, list)| (pcr.0, list.0.into_iter().map(|v| v.0.0).collect())).collect()
}

impl Written {
    fn into_policy(self) -> AppraisalPolicy {
        let spec = self.spec;
        let mut policy = AppraisalPolicy::new(self.metadata.name.0, spec.clusters.0.into_iter().map(|c| c.0).collect());
        if let Some(classes) = spec.endorsement {
            policy.endorsement = classes.0.into_iter().map(|c| c.0).collect();
        }
        policy.boot_log_optional = matches!(spec.boot_log, BootLog::Optional);
        policy.secure_boot_any = matches!(spec.secure_boot, SecureBoot::Any);
        let keys =
            [(KeyVariable::Pk, spec.keys.pk), (KeyVariable::Kek, spec.keys.kek), (KeyVariable::Db, spec.keys.db)];
        policy.keys = keys.into_iter().filter_map(|(v, list)| Some((v, digests(list?)))).collect();
        policy.dbx_includes = spec.dbx_includes.map(digests);
        policy.sbat_level = spec.sbat_level.map(|level| level.0);
        policy.authorities = spec.authorities.map(digests);
        policy.images = spec.images.map(digests);
        policy.files = spec.files.map(digests);
        policy.mok = spec.mok.map(digests);
        policy.grub_commands = spec.grub_commands.map(lines);
        policy.command_line =
            spec.command_line.map(|c| CommandLine { patterns: lines(c.patterns), exact: lines(c.exact) });
        policy.events = spec.events.0.into_iter().map(|(pcr, list)| (pcr.0, digests(list))).collect();
        policy.pcrs.extend(spec.pcrs.sha256.map(|bank| (PcrBank::Sha256, values(bank))));
        policy.pcrs.extend(spec.pcrs.sha384.map(|bank| (PcrBank::Sha384, values(bank))));
        policy.unpoliced = spec.unpoliced.0.into_iter().map(|pcr| pcr.0).collect();
        policy.ima = spec.ima.map(WrittenIma::into_rules);
        policy
    }
}

impl WrittenIma {
    fn into_rules(self) -> ImaRules {
        let list = |v: Text<Value<32>>| <[u8; 32]>::try_from(v.0.0.as_bytes()).ok();
        ImaRules {
            // `Value<32>` holds 32 bytes, so that none is lost here.
            allow_lists: self.allow_lists.0.into_iter().filter_map(list).collect(),
            files: self.files.0.into_iter().map(|f| f.0.0).collect(),
            exceptions: lines(self.exceptions),
            violations_tolerated: matches!(self.violations, Violations::Tolerate),
        }
    }
}
