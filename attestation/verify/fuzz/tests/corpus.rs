//! Every target over its committed corpus, without libFuzzer: what was found once stays found, and a corpus that no
//! longer reaches anything is seen.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_fuzz::{TARGETS, Target, Verdict, guard};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Of all corpora together: they are read by everyone who clones the project.
const BYTES_MAX: u64 = 1024 * 1024;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn inputs(target: &Target) -> Vec<PathBuf> {
    let folder = folder().join(target.name);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    files.map(|file| file.unwrap().path()).collect()
}

#[test]
fn every_input_holds_what_its_target_must_hold() {
    for target in TARGETS {
        let mut verdicts = BTreeSet::new();
        for path in inputs(target) {
            let input = std::fs::read(&path).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            assert!(input.len() <= target.len_max, "{}/{name} is cut off: {} bytes", target.name, input.len());
            println!("{}/{name}", target.name);
            let verdict = guard::run(target, &input);
            verdicts.insert(format!("{verdict:?}"));
        }
        let both = BTreeSet::from([format!("{:?}", Verdict::Accepted), format!("{:?}", Verdict::Refused)]);
        assert_eq!(verdicts, both, "{}: what is accepted and what is refused", target.name);
    }
}

#[test]
fn every_corpus_has_a_target_and_all_are_small() {
    let names: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let folders: BTreeSet<_> = std::fs::read_dir(folder())
        .unwrap()
        .map(|folder| folder.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, folders, "left: targets; right: folders of the corpus");
    let bytes: u64 = TARGETS.iter().flat_map(inputs).map(|path| path.metadata().unwrap().len()).sum();
    assert!(bytes <= BYTES_MAX, "{bytes} bytes of corpora");
}
