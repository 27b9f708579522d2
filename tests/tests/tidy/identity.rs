//! Every case that an identity plane must stand, and the tests that show it. What is listed: the conformance cases of X.509-SVIDs,
//! JWT-SVIDs, bundles, federation endpoints and node-local services, and what went wrong elsewhere (SPIRE's review of
//! 2021 and later advisories, step-ca, Vault, Consul, Envoy, Istio, Teleport). A case that no test shows fails, and so
//! does a test that is gone or shows it no more.

use ambit_tests::text;

/// File, test, and what in the file is of this case.
type Shown = &'static [(&'static str, &'static str, &'static str)];

const SVID: &str = "cli/tests/svid.rs";
const LEAVES: &str = "each_leaf_has_the_verdict_that_the_standard_gives_it";
const TIMES: &str = "time_authority_and_trust_domain_decide_too";
const BUNDLES: &str = "bundles_are_read_in_each_form_and_refused_when_they_are_none";
const OUTSIDE: &str = "federation/state/tests/external.rs";
const BY_RULE: &str = "what_is_not_as_it_must_be_is_refused_by_its_rule_and_changes_nothing";
const JWT: &str = "federation/identity/tests/jwt.rs";
const FOREIGN: &str = "tests/tests/foreign.rs";
const GROWS: &str = "a_foreign_bundle_only_grows_and_its_endpoint_is_who_it_should_be";
const HINTS: &str = "hints_are_bounded_and_an_endpoint_that_demands_a_certificate_gets_none";
const API: &str = "node-agent/tests/workload_api.rs";
const HEADER: &str = "nobody_gets_nothing_and_the_header_is_required";
const AGENT_JWT: &str = "node-agent/tests/jwt.rs";
const IDENTITY: &str = "federation/identity/tests/identity.rs";
const HTTP: &str = "federation/server/src/replica/federate/http.rs";

