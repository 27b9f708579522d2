//! The small grammars: identities, sets of them, selectors, names.

use crate::{SOON, Target, Verdict};
use ambit_model::policy::Peers;
use ambit_model::{ClusterId, NodeId, ObjectName, Selector, SpiffeId, TrustDomain};
use std::fmt::Display;
use std::str::FromStr;

/// One text, read by each grammar. None normalises: what is accepted is written as it was read.
pub(super) const NAMES: Target =
    Target { name: "names", len_max: 2100, cpu: SOON, heap: |n| 32 * 1024 + 64 * n, run: names, shapes: &[] };

/// Whether `text` is a `T`, which is then written as `text` again.
fn is_a<T: FromStr + Display>(text: &str, canonical: bool) -> bool {
    let Ok(value) = text.parse::<T>() else { return false };
    let again = value.to_string();
    assert!(!canonical || again == text, "{text:?} is written {again:?}");
    assert!(again.parse::<T>().is_ok(), "{text:?} is written as what is refused: {again:?}");
    true
}

fn names(input: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(input) else { return Verdict::Refused };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        let below = text.rsplit_once('/').map(|(head, _)| format!("{head}/*")).expect("a path");
        assert!(below.parse::<Peers>().is_ok_and(|set| set.contains(&id)), "{below} does not hold {text}");
    }
    let known = [
        is_a::<SpiffeId>(text, true),
        is_a::<Peers>(text, true),
        is_a::<TrustDomain>(text, true),
        is_a::<ObjectName>(text, true),
        is_a::<ClusterId>(text, true),
        // Upper case digits are read, lower case is written; `unix:uid:+1` and `007` are numbers too.
        is_a::<NodeId>(text, false),
        is_a::<Selector>(text, false),
    ];
    if known.contains(&true) { Verdict::Accepted } else { Verdict::Refused }
}
