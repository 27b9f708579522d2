//! The agent's configuration file: read once, refused whole if anything in it is unknown or wrong.

use crate::staleness::{FailMode, StaleAfter, Staleness};
use ambit_model::{ClusterId, Code, Refusal, SpiffeId, TrustDomain};
use ambit_tpm::{AkKind, EkChoice};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A configuration file is a page of text; more is a mistake.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// A cell has at most five replicas; room for a second cell's addresses.
const SERVERS_MAX: usize = 16;
/// A node has a proxy or two.
const BROKERS_MAX: usize = 16;

/// More than any node opens.
const CALLER_CONNECTS_MAX: u32 = 1_000_000;
/// A connection that is carried and quiet must not hold up the end of an agent for ever.
const DRAIN_S_MAX: u64 = 3600;

/// Every key, so that an unknown one can be named.
const KEYS: &[&str] = &[
    "cluster",
    "trust_domain",
    "fingerprint",
    "servers",
    "node_address",
    "data_dir",
    "tcti",
    "tpm_ek",
    "tpm_ak",
    "node_key",
    "boot_log",
    "ima_log",
    "join_token_file",
    "cgroup_root",
    "pin_dir",
    "pods_dir",
    "workload_socket",
    "broker_socket",
    "brokers",
    "metrics_listen",
    "hbone_listen",
    "drain_max_s",
    "caller_connects_per_s_max",
    "fail_mode",
    "stale_after_s",
];

/// SHA-256 of the trust domain's root certificate, pinned out of band: there is no trust on first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Fingerprint(pub [u8; 32]);

impl TryFrom<String> for Fingerprint {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        let mut out = [0u8; 32];
        hex::decode_to_slice(&s, &mut out)
            .map_err(|_| Refusal::new(Code::ConfigInvalid, "a fingerprint of 64 hexadecimal digits", s))?;
        Ok(Self(out))
    }
}

/// The EK to attest with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TpmEk(pub EkChoice);

impl TryFrom<String> for TpmEk {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        let expected = "'tpm_ek' as auto, rsa2048, p256, p384 or rsa3072";
        EkChoice::from_text(&s).map(Self).ok_or_else(|| Refusal::new(Code::ConfigInvalid, expected, s))
    }
}

/// The AK to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TpmAk(pub AkKind);

impl TryFrom<String> for TpmAk {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        let expected = "'tpm_ak' as p256, p384, rsa2048-ssa or rsa2048-pss";
        AkKind::from_text(&s).map(Self).ok_or_else(|| Refusal::new(Code::ConfigInvalid, expected, s))
    }
}

/// Where the private half of the node's own SVID is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum NodeKeyHome {
    /// In the agent's memory.
    #[default]
    Memory,
    /// In the TPM, which certifies it: nobody takes it away, and each connection to the cell costs a signature there.
    Tpm,
}

impl TryFrom<String> for NodeKeyHome {
    type Error = Refusal;
    fn try_from(s: String) -> Result<Self, Refusal> {
        match s.as_str() {
            "memory" => Ok(Self::Memory),
            "tpm" => Ok(Self::Tpm),
            _ => Err(Refusal::new(Code::ConfigInvalid, "'node_key' as memory or tpm", s)),
        }
    }
}

