//! This node's membership of its cluster: enrols, enrols again at half-life, and again when the cell says that it does
//! not know or trust this node any more, until it is let in.
//!
//! A refusal never ends an agent that was enrolled once: the kernel must go on refusing, and a release must need
//! nobody's hand at the node.

use crate::backoff::{Backoff, random};
use crate::clock::Clock;
use crate::config::Config;
use crate::denials::Lane;
use crate::enrol::{self, Enrolled, NotEnrolled};
use crate::issued::{Issued, Known};
use crate::metrics::METRICS;
use crate::reattest::Turn;
use crate::svids::renew_at;
use crate::takeover::Succession;
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::refusal::Class;
use ambit_model::{Code, Generation, NodeId, Refusal};
use ambit_tpm::Attester;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The first wait after a refusal.
const RETRY_BASE: Duration = Duration::from_secs(1);
/// Never longer: a release restores service within this and one enrolment.
const RETRY_CAP: Duration = Duration::from_secs(10);
/// An admission under a tainted intermediate is renewed within this long.
const REISSUE_MS: u64 = 5000;
/// An admission that lasted this long was no mistake: the next refusal is a new matter, and waits start over.
const LASTED: Duration = Duration::from_secs(60);

/// What the cell said of an admission of this node, on its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The refusal.
    pub refusal: Refusal,
    /// Which admission it is about.
    pub generation: Generation,
}

impl Told {
    /// Whether a refusal by the cell is about this node's standing, so that only an enrolment can help. What one replica
    /// cannot do now, or who may call what, is not.
    pub fn concerns(code: Code) -> bool {
        code == Code::NodeLate || (code.class() == Class::Denied && code != Code::PermissionDenied)
    }

    /// Whether the cell put this node out. A certificate that ran out, a node that a restored cell does not know, one that
    /// was merely late and one whose admission a copy of its key used first are no verdicts on it.
    fn puts_out(&self) -> bool {
        let no_verdict =
            [Code::NodeLate, Code::NodeUnknown, Code::SvidUntrusted, Code::SvidMalformed, Code::NodeAddressMismatch];
        !no_verdict.contains(&self.refusal.code)
    }
}

/// The component.
pub struct Membership {
    /// Where the cell is.
    pub config: Config,
    /// The TPM.
    pub attester: Attester,
    /// The right to quote with it.
    pub turn: Turn,
    /// The time.
    pub clock: Arc<Clock>,
    /// Learns the own roots.
    pub trust: SharedTrust,
    /// Learns that this node is out.
    pub denials: Lane,
    /// The admission in use.
    pub enrolled: watch::Sender<Option<Arc<Enrolled>>>,
    /// The same, for endpoint reports.
    pub node: watch::Sender<Option<(NodeId, Generation)>>,
    /// What is known here: which intermediates are tainted.
    pub issued: Issued,
    /// What the cell says on the stream.
    pub told: watch::Receiver<Option<Told>>,
    /// Who comes after this agent: while it is there, this node's admissions are its to ask for.
    pub succession: Succession,
}

impl Membership {
    /// Returns only where the first enrolment is denied for what this machine is or says. What an operator lifts at the
    /// cell is waited out, also by an agent that has just started: the machine was booted again to be let in.
    pub async fn run(mut self) -> NotEnrolled {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        let mut standing = Standing::default();
        // When the present admission began, until the first refusal after it.
        let mut since = None;
        let mut first = true;
        loop {
            self.succession.over().await;
            let enrolment = enrol::enrol(&self.config, &self.attester, &self.turn, &self.clock, &self.trust);
            let enrolled = tokio::select! {
                enrolled = enrolment => enrolled,
                // An admission that came behind the successor's would end that one's.
                () = self.succession.begun() => continue,
            };
            let refused = match enrolled {
                Ok(enrolled) => {
                    let enrolled = Arc::new(enrolled);
                    standing.good();
                    if let Err(refusal) = self.take(&enrolled, first) {
                        return refusal.into();
                    }
                    (first, since) = (false, Some(Instant::now()));
                    self.last(&enrolled).await
                }
                Err(denied) if first && !lifted_at_the_cell(denied.refusal.code) => return denied,
                Err(denied) => {
                    METRICS.component.set(["enrolment"], 0.0);
                    Some(denied.refusal)
                }
            };
            let Some(refusal) = refused else { continue };
            standing.bad(&refusal);
            let lasted = since.take().map(|since: Instant| since.elapsed() >= LASTED);
            match lasted {
                // The first refusal in a while: an enrolment tells at once what the cell means.
                Some(true) => backoff.reset(),
                Some(false) | None => tokio::time::sleep(backoff.next(random())).await,
            }
        }
    }

