//! The configuration file of one replica: TOML, unknown keys refused.

use ambit_model::{Code, Refusal};
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Election timeouts below this would fire on a slow disk (reference/raft.md: contended fsync p99 26 ms).
const ELECTION_MS_MIN: u64 = 100;
const ELECTION_MS_MAX: u64 = 10_000;
/// An intermediate of less would not outlive a day without an operator (design.md section 4: 24 h-7 d).
const LIFETIME_S_MIN: u64 = 24 * 3600;
const LIFETIME_S_MAX: u64 = 7 * 24 * 3600;
const LAB_LIFETIME_S_MIN: u64 = 10;

/// A replica's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Keys, log and tables; mode 0700.
    pub data_dir: PathBuf,
    /// Where gRPC is served; also the address that others are told.
    pub listen: SocketAddr,
    /// Where `/metrics`, `/healthz` and `/readyz` are served over HTTP.
    pub metrics_listen: SocketAddr,
    /// Raft's timers.
    #[serde(default)]
    pub raft: RaftTimers,
    /// The replica's own intermediates.
    #[serde(default)]
    pub authority: Authority,
}

/// What a replica's intermediates are like.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Authority {
    /// How long each is valid, 24 h to 7 d; it is renewed at half of that. Leaves end with it.
    #[serde(default = "lifetime_default")]
    pub lifetime_s: u64,
    /// A lab, where months are rehearsed in minutes: any lifetime from 10 s.
    #[serde(default)]
    pub lab: bool,
}

fn lifetime_default() -> u64 {
    LIFETIME_S_MAX
}

impl Default for Authority {
    fn default() -> Self {
        Self { lifetime_s: lifetime_default(), lab: false }
    }
}

impl Authority {
    fn check(self) -> Result<(), Refusal> {
        let least = if self.lab { LAB_LIFETIME_S_MIN } else { LIFETIME_S_MIN };
        if (least..=LIFETIME_S_MAX).contains(&self.lifetime_s) {
            return Ok(());
        }
        let expected = format!("authority.lifetime_s of {least}-{LIFETIME_S_MAX}");
        Err(Refusal::new(Code::ConfigInvalid, expected, self.lifetime_s.to_string()))
    }
}

/// Raft's timers.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RaftTimers {
    /// A follower campaigns after one to two of these without a leader.
    #[serde(default = "election_default")]
    pub election_timeout_ms: u64,
    /// How often a leader speaks when idle; at most a third of the election timeout.
    #[serde(default = "heartbeat_default")]
    pub heartbeat_ms: u64,
}

fn election_default() -> u64 {
    300
}
fn heartbeat_default() -> u64 {
    50
}

impl Default for RaftTimers {
    fn default() -> Self {
        Self { election_timeout_ms: election_default(), heartbeat_ms: heartbeat_default() }
    }
}

impl RaftTimers {
    /// As a duration.
    pub fn election_timeout(&self) -> Duration {
        Duration::from_millis(self.election_timeout_ms)
    }
    /// As a duration.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }
}

impl Config {
    /// Reads and checks a file. Errors: `config_unknown_key`, `config_invalid`.
    pub fn load(path: &Path) -> Result<Config, Refusal> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Refusal::new(Code::ConfigInvalid, format!("a readable file {}", path.display()), e.to_string())
        })?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Config, Refusal> {
        let config: Config = toml::from_str(text).map_err(|e| {
            let unknown = e.message().contains("unknown field");
            let code = if unknown { Code::ConfigUnknownKey } else { Code::ConfigInvalid };
            Refusal::new(
                code,
                "data_dir, listen, metrics_listen, [raft] election_timeout_ms, heartbeat_ms and [authority] lifetime_s, lab",
                e.to_string(),
            )
        })?;
        let t = config.raft;
        let election = (ELECTION_MS_MIN..=ELECTION_MS_MAX).contains(&t.election_timeout_ms);
        if !election || t.heartbeat_ms == 0 || t.heartbeat_ms * 3 > t.election_timeout_ms {
            let expected =
                format!("election_timeout_ms {ELECTION_MS_MIN}-{ELECTION_MS_MAX} and heartbeat_ms at most a third");
            return Err(Refusal::new(
                Code::ConfigInvalid,
                expected,
                format!("{} and {}", t.election_timeout_ms, t.heartbeat_ms),
            ));
        }
        config.authority.check()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_and_wrong_timers_are_refused_by_name() {
        let good = "data_dir='d'\nlisten='127.0.0.1:1'\nmetrics_listen='127.0.0.1:2'\n";
        assert!(Config::parse(good).is_ok());
        let unknown = Config::parse(&format!("{good}lisen='x'\n")).unwrap_err();
        assert_eq!(unknown.code, Code::ConfigUnknownKey);
        assert!(unknown.found.contains("lisen"), "{unknown}");
        let timers = format!("{good}[raft]\nelection_timeout_ms=300\nheartbeat_ms=200\n");
        assert_eq!(Config::parse(&timers).unwrap_err().code, Code::ConfigInvalid);
        for (authority, fits) in [
            ("lifetime_s=604800", true),
            ("lifetime_s=86400", true),
            ("lifetime_s=86399", false),
            ("lifetime_s=604801", false),
            ("lab=true\nlifetime_s=10", true),
            ("lab=true\nlifetime_s=9", false),
        ] {
            let parsed = Config::parse(&format!("{good}[authority]\n{authority}\n"));
            assert_eq!(
                parsed.map(drop).map_err(|r| r.code).err(),
                (!fits).then_some(Code::ConfigInvalid),
                "{authority}"
            );
        }
        assert_eq!(Config::parse("data_dir='d'").unwrap_err().code, Code::ConfigInvalid);
    }
}
