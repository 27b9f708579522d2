//! What may be in a file, and that the files which ARCHITECTURE.md names are there.

use ambit_tests::{files, root, text};
use std::collections::BTreeSet;

/// Files that allow `unsafe`, each with its reason. The lint denies it everywhere else.
const UNSAFE: &[(&str, &str)] = &[
    ("attestation/verify/fuzz/src/heap.rs", "the fuzz targets' allocator counts what a parser holds"),
    ("deploy/lab/src/process.rs", "a child enters its namespace and cgroup between fork and exec"),
    ("ebpf/src/sys.rs", "system calls that neither std nor libbpf-rs has"),
];

#[test]
fn unsafe_is_only_in_files_of_the_list() {
    // A file that names the lint other than to forbid it allows it, over however many lines it is written.
    let allows = |path: &String| text(path).unwrap().replace("forbid(unsafe_code)", "").contains("unsafe_code");
    let here = "tests/tests/tidy/";
    let found: BTreeSet<_> = files()
        .unwrap()
        .into_iter()
        .filter(|path| path.ends_with(".rs") && !path.starts_with(here))
        .filter(allows)
        .collect();
    let listed: BTreeSet<_> = UNSAFE.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(found, listed, "left: files that allow unsafe code; right: the list in this test");
    let workspace: toml::Table = text("Cargo.toml").unwrap().parse().unwrap();
    assert_eq!(workspace["workspace"]["lints"]["rust"]["unsafe_code"].as_str(), Some("deny"));
}

/// A path of the machine that it was written on is of no use to anyone else.
#[test]
fn no_file_names_a_path_of_this_machine() {
    let mut paths = vec![root().unwrap().display().to_string()];
    paths.extend(std::env::var("HOME").ok().filter(|home| home.len() > 1).map(|home| home + "/"));
    for file in files().unwrap() {
        let bytes = std::fs::read(root().unwrap().join(&file)).unwrap();
        for path in &paths {
            let holds = bytes.windows(path.len()).any(|window| window == path.as_bytes());
            assert!(!holds, "{file} holds {path}");
        }
    }
}

/// Words in backquotes that look like a path: of these folders, or with one of these endings.
fn named_files(markdown: &str) -> BTreeSet<String> {
    const FOLDERS: &[&str] = &[
        "federation/",
        "attestation/",
        "node-agent/",
        "ebpf/",
        "proto/",
        "cli/",
        "deploy/",
        "tests/",
        "xtask/",
        ".ci/",
    ];
    let spans = markdown.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    spans
        .filter(|word| FOLDERS.iter().any(|folder| word.starts_with(folder)))
        .filter(|word| !word.contains(' ') && !word.contains('*'))
        // `file.rs::item` names an item in a file.
        .map(|word| word.split("::").next().unwrap_or(word).to_owned())
        .collect()
}

#[test]
fn files_named_in_architecture_exist() {
    let names = named_files(&text("ARCHITECTURE.md").unwrap());
    assert!(names.len() > 20, "the four journeys name more than {} files", names.len());
    let missing: Vec<_> = names.into_iter().filter(|name| !root().unwrap().join(name).exists()).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:#?}");
}

#[test]
fn every_crate_is_on_the_map() {
    let map = text("ARCHITECTURE.md").unwrap();
    let workspace: toml::Table = text("Cargo.toml").unwrap().parse().unwrap();
    for member in workspace["workspace"]["members"].as_array().unwrap() {
        let folder = member.as_str().unwrap();
        assert!(map.contains(&format!("`{folder}`")), "ARCHITECTURE.md: `{folder}` is not on the map");
    }
}

#[test]
fn every_dependency_is_told() {
    let told = text("ARCHITECTURE.md").unwrap();
    let workspace: toml::Table = text("Cargo.toml").unwrap().parse().unwrap();
    let all = workspace["workspace"]["dependencies"].as_table().unwrap().iter();
    let foreign = all.filter(|(_, given)| given.get("path").is_none()).map(|(name, _)| name);
    let untold: Vec<_> = foreign.filter(|name| !told.contains(&format!("`{name}`"))).collect();
    assert!(untold.is_empty(), "ARCHITECTURE.md, Dependencies: say why we need {untold:?}");
}

/// Users build without clang, so what is committed must be what the sources give.
#[test]
fn kernel_objects_are_of_their_sources() {
    let mut check = std::process::Command::new("sh");
    let out = check.args(["ebpf/build-objects.sh", "--check"]).current_dir(root().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "cargo xtask deps brings clang; cargo xtask build-bpf makes the objects: {said}");
}

#[test]
fn the_documents_are_there() {
    for document in [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "LICENSE",
        "deny.toml",
        ".ci/run",
    ] {
        assert!(text(document).is_ok_and(|text| text.len() > 100), "{document} is missing or empty");
    }
}
