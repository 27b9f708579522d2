//! The verbs: each asks the cell and turns the answer into rows.

mod admin;
mod apply;
mod approve;
mod approver;
mod attest;
mod audit;
mod check;
mod cluster;
mod deny;
mod drill;
pub(crate) mod entry;
mod federation;
mod lab;
mod node;
mod peer;
mod policy;
mod raft;
mod renewal;
mod result;
mod standby;
mod status;
mod svid;
mod traffic;
mod trust;
mod watch;

pub(crate) use policy::in_step;
pub(crate) use raft::views;

use crate::args::{Args, Verb};
use crate::cell::Cell;
use crate::context::Context;
use crate::output::{Answer, Form};
use ambit_model::Refusal;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// What every verb may need: the options that stand before it.
pub(crate) struct Session {
    context: Option<PathBuf>,
    form: Form,
    timeout: Duration,
    /// The first cell that was opened, whose certificate may be due.
    opened: OnceLock<Cell>,
}

impl Session {
    fn cell(&self) -> Result<Cell, Refusal> {
        let cell = Cell::open(self.context()?, self.timeout)?;
        let _ = self.opened.set(cell.clone());
        Ok(cell)
    }
    fn context(&self) -> Result<Context, Refusal> {
        Context::find(self.context.as_deref())
    }
    /// A cell whose context is to be changed, with the line that says which.
    fn cell_to_change(&self) -> Result<(Cell, String), Refusal> {
        let cell = self.cell()?;
        let banner = cell.context().banner();
        Ok((cell, banner))
    }
}

/// Runs the verb that was typed.
pub async fn run(args: Args) -> Result<Answer, Refusal> {
    let timeout = args.timeout.duration();
    let session = Session { context: args.context, form: args.output, timeout, opened: OnceLock::new() };
    let done = done(&session, args.verb).await;
    match session.opened.get() {
        Some(cell) => renewal::after(cell, done).await,
        None => done,
    }
}

async fn done(session: &Session, verb: Verb) -> Result<Answer, Refusal> {
    match verb {
        Verb::Status => status::status(session).await,
        Verb::Check => check::check(session).await,
        Verb::Cluster(verb) => cluster::run(session, verb).await,
        Verb::Peer(verb) => peer::run(session, verb).await,
        Verb::Node(verb) => node::run(session, verb).await,
        Verb::Entry(verb) => entry::run(session, verb).await,
        Verb::Identity(verb) => trust::identity(session, verb).await,
        Verb::Trust(verb) => trust::trust(session, verb).await,
        Verb::Policy(verb) => policy::run(session, verb).await,
        Verb::Explain(verb) => policy::explain(session, verb).await,
        Verb::Raft(verb) => raft::run(session, verb).await,
        Verb::Attest(verb) => attest::run(session, verb).await,
        Verb::Svid(verb) => svid::run(session, verb).await,
        Verb::Apply(options) => apply::run(session, options).await,
        Verb::Federation(verb) => federation::run(session, verb).await,
        Verb::Deny(verb) => deny::run(session, verb).await,
        Verb::Watch(options) => watch::run(session, options).await,
        Verb::Admin(verb) => admin::run(session, verb).await,
        Verb::Approver(verb) => approver::run(session, verb).await,
        Verb::Approve(options) => approve::run(session, &options).await,
        Verb::Audit(verb) => audit::run(session, verb).await,
        Verb::Lab { args } => lab::run(args).await,
        Verb::Drill(verb) => drill::run(session, verb).await,
    }
}
