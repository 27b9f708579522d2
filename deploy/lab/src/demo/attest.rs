//! A file altered on a running node: trust lost within an interval, calls refused in the other cluster, and trust won
//! back by a clean boot. What IMA would measure is measured by the lab's measurer (printed as `lab`).

use super::enforce::expect;
use super::enrol::wait;
use super::{Demo, PORT};
use crate::cell::{APP, ATTEST_EVERY_S};
use crate::chaos::calls::{Calls, ebb, epoch_ms};
use crate::lab::{Lab, LabError};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The node whose file is altered; its workload calls into the other cluster.
const NODE: &str = "east-n1";
const FILE: &str = "app";
const ALTERED: &[u8] = b"#!/bin/sh\necho another program\n";
/// Several intervals on two loaded cores.
const NOTICE_MAX: Duration = Duration::from_secs(30);
const ENROL_MAX: Duration = Duration::from_secs(40);
const PROCESSES: [&str; 4] = ["agent", "measurer", "tpm-gate", "swtpm"];

impl Demo<'_> {
    pub(super) fn alter_a_file(&mut self) -> Result<(), LabError> {
        self.say.chapter("A file altered on a running node");
        let id = self.lab.node_id(NODE)?;
        self.lab.measure(NODE, FILE, APP)?;
        self.settle(&id)?;
        self.say
            .step(&format!("{NODE} runs {FILE}, as the policy lists it: trusted after its next quote (lab measurer)"));
        let db = SocketAddr::from((self.pod("west-n1", "db")?.address, PORT));
        let calls = Calls::start(&self.lab, "east-n1-web", db, Duration::from_millis(5))?;
        calls.flow(0.0, NOTICE_MAX, "calls that succeed before the change")?;
        let begun = epoch_ms();
        self.lab.measure(NODE, FILE, ALTERED)?;
        let refused = || ebb(&calls.between(begun, f64::INFINITY));
        wait(NOTICE_MAX, "calls refused after the file was altered", || Ok(refused().is_some()))?;
        let at = refused().unwrap_or(f64::INFINITY);
        let stray = calls.between(begun, at).iter().filter(|c| !c.ok).count();
        drop(calls);
        self.figures.put("file altered -> calls refused (lab)", at - begun, "ms", Some(1000.0 * ATTEST_EVERY_S as f64));
        self.figures.put("stray failed calls before that", stray as f64, "", None);
        let explained = self.lab.ambit("east", &["node", "explain", &id])?;
        let names = explained.contains("ima_file_not_allowed") && explained.contains(&format!("measured/{FILE}"));
        expect(names, "an explanation that names the file", &explained)?;
        self.say.good(&format!(
            "untrusted, and its calls into west refused, {:.1} s later; the operator sees:",
            (at - begun) / 1000.0
        ));
        let from = explained.find("\n\n").unwrap_or_default();
        self.say.quote(explained.get(from..).unwrap_or(&explained));
        self.repair(&id)
    }

    /// Nothing unmeasures a file but a boot; nothing brings a distrusted node back but an operator's word.
    fn repair(&mut self, id: &str) -> Result<(), LabError> {
        self.lab.reboot(NODE)?;
        let log = || std::fs::read_to_string(self.lab.agent_log(NODE)).unwrap_or_default();
        self.say.step(&format!("{NODE} was booted again, without the altered file; the cell still refuses it"));
        let (web, db) = (self.pod(NODE, "web")?, self.pod("west-n1", "db")?.address);
        let (code, _) = self.call(&web, &format!("http://{db}:{PORT}/"))?;
        expect(code != 0, "no call before the release", &log())?;
        let begun = Instant::now();
        self.lab.ambit("east", &["node", "release", id])?;
        self.lab.wait_enrolled(NODE, ENROL_MAX)?;
        wait(NOTICE_MAX, "calls after the release", || Ok(self.call(&web, &format!("http://{db}:{PORT}/"))?.0 == 0))?;
        let seconds = begun.elapsed().as_secs_f64();
        self.figures.put("release -> calls again, by a new attestation", seconds, "s", None);
        self.say.good(&format!("released: enrolled anew, and its calls pass again {seconds:.1} s later"));
        self.say.quote(&self.lab.ambit("east", &["node", "attest", id])?);
        Ok(())
    }

    /// Waits for a verdict that is younger than now.
    fn settle(&self, id: &str) -> Result<(), LabError> {
        let verdicts = || -> Result<u64, LabError> {
            let shown = self.lab.ambit("east", &["node", "attest", id, "-o", "json"])?;
            let shown: serde_json::Value = serde_json::from_str(&shown).unwrap_or_default();
            let trusted = shown["state"] == "trusted";
            expect(trusted, "a trusted node", &shown.to_string())?;
            Ok(shown["verdicts"].as_u64().unwrap_or_default())
        };
        let before = verdicts()?;
        // Two, since one may have been under way when the file was dropped.
        wait(NOTICE_MAX, "two more verdicts", || Ok(verdicts()? >= before + 2)).map(drop)
    }
}

impl Lab {
    /// A machine goes down and boots again from clean files: TPM reset, golden logs, nothing measured since.
    pub fn reboot(&self, node: &str) -> Result<(), LabError> {
        for part in PROCESSES {
            let name = format!("{node}-{part}");
            if let Some(process) = self.state()?.process(&name) {
                let id = process.id;
                id.kill();
                wait(Duration::from_secs(5), &format!("{name} ended"), || Ok(!id.alive()))?;
            }
        }
        let folder = self.measured_folder(node);
        let io = |source| LabError::Io { path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(io)?.flatten() {
            std::fs::remove_file(entry.path()).map_err(io)?;
        }
        let (boot_log, ima_log) = (self.boot_log(node), self.ima_log(node));
        let failed = |source| LabError::Tpm { machine: node.to_owned(), source };
        crate::tpm::write_golden_logs(&boot_log, &ima_log).map_err(failed)?;
        for part in PROCESSES.iter().rev() {
            self.restart(&format!("{node}-{part}"))?;
        }
        Ok(())
    }
}
