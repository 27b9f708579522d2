//! What a killed member costs: the leader until somebody else takes writes, a follower until it answers again.

use super::System;
use super::load::Client;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// The probe sends one write so often, whatever became of those before.
const PROBE_EVERY: Duration = Duration::from_millis(10);
/// One write; those that the dead leader took along never end.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(30);
/// After a restarted member answers: leases, streams and timers are in their stride again.
const SETTLE: Duration = Duration::from_millis(500);
/// Between two questions to a member that starts.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// How a leader is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// SIGKILL: its connections break, and say so at once to who listens.
    Killed,
    /// SIGSTOP: it is silent, as behind a link that was cut, and only a timer tells.
    Stopped,
}

/// The leader is lost; the time to the next write that an outside probe, at the survivors, got acknowledged. Then the
/// member is brought back. `next` is the first object not written yet, and is moved on.
pub(super) async fn failover<S: System>(system: &mut S, loss: Loss, next: &mut u64) -> Result<Duration> {
    let leader = system.leader().await?;
    let mut survivors = Vec::new();
    for member in (1..=super::MEMBERS).filter(|member| *member != leader) {
        let mut client = system.connect(member).await?;
        client.get(0).await?;
        survivors.push(client);
    }
    let pid = Pid::from_raw(i32::try_from(system.process(leader)?.id())?);
    let lost = Instant::now();
    match loss {
        Loss::Killed => system.kill(leader)?,
        Loss::Stopped => kill(pid, Signal::SIGSTOP)?,
    }
    let (mut probes, mut every) = (JoinSet::new(), tokio::time::interval(PROBE_EVERY));
    let took = loop {
        tokio::select! {
            _ = every.tick() => {
                let (n, at) = (*next, usize::try_from(*next)? % survivors.len());
                *next += 1;
                let mut client = survivors.get(at).context("a survivor")?.clone();
                probes.spawn(async move { tokio::time::timeout(PROBE_TIMEOUT, client.put(n)).await });
            }
            Some(answer) = probes.join_next() => if let Ok(Ok(())) = answer? {
                break lost.elapsed();
            }
        }
        if lost.elapsed() > PATIENCE {
            bail!("no write within {PATIENCE:?} after the leader was lost");
        }
    };
    probes.shutdown().await;
    match loss {
        Loss::Killed => system.restart(leader)?,
        Loss::Stopped => kill(pid, Signal::SIGCONT)?,
    }
    answers(system, leader).await?;
    tokio::time::sleep(SETTLE).await;
    Ok(took)
}

/// SIGKILL of a follower; the time from its start to its first linearizable read.
pub(super) async fn restart<S: System>(system: &mut S) -> Result<Duration> {
    let leader = system.leader().await?;
    let member = leader % super::MEMBERS + 1;
    system.kill(member)?;
    tokio::time::sleep(SETTLE).await;
    let started = Instant::now();
    system.restart(member)?;
    answers(system, member).await?;
    let took = started.elapsed();
    tokio::time::sleep(SETTLE).await;
    Ok(took)
}

/// Asks until the member answers a linearizable read.
async fn answers<S: System>(system: &mut S, member: usize) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let read = async { anyhow::Ok(system.connect(member).await?.get(0).await?) };
        match tokio::time::timeout(Duration::from_secs(1), read).await {
            Ok(Ok(())) => return Ok(()),
            _ if Instant::now() > until => bail!("member {member} does not answer within {PATIENCE:?}"),
            _ => tokio::time::sleep(ASK_EVERY).await,
        }
    }
}
