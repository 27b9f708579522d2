//! What a workload may be told, given what it was recognised by. Pure; the services only put it into their messages.

use crate::issued::{Known, Svid};
use ambit_model::{Entry, Selector, TrustDomain};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a workload may be told now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<T> {
    /// The full set.
    Set(T),
    /// What is held of a set that another SVID is on its way to.
    Part(T),
    /// It has an identity, but nothing is held of it.
    Coming,
    /// It has none.
    Nobody,
}

impl<T> Answer<T> {
    /// The same in another form.
    pub fn map<U>(self, form: impl FnOnce(T) -> U) -> Answer<U> {
        match self {
            Self::Set(set) => Answer::Set(form(set)),
            Self::Part(part) => Answer::Part(form(part)),
            Self::Coming => Answer::Coming,
            Self::Nobody => Answer::Nobody,
        }
    }
}

/// One identity of a workload.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its certificate and key.
    pub svid: Arc<Svid>,
    /// See [`hints`].
    pub hint: String,
}

/// Every identity of a workload, the default one first, and the roots that it may believe.
#[derive(Clone, Debug)]
pub struct Identities {
    /// At least one.
    pub svids: Vec<Identity>,
    /// See [`Roots`].
    pub roots: Roots,
}

/// Roots (DER) of the own trust domain and of those that the workload's entries federate with; never one pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Whose nodes these are.
    pub own: TrustDomain,
    /// By trust domain, the own one among them.
    pub all: BTreeMap<TrustDomain, Vec<Vec<u8>>>,
}

impl Roots {
    /// Of the own trust domain, one DER after the other.
    pub fn own_der(&self) -> Vec<u8> {
        self.all.get(&self.own).map(|roots| roots.concat()).unwrap_or_default()
    }
    /// The same of each other one, by the SPIFFE ID of its trust domain.
    pub fn foreign_der(&self) -> BTreeMap<String, Vec<u8>> {
        self.all.iter().filter(|(td, _)| **td != self.own).map(|(td, roots)| (id(td), roots.concat())).collect()
    }
    /// The same of all.
    pub fn all_der(&self) -> BTreeMap<String, Vec<u8>> {
        self.all.iter().map(|(td, roots)| (id(td), roots.concat())).collect()
    }
}

/// The SPIFFE ID of a trust domain.
pub fn id(trust_domain: &TrustDomain) -> String {
    format!("spiffe://{trust_domain}")
}

/// The identities of whoever has the selectors `found`.
pub fn identities(known: &Known, found: &BTreeSet<Selector>) -> Answer<Identities> {
    let entries = entries(known, found);
    let (mut svids, mut coming) = (Vec::new(), false);
    for (entry, hint) in entries.iter().zip(hints(&entries)) {
        match known.svids.get(&entry.id) {
            Some(Ok(svid)) => svids.push(Identity { svid: svid.clone(), hint }),
            Some(Err(_)) => {}
            None => coming = true,
        }
    }
    match (svids.is_empty(), coming, roots_of(known, &entries)) {
        (false, false, Some(roots)) => Answer::Set(Identities { svids, roots }),
        (false, true, Some(roots)) => Answer::Part(Identities { svids, roots }),
        (true, true, _) | (_, _, None) => Answer::Coming,
        (true, false, _) => Answer::Nobody,
    }
}

/// The roots for whoever has the selectors `found`.
pub fn roots(known: &Known, found: &BTreeSet<Selector>) -> Answer<Roots> {
    let entries = entries(known, found);
    match roots_of(known, &entries) {
        None => Answer::Coming,
        Some(_) if entries.is_empty() => Answer::Nobody,
        Some(roots) => Answer::Set(roots),
    }
}

/// The entries that recognise it. The first is the identity that its connections have in the mesh.
pub fn entries<'a>(known: &'a Known, found: &BTreeSet<Selector>) -> Vec<&'a Entry> {
    let mut entries: Vec<&Entry> = known.view.iter().flat_map(|view| view.entries_of(found)).collect();
    entries.sort_by(|a, b| b.selectors.len().cmp(&a.selectors.len()).then_with(|| a.id.cmp(&b.id)));
    entries
}

