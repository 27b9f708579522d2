//! What tests of more than one crate share: the repository's files as they are checked in, cells of real replicas, and
//! machines with software TPMs.
//!
//! Never part of a product: no other crate depends on it. Its tests never skip; what cannot run fails and says why.
#![forbid(unsafe_code)]

pub mod agent;
pub mod bench;
pub mod cell;
pub mod contexts;
pub mod hostile;
pub mod machine;
pub mod node;
pub mod operator;
pub mod peering;
pub mod process;
pub mod secrets;
pub mod small;
pub mod soft_tpm;
pub mod table;
pub mod tpm;

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(PathBuf::from).context("this crate lies in a folder of the repository")
}

/// A text file of the repository, by its path from the root.
pub fn text(path: &str) -> Result<String> {
    std::fs::read_to_string(root()?.join(path)).with_context(|| format!("reading {path}"))
}

/// Every file that git tracks or would track, by its path from the root, sorted.
pub fn files() -> Result<Vec<String>> {
    let mut git = std::process::Command::new("git");
    // Tests run as root, the checkout may be someone else's.
    git.args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root()?);
    let out = git.output().context("git ls-files")?;
    anyhow::ensure!(out.status.success(), "git ls-files: {}", String::from_utf8_lossy(&out.stderr));
    let listed = String::from_utf8(out.stdout).context("a path that is not UTF-8")?;
    let mut files: Vec<_> = listed.split('\0').filter(|path| !path.is_empty()).map(str::to_owned).collect();
    // A file deleted but not yet committed is listed too.
    files.retain(|path| root().is_ok_and(|root| root.join(path).is_file()));
    files.sort();
    files.dedup();
    Ok(files)
}