const CASES: &[(&str, Shown)] = &[
    // X.509-SVIDs.
    ("leaf: good", &[(SVID, LEAVES, "(\"good\"")]),
    ("leaf: good with a DNS SAN", &[(SVID, LEAVES, "good and DNS SAN")]),
    ("leaf: empty subject and a critical SAN", &[(SVID, LEAVES, "empty subject, critical SAN")]),
    ("leaf: cA=true", &[(SVID, LEAVES, "cA=true")]),
    ("leaf: keyCertSign", &[(SVID, LEAVES, "(\"keyCertSign\"")]),
    ("leaf: cRLSign", &[(SVID, LEAVES, "(\"cRLSign\"")]),
    ("leaf: no digitalSignature", &[(SVID, LEAVES, "no digitalSignature")]),
    ("leaf: no KeyUsage", &[(SVID, LEAVES, "no KeyUsage")]),
    ("leaf: KeyUsage not critical", &[(SVID, LEAVES, "KeyUsage not critical")]),
    ("leaf: id without path", &[(SVID, LEAVES, "id without path")]),
    ("leaf: https scheme", &[(SVID, LEAVES, "https scheme")]),
    ("leaf: no URI", &[(SVID, LEAVES, "(\"no URI\"")]),
    ("leaf: port in the trust domain", &[(SVID, LEAVES, "port in the trust domain")]),
    ("leaf: id of 3,000 bytes", &[(SVID, LEAVES, "id of 3,000 bytes")]),
    ("leaf: two SPIFFE URIs", &[(SVID, LEAVES, "two SPIFFE URIs")]),
    ("leaf: dot-dot", &[(SVID, LEAVES, "(\"dot-dot\"")]),
    ("leaf: percent-encoding", &[(SVID, LEAVES, "percent-encoding")]),
    ("leaf: query", &[(SVID, LEAVES, "(\"query\"")]),
    ("leaf: trailing slash", &[(SVID, LEAVES, "trailing slash")]),
    ("leaf: https URI first, SPIFFE second", &[(SVID, LEAVES, "https URI first")]),
    ("leaf: upper-case trust domain", &[(SVID, LEAVES, "upper-case trust domain")]),
    ("leaf: EKU serverAuth only, used as a client", &[(SVID, LEAVES, "serverAuth only")]),
    ("leaf: empty subject, SAN not critical", &[(SVID, LEAVES, "empty subject, SAN not critical")]),
    ("leaf: expired", &[(SVID, TIMES, "(\"expired\"")]),
    ("leaf: not yet valid", &[(SVID, TIMES, "(\"not yet valid\"")]),
    ("leaf: right id, foreign CA", &[(SVID, TIMES, "right id, foreign authority")]),
    ("leaf: two trust domains, either first", &[(SVID, LEAVES, "two trust domains, the other first")]),
    // Authorities of an outside CA.
    (
        "authority: another key, a leaf, another trust domain, expired, pathLen 0, an unknown critical extension",
        &[
            (OUTSIDE, BY_RULE, "\"another key\""),
            (OUTSIDE, BY_RULE, "(\"a leaf\""),
            (OUTSIDE, BY_RULE, "another trust domain"),
            (OUTSIDE, BY_RULE, "(\"expired\""),
            (OUTSIDE, BY_RULE, "(\"pathLen 0\""),
            (OUTSIDE, BY_RULE, "unknown critical extension"),
        ],
    ),
    (
        "authority: a root that is none, or that the chain does not reach",
        &[(OUTSIDE, "roots_that_are_none_are_refused", "")],
    ),
    (
        "authority: imported twice",
        &[(OUTSIDE, "a_request_is_spent_once_and_the_next_authority_signs_at_once_until_it_ends", "replayed")],
    ),
    ("authority: one approver", &[(OUTSIDE, "a_new_root_takes_two_approvers_and_the_next_certificate_none", "")]),
    (
        "authority: leaves by the external root alone",
        &[(
            "federation/identity/tests/external.rs",
            "leaves_verify_by_the_external_root_alone_and_by_the_former_while_that_is_relied_on",
            "openssl",
        )],
    ),
    // JWT-SVIDs.
    (
        "JWT: algorithms of the standard",
        &[(JWT, "every_algorithm_of_the_standard_is_verified_with_a_key_of_its_kind_and_no_other", "PS512")],
    ),
    ("JWT: none, HMAC, EdDSA", &[(JWT, "bad_headers_are_refused_whoever_signed_them", "\"alg\":\"none\"")]),
    ("JWT: typ of another kind", &[(JWT, "bad_headers_are_refused_whoever_signed_them", "at+jwt")]),
    ("JWT: headers beside alg, kid, typ", &[(JWT, "bad_headers_are_refused_whoever_signed_them", "\"jku\"")]),
    ("JWT: no exp", &[(JWT, "bad_claims_are_refused_whoever_signed_them", "{{\"sub\":{web},\"aud\":[\"a\"]}}")]),
    ("JWT: no, empty or another audience", &[(JWT, "bad_claims_are_refused_whoever_signed_them", "Code::JwtAudience")]),
    ("JWT: sub that is no SPIFFE ID", &[(JWT, "bad_claims_are_refused_whoever_signed_them", "spiffe://west/../web")]),
    ("JWT: forms that are no compact JWS", &[(JWT, "bad_forms_are_refused", "five parts, a JWE")]),
    ("JWT: another trust domain's key", &[(JWT, "keys_vouch_for_their_own_trust_domain_and_until_they_end", "")]),
    (
        "JWT: a foreign trust domain's token",
        &[
            (AGENT_JWT, "what_others_present_is_judged_by_the_bundle_of_their_trust_domain", "another's signature"),
            (AGENT_JWT, "py_spiffe_verifies_a_token_with_the_keys_that_it_is_told", "theirs, thirds"),
        ],
    ),
    // Bundles.
    ("bundle: empty keys", &[(SVID, BUNDLES, "(\"no keys\""), (FOREIGN, GROWS, "bundle(9, &[])")]),
    ("bundle: unknown use", &[(SVID, BUNDLES, "an unknown use beside")]),
    ("bundle: unknown kty", &[(SVID, BUNDLES, "an unknown kty beside")]),
    ("bundle: two x5c", &[(SVID, BUNDLES, "two x5c")]),
    ("bundle: kid on an x509-svid key", &[(SVID, BUNDLES, "kid on an x509 key")]),
    ("bundle: no kid on a jwt-svid key", &[(SVID, BUNDLES, "no kid on a JWT key")]),
    ("bundle: a trust domain twice in a map", &[(SVID, BUNDLES, "a trust domain twice in a map")]),
    ("bundle: sequence rollback", &[(FOREIGN, GROWS, "bundle_rollback")]),
    ("bundle: equivocation", &[(FOREIGN, GROWS, "bundle_equivocation")]),
    (
        "bundle: shrink to empty",
        &[
            (FOREIGN, GROWS, "bundle_shrunk"),
            (
                "federation/state/tests/foreign.rs",
                "keys_of_tokens_come_with_the_bundle_to_the_same_nodes_and_go_by_the_same_rules",
                "none, and another root",
            ),
        ],
    ),
    ("bundle: hint of nothing", &[(FOREIGN, HINTS, "(2, \"0\", \"ok\", 60)")]),
    ("bundle: huge hint", &[(FOREIGN, HINTS, "18446744073709551616")]),
    ("bundle: huge document", &[(FOREIGN, GROWS, "\"x\".repeat(2 << 20)")]),
    // Federation endpoints.
    (
        "endpoint: redirect to another host",
        &[
            (FOREIGN, GROWS, "https://127.0.0.9:1/x"),
            (HTTP, "places_are_https_and_redirects_stay_on_their_host", "other.example.org"),
        ],
    ),
    ("endpoint: permanent redirect", &[(FOREIGN, GROWS, "301 Moved Permanently")]),
    ("endpoint: redirect without end", &[(FOREIGN, GROWS, "Location: /again")]),
    ("endpoint: http", &[(FOREIGN, GROWS, "(\"http\""), (FOREIGN, GROWS, "http://127.0.0.1/x")]),
    ("endpoint: user in the URL", &[(FOREIGN, GROWS, "(\"a user\"")]),
    (
        "endpoint: server-side request forgery",
        &[(HTTP, "places_are_https_and_redirects_stay_on_their_host", "169.254.169.254")],
    ),
    ("endpoint: demands a client certificate", &[(FOREIGN, HINTS, "foreign_that(\"example.org\", true)")]),
    (
        "endpoint: ours asks for none",
        &[(
            "tests/tests/outside.rs",
            "the_bundle_is_served_to_the_letter_by_the_replicas_own_svid",
            "CertificateRequest",
        )],
    ),
    ("endpoint: another identity or authority", &[(FOREIGN, GROWS, "the_endpoint_is_verified")]),
    // Node-local services.
    (
        "service: no header, or another value",
        &[
            (API, HEADER, "\"TRUE\""),
            ("node-agent/tests/sds.rs", "what_makes_no_sense_is_refused", "workload.spiffe.io"),
        ],
    ),
    (
        "service: the first message at once",
        &[(API, "a_thousand_streams_are_told_a_change_and_no_more_are_opened_than_places", "is_some()")],
    ),
    (
        "service: the full set on every change",
        &[(API, "a_stream_sends_the_full_set_on_every_change_and_ends_with_the_identity", "")],
    ),
    ("service: redaction by absence", &[(API, "what_is_withdrawn_is_missing_from_the_next_message", "")]),
    ("service: nobody is refused", &[(API, HEADER, "no entry for this uid")]),
    ("service: not while starting", &[(API, HEADER, "no slice yet")]),
    (
        "service: duplicate hints",
        &[("node-agent/src/answers.rs", "the_default_identity_comes_first_and_no_hint_comes_twice", "")],
    ),
    (
        "service: empty audience",
        &[(AGENT_JWT, "a_token_is_for_an_own_identity_and_an_audience", "(&[][..], \"\", Code::InvalidArgument)")],
    ),
    (
        "service: JWT for an id that is not owned",
        &[(AGENT_JWT, "a_token_is_for_an_own_identity_and_an_audience", "spiffe://west/peer")],
    ),
    (
        "service: a bundle changes and no SVID",
        &[(AGENT_JWT, "a_new_key_is_told_though_no_svid_changed_and_wakes_no_other_stream", "")],
    ),
    ("service: the same bytes to who comes back", &[(API, "who_connects_again_is_told_the_very_same_bytes", "")]),
    (
        "service: reconnect storm",
        &[("node-agent/src/backoff.rs", "waits_grow_to_the_cap_and_start_over", "full jitter")],
    ),
    (
        "service: 1,000 streams",
        &[(API, "a_thousand_streams_are_told_a_change_and_no_more_are_opened_than_places", "STREAMS: usize = 1000")],
    ),
    (
        "service: what the standard leaves open",
        &[(API, "what_the_standard_leaves_open_is_unimplemented_and_health_follows_the_cell", "")],
    ),
    // What went wrong elsewhere.
    (
        "CSR with a subject, SANs or extensions (SPI-01-004, CVE-2022-40716)",
        &[(IDENTITY, "a_request_carries_a_key_and_nothing_else", "with_more")],
    ),
    ("path normalised (CVE-2021-27099)", &[("federation/model/src/id.rs", "spiffe_ids_are_parsed_to_the_letter", "")]),
    (
        "keys that others can read (SPI-01-002, CVE-2021-38553)",
        &[("tests/tests/refusals.rs", "a_replica_is_founded_once_and_guards_its_keys", "")],
    ),
    (
        "descriptors that leak (SPI-01-006)",
        &[("node-agent/tests/crowd.rs", "a_crowd_keeps_nobody_out_and_descriptors_come_back", "")],
    ),
    ("PID reuse", &[("node-agent/src/caller.rs", "a_number_used_again_gives_nobody_anothers_identity", "reused")]),
    (
        "a join token that is a path (SPI-01-007)",
        &[("tests/tests/enrol.rs", "an_ek_must_be_endorsed_and_expected", "etc/passwd")],
    ),
    (
        "100 concurrent uses of one token",
        &[("tests/tests/enrol.rs", "one_token_admits_one_node_however_many_try_at_once", "ANSWERS: usize = 100")],
    ),
    (
        "one blob verified, another used",
        &[("tests/tests/adversarial.rs", "begin_is_refused", "EK certificate of TPM A, EK public of TPM B")],
    ),
    (
        "a resumed TLS session (SPIRE 6715)",
        &[(
            "tests/tests/outside.rs",
            "the_bundle_is_served_to_the_letter_by_the_replicas_own_svid",
            "NewSessionTicket",
        )],
    ),
    (
        "exhaustion before authentication",
        &[("tests/tests/strangers.rs", "ten_thousand_begins_from_one_address_cost_what_its_budget_allows", "")],
    ),
    (
        "secrets in logs",
        &[
            ("tests/tests/secrets.rs", "live_processes_and_their_logs_hold_no_keys_but_those_in_use", ""),
            ("proto/src/lib.rs", "no_key_and_no_token_is_printed", ""),
        ],
    ),
    (
        "a call that no check covers (CVE-2026-30836)",
        &[
            ("tests/tests/authorise.rs", "the_matrix_and_the_table_hold_every_method_and_no_other", ""),
            ("tests/tests/authorise.rs", "only_who_is_in_the_matrix_is_let_in", ""),
        ],
    ),
    (
        "a certificate that panics its reader (CVE-2026-40097)",
        &[("attestation/verify/src/ek/tests.rs", "no_corruption_panics", "")],
    ),
    (
        "a match on one field alone (CVE-2025-6037)",
        &[(
            "federation/identity/tests/rotation.rs",
            "a_revoked_intermediate_is_known_by_its_key_whatever_its_leaves_say",
            "",
        )],
    ),
    (
        "a CRL that drops what is revoked (CVE-2021-29653)",
        &[(
            "federation/state/tests/denied.rs",
            "one_leaf_is_refused_by_authority_and_serial_and_stands_in_the_crl",
            "",
        )],
    ),
    (
        "an identity check the wrong way round (CVE-2023-3518)",
        &[(AGENT_JWT, "a_token_is_kept_while_it_is_good_and_no_longer", "wider")],
    ),
    ("a name of one type taken for another (CVE-2022-21656)", &[(SVID, LEAVES, "with(\"DNS:w.example.org\")")]),
    (
        "an authority's certificate as a caller's (CVE-2025-49825)",
        &[(IDENTITY, "verification_refuses_foreign_roots_other_times_and_broken_chains", "an intermediate is nobody")],
    ),
    (
        "an administrator's or replica's call after it was revoked",
        &[(
            "federation/server/tests/roles.rs",
            "a_replica_is_a_member_by_its_own_authority_and_only_while_it_is_one",
            "",
        )],
    ),
    (
        "one looping client (Vault 32003)",
        &[
            ("tests/tests/issuance.rs", "a_node_that_loops_is_told_to_wait_and_a_quiet_one_beside_it_is_served", ""),
            (AGENT_JWT, "one_that_asks_for_ever_new_audiences_is_stopped", ""),
        ],
    ),
    (
        "pooled bundles",
        &[
            (
                "node-agent/tests/envoy.rs",
                "envoy_lets_in_each_trust_domain_for_itself_and_rotates_without_a_restart",
                "forged by the federated one",
            ),
            ("node-agent/tests/envoy.rs", "envoy_that_asks_for_increments_does_too", "DELTA_GRPC"),
        ],
    ),
];

