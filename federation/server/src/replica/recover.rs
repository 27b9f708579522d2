//! `ambitd recover`: the majority of a cell is lost for good, and one replica goes on alone with what it has.
//!
//! It is the one act that may lose acknowledged writes, so it refuses wherever there is another way, says what it found,
//! and does nothing before the operator has named every replica that is given up.

use super::authority;
use super::files::{Card, Files};
use super::found::{raft_options, start_failed};
use super::keyring::Keyring;
use super::wall_clock;
use crate::config::Config;
use crate::raft::rebase::{self, Survey};
use crate::store::Bodies;
use crate::store::audit::AuditFiles;
use ambit_identity::fingerprint;
use ambit_identity::tls::{Expect, SharedTrust, Trust};
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_state::objects::{Cause, IncarnationRow, KeySetRow, Member};
use ambit_state::{Beginning, State};
use ambit_transport::{Dialer, Identity};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpStream;

/// The kernel of a machine that is up answers well within this.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// What was found on this replica, and who answers.
pub struct Findings {
    replica: u64,
    term: u64,
    last: u64,
    commit: u64,
    digest: [u8; 32],
    voters: BTreeSet<u64>,
    learners: BTreeSet<u64>,
    /// The others: address, and whether they answer.
    others: BTreeMap<u64, (String, bool)>,
    root_here: bool,
}

/// How it ended.
pub struct Recovered {
    epoch: u64,
    began: IncarnationRow,
    index: u64,
    kept: Option<PathBuf>,
}

/// Looks, tells by `say` what it found, and recovers where `accepted` names exactly the others; with the authority under an
/// external root certified anew by `external`, where that ended.
///
/// # Errors
/// `store_damaged`, `recover_unsafe`, `recover_unconfirmed`; nothing is changed then.
pub async fn recover(
    config: &Config,
    accepted: Option<&[u64]>,
    past_epoch: u64,
    external: Option<&Path>,
    say: impl FnOnce(&Findings) -> Result<(), Refusal>,
) -> Result<Recovered, Refusal> {
    let files = Files::create(&config.data_dir)?;
    if !files.exist() {
        let found = format!("none in {}", config.data_dir.display());
        return Err(Refusal::new(Code::ConfigInvalid, "a replica's identity", found));
    }
    let card = files.card()?;
    stopped(config)?;
    if rebase::finish(&config.data_dir).map_err(|e| start_failed(e.into()))? {
        return finished(config, &card);
    }
    let survey = rebase::survey(&raft_options(config, card.replica)?).map_err(start_failed)?;
    let findings = findings(&files, &card, &survey).await?;
    say(&findings)?;
    findings.safe()?;
    findings.confirmed(accepted)?;
    go_on(config, &files, &card, survey, past_epoch, external).await
}

/// Nobody may write the store that is read here. (The log's own lock says so too.)
fn stopped(config: &Config) -> Result<(), Refusal> {
    std::net::TcpListener::bind(config.listen)
        .map(drop)
        .map_err(|e| Refusal::new(Code::RecoverUnsafe, "a replica that is stopped", format!("{}: {e}", config.listen)))
}

async fn findings(files: &Files, card: &Card, survey: &Survey) -> Result<Findings, Refusal> {
    let (state, membership) = (&survey.whole.state, &survey.whole.membership);
    let members = membership.voters.union(&membership.learners).filter(|id| **id != card.replica);
    let address = |id: u64| state.member(id).map(|m| m.address.clone()).unwrap_or_default();
    let others: Vec<(u64, String)> = members.map(|id| (*id, address(*id))).collect();
    let root_der = files.root_der()?;
    // Roots that this replica's state does not know may have come since: who shows one of those answers still.
    let trust = match state.cell() {
        Some(_) => super::trust_of(state.bundles(), state.denied_authorities(), state.fences(), &card.trust_domain)?,
        None => Trust::Pinned(card.trust_domain.clone(), fingerprint(&root_der)),
    };
    let trust = SharedTrust::new(trust);
    let asked = others.into_iter().map(async |(id, address)| {
        let answers = answers(&trust, card, id, &address).await;
        (id, (address, answers))
    });
    Ok(Findings {
        replica: card.replica,
        term: survey.whole.term,
        last: survey.last,
        commit: survey.commit,
        digest: state.digest(),
        voters: membership.voters.clone(),
        learners: membership.learners.clone(),
        others: futures::future::join_all(asked).await.into_iter().collect(),
        root_here: files.root_key()?.is_some()
            || state.active_root().is_some_and(|(_, row)| row.wrapped.contains_key(&card.replica)),
    })
}