/// What `ambit-agent run --config FILE` needs to know.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// The cluster that the node belongs to.
    pub cluster: ClusterId,
    /// The cell's trust domain.
    pub trust_domain: TrustDomain,
    /// The cell's root.
    pub fingerprint: Fingerprint,
    /// The cell's replicas; any of them will do.
    pub servers: Vec<SocketAddr>,
    /// Where other nodes reach this one, and where its tunnels come from; what it registers on its stream.
    pub node_address: Ipv4Addr,
    /// The agent's own folder (the AK's blobs live there; no SVID key does).
    pub data_dir: PathBuf,
    /// How to reach the TPM (TCG TCTI string).
    pub tcti: String,
    /// Which EK to attest with: `auto` (the default), `rsa2048`, `p256`, `p384` or `rsa3072`. It decides the node's id.
    #[serde(default)]
    pub tpm_ek: TpmEk,
    /// The AK's kind: `p256` (the default), `p384`, `rsa2048-ssa` or `rsa2048-pss`.
    #[serde(default)]
    pub tpm_ak: TpmAk,
    /// Where the key of the node's own SVID is: `memory` (the default) or `tpm`. Workloads' keys are in memory always.
    #[serde(default)]
    pub node_key: NodeKeyHome,
    /// `binary_bios_measurements`.
    pub boot_log: PathBuf,
    /// `binary_runtime_measurements`.
    pub ima_log: PathBuf,
    /// Where a one-time join token lies, for an EK that is on no allow-list.
    pub join_token_file: Option<PathBuf>,
    /// The node's `mesh` cgroup: everything below it is governed.
    pub cgroup_root: PathBuf,
    /// Below bpffs: where programs, links and maps are pinned.
    pub pin_dir: PathBuf,
    /// Where the CNI plugin leaves a file per pod.
    pub pods_dir: PathBuf,
    /// The SPIFFE Workload API's socket.
    pub workload_socket: PathBuf,
    /// The SPIFFE Broker API's socket; absent where no broker may ask.
    pub broker_socket: Option<PathBuf>,
    /// The brokers that may ask there: SPIFFE IDs of this trust domain, of workloads of this node.
    #[serde(default)]
    pub brokers: BTreeSet<SpiffeId>,
    /// Prometheus, `/healthz`, `/readyz` and `/state`.
    pub metrics_listen: SocketAddr,
    /// Tunnels from other nodes.
    pub hbone_listen: SocketAddr,
    /// How long an agent that ends lets connections end which it carries, seconds; 30 unless told, 0 cuts them at once.
    #[serde(default)]
    pub drain_max_s: DrainMax,
    /// Connections that one caller may open to this node's workloads in a second; 10,000 unless told.
    #[serde(default)]
    pub caller_connects_per_s_max: CallerConnects,
    /// What ends when the cell was not heard for `stale_after_s`, or the agent is gone for a minute: `closed` (the default), `strict` or
    /// `static`.
    #[serde(default)]
    pub fail_mode: FailMode,
    /// How old the cell's last word may be, seconds; a day unless told. Of no meaning, and refused, with `static`.
    #[serde(default)]
    pub stale_after_s: StaleAfter,
}

/// See [`Config::drain_max_s`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u64")]
pub struct DrainMax(pub Duration);

impl Default for DrainMax {
    fn default() -> Self {
        Self(Duration::from_secs(30))
    }
}

impl TryFrom<u64> for DrainMax {
    type Error = Refusal;
    fn try_from(seconds: u64) -> Result<Self, Refusal> {
        if seconds > DRAIN_S_MAX {
            let expected = format!("'drain_max_s' of at most {DRAIN_S_MAX} seconds");
            return Err(Refusal::new(Code::ConfigInvalid, expected, seconds.to_string()));
        }
        Ok(Self(Duration::from_secs(seconds)))
    }
}

/// See [`Config::caller_connects_per_s_max`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct CallerConnects(pub u32);

impl Default for CallerConnects {
    fn default() -> Self {
        Self(crate::inbound::PER_S)
    }
}

impl TryFrom<u32> for CallerConnects {
    type Error = Refusal;
    fn try_from(per_s: u32) -> Result<Self, Refusal> {
        if per_s == 0 || per_s > CALLER_CONNECTS_MAX {
            let expected = format!("'caller_connects_per_s_max' of 1-{CALLER_CONNECTS_MAX}");
            return Err(Refusal::new(Code::ConfigInvalid, expected, per_s.to_string()));
        }
        Ok(Self(per_s))
    }
}

impl Config {
    /// What is done without the cell.
    pub fn staleness(&self) -> Staleness {
        Staleness { mode: self.fail_mode, after: self.stale_after_s }
    }
    /// Reads and checks the file at `path`.
    pub fn read(path: &Path) -> Result<Self, Refusal> {
        let trouble = |e: std::io::Error| {
            Refusal::new(Code::ConfigInvalid, format!("a readable file at {}", path.display()), e.to_string())
        };
        if std::fs::metadata(path).map_err(trouble)?.len() > FILE_BYTES_MAX {
            return Err(Refusal::new(Code::ConfigInvalid, "a file of at most 64 KiB", path.display().to_string()));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(trouble)?)
    }

