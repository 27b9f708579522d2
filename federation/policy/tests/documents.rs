//! What parses, what is refused, and where the refusal points.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::policy::{Action, Protocol, Transport};
use ambit_model::{Code, Moment, Refusal, Stamp};
use ambit_policy::{
    BYTES_MAX, DOCUMENTS_MAX, Document, FROM_MAX, PORTS_MAX, PolicySet, check_enforceable, lint, parse, parse_suite,
    policy_text,
};

const WEB_TO_DB: &str = "\
kind: Policy
metadata: {name: web-to-db}
spec:
  target: spiffe://west/db
  action: allow
  from: [spiffe://east/web]
  ports: [8080]
---
kind: Service
metadata: {name: shop}
spec: {address: 10.96.0.10, port: 8080, backends: [spiffe://west/shop, spiffe://east/shop]}
";

fn refused(text: &str) -> Refusal {
    match parse(text) {
        Ok(documents) => panic!("accepted: {documents:?}"),
        Err(refusal) => refusal,
    }
}

#[test]
fn the_reference_documents_parse() {
    let documents = parse(WEB_TO_DB).unwrap();
    let [Document::Policy(policy), Document::Service(service)] = documents.as_slice() else {
        panic!("{documents:?}");
    };
    assert_eq!(policy.name.as_str(), "web-to-db");
    assert_eq!(policy.action, Action::Allow);
    assert_eq!(policy.target.to_string(), "spiffe://west/db");
    assert_eq!(policy.ports, [8080]);
    assert_eq!((service.address.to_string().as_str(), service.port), ("10.96.0.10", 8080));
    assert_eq!(service.backends.len(), 2);
}

/// What a newcomer copies first.
#[test]
fn the_documents_of_the_readme_parse() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    let blocks: Vec<_> = readme.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let kinds: Vec<_> = blocks.iter().flat_map(|block| parse(block).unwrap()).map(|d| d.kind()).collect();
    assert_eq!(kinds, ["Policy", "Service", "Policy", "Policy", "Egress"]);
}

#[test]
fn equal_meaning_gives_equal_policies() {
    let policy = |from: &str, ports: &str| {
        parse(&format!(
            "kind: Policy\nmetadata: {{name: p}}\nspec: {{target: spiffe://w/*, action: deny, from: {from}{ports}}}\n"
        ))
        .unwrap()
    };
    assert_eq!(
        policy("[spiffe://e/a, spiffe://e/b/*]", ", ports: [2, 1]"),
        policy("[spiffe://e/b/*, spiffe://e/a, spiffe://e/a]", ", ports: [1, 2, 2]")
    );
    assert_ne!(policy("[spiffe://e/a]", ""), policy("[spiffe://e/a]", ", ports: [1]"));
}

#[test]
fn backends_have_weights_or_none_and_what_has_none_is_as_before() {
    let weighted = "[{id: spiffe://west/shop, weight: 90}, {weight: 0, id: 'spiffe://east/*'}]";
    let text = WEB_TO_DB.replace("[spiffe://west/shop, spiffe://east/shop]", weighted);
    let documents = parse(&text).unwrap();
    let [_, Document::Service(service)] = documents.as_slice() else { panic!("{documents:?}") };
    assert_eq!(service.weights, [90, 0]);
    assert_eq!(
        service.backends.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["spiffe://west/shop", "spiffe://east/*"]
    );
    let said = ambit_policy::service_text(service);
    assert_eq!(said, "10.96.0.10:8080 to spiffe://west/shop (weight 90), spiffe://east/* (weight 0), local-first");
    let documents = parse(WEB_TO_DB).unwrap();
    let [_, Document::Service(service)] = documents.as_slice() else { panic!("{documents:?}") };
    assert!(service.weights.is_empty());
}

#[test]
fn empty_documents_are_skipped() {
    for (text, count) in [("", 0), ("---\n", 0), ("# nothing\n", 0), ("---\n---\n", 0)] {
        assert_eq!(parse(text).unwrap().len(), count, "{text:?}");
    }
    assert_eq!(parse(&format!("---\n{WEB_TO_DB}---\n# end\n")).unwrap().len(), 2);
}

/// Each row: what is replaced in [`WEB_TO_DB`], by what, the code, and words that the refusal's `found` must hold.
#[test]
fn what_is_wrong_is_refused_in_its_place() {
    use Code::{PolicyLayer7, PolicyMalformed};
    let rows: &[(&str, &str, Code, &[&str])] = &[
        ("  ports: [8080]", "  port: [8080]", PolicyMalformed, &["line 7 column 3", "unknown field `port`"]),
        ("  ports: [8080]", "  paths: [/a]", PolicyLayer7, &["line 7 column 3", "`paths`"]),
        ("  ports: [8080]", "  methods: [GET]", PolicyLayer7, &["line 7", "`methods`"]),
        ("  ports: [8080]", "  headers: {a: b}", PolicyLayer7, &["line 7", "`headers`"]),
        ("  ports: [8080]", "  hosts: [a.example]", PolicyLayer7, &["line 7", "`hosts`"]),
        ("port: 8080,", "port: 8080, hosts: [a],", PolicyLayer7, &["line 11", "`hosts`"]),
        ("kind: Policy", "kind: Polcy", PolicyMalformed, &["line 1", "Polcy"]),
        ("kind: Policy\n", "", PolicyMalformed, &["line 1", "missing field `kind`"]),
        ("kind: Policy", "kind: Policy\nstatus: x", PolicyMalformed, &["line 2", "unknown field `status`"]),
        ("web-to-db", "Web_To_DB", PolicyMalformed, &["line 2", "expected a name of 1-63", "Web_To_DB"]),
        ("{name: web-to-db}", "{name: a, labels: {}}", PolicyMalformed, &["line 2", "`labels`"]),
        ("spiffe://west/db", "spiffe://West/db", PolicyMalformed, &["line 4 column 11", "spec.target", "West"]),
        ("spiffe://west/db", "spiffe://west/a/../b", PolicyMalformed, &["line 4", "'..'"]),
        ("spiffe://west/db", "spiffe://*/db", PolicyMalformed, &["line 4"]),
        ("spiffe://west/db", "spiffe://west/d*", PolicyMalformed, &["line 4"]),
        ("spiffe://west/db", "'*'", PolicyMalformed, &["line 4"]),
        ("action: allow", "action: Allow", PolicyMalformed, &["line 5", "Allow"]),
        ("action: allow", "action: warn", PolicyMalformed, &["line 5", "warn"]),
        (
            "  ports: [8080]",
            "  protocols: [icmp]",
            PolicyMalformed,
            &["line 7 column 15", "protocol tcp or udp", "icmp"],
        ),
        (
            "  ports: [8080]",
            "  expires: 2026-13-01T00:00:00Z",
            PolicyMalformed,
            &["line 7 column 12", "an instant in UTC"],
        ),
        ("  ports: [8080]", "  expires: tomorrow", PolicyMalformed, &["line 7", "tomorrow"]),
        ("[spiffe://east/web]", "['cidr:10.0.0.1/8']", PolicyMalformed, &["line 6 column 10", "a range"]),
        ("[spiffe://east/web]", "['cluster:east']", PolicyMalformed, &["line 6 column 10", "cluster:td/name"]),
        ("[spiffe://east/web]", "['ids:east /web']", PolicyMalformed, &["line 6 column 10", "cluster:td/name"]),
        ("spiffe://west/db", "'group:west/db'", PolicyMalformed, &["line 4 column 11", "group"]),
        ("  action: allow\n", "", PolicyMalformed, &["missing field `action`"]),
        ("[spiffe://east/web]", "[\n spiffe://east/web,\n east/web]", PolicyMalformed, &["line 8 column 2", "from[1]"]),
        ("[spiffe://east/web]", "[]", PolicyMalformed, &["line 6 column 9", "1-256", "length 0"]),
        ("[spiffe://east/web]", "spiffe://east/web", PolicyMalformed, &["line 6", "list of"]),
        ("  from: [spiffe://east/web]\n", "", PolicyMalformed, &["missing field `from`"]),
        ("[8080]", "[]", PolicyMalformed, &["line 7", "list of 1-64"]),
        ("[8080]", "[0]", PolicyMalformed, &["line 7", "1-65535"]),
        ("[8080]", "[65536]", PolicyMalformed, &["line 7", "65536"]),
        ("[8080]", "[-1]", PolicyMalformed, &["line 7"]),
        ("[8080]", "['8080']", PolicyMalformed, &["line 7"]),
        ("  ports: [8080]", "  action: deny", PolicyMalformed, &["line 4", "duplicate field `action`"]),
        ("10.96.0.10", "127.0.0.1", PolicyMalformed, &["line 11", "column 17", "not loopback"]),
        ("10.96.0.10", "0.0.0.0", PolicyMalformed, &["line 11"]),
        ("10.96.0.10", "::1", PolicyMalformed, &["line 11"]),
        ("10.96.0.10", "::ffff:10.96.0.10", PolicyMalformed, &["line 11"]),
        ("10.96.0.10", "fe80::10", PolicyMalformed, &["line 11"]),
        ("10.96.0.10", "FD00::10", PolicyMalformed, &["line 11"]),
        ("10.96.0.10", "fd61:6d62:6974::10", PolicyMalformed, &["line 11"]),
        ("backends: [spiffe://west/shop, spiffe://east/shop]", "backends: []", PolicyMalformed, &["line 11", "1-64"]),
        ("kind: Service", "kind: [", PolicyMalformed, &["line 9 column 7"]),
        (
            "[spiffe://west/shop,",
            "[{id: spiffe://west/shop, weight: 1},",
            PolicyMalformed,
            &["line 9", "of each, or of none"],
        ),
        ("[spiffe://west/shop,", "[{id: spiffe://west/shop, weight: 1001},", PolicyMalformed, &["line 11", "0-1000"]),
        ("[spiffe://west/shop,", "[{id: spiffe://west/shop, weight: -1},", PolicyMalformed, &["line 11"]),
        ("[spiffe://west/shop,", "[{id: spiffe://west/shop},", PolicyMalformed, &["line 11", "missing field `weight`"]),
        ("[spiffe://west/shop,", "[{id: west/shop, weight: 1},", PolicyMalformed, &["line 11", "expected"]),
        (
            "[spiffe://west/shop,",
            "[{id: spiffe://west/shop, weight: 1, path: /},",
            PolicyLayer7,
            &["line 11", "`path`"],
        ),
        (
            "[spiffe://west/shop, spiffe://east/shop]",
            "[{id: spiffe://west/shop, weight: 0}, {id: spiffe://east/shop, weight: 0}]",
            PolicyMalformed,
            &["line 9", "weight 0 of all"],
        ),
        (
            "[spiffe://west/shop, spiffe://east/shop]",
            "[{id: spiffe://west/shop, weight: 1}, {id: spiffe://west/shop, weight: 2}]",
            PolicyMalformed,
            &["line 9", "each once"],
        ),
    ];
    for (old, new, code, words) in rows {
        assert!(WEB_TO_DB.contains(old), "{old}");
        let refusal = refused(&WEB_TO_DB.replacen(old, new, 1));
        assert_eq!(refusal.code, *code, "{new}: {refusal}");
        for word in *words {
            assert!(refusal.found.contains(word), "{new}: '{word}' is missing in: {refusal}");
        }
    }
}

#[test]
fn one_bad_document_refuses_all() {
    let text = format!("{WEB_TO_DB}---\nkind: Policy\n");
    assert_eq!(refused(&text).code, Code::PolicyMalformed);
}

#[test]
fn a_name_twice_is_refused() {
    assert!(refused(&format!("{WEB_TO_DB}---\n{WEB_TO_DB}")).found.contains("Policy web-to-db twice"));
}

#[test]
fn sizes_are_bounded() {
    let policy = |name: usize, from: usize, ports: usize| {
        let from = vec!["spiffe://e/a"; from].join(", ");
        let ports: Vec<_> = (1..=ports).map(|p| p.to_string()).collect();
        let spec = format!("{{target: spiffe://w/b, action: allow, from: [{from}], ports: [{}]}}", ports.join(", "));
        format!("---\nkind: Policy\nmetadata: {{name: p{name}}}\nspec: {spec}\n")
    };
    let many = |count: usize| (0..count).map(|n| policy(n, 1, 1)).collect::<String>();
    assert_eq!(parse(&many(DOCUMENTS_MAX)).unwrap().len(), DOCUMENTS_MAX);
    assert!(refused(&many(DOCUMENTS_MAX + 1)).expected.contains("1000 documents"));
    assert!(refused(&"#".repeat(BYTES_MAX + 1)).expected.contains("1048576 bytes"));
    assert!(parse(&policy(0, FROM_MAX, PORTS_MAX)).is_ok());
    assert!(refused(&policy(0, FROM_MAX + 1, 1)).found.contains("257"));
    assert!(refused(&policy(0, 1, PORTS_MAX + 1)).found.contains("65"));
}

/// Each separator counts once, whichever it is: the reader holds a node for each before anything is judged.
#[test]
fn lines_and_values_are_bounded() {
    const NODES_MAX: usize = 1 << 16;
    for node in ["\n", "\r", "\u{85}", "\u{2028}", "\u{2029}", "-\t", "- ", "? ", ",", "[]", "{}"] {
        let refusal = refused(&node.repeat(NODES_MAX + 1));
        assert!(refusal.expected.contains("65536 lines and values"), "{node:?}: {refusal}");
    }
    // A dash or a question mark inside of a word is none.
    let comments = |count| format!("{WEB_TO_DB}#{}", "a-b?c".repeat(100) + &",".repeat(count));
    let own = comments(0).matches(['\n', ',', '[', '{']).count() + comments(0).matches("-\n").count();
    assert_eq!(parse(&comments(NODES_MAX - own)).unwrap().len(), 2);
    assert!(refused(&comments(NODES_MAX - own + 1)).found.contains("line 12"));
}

/// What an attacker would send: each must come back as a refusal, and soon.
#[test]
fn hostile_text_is_refused() {
    let bomb = {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let alias = format!("*a{}, ", n - 1).repeat(10);
            text.push_str(&format!("a{n}: &a{n} [{alias}]\n"));
        }
        text + "kind: Policy\nmetadata: *a11\nspec: *a11\n"
    };
    // A reader whose time grows with the square of the size would take minutes on any of these.
    let long = |piece: &str| piece.repeat(BYTES_MAX / piece.len());
    let long_spec = |piece: &str| {
        let head = "kind: Policy\nmetadata: {name: p}\nspec: ";
        format!("{head}{}", piece.repeat((BYTES_MAX - head.len()) / piece.len()))
    };
    let mut cases = vec![bomb];
    cases.extend(["[", "{", "- ", "? ", "a: ", "&a ", "!", "'", "\"\\", "|\n", "a\n", "a,", "*a ", "%"].map(long));
    cases.extend(["[]{}", "{a: ", "- ", "? ", "a:\n ", "[a]"].map(long_spec));
    cases.extend(["\u{0}", "%YAML 9.9\n---\n", "kind: *nobody", "\t", "{", "- a", "42"].map(String::from));
    for text in &cases {
        let refusal = refused(text);
        assert_eq!(refusal.code, Code::PolicyMalformed, "{text:.60}");
        assert!(refusal.to_string().len() < 2_000, "{text:.60}");
    }
}

#[test]
fn a_service_keeps_the_order_of_its_backends_and_a_policy_does_not() {
    let text = "kind: Service\nmetadata: {name: s}\nspec: {address: 10.96.0.10, port: 1, order: first-backend, backends: [spiffe://west/s, spiffe://east/s, spiffe://west/s]}\n---\nkind: Policy\nmetadata: {name: p}\nspec: {target: spiffe://west/s, action: allow, from: [spiffe://west/b, spiffe://west/a], ports: [2, 1]}\n";
    let documents = parse(text).unwrap();
    let [Document::Service(s), Document::Policy(p)] = documents.as_slice() else { panic!("kinds") };
    assert_eq!(s.backends.iter().map(ToString::to_string).collect::<Vec<_>>(), ["spiffe://west/s", "spiffe://east/s"]);
    assert_eq!(s.order, ambit_model::Order::FirstBackend);
    assert_eq!(p.from.iter().map(ToString::to_string).collect::<Vec<_>>(), ["spiffe://west/a", "spiffe://west/b"]);
    assert_eq!(p.ports, [1, 2]);
    assert!(parse(&text.replace("first-backend", "random")).is_err());
}

#[test]
fn what_no_kernel_enforces_is_read_and_refused() {
    let policy =
        |spec: &str| format!("kind: Policy\nmetadata: {{name: p}}\nspec: {{target: spiffe://west/db, {spec}}}\n");
    let egress = "kind: Egress\nmetadata: {name: e}\nspec: {from: [spiffe://west/a], to: [192.0.2.0/24], \
                  ports: [443], transport: passthrough}\n";
    for (text, good) in [
        (policy("action: allow, from: [spiffe://west/a]"), true),
        (policy("action: audit, from: [spiffe://west/a], expires: 2030-01-01T00:00:00Z"), true),
        (policy("action: allow, from: ['cluster:west/prod', 'group:west/ops', 'labels:west/app=db']"), true),
        (policy("action: deny, from: [spiffe://west/a], protocols: [udp]"), true),
        (policy("action: deny, from: [spiffe://west/a], protocols: [tcp, udp]"), true),
        (policy("action: allow, from: [spiffe://west/a], protocols: [tcp, udp]"), false),
        (policy("action: audit, from: [spiffe://west/a], protocols: [udp]"), false),
        (policy("action: allow, from: ['cidr:10.0.0.0/8'], transport: passthrough"), true),
        (policy("action: allow, from: ['cidr:0.0.0.0/0'], transport: passthrough"), true),
        (policy("action: audit, from: ['cidr:10.0.0.0/8']"), true),
        (policy("action: deny, from: ['cidr:10.0.0.0/8', 'cidr:127.0.0.0/8', 'cidr:::/0']"), true),
        (policy("action: deny, from: ['cidr:10.0.0.0/8'], protocols: [udp]"), true),
        (policy("action: allow, from: ['cidr:10.0.0.0/8'], transport: passthrough, protocols: [udp]"), false),
        (policy("action: allow, from: ['cidr:10.0.0.0/8', 'cidr:2001:db8::/32'], transport: passthrough"), false),
        (policy("action: audit, from: ['cidr:2001:db8::/32']"), false),
        (policy("action: allow, from: ['cidr:127.0.0.0/8'], transport: passthrough"), false),
        (policy("action: allow, from: ['cidr:169.254.0.0/16'], transport: passthrough"), false),
        (policy("action: allow, from: ['cidr:224.0.0.1/32'], transport: passthrough"), false),
        (egress.to_owned(), true),
        (egress.replace("192.0.2.0/24", "0.0.0.0/0, 169.0.0.0/8"), true),
        (egress.replace("ports", "protocols: [tcp], ports"), true),
        (egress.replace("ports", "protocols: [udp], ports"), false),
        (egress.replace("ports", "protocols: [tcp, udp], ports"), false),
        (egress.replace("192.0.2.0/24", "192.0.2.0/24, '2001:db8::/32'"), false),
        (egress.replace("192.0.2.0/24", "192.0.2.0/24, 127.0.0.0/8"), false),
        (egress.replace("192.0.2.0/24", "169.254.169.254/32"), false),
        (egress.replace("192.0.2.0/24", "225.0.0.0/8"), false),
        (egress.replace("192.0.2.0/24", "255.255.255.255/32"), false),
        (egress.replace("192.0.2.0/24", "0.0.0.0/32"), false),
    ] {
        let documents = parse(&text).unwrap();
        match check_enforceable(&documents[0]) {
            Ok(()) => assert!(good, "{text}"),
            Err(refusal) => {
                assert!(!good, "{text}: {refusal}");
                assert_eq!(refusal.code, Code::PolicyUnenforceable);
                assert!(refusal.found.contains(documents[0].name().as_str()), "{refusal}");
            }
        }
    }
    // Clear text is never what a document says by leaving something out.
    assert!(refused(&egress.replace(", transport: passthrough", "")).found.contains("missing field `transport`"));
    assert!(refused(&egress.replace("passthrough", "tls")).found.contains("passthrough"));
}

#[test]
fn what_is_modelled_is_evaluated() {
    let now = Moment::at(Stamp(1));
    let text = "kind: Policy\nmetadata: {name: p}\nspec: {target: spiffe://west/db, action: allow, \
                from: ['cidr:10.0.0.0/8'], ports: [53], transport: passthrough}\n---\nkind: Egress\nmetadata: {name: e}\nspec: {from: \
                [spiffe://west/a], to: [192.0.2.0/24], ports: [443], transport: passthrough, expires: 1970-01-01T00:00:02Z}\n";
    let documents = parse(text).unwrap();
    let [Document::Policy(policy), Document::Egress(egress)] = documents.as_slice() else { panic!("{documents:?}") };
    let mut set = PolicySet::new(["west".parse().unwrap()].into());
    set.insert("west".parse().unwrap(), policy.clone());
    let db = "spiffe://west/db".parse().unwrap();
    let index = set.compile();
    for (from, port, allowed) in [("10.1.2.3", 53, true), ("10.1.2.3", 54, false), ("11.0.0.1", 53, false)] {
        assert_eq!(set.evaluate_unmeshed(from.parse().unwrap(), &db, port, now).allowed, allowed, "{from} {port}");
        assert_eq!(index.evaluate_unmeshed(from.parse().unwrap(), &db, port, now).allowed, allowed, "{from} {port}");
    }
    let a = "spiffe://west/a".parse().unwrap();
    for (src, to, port, ms, allowed) in [
        (&a, "192.0.2.7", 443, 1, true),
        (&a, "192.0.2.7", 443, 2_000, false),
        (&a, "192.0.3.7", 443, 1, false),
        (&a, "192.0.2.7", 444, 1, false),
        (&db, "192.0.2.7", 443, 1, false),
    ] {
        let at = Moment::at(Stamp(ms));
        assert_eq!(egress.allows(src, to.parse().unwrap(), Protocol::Tcp, port, at), allowed, "{src} {to} {port} {ms}");
    }
}

#[test]
fn what_is_hardly_meant_is_told() {
    let policy = |name: &str, spec: &str| {
        format!("---\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: spiffe://west/db, {spec}}}\n")
    };
    let text = [
        policy("all-denied", "action: allow, from: [spiffe://east/web], ports: [80]"),
        policy("deny-east", "action: deny, from: [spiffe://east/*]"),
        policy("old", "action: allow, from: [spiffe://west/a], expires: 1970-01-01T00:00:01Z"),
        policy("open", "action: allow, from: [spiffe://west/*]"),
        policy("z-again", "action: allow, from: [spiffe://west/b], ports: [80, 443]"),
        policy("fine", "action: allow, from: [spiffe://north/b], ports: [80]"),
        policy("clear", "action: allow, from: ['cidr:0.0.0.0/0'], transport: passthrough"),
        policy("clear-too", "action: allow, from: ['cidr:10.1.0.0/16'], ports: [80], transport: passthrough"),
        policy("clear-ten", "action: deny, from: ['cidr:10.0.0.0/8']"),
        "---\nkind: Egress\nmetadata: {name: wide}\nspec: {from: ['spiffe://west/*'], to: [10.0.0.0/8, 0.0.0.0/0], transport: \
         passthrough, expires: 1970-01-01T00:00:01Z}\n"
            .to_owned(),
    ];
    let found: Vec<String> =
        lint(&parse(&text.concat()).unwrap(), Stamp(2_000)).iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        [
            "egress wide: it is over since 1970-01-01T00:00:01Z: give it a later end, or none",
            "egress wide: it opens every address that the mesh does not know on every port: name ranges",
            "egress wide: whoever gets an identity of west may connect on every port: name the callers",
            "policy all-denied: it never allows anything: policy deny-east denies all of it",
            "policy clear: whoever reaches the pod's network may call in clear text on every port: name ranges",
            "policy clear-too: it adds nothing to policy clear: delete one of them",
            "policy clear-too: it never allows anything: policy clear-ten denies all of it",
            "policy old: it is over since 1970-01-01T00:00:01Z: give it a later end, or none",
            "policy open: whoever gets an identity of west may call on every port: name the callers",
            "policy z-again: it adds nothing to policy open: delete one of them",
        ]
    );
}