/// Whether anybody is at the replica's address: the replica itself, or a process that says nothing and may be it, asleep.
/// Without a certificate of this one, which may have ended by now.
async fn answers(trust: &SharedTrust, card: &Card, id: u64, address: &str) -> bool {
    let Ok(at) = address.parse::<SocketAddr>() else { return false };
    let Ok(name) = card.trust_domain.member(&format!("/ambit/replica/{id}")) else { return false };
    match Dialer::new(trust.clone(), Identity::default()).channel(at, Expect::Id(name)).await {
        Ok(_it_proved_who_it_is) => true,
        Err(refusal) if refusal.code == Code::FingerprintMismatch => false,
        Err(_) => matches!(tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(at)).await, Ok(Ok(_))),
    }
}

impl Findings {
    fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }
    fn answering(&self) -> Vec<u64> {
        self.others.iter().filter(|(_, (_, answers))| *answers).map(|(id, _)| *id).collect()
    }

    /// Whether there is no other way.
    fn safe(&self) -> Result<(), Refusal> {
        let unsafe_ = |expected: String, found: String| Err(Refusal::new(Code::RecoverUnsafe, expected, found));
        if self.learners.contains(&self.replica) {
            return unsafe_(
                "a voter".into(),
                format!("replica {}, a learner: it may lack what was acknowledged", self.replica),
            );
        }
        if !self.voters.contains(&self.replica) {
            return unsafe_("a voter".into(), format!("replica {}, which was removed or never admitted", self.replica));
        }
        if self.voters.len() == 1 {
            return unsafe_(
                "a cell that lost its majority".into(),
                "one whose only voter is this replica: start it".into(),
            );
        }
        let with_me = self.answering().iter().filter(|id| self.voters.contains(id)).count() + 1;
        if with_me >= self.majority() {
            let expected = format!("fewer than {} of {} voters", self.majority(), self.voters.len());
            let found =
                format!("replicas {} answer: start this one and the cell has its majority", numbers(&self.answering()));
            return unsafe_(expected, found);
        }
        Ok(())
    }

    /// Whether the operator has named exactly the others.
    fn confirmed(&self, accepted: Option<&[u64]>) -> Result<(), Refusal> {
        let named: Option<BTreeSet<u64>> = accepted.map(|ids| ids.iter().copied().collect());
        if named.as_ref().is_some_and(|named| named.iter().eq(self.others.keys())) {
            return Ok(());
        }
        let others: Vec<u64> = self.others.keys().copied().collect();
        let found = accepted.map_or("nothing".to_owned(), numbers);
        Err(Refusal::new(Code::RecoverUnconfirmed, format!("--i-accept-the-loss-of {}", numbers(&others)), found))
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |ids: &BTreeSet<u64>| numbers(&ids.iter().copied().collect::<Vec<_>>());
        writeln!(f, "replica:     {} of voters {}, learners {}", self.replica, set(&self.voters), set(&self.learners))?;
        writeln!(
            f,
            "log:         last index {} of term {}, known committed up to {}",
            self.last, self.term, self.commit
        )?;
        writeln!(f, "digest:      {}", hex::encode(self.digest))?;
        for (id, (address, answers)) in &self.others {
            let word = if *answers { "answers: stop it before you give it up" } else { "does not answer" };
            writeln!(f, "replica {id}:   {address} {word}")?;
        }
        writeln!(
            f,
            "root key:    {}",
            if self.root_here {
                "here"
            } else {
                "not here: put root.key in the identity folder, or no replica can join"
            }
        )?;
        writeln!(
            f,
            "at stake:    what the others acknowledged without this replica. Compare term and last index of all"
        )?;
        write!(
            f,
            "             survivors and recover the highest (term first); a backup may be newer than all of them."
        )
    }
}