#[test]
fn every_case_of_identity_is_shown_by_a_test() {
    let mut wrong = Vec::new();
    for (n, (case, shown)) in CASES.iter().enumerate() {
        if shown.is_empty() || CASES.iter().take(n).any(|(other, _)| other == case) {
            wrong.push(format!("{case}: no row, or two"));
        }
        for (file, test, words) in *shown {
            let source = text(file).unwrap_or_default();
            if !is_a_test(&source, test) || !source.contains(words) {
                wrong.push(format!("{case}: not shown by {test} of {file} ({words})"));
            }
        }
    }
    println!("{} of {} cases shown", CASES.len() - wrong.len().min(CASES.len()), CASES.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether the harness runs it: it is marked as a test, and not as one to pass over.
fn is_a_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let begins = |line: &str| {
        line.trim_start_matches("async ").strip_prefix("fn ").is_some_and(|rest| rest.starts_with(&format!("{name}(")))
    };
    let Some(at) = lines.iter().position(|line| begins(line)) else { return false };
    let marks: Vec<_> = lines[..at].iter().rev().take_while(|line| line.starts_with("#[")).collect();
    marks.iter().any(|mark| mark.contains("test")) && !marks.iter().any(|mark| mark.contains("ignore"))
}

#[test]
fn a_case_whose_test_is_gone_is_noticed() {
    let source =
        "#[test]\nfn one() {}\n#[tokio::test]\nasync fn two() {}\nfn three() {}\n#[test]\n#[ignore]\nfn four() {}\n";
    let found = ["one", "two", "three", "four", "on", "five"].map(|name| is_a_test(source, name));
    assert_eq!(found, [true, true, false, false, false, false]);
}
