//! Policy documents, as an operator's tool (or whoever holds its certificate) sends them.

use crate::{Shape, Target, Verdict};
use ambit_policy::{BYTES_MAX, parse};

/// One request is answered within this much heap.
const HEAP_MAX: usize = 96 * 1024 * 1024;

/// YAML to policies and services.
pub(super) const POLICY: Target = Target {
    name: "policy",
    len_max: 4 * 1024,
    // The reader's events, 1.4 KiB for two bytes at worst, up to the parser's bound on their number.
    heap: |n| (256 * 1024 + 1400 * n).min(HEAP_MAX),
    run: policy,
    shapes: &[
        Shape { name: "documents", bytes: BYTES_MAX / 8, make: documents },
        Shape { name: "empty documents", bytes: BYTES_MAX, make: |n| repeat("---\n", n) },
        Shape { name: "callers beyond the limit", bytes: BYTES_MAX, make: callers },
        Shape { name: "one long name", bytes: BYTES_MAX, make: |n| within("kind: Policy\nmetadata: {name: ", "a", n) },
        Shape { name: "a comment", bytes: BYTES_MAX, make: |n| within("# ", "a", n) },
        Shape { name: "comments", bytes: BYTES_MAX, make: |n| repeat("#\n", n) },
        Shape { name: "brackets", bytes: BYTES_MAX, make: |n| repeat("[", n) },
        Shape { name: "pairs of brackets", bytes: BYTES_MAX, make: |n| within("kind: ", "[],", n) },
        Shape { name: "a list of lists", bytes: BYTES_MAX, make: |n| within("kind: [", "[],", n) },
        Shape { name: "a list of names", bytes: BYTES_MAX, make: |n| within("kind: [", "a,", n) },
        Shape { name: "a map of names", bytes: BYTES_MAX, make: |n| within("{", "a,", n) },
        Shape { name: "lines of names", bytes: BYTES_MAX, make: |n| repeat("a:\n", n) },
        Shape { name: "carriage returns", bytes: BYTES_MAX, make: |n| repeat("-\r", n) },
        Shape { name: "other line ends", bytes: BYTES_MAX, make: |n| repeat("a:\u{85}", n) },
        Shape { name: "dashes and tabs", bytes: BYTES_MAX, make: |n| repeat("-\t", n) },
        Shape { name: "dashes to the limit", bytes: 131_000, make: |n| repeat("- ", n) },
        Shape { name: "keys within keys to the limit", bytes: 131_000, make: |n| repeat("? ", n) },
        Shape { name: "lists to the limit", bytes: 98_000, make: |n| within("kind: [", "[],", n) },
        Shape { name: "lines to the limit", bytes: 196_000, make: |n| repeat("a:\n", n) },
        Shape { name: "unknown keys to the limit", bytes: BYTES_MAX / 2, make: keys },
        Shape { name: "dashes", bytes: BYTES_MAX, make: |n| repeat("- ", n) },
        Shape { name: "keys within keys", bytes: BYTES_MAX, make: |n| repeat("? ", n) },
        Shape { name: "lines ever deeper", bytes: BYTES_MAX, make: deeper },
        Shape { name: "anchors", bytes: BYTES_MAX, make: anchors },
        Shape { name: "aliases of aliases", bytes: 4096, make: laughs },
        Shape { name: "unknown keys", bytes: BYTES_MAX, make: keys },
        Shape { name: "the same key", bytes: BYTES_MAX, make: |n| within("{", "kind: Policy, ", n) },
        Shape { name: "a key that does not end", bytes: BYTES_MAX, make: |n| repeat("a ", n) },
        Shape { name: "quotes", bytes: BYTES_MAX, make: |n| within("kind: ", "'a' ", n) },
        Shape { name: "escapes", bytes: BYTES_MAX, make: |n| within("kind: \"", "\\x41", n) },
        Shape { name: "tags", bytes: BYTES_MAX, make: |n| repeat("!a ", n) },
        Shape { name: "directives", bytes: BYTES_MAX, make: |n| repeat("%TAG ! a\n", n) },
        Shape { name: "a block text", bytes: BYTES_MAX, make: |n| within("kind: |\n", " a\n", n) },
    ],
};

fn policy(input: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(input) else { return Verdict::Refused };
    let parsed = parse(text);
    match &parsed {
        Ok(documents) => {
            let mut names = std::collections::BTreeSet::new();
            for document in documents {
                assert!(names.insert((document.kind(), document.name().clone())), "a name twice");
                assert!(!document.trust_domains().is_empty(), "speaks of nobody");
            }
        }
        Err(refusal) => {
            assert!(refusal.found.chars().count() <= 320, "a refusal that quotes without end");
        }
    }
    match parsed {
        Ok(documents) if documents.is_empty() => Verdict::Refused,
        other => Verdict::from(&other),
    }
}

fn repeat(what: &str, n: usize) -> Vec<u8> {
    what.repeat(n / what.len()).into_bytes()
}

fn within(head: &str, what: &str, n: usize) -> Vec<u8> {
    [head.as_bytes(), &repeat(what, n - head.len())].concat()
}

fn numbered(head: &str, n: usize, line: impl Fn(usize) -> String) -> Vec<u8> {
    let mut out = head.to_owned();
    for number in 0.. {
        let next = line(number);
        if out.len() + next.len() > n {
            break;
        }
        out.push_str(&next);
    }
    out.into_bytes()
}

fn documents(n: usize) -> Vec<u8> {
    numbered("", n, |number| {
        format!(
            "kind: Policy\nmetadata: {{name: p{number}}}\nspec: {{target: spiffe://w/db, action: allow, from: \
             [spiffe://e/web, spiffe://e/a/*], ports: [80, 443]}}\n---\n"
        )
    })
}

fn callers(n: usize) -> Vec<u8> {
    let head = "kind: Policy\nmetadata: {name: p}\nspec:\n  target: spiffe://w/db\n  action: allow\n  from:\n";
    numbered(head, n, |number| format!("  - spiffe://e/{number}\n"))
}

fn keys(n: usize) -> Vec<u8> {
    numbered("", n, |number| format!("k{number}: 1\n"))
}

fn anchors(n: usize) -> Vec<u8> {
    numbered("", n, |number| format!("- &a{number} x\n"))
}

/// Each line one deeper than the one before: about the square root of the length.
fn deeper(n: usize) -> Vec<u8> {
    numbered("", n, |number| format!("{}a:\n", " ".repeat(number)))
}

/// Each list is nine times the one before.
fn laughs(n: usize) -> Vec<u8> {
    numbered("a0: &a0 x\n", n, |number| {
        let list = vec![format!("*a{number}"); 9].join(", ");
        format!("a{0}: &a{0} [{list}]\n", number + 1)
    })
}
