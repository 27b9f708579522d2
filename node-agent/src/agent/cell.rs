//! The agent's side towards its cell: admission, stream, and what is known by them.

use super::AgentError;
use crate::clock::Clock;
use crate::config::Config;
use crate::control::Outcome;
use crate::course::Course;
use crate::denials::Lane;
use crate::enrol::{self, Enrolled, NotEnrolled};
use crate::issued::Issued;
use crate::membership::Membership;
use crate::reattest::{Rounds, Turn};
use crate::seen::Seen;
use crate::session::{self, Session};
use crate::takeover::{self, Guest, Sockets, Successor};
use crate::view::View;
use ambit_identity::{SharedTrust, Trust};
use ambit_model::policy::Endpoint;
use ambit_model::{Code, Generation, NodeId, Refusal};
use ambit_tpm::{Attester, Options};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// A new agent that is not admitted and has no slice by then gives up, and the former one goes on.
const PREPARE_MAX: Duration = Duration::from_secs(110);

/// Its parts.
pub(super) struct Cell {
    pub(super) clock: Arc<Clock>,
    pub(super) trust: SharedTrust,
    pub(super) denials: Lane,
    pub(super) issued: Issued,
    pub(super) seen: Seen,
    pub(super) node: watch::Receiver<Option<(NodeId, Generation)>>,
    pub(super) enrolled: watch::Receiver<Option<Arc<Enrolled>>>,
    pub(super) channel: watch::Receiver<Option<Channel>>,
    pub(super) desired: watch::Receiver<Option<Arc<View>>>,
    stage: Stage,
}

enum Stage {
    Waits(Box<(Membership, Session)>),
    Runs(JoinHandle<NotEnrolled>, JoinHandle<()>),
    Over,
}

impl Cell {
    /// Makes the parts; the former agent, where there is one, hears what the cell says.
    pub(super) fn new(
        config: &Config,
        course: &Course,
        former: Option<&Guest>,
        outcome: watch::Receiver<Option<Outcome>>,
        endpoints: watch::Receiver<Option<Vec<Endpoint>>>,
    ) -> Result<(Self, Successor), Refusal> {
        let clock = Arc::new(Clock::default());
        let trust = SharedTrust::new(Trust::Pinned(config.trust_domain.clone(), config.fingerprint.0));
        let tpm = Options::new(&config.tcti, &config.data_dir);
        let attester =
            Attester::start(Options { ek: config.tpm_ek.0, ak: config.tpm_ak.0, ..tpm }).map_err(enrol::tpm)?;
        let (turn, cluster) = (Turn::default(), config.cluster.clone());
        let (boot_log, ima_log) = (config.boot_log.clone(), config.ima_log.clone());
        let rounds = Rounds::new(attester.clone(), turn.clone(), cluster, boot_log, ima_log);
        let denials = Lane::default();
        let issued = Issued::default().in_course(course.clone());
        let seen = Seen::default();
        let (desired, desired_rx) = watch::channel(None);
        let (node, node_rx) = watch::channel(None);
        let (enrolled, enrolled_rx) = watch::channel(None);
        let (told, told_rx) = watch::channel(None);
        let (channel, channel_rx) = watch::channel(None);
        let (successor, succession) = takeover::succession();
        let membership = Membership {
            config: config.clone(),
            attester,
            turn,
            clock: clock.clone(),
            trust: trust.clone(),
            denials: denials.clone(),
            enrolled,
            node,
            issued: issued.clone(),
            told: told_rx,
            succession: succession.clone(),
        };
        let session = Session {
            trust: trust.clone(),
            servers: config.servers.clone(),
            trust_domain: config.trust_domain.clone(),
            cluster: config.cluster.clone(),
            node_address: config.node_address,
            clock: clock.clone(),
            denials: denials.clone(),
            rounds,
            succession,
            relay: former.map(|former| former.relay(&denials)),
            wires: session::Wires {
                enrolled: enrolled_rx.clone(),
                told: Arc::new(told),
                desired: Arc::new(desired),
                outcome,
                endpoints,
                issued: issued.clone(),
                seen: seen.clone(),
                channel: Arc::new(channel),
            },
        };
        let stage = Stage::Waits(Box::new((membership, session)));
        let (node, enrolled, channel, desired) = (node_rx, enrolled_rx, channel_rx, desired_rx);
        Ok((Self { clock, trust, denials, issued, seen, node, enrolled, channel, desired, stage }, successor))
    }

    /// Begins, if it has not yet.
    pub(super) fn start(&mut self) {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Waits(parts) => {
                let (membership, session) = *parts;
                Stage::Runs(tokio::spawn(membership.run()), tokio::spawn(session.run()))
            }
            running => running,
        };
    }

    /// Returns why a part of it ended: none does by itself.
    pub(super) async fn ended(&mut self) -> AgentError {
        let ended = |component, why: String| AgentError::Ended { component, why };
        let Stage::Runs(membership, stream) = &mut self.stage else {
            return ended("enrolment", "not begun".into());
        };
        let denied = |denied: Result<_, tokio::task::JoinError>| {
            denied.map_or_else(|e| ended("enrolment", e.to_string()), AgentError::Denied)
        };
        tokio::select! {
            biased;
            why = &mut *membership => denied(why),
            // The stream lives by the enrolment, whose own word comes a moment later.
            why = stream => match tokio::time::timeout(super::WORD_MAX, membership).await {
                Ok(why) => denied(why),
                Err(_) => ended("stream", why.err().map_or("returned".to_owned(), |e| e.to_string())),
            },
        }
    }

    /// Waits until this node is admitted anew and has its slice, and asks the former agent for its sockets.
    pub(super) async fn prepared(&mut self, former: &Guest) -> Result<Sockets, AgentError> {
        let mut desired = self.desired.clone();
        let late = tokio::time::sleep(PREPARE_MAX);
        // What wait_for gives holds a lock: kept while the sockets come, it would keep the session from its next slice, and with it
        // a thread that may be the one by which they come.
        let held = async { desired.wait_for(Option::is_some).await.is_ok() };
        tokio::select! {
            // It is held by the session, which does not end.
            _ = held => Ok(former.give().await?),
            error = self.ended() => Err(error),
            () = late => {
                let found = format!("none within {} s", PREPARE_MAX.as_secs());
                Err(Refusal::new(Code::TakeOverRefused, "an admission and a slice", found).into())
            }
        }
    }
}
