//! Documents and lists, as an operator's tool (or whoever holds its certificate) sends them.

use crate::{SOON, Shape, Target, Verdict};
use ambit_model::NodeId;
use ambit_policy::appraisal::{APPRAISAL_BYTES_MAX, diff, lint, parse_appraisal, to_yaml};
use ambit_policy::{BYTES_MAX, parse};
use ambit_verify::appraisal::{ALLOW_LIST_BYTES_MAX, AllowList, CompiledPolicy};
use ambit_verify::ek::list;
use std::time::Duration;

/// One request is answered within this much heap.
const HEAP_MAX: usize = 96 * 1024 * 1024;

/// YAML to policies and services.
pub(super) const POLICY: Target = Target {
    name: "policy",
    len_max: 4 * 1024,
    // The reader's events, 1.4 KiB for two bytes at worst, up to the parser's bound on their number.
    cpu: SOON,
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

/// YAML to an appraisal policy.
pub(super) const APPRAISAL: Target = Target {
    name: "appraisal_policy",
    len_max: 4 * 1024,
    // A thousand patterns, compiled more than once; some of them large.
    cpu: Duration::from_secs(3),
    // What a policy's patterns compile to: 32 MiB at most, for as few bytes as one likes.
    heap: |n| (40 * 1024 * 1024 + 1400 * n).min(HEAP_MAX),
    run: appraisal,
    shapes: &[
        Shape { name: "dashes to the limit", bytes: 131_000, make: |n| repeat("- ", n) },
        Shape { name: "dashes", bytes: APPRAISAL_BYTES_MAX, make: |n| repeat("- ", n) },
        Shape { name: "other line ends", bytes: APPRAISAL_BYTES_MAX, make: |n| repeat("a:\u{85}", n) },
        Shape { name: "one long text", bytes: APPRAISAL_BYTES_MAX, make: |n| within("kind: ", "a ", n) },
        Shape { name: "files", bytes: APPRAISAL_BYTES_MAX, make: files },
        Shape { name: "patterns", bytes: APPRAISAL_BYTES_MAX / 8, make: |n| patterns(n, "{1,9}") },
        Shape {
            name: "patterns that compile to 0.1 MiB",
            bytes: APPRAISAL_BYTES_MAX / 8,
            make: |n| patterns(n, "{2000}"),
        },
    ],
};

fn appraisal(input: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(input) else { return Verdict::Refused };
    let parsed = parse_appraisal(text);
    if let Ok(policy) = &parsed {
        let _ = CompiledPolicy::compile(policy, &mut |_| None);
        // The canonical form is longer than the shortest one: near the limits it may be beyond them. And lint, which runs
        // on its author's own machine, compiles however many patterns there are.
        if input.len() <= APPRAISAL_BYTES_MAX / 16 {
            let written = to_yaml(policy);
            assert_eq!(parse_appraisal(&written).as_ref(), Ok(policy), "written as another policy:\n{written}");
            let _ = lint(policy);
        }
        assert!(diff(policy, policy).is_empty(), "differs from itself");
    }
    Verdict::from(&parsed)
}

const APPRAISAL_HEAD: &str = "kind: AppraisalPolicy\nmetadata: {name: p}\nspec:\n  clusters: [west]\n";

fn files(n: usize) -> Vec<u8> {
    numbered(&format!("{APPRAISAL_HEAD}  ima:\n    files:\n"), n, |number| {
        format!("    - {number:064x} /usr/bin/{number}\n")
    })
}

fn patterns(n: usize, repetition: &str) -> Vec<u8> {
    numbered(&format!("{APPRAISAL_HEAD}  commandLine:\n    patterns:\n"), n, |number| {
        format!("    - a{number}{repetition}\n")
    })
}

/// IMA allow-lists: `DIGEST PATH` lines.
pub(super) const ALLOW_LIST: Target = Target {
    name: "allow_list",
    len_max: 2048,
    cpu: SOON,
    heap: |n| 8 * 1024 + 8 * n,
    run: allow_list,
    shapes: &[
        Shape { name: "files", bytes: ALLOW_LIST_BYTES_MAX / 4, make: listed },
        Shape { name: "comments", bytes: ALLOW_LIST_BYTES_MAX / 4, make: |n| repeat("#\n", n) },
        Shape {
            name: "one path",
            bytes: ALLOW_LIST_BYTES_MAX / 4,
            make: |n| within(&format!("{:064x} ", 1), "/a\\x41", n),
        },
    ],
};

fn allow_list(input: &[u8]) -> Verdict {
    let parsed = AllowList::parse(input);
    if let Ok(list) = &parsed {
        assert_eq!(list.sha256().as_slice(), crate::logs::sha256(&[input]));
        let lines = input.split(|b| *b == b'\n').filter(|line| !line.is_empty()).count();
        assert!(list.len() <= lines, "more files than lines");
        assert!(!list.contains(&[0x5a; 32], "/nobody/lists/this") || input.len() >= 64, "allows what it does not name");
    }
    match parsed {
        Ok(list) if list.is_empty() => Verdict::Refused,
        other => Verdict::from(&other),
    }
}

fn listed(n: usize) -> Vec<u8> {
    // Backwards, so that sorting has work.
    numbered("", n, |number| format!("{:064x}  /usr/bin/{number}\n", usize::MAX - number))
}

/// EK allow-lists: what operators keep in spreadsheets.
pub(super) const EK_LIST: Target = Target {
    name: "ek_list",
    len_max: 2048,
    cpu: SOON,
    heap: |n| 8 * 1024 + 64 * n,
    run: ek_list,
    shapes: &[
        Shape {
            name: "rows",
            bytes: 6_000_000,
            make: |n| numbered("", n, |number| format!("{number:064x},rack {number}\n")),
        },
        Shape { name: "bad rows", bytes: 4_000_000, make: |n| repeat("x\n", n) },
        Shape { name: "one long row", bytes: 4_000_000, make: |n| repeat("ab:", n) },
    ],
};

fn ek_list(input: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(input) else { return Verdict::Refused };
    let parsed = list::parse(text);
    if let Ok(rows) = &parsed {
        let nodes = |rows: &[(NodeId, String)]| rows.iter().map(|(node, _)| *node).collect::<Vec<_>>();
        let written = list::write(rows.iter().map(|(node, comment)| (*node, comment.as_str())));
        let again = list::parse(&written).expect("what it writes, it reads");
        assert_eq!(nodes(&again), nodes(rows), "written as another list:\n{written}");
    }
    match parsed {
        Ok(rows) if rows.is_empty() => Verdict::Refused,
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
