//! EK allow-lists as text: one EK a line, its fingerprint and a comment. What operators keep in spreadsheets.
//!
//! The fingerprint is SHA-256 over the EK's SubjectPublicKeyInfo (DER), which is also the node's id. On the machine:
//!
//! ```text
//! tpm2_createek -c ek.ctx -G rsa -u ek.pub        # -G ecc for an EC EK
//! tpm2_readpublic -c ek.ctx -f der -o ek.der
//! openssl dgst -sha256 ek.der                     # or: sha256sum ek.der
//! ```
//!
//! or from a certificate: `openssl x509 -in ek.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256`.

use ambit_model::{Code, NodeId, Refusal};

/// Most EKs taken from one list.
pub const LIST_MAX: usize = 100_000;

/// Bad lines that a refusal names.
const BAD_SHOWN: usize = 20;

/// Reads a list. A line is a fingerprint (64 hexadecimal digits in any case, with or without colons between bytes, with
/// or without `sha256:` or what `openssl dgst` prints before it), then optionally a comma or white space and a comment.
/// Empty lines, lines that begin with `#`, and one header line (`node_id,...`, `ek_sha256,...`, `fingerprint,...`) are
/// passed over. Bad lines are named; then nothing is taken.
pub fn parse(text: &str) -> Result<Vec<(NodeId, String)>, Refusal> {
    let mut out = Vec::new();
    let mut bad = Vec::new();
    let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
    for (n, line) in lines.map(|(n, line)| (n.saturating_add(1), line.trim())) {
        if line.is_empty() || line.starts_with('#') || (out.is_empty() && bad.is_empty() && is_header(line)) {
            continue;
        }
        match row(line) {
            Some(row) if out.len() <= LIST_MAX => out.push(row),
            None if bad.len() <= BAD_SHOWN => bad.push(n.to_string()),
            _ => {}
        }
    }
    if !bad.is_empty() {
        let more = if bad.len() > BAD_SHOWN { ", ..." } else { "" };
        bad.truncate(BAD_SHOWN);
        let found = format!("something else in line {}{more}", bad.join(", "));
        return Err(Refusal::new(Code::BadRequest, "a SHA-256 fingerprint at the start of each line", found));
    }
    if out.len() > LIST_MAX {
        return Err(Refusal::new(Code::BadRequest, format!("at most {LIST_MAX} EKs"), "more"));
    }
    Ok(out)
}

/// Writes a list that [`parse`] reads: a header, then fingerprint and comment.
pub fn write<'a>(rows: impl IntoIterator<Item = (NodeId, &'a str)>) -> String {
    let mut out = String::from("ek_sha256,comment\n");
    for (node, comment) in rows {
        let comment: String = comment.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let plain = !comment.contains([',', '"']);
        let comment = if plain { comment } else { format!("\"{}\"", comment.replace('"', "\"\"")) };
        out.push_str(&format!("{},{comment}\n", hex::encode(node.0)));
    }
    out
}

fn is_header(line: &str) -> bool {
    let first = line.split([',', ' ', '\t']).next().unwrap_or_default().trim_matches('"').to_ascii_lowercase();
    matches!(first.as_str(), "node_id" | "node" | "ek_sha256" | "ek" | "sha256" | "fingerprint")
}

fn row(line: &str) -> Option<(NodeId, String)> {
    // What `openssl dgst` prints: SHA2-256(ek.der)= 12ab..., SHA256(stdin)= 12ab...
    let line = match line.split_once(")= ") {
        Some((before, after)) if before.starts_with("SHA") => after,
        _ => line,
    };
    let line = line.strip_prefix('"').unwrap_or(line);
    let line =
        line.get(..7).filter(|p| p.eq_ignore_ascii_case("sha256:")).and_then(|p| line.get(p.len()..)).unwrap_or(line);
    let end = line.find(|c: char| !c.is_ascii_hexdigit() && c != ':').unwrap_or(line.len());
    let (fingerprint, rest) = line.split_at_checked(end)?;
    let digits = match fingerprint.len() {
        64 => fingerprint.to_owned(),
        // 32 bytes and 31 colons, each in its place.
        95 if fingerprint.bytes().enumerate().all(|(n, b)| (b == b':') == (n % 3 == 2)) => fingerprint.replace(':', ""),
        _ => return None,
    };
    let node = NodeId(<[u8; 32]>::try_from(hex::decode(digits).ok()?).ok()?);
    let rest = rest.strip_prefix('"').unwrap_or(rest);
    let comment = match rest.chars().next() {
        None => "",
        Some(',' | ' ' | '\t' | ';') => rest.trim_start_matches([',', ' ', '\t', ';']),
        Some(_) => return None,
    };
    let quoted = comment.strip_prefix('"').and_then(|c| c.strip_suffix('"'));
    Some((node, quoted.map_or_else(|| comment.to_owned(), |c| c.replace("\"\"", "\""))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b";

    #[test]
    fn lists_of_many_origins_are_read() {
        let colons =
            A.to_uppercase().as_bytes().chunks(2).map(|c| String::from_utf8_lossy(c)).collect::<Vec<_>>().join(":");
        let rows = [
            (A.to_owned(), ""),
            (format!("{A},rack 4, left"), "rack 4, left"),
            (format!("sha256:{A}"), ""),
            (format!("SHA256:{A}  spare"), "spare"),
            (format!("{colons},by colons"), "by colons"),
            (format!("SHA2-256(ek.der)= {A}"), ""),
            (format!("SHA256(stdin)= {A}"), ""),
            (format!("{A}  ek.der"), "ek.der"),
            (format!("\"{A}\",\"the \"\"old\"\" one\""), "the \"old\" one"),
        ];
        for (line, comment) in rows {
            let read = parse(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(read.len(), 1, "{line}");
            assert_eq!((hex::encode(read[0].0.0), read[0].1.as_str()), (A.to_owned(), comment), "{line}");
        }
        let file = format!("\u{feff}ek_sha256,comment\r\n\r\n# the first rack\r\n{A},one\r\n{A},two\r\n");
        assert_eq!(parse(&file).unwrap().len(), 2);
        assert_eq!(parse("").unwrap().len(), 0);
    }

    #[test]
    fn bad_lines_are_named() {
        let short = &A[1..];
        let wrong_colons = format!("6:{}", &A[1..]);
        let file = format!("node_id\n{A}\n{short}\n{A}ff\n{A}\n{wrong_colons}\nnode_id\n{A}x\nzz\n");
        let refusal = parse(&file).unwrap_err();
        assert_eq!(
            (refusal.code, refusal.found.as_str()),
            (Code::BadRequest, "something else in line 3, 4, 6, 7, 8, 9")
        );
        assert!(parse(&"x\n".repeat(1000)).unwrap_err().found.len() < 200);
    }

    #[test]
    fn what_is_written_is_read() {
        let rows = [
            (NodeId([1; 32]), "plain"),
            (NodeId([2; 32]), "a, b"),
            (NodeId([3; 32]), "\"q\", new\nline"),
            (NodeId([4; 32]), ""),
        ];
        let read = parse(&write(rows)).unwrap();
        let read: Vec<_> = read.iter().map(|(n, c)| (n.0[0], c.as_str())).collect();
        assert_eq!(read, [(1, "plain"), (2, "a, b"), (3, "\"q\", new line"), (4, "")]);
    }
}