/// What the operator says of each entry, unique in one answer: of two that say the same the first keeps it
/// (SPIFFE_Workload_API.md section 5.2.1).
pub fn hints(entries: &[&Entry]) -> Vec<String> {
    let mut said = BTreeSet::new();
    let hint = |entry: &&Entry| Some(entry.extras.hint.clone()).filter(|hint| said.insert(hint.clone()));
    entries.iter().map(hint).map(Option::unwrap_or_default).collect()
}

fn roots_of(known: &Known, entries: &[&Entry]) -> Option<Roots> {
    let view = known.view.as_ref()?;
    let named: BTreeSet<&TrustDomain> = entries.iter().flat_map(|e| &e.federates_with).collect();
    let foreign = view.foreign.iter().filter(|bundle| named.contains(bundle.trust_domain()));
    let foreign = foreign.map(|bundle| (bundle.trust_domain().clone(), bundle.roots().to_vec()));
    let own = (view.trust_domain.clone(), view.own.roots().to_vec());
    Some(Roots { own: view.trust_domain.clone(), all: foreign.chain([own]).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{entry, slice, view};
    use ambit_model::{Code, Generation, Refusal, Stamp};
    use ambit_proto::v1;

    fn found() -> BTreeSet<Selector> {
        ["cgroup:web", "unix:uid:0"].iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_default_identity_comes_first_and_no_hint_comes_twice() {
        let hinted = |id: &str, selectors: &[&str], hint: &str| {
            let entry = entry(id, &format!("spiffe://west/{id}"), selectors);
            v1::Entry { hint: hint.into(), ..entry }
        };
        let entries = vec![
            hinted("b", &["cgroup:web"], "inner"),
            hinted("a", &["cgroup:web"], "inner"),
            hinted("most", &["cgroup:web", "unix:uid:0"], "outer"),
            hinted("none", &["unix:uid:0"], ""),
            hinted("other", &["unix:uid:7"], "inner"),
        ];
        let view = view(v1::Slice { entries, ..slice() }).unwrap();
        let known = Known { view: Some(Arc::new(view)), ..Known::default() };
        let entries = entries_of(&known);
        let told: Vec<_> = entries.iter().map(|e| e.id.as_str()).zip(hints(&entries)).collect();
        let expected = [("most", "outer"), ("a", "inner"), ("b", ""), ("none", "")];
        assert_eq!(told, expected.map(|(id, hint)| (id, hint.to_owned())));
    }

    fn entries_of(known: &Known) -> Vec<&Entry> {
        entries(known, &found())
    }

    #[test]
    fn what_is_told_follows_what_is_held() {
        let svid = || {
            Ok(Arc::new(Svid {
                id: "spiffe://west/web".parse().unwrap(),
                key_pkcs8: Vec::new().into(),
                chain_der: vec![],
                generation: Generation(1),
                authority: "aa".repeat(20),
                since: Stamp(0),
                not_after: Stamp(1),
            }))
        };
        let refused = || Err(Refusal::new(Code::NotFound, "", ""));
        // The slice has two entries of this workload: web and web-root.
        for (held, told) in [
            (vec![], "coming"),
            (vec![("web", svid())], "part of 1"),
            (vec![("web", svid()), ("web-root", svid())], "2"),
            (vec![("web", svid()), ("web-root", refused())], "1"),
            (vec![("web-root", refused())], "coming"),
            (vec![("web", refused()), ("web-root", refused())], "nobody"),
            (vec![("any", svid())], "coming"),
        ] {
            let names: Vec<_> = held.iter().map(|(name, svid)| (*name, svid.is_ok())).collect();
            let svids = held.into_iter().map(|(name, svid)| (name.parse().unwrap(), svid)).collect();
            let known = Known { view: Some(Arc::new(view(slice()).unwrap())), svids: Arc::new(svids) };
            let answer = match identities(&known, &found()) {
                Answer::Set(set) => format!("{}", set.svids.len()),
                Answer::Part(part) => format!("part of {}", part.svids.len()),
                Answer::Coming => "coming".to_owned(),
                Answer::Nobody => "nobody".to_owned(),
            };
            assert_eq!(answer, told, "{names:?}");
        }
    }
}
