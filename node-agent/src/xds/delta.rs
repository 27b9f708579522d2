//! One xDS stream in incremental form: a request says what more and what less is wanted, a response what is new and what is
//! gone. Nothing that a request asks for is passed over, whatever its nonce: the next one would not say it again.

use super::{Invalid, Last, Meaning, NAME_BYTES_MAX, NAMES_MAX, Named, SECRET, TOO_MUCH, Told, Variant, Wanted};
use super::{is_of_secrets, names, version};
use ambit_proto::xds::core::Node;
use ambit_proto::xds::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use std::collections::{BTreeMap, BTreeSet};

/// The name of all that there are.
const WILDCARD: &str = "*";

/// The stream.
#[derive(Debug, Default)]
pub struct Increments {
    wanted: Option<Wanted>,
    /// By name, the version that the client was told or says that it has; none where it was told that there is none.
    known: BTreeMap<String, Option<String>>,
    /// Asked for since the last response. The client may have dropped what it knew of these.
    anew: BTreeSet<String>,
    told: Option<Last>,
    responses: u64,
}

impl Increments {
    fn subscribe<'a>(&mut self, wanted: &mut Wanted, more: impl Iterator<Item = &'a String>) {
        for name in more {
            match name.as_str() {
                WILDCARD => wanted.all = true,
                _ => _ = wanted.named.insert(name.clone()),
            }
            self.anew.insert(name.clone());
        }
    }

    fn unsubscribe<'a>(&mut self, wanted: &mut Wanted, less: impl Iterator<Item = &'a String>) {
        for name in less {
            match name.as_str() {
                WILDCARD => wanted.all = false,
                // What was never asked for is not asked for now either.
                _ => _ = wanted.named.remove(name),
            }
            self.anew.remove(name);
            // Where all is wanted, the client has dropped what it is to have all the same.
            if wanted.all {
                self.known.remove(name);
            }
        }
        // Nobody is told again of what is no longer wanted. Of all, what was known is known by its own name.
        self.known.retain(|name, _| wanted.wants(name));
    }
}

/// What a client had from a stream before this one.
fn resumed(versions: &BTreeMap<String, String>) -> Result<BTreeMap<String, Option<String>>, Invalid> {
    let fits = |(name, version): (&String, &String)| name.len().max(version.len()) <= NAME_BYTES_MAX;
    if versions.len() > NAMES_MAX || !versions.iter().all(fits) {
        return Err(TOO_MUCH);
    }
    Ok(versions.iter().map(|(name, version)| (name.clone(), Some(version.clone()))).collect())
}

