//! IMA allow-lists: which file digests may be measured, and where. One parsed list serves every policy and node that
//! names it by the SHA-256 of its text.

use crate::hash::sha256;
use ambit_model::appraisal::{HexDigest, ImaFile};
use ambit_model::{Code, Refusal};

/// The largest list read, in bytes: about 300,000 files with their paths.
pub const ALLOW_LIST_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The first 16 bytes of SHA-256 over the path; zeros for any path. Kept instead of the path: 48 bytes a file in all.
type PathKey = [u8; 16];
const ANYWHERE: PathKey = [0; 16];

/// A parsed list: sorted, so that a look-up is a binary search.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList {
    sha256: [u8; 32],
    short: Vec<([u8; 32], PathKey)>,
    /// SHA-384 and SHA-512, the former filled up with zeros.
    long: Vec<([u8; 64], PathKey)>,
}

impl AllowList {
    /// Parses a text of lines `DIGEST PATH` (as `sha256sum` writes them), `DIGEST *` or `DIGEST`, where the last two
    /// allow the file anywhere. Empty lines and those that begin with `#` are skipped. Bytes of a path that are no
    /// printable ASCII may stand as they are or as `\xNN`.
    ///
    /// # Errors
    /// [`Code::AppraisalPolicyMalformed`], naming the line.
    pub fn parse(text: &[u8]) -> Result<AllowList, Refusal> {
        let bad = |expected: &str, found: String| Refusal::new(Code::AppraisalPolicyMalformed, expected, found);
        if text.len() > ALLOW_LIST_BYTES_MAX {
            return Err(bad("an allow-list of at most 32 MiB", format!("{} bytes", text.len())));
        }
        let mut list = AllowList { sha256: sha256(text), ..AllowList::default() };
        for (n, line) in text.split(|b| *b == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let number = n.saturating_add(1);
            let end = line.iter().position(|b| *b == b' ').unwrap_or(line.len());
            let (digest, rest) = line.split_at_checked(end).unwrap_or((line, &[]));
            let digest: HexDigest = std::str::from_utf8(digest)
                .ok()
                .and_then(|d| d.parse().ok())
                .ok_or_else(|| bad("DIGEST PATH, DIGEST * or DIGEST", format!("line {number}: another text")))?;
            list.insert(&digest, path_key(written_path(rest)));
        }
        list.sort();
        Ok(list)
    }

    /// The list of a policy's own files.
    pub(super) fn of_files<'a>(files: impl Iterator<Item = &'a ImaFile>) -> AllowList {
        let mut list = AllowList::default();
        for file in files {
            list.insert(&file.digest, file.path.as_ref().map_or(ANYWHERE, |p| path_key(p.as_bytes())));
        }
        list.sort();
        list
    }

    /// SHA-256 of the text: the list's name.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// How many lines it holds, without repetition.
    pub fn len(&self) -> usize {
        self.short.len().saturating_add(self.long.len())
    }

    /// Whether it allows nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a file with this digest may stand at this path, written as [`crate::ima::ImaEntry::path_text`] does.
    pub fn contains(&self, digest: &[u8], path: &str) -> bool {
        let key = path_key(path.as_bytes());
        if let Ok(short) = <[u8; 32]>::try_from(digest) {
            return [ANYWHERE, key].iter().any(|k| self.short.binary_search(&(short, *k)).is_ok());
        }
        let long = padded(digest);
        [ANYWHERE, key].iter().any(|k| self.long.binary_search(&(long, *k)).is_ok())
    }

    fn insert(&mut self, digest: &HexDigest, key: PathKey) {
        match <[u8; 32]>::try_from(digest.as_bytes()) {
            Ok(short) => self.short.push((short, key)),
            Err(_) => self.long.push((padded(digest.as_bytes()), key)),
        }
    }

    fn sort(&mut self) {
        self.short.sort_unstable();
        self.short.dedup();
        self.short.shrink_to_fit();
        self.long.sort_unstable();
        self.long.dedup();
        self.long.shrink_to_fit();
    }
}

fn padded(digest: &[u8]) -> [u8; 64] {
    let mut out = [0; 64];
    for (to, from) in out.iter_mut().zip(digest) {
        *to = *from;
    }
    out
}

/// `sha256sum` writes a second space before the path of a text file, an asterisk before that of a binary one.
fn written_path(rest: &[u8]) -> &[u8] {
    let rest = rest.strip_prefix(b" ").unwrap_or(rest);
    let rest = rest.strip_prefix(b" ").unwrap_or(rest);
    if rest == b"*" { &[] } else { rest.strip_prefix(b"*").unwrap_or(rest) }
}

fn path_key(path: &[u8]) -> PathKey {
    if path.is_empty() {
        return ANYWHERE;
    }
    let plain = path.iter().all(|b| b.is_ascii_graphic() || *b == b' ');
    let hash = if plain { sha256(path) } else { sha256(path.escape_ascii().to_string().as_bytes()) };
    hash.first_chunk().copied().unwrap_or(ANYWHERE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_allow_a_digest_at_a_path_or_anywhere() {
        let (a, b, c, d) = ([1u8; 32], [2u8; 32], [3u8; 48], [4u8; 64]);
        let text = format!(
            "# a comment\n{}  /bin/a b\n{} *\r\n\n{} */lib/c\n{}\n{} /caf\u{e9}\n",
            hex::encode(a),
            hex::encode(b),
            hex::encode(c),
            hex::encode(d),
            hex::encode(d)
        );
        let list = AllowList::parse(text.as_bytes()).unwrap();
        assert_eq!(list.len(), 5);
        assert_eq!(list.sha256(), sha256(text.as_bytes()));
        for (digest, path, allowed) in [
            (a.as_slice(), "/bin/a b", true),
            (&a, "/bin/a", false),
            (&b, "/anywhere", true),
            (&c, "/lib/c", true),
            (&c, "/lib/d", false),
            (&d, "/x", true),
            (&[5; 32], "/bin/a b", false),
            (&[], "", false),
        ] {
            assert_eq!(list.contains(digest, path), allowed, "{path}");
        }
        let accent = AllowList::parse(format!("{} /caf\u{e9}\n", hex::encode(a)).as_bytes()).unwrap();
        assert!(accent.contains(&a, "/caf\\xc3\\xa9"));
        for bad in ["abc /a\n", "/a\n", &format!("{} /a\n", "A".repeat(64)), &format!("{} /a\n", "a".repeat(40))] {
            let refusal = AllowList::parse(format!("# x\n{bad}").as_bytes()).unwrap_err();
            assert!(refusal.found.starts_with("line 2"), "{refusal}");
        }
    }

    #[test]
    fn a_hundred_thousand_files_take_a_few_mebibytes() {
        let text: String =
            (0..100_000u32).map(|n| format!("{} /usr/lib/{n}\n", hex::encode(sha256(&n.to_be_bytes())))).collect();
        let list = AllowList::parse(text.as_bytes()).unwrap();
        assert_eq!(list.len(), 100_000);
        assert!(list.short.capacity() * std::mem::size_of::<([u8; 32], PathKey)>() <= 5 * 1024 * 1024);
        assert!(list.contains(&sha256(&7u32.to_be_bytes()), "/usr/lib/7"));
    }
}
