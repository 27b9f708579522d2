//! One entry of `binary_runtime_measurements` (Linux, security/integrity/ima/ima_fs.c and ima_template.c).

use crate::IMA_PCR;
use crate::hash::HashAlg;
use crate::wire::{Malformed, Reader};

/// A template's name, or its format where it has none: `d-ng|n-ng|sig` and the like.
const NAME_BYTES_MAX: usize = 128;
/// One entry's template data: a path, a signature, or a measured buffer such as a key ring.
const DATA_BYTES_MAX: usize = 1024 * 1024;
/// Fields of one template; the kernel's limit is 15.
const FIELDS_MAX: usize = 15;
/// Of a path in [`ImaEntry::place`].
const PLACE_PATH_CHARS: usize = 256;
/// The templates that the kernel names, with their fields.
const TEMPLATES: [(&str, &str); 7] = [
    ("ima-ng", "d-ng|n-ng"),
    ("ima-sig", "d-ng|n-ng|sig"),
    ("ima-ngv2", "d-ngv2|n-ng"),
    ("ima-sigv2", "d-ngv2|n-ng|sig"),
    ("ima-buf", "d-ng|n-ng|buf"),
    ("ima-modsig", "d-ng|n-ng|sig|d-modsig|modsig"),
    ("evm-sig", "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode"),
];

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImaEntry<'a> {
    /// Position in the log, from 1.
    pub number: u64,
    /// The hash that IMA used, as the entry names it: `sha256`.
    pub algorithm: &'a str,
    /// The file's digest.
    pub digest: &'a [u8],
    /// Its path, or the name of what was measured instead of a file. Bytes: Linux gives paths no encoding.
    pub path: &'a [u8],
    /// Whether the entry carries a signature of the file.
    pub signed: bool,
    /// Whether it records a violation: the file was open for writing while it was measured.
    pub violation: bool,
}

impl ImaEntry<'_> {
    /// The path as text, bytes that are no printable ASCII escaped.
    pub fn path_text(&self) -> String {
        self.path.escape_ascii().to_string()
    }

    /// Where the entry stands: what a node may be told. A longer path is cut: it goes into rows and messages.
    pub fn place(&self) -> String {
        let path = self.path_text();
        let cut: String = path.chars().take(PLACE_PATH_CHARS).collect();
        let more = if cut.len() < path.len() { "..." } else { "" };
        format!("IMA entry {} {cut}{more}", self.number)
    }
}

/// An entry as it stands in the log.
pub(super) struct RawEntry<'a> {
    /// SHA-1 of `data`, or zeros for a violation.
    pub(super) template_hash: [u8; 20],
    pub(super) data: &'a [u8],
    name: &'a [u8],
    at: usize,
}