impl Variant for Increments {
    const METHOD: &'static str = "DeltaSecrets";
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn node(request: &DeltaDiscoveryRequest) -> Option<&Node> {
        request.node.as_ref()
    }
    fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }
    fn was_told(&self) -> bool {
        self.told.is_some()
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<Meaning, Invalid> {
        is_of_secrets(&request.type_url)?;
        let mut more = names(&request.resource_names_subscribe)?.peekable();
        let less = names(&request.resource_names_unsubscribe)?;
        let is_first = self.wanted.is_none();
        if !is_first && !request.initial_resource_versions.is_empty() {
            return Err(Invalid("initial_resource_versions come with the first request"));
        }
        let mut wanted = self.wanted.take().unwrap_or_default();
        if is_first {
            // One that names nothing wants all, and goes on to when it names something later.
            wanted.all = more.peek().is_none();
        }
        let before = self.anew.len();
        self.subscribe(&mut wanted, more);
        if is_first {
            self.known = resumed(&request.initial_resource_versions.into_iter().collect())?;
            // It says what it has of them; only what it lacks is told.
            self.anew.retain(|name| !self.known.contains_key(name));
        }
        self.unsubscribe(&mut wanted, less);
        if wanted.named.len() > NAMES_MAX {
            return Err(TOO_MUCH);
        }
        let more = is_first || self.anew.len() > before;
        self.wanted = Some(wanted);
        Ok(match &self.told {
            _ if more => Meaning::More,
            Some(told) if told.nonce == request.response_nonce => Meaning::of(request.error_detail.as_ref()),
            Some(_) | None => Meaning::Stale,
        })
    }

    fn respond(&mut self, secrets: Vec<Named>) -> Told<DeltaDiscoveryResponse> {
        let Some(wanted) = &self.wanted else { return Told::Nothing };
        let there: BTreeMap<String, (String, Named)> = secrets
            .into_iter()
            .map(|named| (named.name.clone(), (version(std::slice::from_ref(&named.secret)), named)))
            .collect();
        let system: Vec<_> = there.values().map(|(_, named)| named.secret.clone()).collect();
        // What the client has and what it asked for by name is gone if it is not there, and it is told so once.
        let asked = self.known.keys().chain(&wanted.named);
        let gone = |name: &&String| {
            !there.contains_key(*name) && (self.known.get(*name) != Some(&None) || self.anew.contains(*name))
        };
        let removed: BTreeSet<String> = asked.filter(gone).cloned().collect();
        let is_new = |(name, (version, _)): &(String, (String, Named))| {
            self.anew.contains(name) || self.known.get(name).and_then(Option::as_ref) != Some(version)
        };
        let added: Vec<_> = there.into_iter().filter(is_new).collect();
        if added.is_empty() && removed.is_empty() {
            return Told::Nothing;
        }
        self.anew.clear();
        for name in &removed {
            match wanted.named.contains(name) {
                true => self.known.insert(name.clone(), None),
                false => self.known.remove(name),
            };
        }
        self.known.extend(added.iter().map(|(name, (version, _))| (name.clone(), Some(version.clone()))));
        self.responses += 1;
        let nonce = self.responses.to_string();
        let version = version(&system);
        self.told = Some(Last { version: version.clone(), nonce: nonce.clone() });
        let resource = |(name, (version, named)): (String, (String, Named))| Resource {
            version,
            resource: Some(named.secret),
            name,
        };
        Told::Response(DeltaDiscoveryResponse {
            system_version_info: version,
            resources: added.into_iter().map(resource).collect(),
            type_url: SECRET.to_owned(),
            nonce,
            removed_resources: removed.into_iter().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_proto::xds::google::rpc::Status;
    use prost_types::Any;

    fn there(secrets: &[(&str, u8)]) -> Vec<Named> {
        let any = |byte: u8| Any { type_url: SECRET.into(), value: vec![byte] };
        secrets.iter().map(|(name, byte)| Named { name: (*name).into(), secret: any(*byte) }).collect()
    }
    fn of(byte: u8) -> String {
        version(&[there(&[("", byte)]).remove(0).secret])
    }
    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }
    fn request(more: &[&str], less: &[&str], nonce: &str) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            resource_names_subscribe: list(more),
            resource_names_unsubscribe: list(less),
            response_nonce: nonce.into(),
            ..Default::default()
        }
    }
    fn with(known: &[(&str, String)], request: DeltaDiscoveryRequest) -> DeltaDiscoveryRequest {
        let initial_resource_versions = known.iter().map(|(name, v)| ((*name).to_owned(), v.clone())).collect();
        DeltaDiscoveryRequest { initial_resource_versions, ..request }
    }
    fn error(request: DeltaDiscoveryRequest) -> DeltaDiscoveryRequest {
        let error_detail = Some(Status { code: 3, message: "bad".into(), details: vec![] });
        DeltaDiscoveryRequest { error_detail, ..request }
    }
    /// What is told: names that are there, and names that are gone.
    fn told(stream: &mut Increments, secrets: &[(&str, u8)]) -> (Vec<String>, Vec<String>) {
        match stream.respond(there(secrets)) {
            Told::Response(response) => {
                assert_eq!(response.type_url, SECRET);
                for resource in &response.resources {
                    let byte = resource.resource.as_ref().unwrap().value[0];
                    assert_eq!(resource.version, of(byte), "a secret's version is of that secret");
                }
                let names = response.resources.into_iter().map(|resource| resource.name).collect();
                (names, response.removed_resources)
            }
            other => {
                assert_eq!(other, Told::Nothing);
                (vec![], vec![])
            }
        }
    }
    type Step<'a> = (DeltaDiscoveryRequest, Meaning, &'a [(&'a str, u8)], &'a [&'a str], &'a [&'a str]);
    fn run(steps: Vec<Step<'_>>) {
        let mut stream = Increments::default();
        for (n, (come, meaning, secrets, added, removed)) in steps.into_iter().enumerate() {
            assert_eq!(stream.request(come), Ok(meaning), "step {n}");
            assert_eq!(told(&mut stream, secrets), (list(added), list(removed)), "step {n}");
        }
    }
    use Meaning::{Accepted, More, Stale};

    #[test]
    fn what_changed_is_told_once_and_what_is_asked_for_anew_again() {
        let (a1, a2) = (("a", 1), ("a", 2));
        run(vec![
            (request(&["a"], &[], ""), More, &[a1], &["a"], &[]),
            (request(&[], &[], "1"), Accepted, &[a1], &[], &[]),
            (request(&[], &[], "1"), Accepted, &[a2], &["a"], &[]),
            // A rejection is no reason to tell the same again.
            (error(request(&[], &[], "2")), Meaning::Rejected("bad".into()), &[a2], &[], &[]),
            // It may have dropped what it asks for again, whatever it had read by then.
            (request(&["a"], &[], "1"), More, &[a2], &["a"], &[]),
            // Something that nobody told.
            (error(request(&[], &[], "77")), Stale, &[a2], &[], &[]),
            (request(&["b"], &[], "3"), More, &[a2, ("b", 5)], &["b"], &[]),
            // What is no longer asked for is not told, nor that it goes.
            (request(&[], &["a"], "4"), Accepted, &[("b", 5)], &[], &[]),
            (request(&[], &["never asked for", "a"], ""), Stale, &[("b", 6)], &["b"], &[]),
            (request(&["a"], &[], ""), More, &[a2, ("b", 6)], &["a"], &[]),
            (request(&[], &[], "6"), Accepted, &[("b", 6)], &[], &["a"]),
            (request(&[], &[], "7"), Accepted, &[("b", 6)], &[], &[]),
            (request(&[], &[], ""), Stale, &[a2, ("b", 6)], &["a"], &[]),
            (request(&[], &["a", "b"], "8"), Accepted, &[], &[], &[]),
        ]);
    }

    #[test]
    fn a_name_without_a_secret_is_said_to_be_none_once_and_again_when_asked_again() {
        run(vec![
            (request(&["a", "b"], &[], ""), More, &[("b", 1)], &["b"], &["a"]),
            (request(&[], &[], "1"), Accepted, &[("b", 1)], &[], &[]),
            (request(&["a"], &[], "1"), More, &[("b", 1)], &[], &["a"]),
            (request(&[], &[], "2"), Accepted, &[("a", 1), ("b", 1)], &["a"], &[]),
        ]);
    }

    #[test]
    fn a_client_that_comes_back_is_told_what_it_lacks() {
        let (same, other) = (("same", of(1)), ("other", of(2)));
        let known = [same, other, ("gone", of(3)), ("no more wanted", of(4))];
        run(vec![
            (
                with(&known, request(&["same", "other", "gone", "new"], &[], "9")),
                More,
                &[("same", 1), ("other", 9), ("new", 5)],
                &["new", "other"],
                &["gone"],
            ),
            (request(&[], &[], "1"), Accepted, &[("same", 1), ("other", 9), ("new", 5)], &[], &[]),
        ]);
        run(vec![(with(&known[..1], request(&["same"], &[], "")), More, &[("same", 1)], &[], &[])]);
        // Of all that there are.
        run(vec![(with(&known[..2], request(&[], &[], "")), More, &[("same", 1)], &[], &["other"])]);
    }

    #[test]
    fn all_is_asked_for_by_a_star_or_by_naming_nothing_and_until_the_star_is_taken_back() {
        let all: &[(&str, u8)] = &[("a", 1), ("b", 1)];
        for first in [&[][..], &[""], &["*"]] {
            run(vec![
                (request(first, &[], ""), More, all, &["a", "b"], &[]),
                (request(&[], &[], "1"), Accepted, &[("a", 1)], &[], &["b"]),
                // It has dropped what it is to have all the same.
                (request(&["default"], &["a"], "2"), More, &[("a", 1), ("default", 3)], &["a", "default"], &[]),
                (request(&[], &["default"], "3"), Accepted, all, &["b"], &[]),
                (request(&[], &["*"], "4"), Accepted, &[], &[], &[]),
                (request(&["a"], &[], "4"), More, &[("a", 1)], &["a"], &[]),
            ]);
        }
        let mut named = Increments::default();
        named.request(request(&["a"], &[], "")).unwrap();
        assert_eq!((named.wanted().unwrap().wants("a"), named.wanted().unwrap().wants("b")), (true, false));
    }

    #[test]
    fn requests_are_bounded_and_no_other_type_is_served() {
        let typed = |url: &str| DeltaDiscoveryRequest { type_url: url.into(), ..request(&["a"], &[], "") };
        let (long, longer) = ("a".repeat(2048), "a".repeat(2049));
        let many: Vec<String> = (0..65).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let versions: Vec<(&str, String)> = many.iter().map(|name| (*name, "1".into())).collect();
        let empty = request(&["a"], &[], "");
        for (come, good) in [
            (typed(SECRET), true),
            (typed("type.googleapis.com/envoy.config.cluster.v3.Cluster"), false),
            (typed(&SECRET[1..]), false),
            (request(&[&long], &[&long], ""), true),
            (request(&[&longer], &[], ""), false),
            (request(&["a"], &[&longer], ""), false),
            (request(&many[1..], &[], ""), true),
            (request(&many, &[], ""), false),
            (request(&["a"], &many, ""), false),
            (with(&versions[1..], empty.clone()), true),
            (with(&versions, empty.clone()), false),
            (with(&[(&longer, "1".into())], empty.clone()), false),
            (with(&[("a", longer.clone())], empty), false),
        ] {
            let case: String = format!("{come:?}").chars().take(300).collect();
            assert_eq!(Increments::default().request(come).is_ok(), good, "{case}");
        }
        // Little by little is no way around it, and what was known comes first.
        let mut stream = Increments::default();
        assert!(stream.request(request(&many[..40], &[], "")).is_ok());
        assert_eq!(stream.request(request(&many[30..], &[], "")), Err(TOO_MUCH));
        let mut late = Increments::default();
        late.request(request(&["a"], &[], "")).unwrap();
        assert!(late.request(with(&versions[..1], request(&[], &[], ""))).is_err());
    }

    #[test]
    fn what_a_client_keeps_asking_for_and_dropping_is_not_remembered() {
        let mut stream = Increments::default();
        stream.request(request(&[], &[], "")).unwrap();
        for n in 0..500 {
            let name = n.to_string();
            stream.request(request(&[&name], &[&name], "")).unwrap();
            told(&mut stream, &[(&name, 1)]);
        }
        assert!(stream.known.len() <= 2 && stream.anew.is_empty(), "{} {}", stream.known.len(), stream.anew.len());
    }
}
