//! Cells, peers, nodes: who is who, proved.

use super::Demo;
use super::figures::Figures;
use super::say::Say;
use crate::cell::Cell;
use crate::lab::{Lab, LabError};
use ambit_model::{Refusal, refusal::Code};
use std::time::{Duration, Instant};

/// Enrolment on two loaded cores; the figure itself is printed.
const ENROL_MAX: Duration = Duration::from_secs(30);
/// The first pull follows an approval within a heartbeat.
const PEER_MAX: Duration = Duration::from_secs(15);
/// Same length, so that only the event's data changes.
const HONEST: &[u8] = b"ima_policy=tcb";
const ALTERED: &[u8] = b"ima_policy=off";

pub(super) fn form(lab: &Lab, say: &Say, site: &str, figures: &mut Figures) -> Result<Cell, LabError> {
    let begun = Instant::now();
    let cell = lab.form_cell(site)?;
    lab.register_cluster(site)?;
    figures.put(format!("cell {site} formed"), begun.elapsed().as_secs_f64(), "s", None);
    say.good(&format!("cell {site}: {} replicas, root {}", cell.addresses.len(), cell.fingerprint));
    Ok(cell)
}

impl Demo<'_> {
    pub(crate) fn peer(&mut self) -> Result<(), LabError> {
        self.say.chapter("Peers: a one-time token, proof on both sides, approval by fingerprint");
        let (lab, west, east) = (&self.lab, &self.west, &self.east);
        let begun = Instant::now();
        let made =
            lab.ambit("west", &["cluster", "token", "--trust-domain", "east", "--fingerprint", &east.fingerprint])?;
        let token = made.split_whitespace().last().unwrap_or_default().to_owned();
        let mut args = vec!["peer".to_owned(), "register".into()];
        for address in &west.addresses {
            args.extend(["--address".to_owned(), address.to_string()]);
        }
        args.extend(
            ["--trust-domain", "west", "--fingerprint", &west.fingerprint, "--token", &token].map(String::from),
        );
        lab.ambit("east", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
        lab.ambit("east", &["peer", "approve", "west", "--fingerprint", &west.fingerprint])?;
        lab.ambit("west", &["peer", "approve", "east", "--fingerprint", &east.fingerprint])?;
        for site in ["west", "east"] {
            wait(PEER_MAX, "the peer active", || Ok(lab.ambit(site, &["peer", "list"])?.contains("active")))?;
        }
        self.figures.put("peers registered, both ways", begun.elapsed().as_secs_f64(), "s", None);
        self.say.quote(&lab.ambit("east", &["cluster", "list"])?);
        Ok(())
    }

    pub(crate) fn enrol_nodes(&mut self) -> Result<(), LabError> {
        self.say.chapter("Nodes: certificates only after a TPM quote that fits a real boot log");
        for node in ["west-n1", "west-n2", "east-n1", "east-n2"] {
            self.lab.start_agent(node)?;
            self.lab.wait_enrolled(node, ENROL_MAX)?;
            let (took, tpm) = self.enrolment(node)?;
            self.say.good(&format!("{node} enrolled by quote in {took} ms, of which its TPM took {tpm} ms"));
            self.figures.put(format!("enrol {node}, without TPM time"), took - tpm, "ms", Some(250.0));
        }
        self.say.quote(&self.lab.ambit("west", &["node", "list"])?);
        Ok(())
    }

    /// What the agent says that its enrolment took, and the TPM's part of it, in ms.
    fn enrolment(&self, node: &str) -> Result<(f64, f64), LabError> {
        let log = std::fs::read_to_string(self.lab.agent_log(node)).unwrap_or_default();
        let line = log.lines().rev().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
        let mut line = line.filter(|v| v["message"] == "enrolled");
        let number = |v: &serde_json::Value| v.as_f64().or_else(|| v.as_str().and_then(|s| s.parse().ok()));
        let found = line.next().and_then(|v| Some((number(&v["took_ms"])?, number(&v["tpm_ms"])?)));
        found.ok_or_else(|| Refusal::new(Code::Internal, "the agent's line `enrolled`", log).into())
    }

    pub(super) fn refuse_altered_boot(&mut self) -> Result<(), LabError> {
        self.say.chapter("A node whose boot log was altered");
        let node = "west-n3";
        let path = self.lab.boot_log(node);
        let mut log = std::fs::read(&path).map_err(|source| LabError::Io { path: path.clone(), source })?;
        let places: Vec<usize> =
            (0..log.len().saturating_sub(HONEST.len())).filter(|i| log[*i..].starts_with(HONEST)).collect();
        for at in &places {
            log[*at..*at + ALTERED.len()].copy_from_slice(ALTERED);
        }
        crate::lab::write_file(&path, &log)?;
        self.say.step(&format!("in {node}'s boot log, the kernel's command line now says ima_policy=off"));
        self.lab.start_agent(node)?;
        // Its agent ends with the refusal.
        let agent = format!("{node}-agent");
        let alive = || Ok::<_, LabError>(self.lab.state()?.process(&agent).is_some_and(|p| p.id.alive()));
        wait(ENROL_MAX, "the refused agent ended", || Ok(!alive()?))?;
        let told = std::fs::read_to_string(self.lab.agent_log(node)).unwrap_or_default();
        let Some(refused) = told.lines().rev().find(|l| l.contains("boot_log_event_altered")) else {
            return Err(Refusal::new(Code::Internal, format!("{node} refused as boot_log_event_altered"), told).into());
        };
        self.say.step("the node is told:");
        self.say.quote(refused);
        self.say.step("the operator sees, by `ambit node explain`:");
        let explained = self.lab.ambit("west", &["node", "explain"])?;
        for word in ["boot_log_event_altered", "expected", "found"] {
            if !explained.contains(word) {
                return Err(Refusal::new(Code::Internal, format!("an explanation with `{word}`"), explained).into());
            }
        }
        self.say.quote(&explained);
        self.say.good("refused: no certificate, and the nonce is spent");
        Ok(())
    }
}

/// Polls until `holds`, or says what did not come.
pub(crate) fn wait(
    limit: Duration,
    what: &str,
    mut holds: impl FnMut() -> Result<bool, LabError>,
) -> Result<Duration, LabError> {
    let begun = Instant::now();
    while !holds()? {
        if begun.elapsed() > limit {
            return Err(
                Refusal::new(Code::Unavailable, format!("{what} within {} s", limit.as_secs()), "nothing yet").into()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(begun.elapsed())
}