    /// Checks a configuration text.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let table: toml::Table =
            text.parse().map_err(|e: toml::de::Error| Refusal::new(Code::ConfigInvalid, "TOML", e.message()))?;
        if let Some(key) = table.keys().find(|k| !KEYS.contains(&k.as_str())) {
            return Err(Refusal::new(Code::ConfigUnknownKey, format!("one of {}", KEYS.join(", ")), key.as_str()));
        }
        let is_timed = table.contains_key("stale_after_s");
        let config: Config = table.try_into().map_err(|e: toml::de::Error| {
            Refusal::new(Code::ConfigInvalid, "a value of the right form", e.to_string())
        })?;
        if config.servers.is_empty() || config.servers.len() > SERVERS_MAX {
            let found = config.servers.len().to_string();
            return Err(Refusal::new(Code::ConfigInvalid, format!("'servers' with 1-{SERVERS_MAX} addresses"), found));
        }
        if is_timed && config.fail_mode == FailMode::Static {
            let expected = "'stale_after_s', or 'fail_mode' as static, in which nothing is ever too old";
            return Err(Refusal::new(Code::ConfigInvalid, expected, "both"));
        }
        config.check_brokers()?;
        let broker_socket = config.broker_socket.iter().map(|path| ("broker_socket", path));
        for (key, path) in broker_socket.chain([
            ("data_dir", &config.data_dir),
            ("cgroup_root", &config.cgroup_root),
            ("pin_dir", &config.pin_dir),
            ("pods_dir", &config.pods_dir),
            ("workload_socket", &config.workload_socket),
        ]) {
            if !path.is_absolute() {
                let found = path.display().to_string();
                return Err(Refusal::new(Code::ConfigInvalid, format!("'{key}' as an absolute path"), found));
            }
        }
        Ok(config)
    }

    /// A socket that nobody may use and brokers without a socket are mistakes, and so is one whom this cell never vouches
    /// for.
    fn check_brokers(&self) -> Result<(), Refusal> {
        let invalid = |expected: String, found: String| Err(Refusal::new(Code::ConfigInvalid, expected, found));
        if self.broker_socket.is_some() == self.brokers.is_empty() {
            let found = if self.brokers.is_empty() { "'broker_socket' alone" } else { "'brokers' alone" };
            return invalid("'broker_socket' and 'brokers', or neither".into(), found.into());
        }
        if self.brokers.len() > BROKERS_MAX {
            return invalid(format!("'brokers' with at most {BROKERS_MAX}"), self.brokers.len().to_string());
        }
        match self.brokers.iter().find(|id| id.trust_domain() != self.trust_domain) {
            Some(foreign) => invalid(format!("'brokers' of trust domain {}", self.trust_domain), foreign.to_string()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_tpm::EkKind;

    const GOOD: &str = r#"
        cluster = "west"
        trust_domain = "west"
        fingerprint = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
        servers = ["10.71.0.11:7443"]
        node_address = "10.71.0.21"
        data_dir = "/var/lib/ambit"
        tcti = "swtpm:host=127.0.0.1,port=2321"
        boot_log = "/b"
        ima_log = "/i"
        cgroup_root = "/sys/fs/cgroup/mesh"
        pin_dir = "/sys/fs/bpf/ambit"
        pods_dir = "/run/ambit/pods"
        workload_socket = "/run/ambit/agent.sock"
        metrics_listen = "10.71.0.21:9464"
        hbone_listen = "10.71.0.21:15008"
    "#;

    const SOCKET: &str = "broker_socket = \"/run/ambit/broker.sock\"\n";

    #[test]
    fn a_good_file_is_read_and_bad_ones_name_what_is_wrong() {
        assert_eq!(Config::parse(GOOD).unwrap().cluster.as_str(), "west");
        for (line, seconds) in [("", 30), ("drain_max_s = 0", 0), ("drain_max_s = 3600", 3600)] {
            let config = Config::parse(&format!("{GOOD}\n{line}")).unwrap();
            assert_eq!(config.drain_max_s, DrainMax(Duration::from_secs(seconds)));
        }
        for (lines, mode, after_s) in [
            ("", FailMode::Closed, 86_400),
            ("fail_mode = \"strict\"\nstale_after_s = 60", FailMode::Strict, 60),
            ("fail_mode = \"static\"", FailMode::Static, 86_400),
        ] {
            let found = Config::parse(&format!("{GOOD}\n{lines}")).unwrap().staleness();
            assert_eq!(found, Staleness { mode, after: StaleAfter(Duration::from_secs(after_s)) });
        }
        let keys = "tpm_ek = \"p384\"\ntpm_ak = \"rsa2048-ssa\"\nnode_key = \"tpm\"";
        let keys = Config::parse(&format!("{GOOD}\n{keys}")).unwrap();
        assert_eq!(keys.node_key, NodeKeyHome::Tpm);
        assert_eq!((keys.tpm_ek.0, keys.tpm_ak.0), (EkChoice::Fixed(EkKind::EccP384), AkKind::Rsa2048Ssa));
        let brokers = Config::parse(&format!("{GOOD}\n{SOCKET}brokers = [\"spiffe://west/proxy\"]")).unwrap().brokers;
        assert_eq!(brokers, BTreeSet::from(["spiffe://west/proxy".parse().unwrap()]));
        for (from, to, code, names) in [
            ("tcti", "tctii", Code::ConfigUnknownKey, "tctii"),
            ("\"west\"", "\"West!\"", Code::ConfigInvalid, "West!"),
            ("aaaa\"", "zz\"", Code::ConfigInvalid, "fingerprint"),
            ("[\"10.71.0.11:7443\"]", "[]", Code::ConfigInvalid, "servers"),
            ("10.71.0.21:15008", "10.71.0.21", Code::ConfigInvalid, "hbone_listen"),
            ("/run/ambit/pods", "pods", Code::ConfigInvalid, "pods"),
            ("boot_log = \"/b\"", "", Code::ConfigInvalid, "boot_log"),
            ("boot_log =", "tpm_ek = \"p521\"\nboot_log =", Code::ConfigInvalid, "p521"),
            ("boot_log =", "tpm_ak = \"rsa\"\nboot_log =", Code::ConfigInvalid, "tpm_ak"),
            ("boot_log =", "node_key = \"disk\"\nboot_log =", Code::ConfigInvalid, "node_key"),
            ("boot_log =", "broker_socket = \"/b\"\nboot_log =", Code::ConfigInvalid, "broker_socket"),
            ("boot_log =", "brokers = [\"spiffe://west/p\"]\nboot_log =", Code::ConfigInvalid, "brokers"),
            ("boot_log =", &format!("{SOCKET}brokers = []\nboot_log ="), Code::ConfigInvalid, "brokers"),
            ("boot_log =", &format!("{SOCKET}brokers = [\"west/p\"]\nboot_log ="), Code::ConfigInvalid, "west/p"),
            (
                "boot_log =",
                &format!("{SOCKET}brokers = [\"spiffe://east/p\"]\nboot_log ="),
                Code::ConfigInvalid,
                "spiffe://east/p",
            ),
            (
                "boot_log =",
                "broker_socket = \"b\"\nbrokers = [\"spiffe://west/p\"]\nboot_log =",
                Code::ConfigInvalid,
                "broker_socket",
            ),
            ("boot_log =", "drain_max_s = 3601\nboot_log =", Code::ConfigInvalid, "drain_max_s"),
            ("boot_log =", "caller_connects_per_s_max = 0\nboot_log =", Code::ConfigInvalid, "1-1000000"),
            ("boot_log =", "fail_mode = \"open\"\nboot_log =", Code::ConfigInvalid, "'fail_mode' as closed"),
            ("boot_log =", "stale_after_s = 59\nboot_log =", Code::ConfigInvalid, "stale_after_s"),
            ("boot_log =", "stale_after_s = 2592001\nboot_log =", Code::ConfigInvalid, "stale_after_s"),
            (
                "boot_log =",
                "fail_mode = \"static\"\nstale_after_s = 60\nboot_log =",
                Code::ConfigInvalid,
                "nothing is ever too old",
            ),
            ("boot_log =", "drain_max_s = -1\nboot_log =", Code::ConfigInvalid, "drain_max_s"),
            ("cluster =", "cluster", Code::ConfigInvalid, ""),
        ] {
            let refusal = Config::parse(&GOOD.replace(from, to)).unwrap_err();
            assert_eq!(refusal.code, code, "{refusal}");
            assert!(refusal.to_string().contains(names), "{refusal} should name {names}");
        }
    }
}