    /// Waits until the admission must be renewed (none), or the cell refuses it. Under a tainted intermediate it must be
    /// within seconds.
    async fn last(&mut self, enrolled: &Enrolled) -> Option<Refusal> {
        let due = renew_at(enrolled.since, enrolled.not_after, random());
        let renewal = tokio::time::sleep(Duration::from_millis(due.0.saturating_sub(self.clock.now().0)));
        tokio::pin!(renewal);
        let mut known = self.issued.watch();
        let tainted = async {
            let is = |k: &Known| k.view.as_ref().is_some_and(|view| view.tainted.contains(&enrolled.authority));
            let heard = known.wait_for(is).await.is_ok();
            if !heard {
                std::future::pending::<()>().await;
            }
            // Every node of the cell hears of it at once.
            tokio::time::sleep(Duration::from_millis(random() % REISSUE_MS)).await;
        };
        tokio::pin!(tainted);
        loop {
            tokio::select! {
                () = &mut renewal => return None,
                () = &mut tainted => return None,
                changed = self.told.changed() => {
                    let told = self.told.borrow_and_update().clone();
                    match told.filter(|told| told.generation >= enrolled.generation) {
                        Some(told) => {
                            if told.puts_out() {
                                self.denials.set_out(true);
                            }
                            return Some(told.refusal);
                        }
                        // The stream is gone with its process; the renewal is still worth its while.
                        None if changed.is_err() => {
                            renewal.as_mut().await;
                            return None;
                        }
                        None => {}
                    }
                }
            }
        }
    }

    fn take(&self, enrolled: &Arc<Enrolled>, first: bool) -> Result<(), Refusal> {
        if first {
            // Later bundles come with the slices, which know more of them.
            self.trust.replace(Trust::Bundles(TrustStore::new(&enrolled.bundle)?));
        }
        METRICS.component.set(["enrolment"], 1.0);
        self.denials.set_out(false);
        self.node.send_replace(Some((enrolled.node, enrolled.generation)));
        // Last: the stream begins with it.
        self.enrolled.send_replace(Some(enrolled.clone()));
        Ok(())
    }
}

/// Whether an operator ends this refusal without anything being done at the machine.
fn lifted_at_the_cell(code: Code) -> bool {
    matches!(
        code,
        Code::NodeUntrusted
            | Code::NodeQuarantined
            | Code::NodeBanned
            | Code::NodeLate
            | Code::AppraisalPolicyMissing
            | Code::AllowListMissing
    )
}

/// What was last said of this node, so that each word is told to operators once and not at every attempt.
#[derive(Debug, Default)]
struct Standing {
    refused: Option<Code>,
}

impl Standing {
    fn good(&mut self) {
        METRICS.trusted.only(["ok"], 1.0);
        if let Some(code) = self.refused.take() {
            tracing::info!(%code, "this node is trusted again");
        }
    }

    fn bad(&mut self, refusal: &Refusal) {
        let code = refusal.code;
        METRICS.trusted.only([code.as_str()], 0.0);
        if self.refused.replace(code) != Some(code) {
            tracing::error!(%code, remedy = code.remedy(), "the cell refuses this node: nothing new opens until it is let in again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_a_node_are_told_from_those_of_a_call() {
        for (code, concerns, out) in [
            (Code::NodeUntrusted, true, true),
            (Code::NodeQuarantined, true, true),
            (Code::NodeBanned, true, true),
            (Code::TpmStateForked, true, true),
            (Code::ImaFileNotAllowed, true, true),
            (Code::NodeUnknown, true, false),
            (Code::NodeLate, true, false),
            (Code::SvidUntrusted, true, false),
            (Code::NodeAddressMismatch, true, false),
            (Code::PermissionDenied, false, false),
            (Code::Unavailable, false, false),
            (Code::Busy, false, false),
            (Code::BadRequest, false, false),
            (Code::Unauthenticated, false, false),
        ] {
            assert_eq!(Told::concerns(code), concerns, "{code}");
            let told = Told { refusal: Refusal::new(code, "", ""), generation: Generation(1) };
            assert_eq!(concerns && told.puts_out(), out, "{code}");
        }
    }
}
