//! Rows of the adversarial list: `cargo xtask test` prints them as one table when the tests are done.

use crate::root;
use anyhow::Result;
use std::path::PathBuf;

/// Writes `case NN  <what>  -> <code>` of reference list `case`. One file a row, so that tests that run at once, or
/// again, write the same table. The verifier's own tests write rows in the same form.
pub fn row(case: u8, what: &str, code: &str) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let folder = target.map_or_else(|| root().map(|root| root.join("target")), Ok)?.join("adversarial");
    std::fs::create_dir_all(&folder)?;
    let slug: String = what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    std::fs::write(folder.join(format!("{case:02}-{slug}.txt")), format!("case {case:02}  {what}  -> {code}\n"))?;
    Ok(())
}
