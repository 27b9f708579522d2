//! The caller probe: a process of the lab that calls from inside a pod and prints one JSON line per call.

use super::figures::Sample;
use super::lab::Lab;
use super::spec::Caller;
use super::watch::{Clock, Samples};
use ambit_model::{Code, Refusal};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Child;
use tokio::task::JoinHandle;

/// A line is a hundred bytes; the first line of a page may be longer and is cut by the lab.
const LINE_BYTES_MAX: u64 = 4096;
/// Who answers is a name, not a page.
const BY_BYTES_MAX: usize = 64;

/// One line of the probe. `t_ms` is when the outcome was known, in milliseconds since the Unix epoch.
#[derive(Deserialize)]
struct Line {
    t_ms: u64,
    ok: bool,
    by: Option<String>,
}

/// One line of the probe as a sample; none for anything else that it prints.
pub fn parse(line: &str, begun_ms: u64) -> Option<Sample> {
    let line: Line = serde_json::from_str(line).ok()?;
    let by = line.by.unwrap_or_default();
    // Spaces and control characters would not survive the sample's text.
    let by = by.chars().filter(|c| !c.is_control() && !c.is_whitespace()).take(BY_BYTES_MAX).collect();
    Some(Sample { t_ms: line.t_ms.checked_sub(begun_ms)?, ok: line.ok, by })
}

/// A running probe. It dies with this value.
pub struct Running {
    child: Child,
    reader: JoinHandle<()>,
}

/// Starts the probe and feeds its samples.
pub fn start(lab: &Lab, caller: &Caller, clock: Clock, samples: Samples) -> Result<Running, Refusal> {
    let mut child = lab.probe(caller)?;
    let stdout = child.stdout.take().ok_or_else(|| Refusal::new(Code::Internal, "the probe's output", "none"))?;
    let reader = tokio::spawn(read(stdout, clock.begun_ms, samples));
    Ok(Running { child, reader })
}

async fn read(stdout: impl AsyncRead + Unpin, begun_ms: u64, samples: Samples) {
    use tokio::io::AsyncReadExt;
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if let Some(sample) = std::str::from_utf8(&line).ok().and_then(|l| parse(l, begun_ms)) {
                    samples.push(sample);
                }
            }
        }
    }
}

impl Running {
    /// Why the probe ended by itself, if it did.
    pub fn ended(&mut self) -> Option<String> {
        self.child.try_wait().ok().flatten().map(|status| format!("the caller probe ended: {status}"))
    }

    /// Ends the probe and waits until it is gone.
    pub async fn stop(mut self) {
        // An error means that it is gone already.
        let _ = self.child.kill().await;
        let _ = self.reader.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_probe_become_samples() {
        for (line, sample) in [
            (r#"{"t_ms":1500,"ok":true,"by":"west-n1-api"}"#, Some("500 ok west-n1-api")),
            (r#"{"t_ms":1500,"ok":false,"by":null}"#, Some("500 fail")),
            (r#"{"t_ms":1500,"ok":false}"#, Some("500 fail")),
            (r#"{"t_ms":1500,"ok":true,"by":"two words\r"}"#, Some("500 ok twowords")),
            (r#"{"t_ms":900,"ok":true}"#, None),
            (r#"{"t_ms":-1,"ok":true}"#, None),
            ("probe started", None),
            ("", None),
        ] {
            assert_eq!(parse(line, 1000).map(|s| s.to_string()).as_deref(), sample, "{line}");
        }
    }

    #[tokio::test]
    async fn a_line_without_end_does_not_grow_memory() {
        let mut input = vec![b'x'; 3 * LINE_BYTES_MAX as usize];
        input.extend_from_slice(b"\n{\"t_ms\":7,\"ok\":true}\n");
        let samples = Samples::default();
        read(input.as_slice(), 0, samples.clone()).await;
        assert_eq!(samples.all().len(), 1);
    }
}
