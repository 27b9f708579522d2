//! `ambit trust rotate`: a new root, from its preparation to the revocation of the old one. It begins where the last one
//! stopped, so that it may be broken off and run again at any point.

use super::authorities::{request, state};
use super::external::own_root;
use crate::args::Approvals;
use crate::ask;
use crate::cell::Cell;
use crate::output::{Answer, Form, pretty};
use crate::pair::Locked;
use crate::verbs::Session;
use crate::verbs::approver::{Outcome, or_proposal};
use crate::verbs::renewal::renewed;
use crate::when::now_ms;
use ambit_identity::keys::certificates_to_pem;
use ambit_model::{Act, Code, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::io::Write;
use std::time::{Duration, Instant};

/// How often the state is looked at while something is waited for.
pub(super) const LOOK: Duration = Duration::from_millis(300);

/// An external authority that began within this may be too young to sign; the cell says when it is not.
const YOUNG_MS: u64 = 60_000;

/// How to rotate.
pub(super) struct Options {
    pub(super) wait: Duration,
    pub(super) without_acks: bool,
    pub(super) dry_run: bool,
    /// To a root with a key in the cell, whatever root is active.
    pub(super) own: bool,
}

/// What is to be done next, by the state alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Prepare,
    Activate,
    /// Replicas sign under the old root still.
    AwaitReplicas,
    Taint,
    Revoke,
}

fn next(state: &v1::X509AuthorityState) -> Step {
    let root = |wanted: &str| state.roots.iter().find(|root| root.state == wanted);
    let under = |root: &v1::X509Root| state.intermediates.iter().any(|i| i.current && i.root == root.fingerprint);
    match (root("prepared"), root("old"), root("tainted")) {
        (Some(_), _, _) => Step::Activate,
        (None, Some(old), _) if under(old) => Step::AwaitReplicas,
        (None, Some(_), _) => Step::Taint,
        (None, None, Some(_)) => Step::Revoke,
        (None, None, None) => Step::Prepare,
    }
}

