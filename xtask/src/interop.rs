//! The Python environment of the interoperability tests: `interop` in the target folder, with what
//! `tests/interop/requirements.txt` pins by hash and nothing else.

use crate::{Stop, cargo};
use std::path::{Path, PathBuf};

/// What is installed, and the file that says so when all of it is.
const REQUIREMENTS: &str = "tests/interop/requirements.txt";
const MARK: &str = "installed";

/// Makes the environment unless it holds just that.
pub(crate) fn install() -> Result<(), Stop> {
    let wanted = read(&cargo::root()?.join(REQUIREMENTS))?;
    let folder = folder()?;
    let mark = folder.join(MARK);
    if std::fs::read_to_string(&mark).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|e| Stop::Failed(format!("{}: {e}", folder.display())))?;
    }
    let text = folder.display().to_string();
    // Debian's own: what the requirements pin is built for it.
    cargo::program("/usr/bin/python3", &["-m", "venv", &text])?;
    let pip = folder.join("bin/pip").display().to_string();
    let quiet = ["--quiet", "--disable-pip-version-check", "--no-input"];
    let install =
        // aics_tlog names a newer Python than Debian's, and runs on this one: its tests of ours would say if not.
        [&["install"][..], &quiet, &["--no-deps", "--ignore-requires-python", "--require-hashes", "--requirement", REQUIREMENTS]].concat();
    cargo::program(&pip, &install)?;
    std::fs::write(&mark, wanted).map_err(|e| Stop::Failed(format!("{}: {e}", mark.display())))
}

/// Beside the folder that this binary lies in.
fn folder() -> Result<PathBuf, Stop> {
    let me = cargo::binary("interop")?;
    let target = me.parent().and_then(Path::parent).ok_or_else(|| Stop::Failed("no target folder".into()))?;
    Ok(target.join("interop"))
}

fn read(path: &Path) -> Result<String, Stop> {
    std::fs::read_to_string(path).map_err(|e| Stop::Failed(format!("{}: {e}", path.display())))
}
