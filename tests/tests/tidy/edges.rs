//! Dependency edges (design: "Dependency direction"). A new edge is a decision of its own: change the table here and
//! tell it in ARCHITECTURE.md.

use ambit_tests::text;
use std::collections::BTreeMap;

/// Crate, and the crates of this workspace that it may use. Development dependencies are judged apart.
const EDGES: &[(&str, &[&str])] = &[
    ("ambit-model", &[]),
    ("ambit-policy", &["ambit-model"]),
    ("ambit-audit", &["ambit-model"]),
    ("ambit-state", &["ambit-audit", "ambit-model", "ambit-policy"]),
    ("ambit-identity", &["ambit-audit", "ambit-model", "ambit-state"]),
    ("ambit-verify", &["ambit-model"]),
    // Drives parsers and is part of no product.
    ("ambit-fuzz", &["ambit-identity", "ambit-model", "ambit-policy", "ambit-verify"]),
    ("ambit-proto", &["ambit-model"]),
    ("ambit-tpm", &["ambit-model"]),
    ("ambit-ebpf", &[]),
    ("ambit-transport", &["ambit-model", "ambit-identity", "ambit-proto"]),
    (
        "ambitd",
        &[
            "ambit-audit",
            "ambit-model",
            "ambit-policy",
            "ambit-state",
            "ambit-identity",
            "ambit-verify",
            "ambit-proto",
            // A replica's own TPM: its wrap key, and what it booted.
            "ambit-tpm",
            "ambit-transport",
        ],
    ),
    (
        "ambit-agent",
        &[
            "ambit-model",
            "ambit-policy",
            "ambit-identity",
            "ambit-proto", // What both ends hash, encode and bound comes from one place; the agent decides nothing with it.
            "ambit-verify",
            "ambit-tpm",
            "ambit-ebpf",
            "ambit-transport",
        ],
    ),
    // The same verifier judges folders offline that judges nodes in the server.
    (
        "ambit",
        &[
            "ambit-audit",
            "ambit-model",
            "ambit-policy",
            "ambit-identity",
            "ambit-proto",
            "ambit-transport",
            "ambit-verify",
        ],
    ),
    // Chaos writes with the drill engine's writer and judges with its ledger.
    ("ambit-lab", &["ambit", "ambit-model", "ambit-policy", "ambit-identity", "ambit-proto", "ambit-transport"]),
    (
        "ambit-tests",
        // Fixtures speak to the real binaries over the wire, as agents and operators do; the benchmark applies the
        // commands that it times.
        &[
            "ambit-identity",
            "ambit-lab",
            "ambit-model",
            "ambit-policy",
            "ambit-proto",
            "ambit-state",
            "ambit-tpm",
            "ambit-transport",
            "ambit-verify",
        ],
    ),
    // The very engine and state machine of the server, under faults.
    ("ambit-sim", &["ambit-identity", "ambit-model", "ambit-state", "ambitd"]),
    ("xtask", &[]),
];

/// External crate, the only crates of this workspace that may use it, and why.
const ONLY: &[(&str, &[&str], &str)] = &[
    ("raft", &["ambitd"], "raft's types stop at the server's driver"),
    ("raft-engine", &["ambitd"], "one log store"),
    ("protobuf", &["ambitd"], "raft's message encoding, opaque to everyone else"),
    ("slog", &["ambitd"], "raft's logger only; everything else logs through tracing"),
    ("sled", &["ambitd"], "rebuildable tables of the server"),
    ("tss-esapi", &["ambit-tpm"], "one thread owns the TPM; the verifier must not need a TPM library"),
    ("libfuzzer-sys", &["ambit-fuzz"], "a fuzzing engine is part of no product"),
    ("libbpf-rs", &["ambit-ebpf"], "kernel layouts stay behind one crate"),
];

/// Crates that decide and never act.
const PURE: &[&str] = &["ambit-audit", "ambit-model", "ambit-policy", "ambit-state", "ambit-identity", "ambit-verify"];

/// Crates that act: clocks, sockets, files, processes, ambient randomness, global state.
const ACTS: &[&str] = &[
    "axum",
    "chrono",
    "crossbeam",
    "futures",
    "getrandom",
    "h2",
    "hyper",
    "hyper-util",
    "libbpf-rs",
    "libc",
    "mio",
    "nix",
    "parking_lot",
    "raft",
    "raft-engine",
    "rand",
    "rayon",
    "reqwest",
    "rustix",
    "sled",
    "socket2",
    "tempfile",
    "tokio",
    "tokio-rustls",
    "tokio-stream",
    "tonic",
    "tower",
    "tracing",
    "tracing-subscriber",
    "tss-esapi",
];

struct Crate {
    name: String,
    manifest: toml::Table,
}

impl Crate {
    fn dependencies(&self, section: &str) -> Vec<&str> {
        let table = self.manifest.get(section).and_then(|section| section.as_table());
        table.map(|table| table.keys().map(String::as_str).collect()).unwrap_or_default()
    }
    fn linked(&self) -> Vec<&str> {
        [self.dependencies("dependencies"), self.dependencies("build-dependencies")].concat()
    }
}

fn crates() -> Vec<Crate> {
    let workspace: toml::Table = text("Cargo.toml").unwrap().parse().unwrap();
    let members = workspace["workspace"]["members"].as_array().unwrap();
    let folders = members.iter().map(|member| member.as_str().unwrap());
    folders
        .map(|folder| {
            let manifest: toml::Table = text(&format!("{folder}/Cargo.toml")).unwrap().parse().unwrap();
            let name = manifest["package"]["name"].as_str().unwrap().to_owned();
            assert!(manifest.get("target").is_none(), "{name}: dependencies by target hide from this check");
            Crate { name, manifest }
        })
        .collect()
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let allowed: BTreeMap<_, _> = EDGES.iter().copied().collect();
    for krate in crates() {
        let may = allowed.get(krate.name.as_str()).unwrap_or_else(|| panic!("{}: give it a row in EDGES", krate.name));
        for dependency in krate.linked() {
            if allowed.contains_key(dependency) {
                assert!(may.contains(&dependency), "{} must not use {dependency}", krate.name);
            }
        }
    }
}

/// A test may reach sideways, never to what is above its crate: that would turn the build's order round.
#[test]
fn tests_reach_sideways_but_not_up() {
    let products = ["ambitd", "ambit-agent", "ambit", "ambit-fuzz", "ambit-lab", "ambit-tests", "xtask"];
    for krate in crates().iter().filter(|krate| !products.contains(&krate.name.as_str())) {
        for dependency in krate.dependencies("dev-dependencies") {
            assert!(!products.contains(&dependency), "{}'s tests must not use {dependency}", krate.name);
        }
    }
}

#[test]
fn some_crates_have_one_user() {
    for krate in crates() {
        for (external, users, why) in ONLY {
            let uses = krate.linked().contains(external);
            assert!(!uses || users.contains(&krate.name.as_str()), "{} must not use {external}: {why}", krate.name);
        }
    }
}

#[test]
fn pure_crates_use_nothing_that_acts() {
    let crates = crates();
    for name in PURE {
        let krate = crates.iter().find(|krate| krate.name == *name).unwrap();
        let acts: Vec<_> = krate.linked().into_iter().filter(|dependency| ACTS.contains(dependency)).collect();
        assert!(acts.is_empty(), "{name} is pure and must not use {acts:?}");
    }
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    for krate in crates() {
        let lints = krate.manifest.get("lints").and_then(|lints| lints.get("workspace")).and_then(|w| w.as_bool());
        assert_eq!(lints, Some(true), "{}: [lints] workspace = true", krate.name);
    }
}
