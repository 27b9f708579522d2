//! The configuration file of one replica: TOML, unknown keys refused.

use ambit_identity::document::OidcIssuer;
use ambit_model::{Code, Refusal};
use ambit_tpm::{AkKind, EkChoice};
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

/// The standard's advice where a bundle says nothing, and the shortest that readers follow.
const REFRESH_HINT_S: u64 = 300;
const REFRESH_HINT_S_MIN: u64 = 60;
const REFRESH_HINT_S_MAX: u64 = 86_400;

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
    /// The TPM that holds the replica's wrap key and proves what it booted: `device:/dev/tpmrm0`, `tabrmd:`,
    /// `swtpm:host=127.0.0.1,port=2321`. Without it the wrap key lies in a file, and the root cannot be sealed.
    #[serde(default)]
    pub tpm: Option<TpmConfig>,
    /// Where the kernel shows the boot log.
    #[serde(default = "boot_log_default")]
    pub boot_log: PathBuf,
    /// Where the kernel shows the IMA log.
    #[serde(default = "ima_log_default")]
    pub ima_log: PathBuf,
    /// Raft's timers.
    #[serde(default)]
    pub raft: RaftTimers,
    /// The replica's own intermediates.
    #[serde(default)]
    pub authority: Authority,
    /// Authorities of the web (PEM), by which bundle endpoints of the profile https_web are verified.
    #[serde(default = "web_roots_default")]
    pub web_roots: PathBuf,
    /// What outsiders may fetch; without it nothing is served to them.
    #[serde(default)]
    pub bundle_endpoint: Option<Outside>,
}

/// The replica's TPM, named as an agent names its own. EK and AK are those of an agent's defaults.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct TpmConfig {
    /// As tpm2-tools name it.
    pub tcti: String,
    /// The EK.
    pub ek: EkChoice,
    /// The AK.
    pub ak: AkKind,
}

impl From<String> for TpmConfig {
    fn from(tcti: String) -> Self {
        Self { tcti, ek: EkChoice::default(), ak: AkKind::default() }
    }
}

/// The bundle endpoint (SPIFFE_Federation.md section 5).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Outside {
    /// Where HTTPS is served to anybody.
    pub listen: SocketAddr,
    /// How the endpoint shows that it is the trust domain's.
    pub profile: EndpointProfile,
    /// How often others should come, seconds. A rotation does not wait for them: its operator does.
    pub refresh_hint_s: u64,
    /// Who makes tokens, as OIDC documents and tokens name it; without it neither are the documents served, nor is it in
    /// the tokens. The same at all replicas of a cell.
    pub oidc_issuer: Option<OidcIssuer>,
    /// Whether the audit log's signed head and its hashes are served too: how much a cell does is seen by them.
    pub audit: bool,
}

/// Profiles of a bundle endpoint (SPIFFE_Federation.md section 5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointProfile {
    /// By a certificate of the web's authorities.
    HttpsWeb {
        /// PEM, leaf first.
        certificate: PathBuf,
        /// PEM, PKCS#8, mode 0600.
        key: PathBuf,
    },
    /// By the replica's own SVID.
    HttpsSpiffe,
}

/// As in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    listen: SocketAddr,
    profile: String,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    refresh_hint_s: Option<u64>,
    oidc_issuer: Option<String>,
    #[serde(default)]
    audit: bool,
}

impl TryFrom<Written> for Outside {
    type Error = String;
    fn try_from(w: Written) -> Result<Self, String> {
        let profile = match (w.profile.as_str(), w.certificate, w.key) {
            ("https_web", Some(certificate), Some(key)) => EndpointProfile::HttpsWeb { certificate, key },
            ("https_spiffe", None, None) => EndpointProfile::HttpsSpiffe,
            ("https_web", ..) => return Err("profile https_web needs certificate and key".into()),
            ("https_spiffe", ..) => {
                return Err("profile https_spiffe shows the replica's own SVID: no certificate, no key".into());
            }
            (other, ..) => return Err(format!("profile https_web or https_spiffe, not {other}")),
        };
        let refresh_hint_s = w.refresh_hint_s.unwrap_or(REFRESH_HINT_S);
        if !(REFRESH_HINT_S_MIN..=REFRESH_HINT_S_MAX).contains(&refresh_hint_s) {
            return Err(format!("refresh_hint_s of {REFRESH_HINT_S_MIN}-{REFRESH_HINT_S_MAX}, not {refresh_hint_s}"));
        }
        let oidc_issuer = w.oidc_issuer.map(|url| url.parse().map_err(|e| format!("oidc_issuer: {e}")));
        Ok(Self { listen: w.listen, profile, refresh_hint_s, oidc_issuer: oidc_issuer.transpose()?, audit: w.audit })
    }
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

fn boot_log_default() -> PathBuf {
    "/sys/kernel/security/tpm0/binary_bios_measurements".into()
}
fn ima_log_default() -> PathBuf {
    "/sys/kernel/security/ima/binary_runtime_measurements".into()
}
/// Where Debian keeps them.
fn web_roots_default() -> PathBuf {
    "/etc/ssl/certs/ca-certificates.crt".into()
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
                "data_dir, listen, metrics_listen, tpm, boot_log, ima_log, web_roots, [raft] election_timeout_ms, heartbeat_ms, [authority] lifetime_s, lab and \
                 [bundle_endpoint] listen, profile, certificate, key, refresh_hint_s, oidc_issuer, audit",
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

    #[test]
    fn a_bundle_endpoint_is_wholly_said_or_not_at_all() {
        let good = "data_dir='d'\nlisten='127.0.0.1:1'\nmetrics_listen='127.0.0.1:2'\n[bundle_endpoint]\n";
        assert!(
            Config::parse("data_dir='d'\nlisten='127.0.0.1:1'\nmetrics_listen='127.0.0.1:2'\n")
                .unwrap()
                .bundle_endpoint
                .is_none()
        );
        for (text, taken) in [
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'", true),
            ("listen='127.0.0.1:3'\nprofile='https_web'\ncertificate='c'\nkey='k'\nrefresh_hint_s=60", true),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\noidc_issuer='https://id.example.org/west'", true),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\naudit=true", true),
            ("profile='https_spiffe'", false),
            ("listen='127.0.0.1:3'", false),
            ("listen='127.0.0.1:3'\nprofile='http'", false),
            ("listen='127.0.0.1:3'\nprofile='https_web'", false),
            ("listen='127.0.0.1:3'\nprofile='https_web'\ncertificate='c'", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\nkey='k'", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\nrefresh_hint_s=59", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\nrefresh_hint_s=86401", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\noidc_issuer='http://id.example.org'", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\noidc_issuer='https://id.example.org/'", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\noidc_issuer='https://u@id.example.org'", false),
            ("listen='127.0.0.1:3'\nprofile='https_spiffe'\nclient_auth=true", false),
        ] {
            let read = Config::parse(&format!("{good}{text}\n"));
            assert_eq!(read.is_ok(), taken, "{text}: {:?}", read.err().map(|r| r.found));
        }
    }
}
