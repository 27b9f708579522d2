//! The two drills, and what the processes weigh.

use super::Demo;
use super::enforce::expect;
use crate::lab::LabError;
use ambit_model::{Refusal, refusal::Code};

impl Demo<'_> {
    pub(super) fn drill(&mut self, name: &str) -> Result<(), LabError> {
        self.say.chapter(&format!("Drill: {name}"));
        let ran = self.lab.drill(name, crate::library::drill(name)?)?;
        self.say.quote(&ran.told);
        expect(ran.passed, "every objective of the drill met", &ran.told)?;
        self.say.good(&format!("report verified offline: {}", ran.verdict));
        self.keep(name, &ran.report)
    }

    fn keep(&mut self, name: &str, report: &std::path::Path) -> Result<(), LabError> {
        let bytes = std::fs::read(report).map_err(|source| LabError::Io { path: report.to_owned(), source })?;
        let sealed: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        // The report proper is a text inside the sealed file, so that its bytes are what was signed.
        let inner: serde_json::Value = match sealed["report"].as_str() {
            Some(text) => serde_json::from_str(text).unwrap_or_default(),
            None => sealed["report"].clone(),
        };
        let figures = &inner["figures"];
        let number = |v: &serde_json::Value| v.as_f64();
        let missing = || Refusal::new(Code::Internal, "figures in the report", figures.to_string());
        let lost = number(&figures["ledger"]["lost"]).ok_or_else(missing)?;
        let (probe, target) = if name == "leader-loss" { ("writer", 2.0) } else { ("caller", 5.0) };
        let rto = number(&figures[probe]["rto_ms"]).unwrap_or(f64::INFINITY);
        self.figures.put(format!("{name}: RTO"), rto / 1000.0, "s", Some(target));
        self.figures.put(format!("{name}: acknowledged writes lost"), lost, "", Some(0.0));
        let doubled = number(&figures["ledger"]["duplicated"]).unwrap_or(f64::INFINITY);
        self.figures.put(format!("{name}: writes duplicated"), doubled, "", Some(0.0));
        if name == "cluster-loss" {
            self.figures.put(
                "cluster-loss: failed calls",
                number(&figures[probe]["failed"]).ok_or_else(missing)?,
                "",
                None,
            );
            if let Some(ms) = number(&figures[probe]["failback_ms"]) {
                self.figures.put("cluster-loss: fail-back after west's return", ms / 1000.0, "s", None);
            }
        }
        expect(lost == 0.0, "no acknowledged write lost", &lost.to_string())
    }

    /// Resident memory of this build; the targets are for a release build.
    pub(super) fn weigh(&mut self) -> Result<(), LabError> {
        for (process, name) in
            [("west-r1", "resident memory of a replica"), ("west-n1-agent", "resident memory of an agent")]
        {
            let state = self.lab.state()?;
            let pid = state.process(process).map(|p| p.id.pid).unwrap_or_default();
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let kib =
                status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<f64>().ok());
            self.figures.put(
                format!("{name}, debug build"),
                kib.ok_or_else(|| Refusal::new(Code::Internal, format!("the process {process}"), "none"))? / 1024.0,
                "MiB",
                None,
            );
        }
        Ok(())
    }
}