/// Rotates. Steps are told on standard error as they are done.
pub(super) async fn rotate(session: &Session, options: Options) -> Result<Answer, Refusal> {
    let (mut cell, banner) = session.cell_to_change()?;
    let mut steps = Steps::new();
    let first = state(&cell).await?;
    // Better not begun than stopped before its last step.
    if next(&first) == Step::Prepare && ask!(cell, Membership.status(v1::StatusRequest {}))?.approvers == 1 {
        let expected = "no approver or two, who revoke the old root at the end";
        return Err(Refusal::new(Code::NeedsSecondApprover, expected, "one"));
    }
    if options.dry_run {
        return plan(session, &cell, &first, banner, options.own).await;
    }
    steps.say(&banner);
    let mut revoked = false;
    while !revoked {
        let now = state(&cell).await?;
        match next(&now) {
            Step::Prepare => {
                let ask = if options.own { own_root()? } else { request(None, false, false)? };
                match ask!(cell, LocalAuthority.prepare_x509_authority(ask)) {
                    Err(refusal) if steps.joined_since(&refusal, &options) => {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                    done => drop(done?),
                }
                steps.say("prepared: a new root is in the bundle");
            }
            Step::Activate => {
                // A root that cannot certify the next one leads this context to it no other way.
                cell.trust_bundle().await?;
                wait(&mut steps, &cell, &options, "prepared", |root| root.missing.clone()).await?;
                let ask = request(None, options.without_acks, false)?;
                match ask!(cell, LocalAuthority.activate_x509_authority(ask)) {
                    Err(refusal) if steps.joined_since(&refusal, &options) => {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                    // It is on record before its time, for clocks that lag.
                    Err(refusal) if is_young(&now, &refusal) && steps.began.elapsed() < options.wait => {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                    done => drop(done?),
                }
                steps.say("activated: intermediates are signed under the new root");
            }
            Step::AwaitReplicas => {
                cell.trust_bundle().await?;
                let replicas = |root: &v1::X509Root| {
                    root.using.iter().filter(|name| name.starts_with("replica ")).cloned().collect::<Vec<_>>()
                };
                wait(&mut steps, &cell, &Options { without_acks: false, ..options }, "old", replicas).await?;
            }
            Step::Taint => {
                // Who rotates goes first: the old root vouches for nothing soon, not for this certificate either.
                cell = follow(session, &cell).await?;
                steps.say("this context: renewed under the new root, which it pins now");
                ask!(cell, LocalAuthority.taint_x509_authority(request(None, false, false)?))?;
                steps.say("tainted: whatever is under the old root is issued anew");
            }
            Step::Revoke => {
                cell = follow(session, &cell).await?;
                let cut_off = |root: &v1::X509Root| root.using.clone();
                wait(&mut steps, &cell, &options, "tainted", cut_off).await?;
                wait(&mut steps, &cell, &options, "active", |root| root.missing.clone()).await?;
                let proposed = match revoke(&cell, &now, options.without_acks).await {
                    Err(refusal) if steps.joined_since(&refusal, &options) => {
                        tokio::time::sleep(LOOK).await;
                        continue;
                    }
                    done => done?,
                };
                if let Some(proposed) = proposed {
                    steps
                        .say("tainted still: its revocation takes approvals (ambit trust revoke ROOT --approval FILE)");
                    return Ok(proposed);
                }
                steps.say("revoked: the old root is out of the bundle");
                revoked = true;
            }
        }
    }
    let active = state(&cell).await?.roots.into_iter().find(|root| root.state == "active").unwrap_or_default();
    let fingerprint = active.fingerprint;
    let text = match session.form {
        Form::Table => format!("root fingerprint: {fingerprint}"),
        Form::Json => pretty(&json!({"fingerprint": fingerprint, "steps": steps.done})),
    };
    Ok(Answer::ok(text)
        .note("pin it in the configuration of agents and in other contexts: who starts anew knows no other"))
}

/// Whether the refusal may be for the youth of the prepared root's external authority, which passes.
fn is_young(state: &v1::X509AuthorityState, refusal: &Refusal) -> bool {
    let prepared = state.roots.iter().filter(|root| root.state == "prepared");
    let last = prepared.flat_map(|root| &root.externals).filter(|one| one.signs).map(|one| one.not_before_ms).max();
    refusal.code == Code::ExternalCertificate && last.is_some_and(|begun| begun + YOUNG_MS > now_ms())
}

/// Revokes the tainted root, or says what approvers have to sign first.
async fn revoke(cell: &Cell, now: &v1::X509AuthorityState, without_acks: bool) -> Result<Option<Answer>, Refusal> {
    let tainted = now.roots.iter().find(|root| root.state == "tainted").map(|root| root.fingerprint.clone());
    let act = Act::RevokeRoot(crate::context::fingerprint(&tainted.clone().unwrap_or_default())?);
    let ask = request(tainted, without_acks, false)?;
    let done = ask!(cell, LocalAuthority.revoke_x509_authority(ask));
    match or_proposal(cell, act, &Approvals { files: Vec::new() }, done).await? {
        Outcome::Done(_) => Ok(None),
        Outcome::Proposed(answer) => Ok(Some(answer)),
    }
}

/// What was done so far, told as it is done.
pub(super) struct Steps {
    began: Instant,
    pub(super) done: Vec<String>,
}

impl Steps {
    pub(super) fn new() -> Steps {
        Steps { began: Instant::now(), done: Vec::new() }
    }
    pub(super) fn say(&mut self, line: &str) {
        let _ = writeln!(std::io::stderr(), "{:>7.1} s  {line}", self.began.elapsed().as_secs_f64());
        self.done.push(line.to_owned());
    }
    /// Whether somebody came between the last look and the step, who is to be waited for as all others are.
    pub(super) fn joined_since(&self, refusal: &Refusal, options: &Options) -> bool {
        // A replica that joins brings a record key, and a key to wrap to.
        let came = matches!(refusal.code, Code::AcksMissing | Code::AuthorityInUse | Code::StaleRevision);
        came && self.began.elapsed() < options.wait
    }
}

/// Waits until nobody is waited for at the root in that state; tells who is, as that changes.
async fn wait(
    steps: &mut Steps,
    cell: &Cell,
    options: &Options,
    root: &str,
    whom: impl Fn(&v1::X509Root) -> Vec<String>,
) -> Result<(), Refusal> {
    let until = Instant::now() + options.wait;
    let mut told = None;
    loop {
        let now = state(cell).await?;
        let Some(found) = now.roots.iter().find(|r| r.state == root) else {
            let expected = format!("a root that is {root}");
            return Err(Refusal::new(Code::RootState, expected, "none: somebody else rotates too"));
        };
        let missing = whom(found);
        if missing.is_empty() || (options.without_acks && Instant::now() > until) {
            return Ok(());
        }
        if Instant::now() > until {
            let code = if root == "prepared" { Code::AcksMissing } else { Code::AuthorityInUse };
            let expected = format!("nobody to be waited for after {} s", options.wait.as_secs());
            return Err(Refusal::new(code, expected, missing.join(", ")));
        }
        if told.as_ref() != Some(&missing) {
            let names = missing.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
            steps.say(&format!(
                "{root}: {}/{} acknowledged, waiting for {}: {names}",
                found.acked,
                found.of,
                missing.len()
            ));
            told = Some(missing);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn plan(
    session: &Session,
    cell: &Cell,
    now: &v1::X509AuthorityState,
    banner: String,
    own: bool,
) -> Result<Answer, Refusal> {
    let step = next(now);
    let missing = match step {
        Step::Activate => ask!(cell, LocalAuthority.activate_x509_authority(request(None, false, true)?))?.missing,
        Step::Revoke => ask!(cell, LocalAuthority.revoke_x509_authority(request(None, false, true)?))?.missing,
        Step::Prepare => {
            let ask = v1::X509AuthorityRequest { own_root: own, ..request(None, false, true)? };
            ask!(cell, LocalAuthority.prepare_x509_authority(ask))?;
            Vec::new()
        }
        Step::AwaitReplicas | Step::Taint => Vec::new(),
    };
    let word = match step {
        Step::Prepare => "prepare",
        Step::Activate => "activate",
        Step::AwaitReplicas => "wait for the replicas, then taint",
        Step::Taint => "taint",
        Step::Revoke => "revoke",
    };
    let text = match session.form {
        Form::Table if missing.is_empty() => format!("next: {word}"),
        Form::Table => format!("next: {word}, once there are {}", missing.join(", ")),
        Form::Json => pretty(&json!({"next": word, "missing": missing})),
    };
    Ok(Answer::ok(text).note(banner))
}

/// The administrator's own certificate renewed under the active root, and that root pinned in the context.
async fn follow(session: &Session, cell: &Cell) -> Result<Cell, Refusal> {
    let now = state(cell).await?;
    let active = now.roots.iter().find(|root| root.state == "active").map(|root| root.fingerprint.clone());
    let active = active.ok_or_else(|| Refusal::new(Code::Internal, "an active root", "none"))?;
    let context = cell.context();
    let bundle = v1::GetBundleRequest { trust_domain: context.trust_domain.to_string() };
    let roots = ask!(cell, BundleRegistry.get_bundle(bundle))?.roots_der;
    let root = roots.into_iter().find(|der| hex::encode(ambit_identity::fingerprint(der)) == active);
    let root = root.ok_or_else(|| Refusal::new(Code::Internal, "the active root in the bundle", "none"))?;
    let addresses: Vec<String> = context.addresses.iter().map(ToString::to_string).collect();
    let written = json!({"trust_domain": context.trust_domain.as_str(), "fingerprint": active, "addresses": addresses});
    let locked = Locked::wait(&context.folder)?;
    // The new certificate is taken by who shows either root, and both are shown until the old one is revoked: wherever
    // this breaks off the context is of use, and the next run goes on.
    renewed(cell, &locked).await?;
    locked.replace("root.pem", certificates_to_pem([root.as_slice()]).as_bytes())?;
    locked.replace("context.json", written.to_string().as_bytes())?;
    session.cell()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_step_follows_from_where_the_last_one_stopped() {
        let state = |roots: &[(&str, &str)], current: &[&str]| v1::X509AuthorityState {
            roots: roots
                .iter()
                .map(|(name, state)| v1::X509Root {
                    fingerprint: (*name).into(),
                    state: (*state).into(),
                    ..Default::default()
                })
                .collect(),
            intermediates: current
                .iter()
                .map(|root| v1::X509Intermediate { current: true, root: (*root).into(), ..Default::default() })
                .collect(),
            ..Default::default()
        };
        for (roots, current, step) in [
            (&[("a", "active")][..], &["a"][..], Step::Prepare),
            (&[("a", "active"), ("z", "revoked")], &["a"], Step::Prepare),
            (&[("a", "active"), ("b", "prepared")], &["a"], Step::Activate),
            (&[("b", "active"), ("a", "old")], &["a", "b"], Step::AwaitReplicas),
            (&[("b", "active"), ("a", "old")], &["b", "b"], Step::Taint),
            (&[("b", "active"), ("a", "tainted")], &["b"], Step::Revoke),
        ] {
            assert_eq!(next(&state(roots, current)), step, "{roots:?}");
        }
    }
}