impl<'a> RawEntry<'a> {
    /// The next entry; none if `r` ends inside of it, in which case more bytes may complete it. Sizes are judged before
    /// they are waited for.
    pub(super) fn read(r: &mut Reader<'a>) -> Result<Option<RawEntry<'a>>, Malformed> {
        let at = r.at();
        let Ok(pcr) = r.u32_le("IMA entry's PCR") else { return Ok(None) };
        if pcr != IMA_PCR {
            return Err(Malformed::new("IMA entry's PCR", at));
        }
        let Ok(template_hash) = r.array("IMA template hash") else { return Ok(None) };
        let Some(name) = sized(r, NAME_BYTES_MAX, "IMA template name")? else { return Ok(None) };
        // The first template, plain `ima`, gives its data no length: nothing after it could be trusted to be framed.
        if name == b"ima" || name.is_empty() || !name.iter().all(|b| b.is_ascii_graphic()) {
            return Err(Malformed::new("IMA template name", at));
        }
        let Some(data) = sized(r, DATA_BYTES_MAX, "IMA template data")? else { return Ok(None) };
        Ok(Some(RawEntry { template_hash, data, name, at }))
    }

    pub(super) fn violation(&self) -> bool {
        self.template_hash == [0; 20]
    }

    /// The SHA-1 that the entry states is over its data.
    pub(super) fn whole(&self) -> bool {
        self.violation() || HashAlg::Sha1.digest(&[self.data]) == self.template_hash
    }

    /// The fields that appraisal needs. The template's name, and with it the meaning of the fields, is covered by nothing:
    /// so the file's digest and name are the first two fields of every template, and only those.
    pub(super) fn parse(&self, number: u64) -> Result<ImaEntry<'a>, Malformed> {
        let bad = |what| Malformed::new(what, self.at);
        let name = std::str::from_utf8(self.name).map_err(|_| bad("IMA template name"))?;
        let named = TEMPLATES.iter().find(|(known, _)| *known == name).map(|(_, fields)| *fields);
        let format = named.unwrap_or(name);
        let mut r = Reader::new(self.data);
        let (mut digest, mut path, mut signed) = (None, None, false);
        for (n, field) in format.split('|').enumerate() {
            if n >= FIELDS_MAX {
                return Err(bad("IMA template: too many fields"));
            }
            let body = r.sized_le(DATA_BYTES_MAX, "IMA field").map_err(|_| bad("IMA field"))?;
            match (n, field) {
                (0, "d-ng") => digest = Some(digest_ng(body).ok_or(bad("IMA d-ng field"))?),
                (0, "d-ngv2") => digest = Some(digest_ngv2(body).ok_or(bad("IMA d-ngv2 field"))?),
                // A file name, ended by its zero and holding no other.
                (1, "n-ng") => path = Some(terminated(body).ok_or(bad("IMA n-ng field"))?),
                (2.., "sig" | "evmsig" | "modsig") => signed |= !body.is_empty(),
                (
                    2..,
                    "buf" | "d-modsig" | "xattrnames" | "xattrlengths" | "xattrvalues" | "iuid" | "igid" | "imode",
                ) => {}
                _ => return Err(bad("IMA template that is not known, or whose first fields are no digest and name")),
            }
        }
        r.end("bytes after the IMA fields").map_err(|_| bad("bytes after the IMA fields"))?;
        let (algorithm, digest) = digest.ok_or(bad("IMA template without a digest"))?;
        let path = path.ok_or(bad("IMA template without a name"))?;
        Ok(ImaEntry { number, algorithm, digest, path, signed, violation: self.violation() })
    }
}

/// A size and that many bytes: none if they have not all come.
fn sized<'a>(r: &mut Reader<'a>, max: usize, what: &'static str) -> Result<Option<&'a [u8]>, Malformed> {
    let at = r.at();
    let Ok(n) = r.u32_le(what) else { return Ok(None) };
    let n = usize::try_from(n).ok().filter(|n| *n <= max).ok_or(Malformed::new(what, at))?;
    Ok(r.take(n, what).ok())
}

fn terminated(body: &[u8]) -> Option<&[u8]> {
    body.strip_suffix(&[0]).filter(|name| !name.contains(&0))
}

/// `sha256:` and a zero, then the digest, which is as long as the algorithm says.
fn digest_ng(body: &[u8]) -> Option<(&str, &[u8])> {
    let end = body.iter().position(|b| *b == 0)?;
    let (head, rest) = body.split_at_checked(end)?;
    let algorithm = std::str::from_utf8(head.strip_suffix(b":")?).ok()?;
    let digest = rest.get(1..)?;
    let size = match algorithm {
        "md5" => 16,
        "sha1" => 20,
        "sha224" => 28,
        "sha256" | "sm3" | "streebog256" => 32,
        "sha384" => 48,
        "sha512" | "wp512" | "streebog512" => 64,
        _ => return None,
    };
    (digest.len() == size).then_some((algorithm, digest))
}

/// `ima:` or `verity:`, then as in d-ng. A verity digest is of another thing than the file's bytes: its own name.
fn digest_ngv2(body: &[u8]) -> Option<(&str, &[u8])> {
    if let Some(rest) = body.strip_prefix(b"ima:") {
        return digest_ng(rest);
    }
    let (algorithm, digest) = digest_ng(body.strip_prefix(b"verity:")?)?;
    let name = match algorithm {
        "sha256" => "verity:sha256",
        "sha512" => "verity:sha512",
        _ => return None,
    };
    Some((name, digest))
}