const SUITE: &str = "\
kind: PolicyTest
metadata: {name: db}
spec:
  at: 2026-01-01T00:00:00Z
  sets:
    cluster:west/prod: [spiffe://west/a]
  cases:
  - {from: spiffe://west/a, to: spiffe://west/db, ports: [5432], expect: allow}
  - {from: spiffe://west/b, to: spiffe://west/db, ports: [5432], expect: deny}
  - {from: spiffe://east/ops, to: spiffe://west/db, ports: [22, 23], expect: allow}
---
kind: Group
metadata: {name: ops}
spec: {members: [spiffe://east/ops]}
---
kind: Policy
metadata: {name: db}
spec: {target: spiffe://west/db, action: allow, from: ['cluster:west/prod'], ports: [5432]}
---
kind: Policy
metadata: {name: ops}
spec: {target: spiffe://west/db, action: allow, from: ['group:west/ops'], ports: [22]}
";

#[test]
fn a_suite_asks_what_it_says() {
    let (documents, suites) = parse_suite(SUITE).unwrap();
    assert_eq!((documents.len(), suites.len()), (3, 1));
    let failures: Vec<String> = suites[0].run(&documents, Stamp(1)).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(
        failures,
        [
            "case 3: expected allow, found denied by default: no policy allows it: spiffe://east/ops -> spiffe://west/db:23"
        ]
    );
    // What would come out otherwise in a cell, or not at all, is no answer.
    let twice = format!("{SUITE}---\n{}", SUITE.split("---\n").last().unwrap());
    let udp = SUITE.replace("ports: [22]}", "ports: [22], protocols: [udp]}");
    for (text, code, found) in [
        (
            SUITE.replace("cluster:west/prod: [", "cluster:west/prob: ["),
            Code::PolicyMalformed,
            "policy db: cluster:west/prod",
        ),
        (SUITE.replace("'group:west/ops'", "'group:west/opz'"), Code::PolicyMalformed, "policy ops: group:west/opz"),
        (
            SUITE.replace("members: [spiffe://east/ops]", "members: ['labels:west/a=b']"),
            Code::PolicyMalformed,
            "labels:west/a=b",
        ),
        (udp, Code::PolicyUnenforceable, "Policy ops: allow over udp"),
    ] {
        let (documents, suites) = parse_suite(&text).unwrap();
        let refusal = suites[0].run(&documents, Stamp(1)).unwrap_err();
        assert!(refusal.code == code && refusal.found.contains(found), "{refusal}");
    }
    assert!(parse_suite(&twice).is_err());
    let (mut both, _) = parse_suite(SUITE).unwrap();
    both.extend(documents.clone());
    assert!(suites[0].run(&both, Stamp(1)).unwrap_err().found.contains("Group ops twice"));
    // A refusal points at its line of the whole text, whichever document it is in.
    for (old, new, line) in [
        ("expect: deny", "expect: refuse", "line 9"),
        ("cluster:west/prod: [", "group:west/ops: [", "line 6"),
        ("members", "member", "line 14"),
        (
            "target: spiffe://west/db, action: allow, from: ['group",
            "target: x, action: allow, from: ['group",
            "line 22",
        ),
    ] {
        assert!(SUITE.contains(old), "{old}");
        let refusal = parse_suite(&SUITE.replacen(old, new, 1)).unwrap_err();
        assert!(refusal.found.starts_with(line), "{refusal}");
    }
}

/// Clear text is said where it is wanted, and policies speak of identities or of addresses.
#[test]
fn a_policy_that_lets_in_clear_text_says_so() {
    let read = |spec: &str| {
        let text =
            format!("kind: Policy\nmetadata:\n  name: p\nspec:\n  target: spiffe://west/db\n  {spec}\n  ports: [80]\n");
        parse(&text).map(|documents| match documents.as_slice() {
            [Document::Policy(policy)] => (policy.transport().map(Transport::as_str), policy_text(policy)),
            other => panic!("{other:?}"),
        })
    };
    let clear = "allow cidr:10.0.0.0/8 to spiffe://west/db on 80, passthrough: in clear text, carried by the agent";
    for (spec, want) in [
        ("action: allow\n  from: ['cidr:10.0.0.0/8']\n  transport: passthrough", Ok((Some("passthrough"), clear))),
        ("action: deny\n  from: ['cidr:10.0.0.0/8']", Ok((None, "deny cidr:10.0.0.0/8 to spiffe://west/db on 80"))),
        ("action: audit\n  from: ['cidr:10.0.0.0/8']", Ok((None, "audit cidr:10.0.0.0/8 to spiffe://west/db on 80"))),
        ("action: allow\n  from: ['cidr:10.0.0.0/8']", Err("callers by address come in clear text")),
        ("action: allow\n  from: [spiffe://west/a]\n  transport: passthrough", Err("lets nobody in by address")),
        ("action: deny\n  from: ['cidr:10.0.0.0/8']\n  transport: passthrough", Err("lets nobody in by address")),
        ("action: deny\n  from: ['cidr:10.0.0.0/8', spiffe://west/a]", Err("one policy for each")),
        ("action: allow\n  from: ['cidr:10.0.0.0/8']\n  transport: tls", Err("line 8 column 14: ")),
    ] {
        match (read(spec), want) {
            (Ok((transport, text)), Ok(want)) => assert_eq!((transport, text.as_str()), want, "{spec}"),
            (Err(refusal), Err(said)) => {
                assert_eq!(refusal.code, Code::PolicyMalformed, "{refusal}");
                assert!(refusal.found.starts_with("line ") && refusal.found.contains(said), "{refusal}");
            }
            (found, want) => panic!("{spec}: {found:?}, not {want:?}"),
        }
    }
}
