//! Reading the machine's two measurement logs, from an offset and within a bound.

use ambit_model::{Code, Refusal};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// The log at `path` from `offset` on; nothing where it is not that long. A log that does not exist is an empty one:
/// whether a machine may be without is for the cell's policy to say, not for the machine.
pub fn read(path: &Path, offset: u64, bytes_max: u64) -> Result<Vec<u8>, Refusal> {
    let unreadable = |e: std::io::Error| {
        Refusal::new(Code::EvidenceMalformed, format!("a readable log at {}", path.display()), e.to_string())
    };
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), "no log there; an empty one is shown to the cell");
            return Ok(Vec::new());
        }
        Err(e) => return Err(unreadable(e)),
    };
    file.seek(SeekFrom::Start(offset)).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > bytes_max {
        let found = format!("more in {} from byte {offset} on", path.display());
        return Err(Refusal::new(Code::EvidenceTooLarge, format!("at most {bytes_max} bytes"), found));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_read_from_the_offset_and_never_beyond_the_bound() {
        let path = std::env::temp_dir().join(format!("ambit-agent-log-{}", std::process::id()));
        std::fs::write(&path, b"0123456789").unwrap();
        let of = |offset, max| read(&path, offset, max).map_err(|r| r.code);
        assert_eq!(of(0, 10).unwrap(), b"0123456789");
        assert_eq!(of(7, 10).unwrap(), b"789");
        assert_eq!(of(10, 10).unwrap(), b"");
        assert_eq!(of(4096, 10).unwrap(), b"", "a log that shrank");
        assert_eq!(of(0, 9), Err(Code::EvidenceTooLarge));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(of(0, 9).unwrap(), b"", "no log");
        assert_eq!(read(&std::env::temp_dir(), 0, 9).unwrap_err().code, Code::EvidenceMalformed);
    }
}
