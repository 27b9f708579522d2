//! The administrator's context: which cell, how to recognise it, and where it answers.

use crate::exit::file_refusal;
use ambit_model::{Code, Refusal, TrustDomain};
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// `context.json` is a few lines; a larger file is not one.
const CONTEXT_BYTES_MAX: u64 = 64 * 1024;
/// More replicas than any cell has; each is tried in turn.
const ADDRESSES_MAX: usize = 16;

/// A cell and the administrator's certificate for it.
#[derive(Clone, Debug)]
pub struct Context {
    /// The cell's trust domain; its name in everything printed.
    pub trust_domain: TrustDomain,
    /// SHA-256 of the root, learnt out of band, 64 hexadecimal digits.
    pub fingerprint: [u8; 32],
    /// Replicas, in the order in which they are tried.
    pub addresses: Vec<SocketAddr>,
    /// admin.pem, admin.key and root.pem lie here.
    pub folder: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    trust_domain: TrustDomain,
    fingerprint: String,
    addresses: Vec<SocketAddr>,
}

impl Context {
    /// The context in `file`, or the one that the environment or the home folder names.
    pub fn find(file: Option<&Path>) -> Result<Context, Refusal> {
        match file {
            Some(file) => Context::read(file),
            None => Context::read(&default_file()?),
        }
    }

    /// The context in `file`.
    pub fn read(file: &Path) -> Result<Context, Refusal> {
        let text = read_bounded(file, CONTEXT_BYTES_MAX)?;
        let bad = |found: String| {
            let expected = format!("a context {{trust_domain, fingerprint, addresses}} in {}", file.display());
            Refusal::new(Code::ConfigInvalid, expected, found)
        };
        let written: Written = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if written.addresses.is_empty() || written.addresses.len() > ADDRESSES_MAX {
            return Err(bad(format!("{} addresses; 1 to {ADDRESSES_MAX} are possible", written.addresses.len())));
        }
        Ok(Context {
            trust_domain: written.trust_domain,
            fingerprint: fingerprint(&written.fingerprint)?,
            addresses: written.addresses,
            folder: file.parent().filter(|of| !of.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned(),
        })
    }

    /// What every change prints first, so that nobody changes the wrong cell unnoticed.
    pub fn banner(&self) -> String {
        format!("context: {} (root {}..)", self.trust_domain, &hex::encode(self.fingerprint)[..16])
    }
}

/// A fingerprint of 64 hexadecimal digits.
pub fn fingerprint(text: &str) -> Result<[u8; 32], Refusal> {
    let mut out = [0u8; 32];
    hex::decode_to_slice(text, &mut out)
        .map_err(|_| Refusal::new(Code::BadRequest, "a root fingerprint of 64 hexadecimal digits", text))?;
    Ok(out)
}

/// The text of a file that must not be larger than `bytes_max`; `-` is standard input.
pub fn read_bounded(file: &Path, bytes_max: u64) -> Result<String, Refusal> {
    use std::io::Read;
    let mut text = String::new();
    let read = if file.as_os_str() == "-" {
        std::io::stdin().lock().take(bytes_max + 1).read_to_string(&mut text)
    } else {
        let opened = std::fs::File::open(file).map_err(|e| file_refusal(file, &e))?;
        opened.take(bytes_max + 1).read_to_string(&mut text)
    };
    let read = read.map_err(|e| file_refusal(file, &e))?;
    if read as u64 > bytes_max {
        let expected = format!("at most {bytes_max} bytes in {}", file.display());
        return Err(Refusal::new(Code::BadRequest, expected, "more"));
    }
    Ok(text)
}

fn default_file() -> Result<PathBuf, Refusal> {
    if let Some(file) = std::env::var_os("AMBIT_CONTEXT").filter(|v| !v.is_empty()) {
        return Ok(file.into());
    }
    match std::env::var_os("HOME") {
        Some(home) => Ok(Path::new(&home).join(".config/ambit/context.json")),
        None => Err(Refusal::new(Code::ConfigInvalid, "--context FILE, AMBIT_CONTEXT or HOME", "none of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Context, Refusal> {
        let file = std::env::temp_dir().join(format!("ambit-context-{}-{}", std::process::id(), text.len()));
        std::fs::write(&file, text).unwrap();
        let read = Context::read(&file);
        std::fs::remove_file(&file).unwrap();
        read
    }

    #[test]
    fn a_context_is_read_strictly() {
        let fp = "ab".repeat(32);
        let good = read(&format!(r#"{{"trust_domain":"west","fingerprint":"{fp}","addresses":["10.71.0.11:7443"]}}"#))
            .unwrap();
        assert_eq!(good.banner(), "context: west (root abababababababab..)");
        for (text, code) in [
            (format!(r#"{{"trust_domain":"west","fingerprint":"{fp}","addresses":[]}}"#), Code::ConfigInvalid),
            (format!(r#"{{"trust_domain":"west","fingerprint":"{fp}","addresses":["x"]}}"#), Code::ConfigInvalid),
            (r#"{"trust_domain":"west","fingerprint":"ab","addresses":["1.2.3.4:5"]}"#.to_owned(), Code::BadRequest),
            (
                format!(r#"{{"trust_domain":"w","fingerprint":"{fp}","addresses":["1.2.3.4:5"],"x":1}}"#),
                Code::ConfigInvalid,
            ),
            (String::new(), Code::ConfigInvalid),
        ] {
            assert_eq!(read(&text).unwrap_err().code, code, "{text}");
        }
        assert_eq!(Context::read(Path::new("/nowhere/context.json")).unwrap_err().code, Code::BadRequest);
    }
}
