//! The root sealed to TPMs: everything wrapped anew, and then no key in a file that opens it.

use super::Replica;
use ambit_identity::wrap::{Purpose, wrap_for};
use ambit_identity::{Root, fingerprint};
use ambit_model::bundle::RootState;
use ambit_model::{Code, Refusal};
use ambit_state::sealing::Seal;
use ambit_state::{Applied, Command};
use std::collections::BTreeMap;

impl Replica {
    /// Commits what was wrapped to these keys of replicas, refused where they are others by then. A cell without attested
    /// replicas, where a change of keys is nothing, has it in the form that every release reads.
    pub async fn propose_wrapped(&self, to: BTreeMap<u64, Vec<u8>>, command: Command) -> Result<Applied, Refusal> {
        self.propose_own(self.wrapped(to, command)).await
    }
    /// The same, before it is committed.
    pub fn wrapped(&self, to: BTreeMap<u64, Vec<u8>>, command: Command) -> Command {
        let named = self.local(ambit_state::State::has_attested);
        if named { Command::WrappedTo(to, Box::new(command)) } else { command }
    }
}

/// Wraps roots' keys to replicas that cannot open them yet, so that the loss of no replica is that of the root. Whoever
/// can open one does it, the leader where it can.
pub async fn wrap_roots(replica: &Replica) -> Result<(), Refusal> {
    let (roots, members) = replica.local(|s| (s.roots(), s.wrap_keys()));
    for (id, row) in roots.into_iter().filter(|(_, row)| row.state != RootState::Revoked) {
        let mut lacking = members.clone();
        lacking.retain(|n, _| !row.wrapped.contains_key(n));
        if lacking.is_empty() {
            continue;
        }
        let Ok(root) = replica.open_root(&id).await else { continue };
        let mut wrapped = BTreeMap::new();
        for (n, public) in &lacking {
            wrapped.insert(*n, ambit_identity::wrap::wrap(public, &root.key().pkcs8())?);
        }
        let command = over_authority(&root, replica.wrapped(lacking, Command::WrapRoot(id, wrapped)));
        match replica.propose_own(command).await?.outcome {
            // Another authority was imported meanwhile, and wrapped to all: the next look sees what lacks then.
            Err(refusal) if refusal.code == Code::StaleRevision => {}
            outcome => drop(outcome?),
        }
    }
    Ok(())
}

/// What was made with the key of this root: where that is the key of an authority under an external root, refused once another
/// one signs, in whose place it would stand.
pub fn over_authority(root: &Root, command: Command) -> Command {
    if root.above().is_empty() {
        return command;
    }
    Command::OverAuthority(fingerprint(root.der()), root.key().spki_sha256(), Box::new(command))
}

/// Wraps the keys of all roots and JWT authorities to the wrap keys of now.
///
/// # Errors
/// [`Code::IssuerUnavailable`] where this replica cannot open one of them.
pub async fn make(replica: &Replica) -> Result<Command, Refusal> {
    let (to, roots, jwt) = replica.local(|s| {
        let to: BTreeMap<u64, Vec<u8>> = s.members().map(|(id, m)| (id, m.wrap_key.clone())).collect();
        let roots: Vec<_> =
            s.roots().into_iter().filter(|(_, row)| row.state != RootState::Revoked).map(|(id, _)| id).collect();
        let jwt: Vec<_> = s
            .jwt_authorities()
            .filter(|row| !row.wrapped.is_empty())
            .map(|row| (row.kid.clone(), row.wrapped.get(&replica.id()).cloned()))
            .collect();
        (to, roots, jwt)
    });
    let all = |purpose, key: &[u8]| -> Result<BTreeMap<u64, Vec<u8>>, Refusal> {
        to.iter().map(|(id, public)| Ok((*id, wrap_for(purpose, public, key)?))).collect()
    };
    let mut opened = Vec::new();
    let mut seal = Seal { to: to.clone(), roots: BTreeMap::new(), jwt: BTreeMap::new() };
    for id in roots {
        let root = replica.open_root(&id).await?;
        seal.roots.insert(id, all(Purpose::Key, &root.key().pkcs8())?);
        opened.push(root);
    }
    for (kid, mine) in jwt {
        let none = || Refusal::new(Code::IssuerUnavailable, "a JWT authority wrapped to this replica", kid.clone());
        let key = replica.keyring().unwrap_for(Purpose::JwtAuthority, &mine.ok_or_else(none)?).await?;
        seal.jwt.insert(kid, all(Purpose::JwtAuthority, &key)?);
    }
    let seal = Command::SealRoots(Box::new(seal));
    Ok(opened.iter().fold(seal, |command, root| over_authority(root, command)))
}

/// Once the root is sealed, and this replica's TPM was seen to open it, nothing else here does. A file that is removed may
/// still be on the disk, or in a copy of it: who must exclude that rotates the root after sealing it.
pub(super) async fn forget_unsealed(replica: &Replica) -> Result<(), Refusal> {
    let wrapped = replica.local(|s| {
        let me = s.member(replica.id()).filter(|member| s.wraps_to_tpm(replica.id(), member));
        let (_, row) = s.active_root()?;
        me.filter(|_| s.is_sealed()).and_then(|_| row.wrapped.get(&replica.id()).cloned())
    });
    let Some(wrapped) = wrapped else { return Ok(()) };
    if replica.inner.files.unsealed()?.is_empty() {
        return Ok(());
    }
    replica.keyring().tpm_opens(Purpose::Key, &wrapped).await?;
    let gone = replica.inner.files.forget_unsealed()?;
    replica.keyring().forget_file();
    tracing::info!(files = gone.join(", "), "the root is sealed: keys in files are removed");
    Ok(())
}
