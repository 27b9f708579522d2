//! The agent's two ends towards its cell, membership and stream, put together as `agent::run` does; no kernel, no pods.

use super::replica::Replica;
use super::tpm::Swtpm;
use ambit_agent::clock::Clock;
use ambit_agent::config::{Config, Fingerprint};
use ambit_agent::denials::Lane;
use ambit_agent::enrol::NotEnrolled;
use ambit_agent::membership::Membership;
use ambit_agent::reattest::{Rounds, Turn};
use ambit_agent::session::{Session, Wires};
use ambit_agent::takeover::{self, Successor};
use ambit_agent::view::View;
use ambit_identity::{SharedTrust, Trust, fingerprint};
use ambit_model::policy::Endpoint;
use ambit_tpm::Attester;
use std::net::Ipv4Addr;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) struct Agent {
    pub(crate) attester: Attester,
    pub(crate) turn: Turn,
    pub(crate) denials: Lane,
    pub(crate) desired: watch::Receiver<Option<Arc<View>>>,
    pub(crate) endpoints: watch::Sender<Option<Vec<Endpoint>>>,
    pub(crate) membership: JoinHandle<NotEnrolled>,
    /// Who comes after it.
    pub(crate) successor: Successor,
    /// What nobody here uses, but whose other end must not be gone.
    _held: Box<dyn std::any::Any + Send>,
}

impl Agent {
    /// Enrols with `replica` by `tpm`, whose folder holds the files `boot_log` and `ima_log`.
    pub(crate) fn start(replica: &Replica, tpm: &Swtpm) -> Agent {
        Agent::start_with(replica, tpm, Turn::default())
    }

    pub(crate) fn start_with(replica: &Replica, tpm: &Swtpm, turn: Turn) -> Agent {
        // What the agent says of itself, where a test fails.
        let _ = tracing_subscriber::fmt().with_env_filter("info,tss_esapi=warn").with_test_writer().try_init();
        let (trust_domain, bundle) = replica.with_cell(|cell| (cell.td.clone(), cell.bundle()));
        let pinned = fingerprint(&bundle.roots_der[0]);
        let unused = || tpm.file("unused");
        let config = Config {
            cluster: trust_domain.as_str().parse().unwrap(),
            trust_domain: trust_domain.clone(),
            fingerprint: Fingerprint(pinned),
            servers: vec![replica.address],
            node_address: Ipv4Addr::LOCALHOST,
            data_dir: tpm.state(),
            tcti: tpm.tcti(),
            tpm_ek: Default::default(),
            tpm_ak: Default::default(),
            node_key: Default::default(),
            boot_log: tpm.file("boot_log"),
            ima_log: tpm.file("ima_log"),
            join_token_file: None,
            cgroup_root: unused(),
            pin_dir: unused(),
            pods_dir: unused(),
            workload_socket: unused(),
            broker_socket: None,
            brokers: std::collections::BTreeSet::new(),
            metrics_listen: replica.address,
            hbone_listen: replica.address,
            caller_connects_per_s_max: Default::default(),
            drain_max_s: Default::default(),
            fail_mode: Default::default(),
            stale_after_s: Default::default(),
        };
        let attester = Attester::open(&config.tcti, &config.data_dir).unwrap();
        let trust = SharedTrust::new(Trust::Pinned(trust_domain.clone(), pinned));
        let (clock, denials) = (Arc::new(Clock::default()), Lane::default());
        let (enrolled, enrolled_rx) = watch::channel(None);
        let (told, told_rx) = watch::channel(None);
        let (node, node_rx) = watch::channel(None);
        let (desired, desired_rx) = watch::channel(None);
        let (outcome, outcome_rx) = watch::channel(None);
        let (endpoints, endpoints_rx) = watch::channel(Some(vec![]));
        let (channel, channel_rx) = watch::channel(None);
        let issued = ambit_agent::issued::Issued::default();
        let (successor, succession) = takeover::succession();
        let session = Session {
            trust: trust.clone(),
            servers: config.servers.clone(),
            trust_domain,
            cluster: config.cluster.clone(),
            node_address: config.node_address,
            clock: clock.clone(),
            denials: denials.clone(),
            rounds: Rounds::new(
                attester.clone(),
                turn.clone(),
                config.cluster.clone(),
                config.boot_log.clone(),
                config.ima_log.clone(),
            ),
            succession: succession.clone(),
            relay: None,
            wires: Wires {
                enrolled: enrolled_rx,
                told: Arc::new(told),
                desired: Arc::new(desired),
                outcome: outcome_rx,
                endpoints: endpoints_rx,
                issued: issued.clone(),
                seen: Default::default(),
                channel: Arc::new(channel),
            },
        };
        let membership = Membership {
            config,
            attester: attester.clone(),
            turn: turn.clone(),
            clock,
            trust,
            denials: denials.clone(),
            enrolled,
            node,
            issued,
            told: told_rx,
            succession,
        };
        tokio::spawn(session.run());
        let membership = tokio::spawn(membership.run());
        let held = Box::new((node_rx, outcome, channel_rx));
        Agent { attester, turn, denials, desired: desired_rx, endpoints, membership, successor, _held: held }
    }
}