/// `2,3`, or `none`.
pub(super) fn numbers(ids: &[u64]) -> String {
    if ids.is_empty() {
        return "none".to_owned();
    }
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

async fn go_on(
    config: &Config,
    files: &Files,
    card: &Card,
    survey: Survey,
    past_epoch: u64,
    external: Option<&Path>,
) -> Result<Recovered, Refusal> {
    let mut whole = survey.whole;
    super::restore::certify_anew(&mut whole.state, external)?;
    let known = whole.state.member(card.replica).cloned();
    let known = known.ok_or_else(|| {
        Refusal::new(Code::RecoverUnsafe, "a member of the cell", format!("replica {}", card.replica))
    })?;
    let beginning = Beginning {
        cause: Cause::Recovered,
        replica: card.replica,
        keys: key_set(config, files, card, &whole.state, &known, past_epoch).await?,
        member: Member { address: config.listen.to_string(), ..known },
        admit: None,
        past_epoch,
    };
    // What the log of Raft still holds of the lost incarnation's audit log is beside it before that goes.
    let files = AuditFiles::at(&config.data_dir);
    files.append(survey.audited).and_then(|()| files.sync()).map_err(|e| start_failed(e.into()))?;
    whole.state.begin_incarnation(wall_clock(), beginning)?;
    let (epoch, _) = latest(&whole.state)?;
    let kept = rebase::refound(&config.data_dir, ReplicaId(card.replica), &whole, &format!("before-epoch-{epoch}"));
    let kept = kept.map_err(start_failed)?;
    Ok(Recovered { kept: Some(kept), ..finished(config, card)? })
}

/// Only the record key of this replica, where the root is here to certify that. Else who opens it first sees to it.
async fn key_set(
    config: &Config,
    files: &Files,
    card: &Card,
    state: &State,
    me: &Member,
    past_epoch: u64,
) -> Result<Option<KeySetRow>, Refusal> {
    let active = state.active_root().map(|(id, _)| id);
    let active = active.ok_or_else(|| Refusal::new(Code::Internal, "an active root", "none"))?;
    let keyring = Keyring::open(config, files).await?;
    let root = match authority::open(files, card, &keyring, authority::kept(state, &active), &active).await {
        Err(refusal) if refusal.code == Code::IssuerUnavailable => return Ok(None),
        root => root?,
    };
    super::key_set::of_one(state, &root, me.record_key, past_epoch).map(Some)
}

fn latest(state: &State) -> Result<(u64, IncarnationRow), Refusal> {
    let row = state.incarnations().next_back().map(|(epoch, row)| (epoch, row.clone()));
    row.ok_or_else(|| Refusal::new(Code::Internal, "the beginning of an incarnation", "none"))
}

/// Reads the new store back: what it says is what the replica will start from.
fn finished(config: &Config, card: &Card) -> Result<Recovered, Refusal> {
    let survey = rebase::survey(&raft_options(config, card.replica)?).map_err(start_failed)?;
    let (epoch, began) = latest(&survey.whole.state)?;
    Ok(Recovered { epoch, began, index: survey.whole.state.applied().0, kept: None })
}

impl fmt::Display for Recovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, digest) = (self.began.from_index, hex::encode(self.began.from_digest));
        writeln!(f, "recovered:   index {from}, digest {digest}")?;
        writeln!(f, "incarnation: epoch {}, one voter, from index {}", self.epoch, self.index)?;
        writeln!(f, "given up:    {}: wipe them, they must not start again", numbers(&self.began.given_up))?;
        if let Some(kept) = &self.kept {
            writeln!(f, "old store:   {}", kept.display())?;
        }
        writeln!(
            f,
            "next:        ambitd run; then add replicas under new addresses or wiped ones (ambit raft add), and"
        )?;
        write!(
            f,
            "             let nodes attest: until its own verdict no node gets an SVID. Tokens and tickets are void."
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(replica: u64, voters: &[u64], learners: &[u64], answering: &[u64]) -> Findings {
        let all = voters.iter().chain(learners).filter(|id| **id != replica);
        Findings {
            replica,
            term: 3,
            last: 9,
            commit: 8,
            digest: [0; 32],
            voters: voters.iter().copied().collect(),
            learners: learners.iter().copied().collect(),
            others: all.map(|id| (*id, (format!("127.0.0.1:{id}"), answering.contains(id)))).collect(),
            root_here: true,
        }
    }

    #[test]
    fn only_a_voter_without_a_majority_in_reach_may_go_on() {
        for (replica, voters, learners, answering, safe) in [
            (1, &[1, 2, 3][..], &[][..], &[][..], true),
            (1, &[1, 2, 3], &[], &[2], false),
            (1, &[1, 2, 3, 4, 5], &[], &[2], true),
            (1, &[1, 2, 3, 4, 5], &[], &[2, 5], false),
            (1, &[1, 2], &[], &[], true),
            (1, &[1, 2], &[3], &[3], true),
            (3, &[1, 2], &[3], &[], false),
            (4, &[1, 2, 3], &[], &[], false),
            (1, &[1], &[], &[], false),
            (1, &[1], &[2], &[], false),
            (1, &[], &[], &[], false),
        ] {
            let outcome = of(replica, voters, learners, answering).safe();
            let code = outcome.as_ref().err().map(|r| r.code);
            assert_eq!(
                code,
                (!safe).then_some(Code::RecoverUnsafe),
                "{replica} of {voters:?} {learners:?} {answering:?}"
            );
        }
    }

    #[test]
    fn every_other_replica_must_be_named_and_nobody_else() {
        let found = of(1, &[1, 2, 3], &[4], &[]);
        for (named, good) in [
            (Some(&[2, 3, 4][..]), true),
            (Some(&[4, 2, 3, 3]), true),
            (Some(&[2, 3]), false),
            (Some(&[1, 2, 3, 4]), false),
            (Some(&[2, 3, 5]), false),
            (Some(&[]), false),
            (None, false),
        ] {
            let code = found.confirmed(named).err().map(|r| r.code);
            assert_eq!(code, (!good).then_some(Code::RecoverUnconfirmed), "{named:?}");
        }
    }
}
