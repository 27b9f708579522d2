//! The root sealed to TPMs, and the shares that open it where all of them are lost.

use super::Authorities;
use crate::authorise::Actor;
use crate::replica::{random, seal, ticket};
use ambit_identity::ShareSet;
use ambit_identity::wrap::{Purpose, wrap_for};
use ambit_model::act::ShareHolder;
use ambit_model::{Act, Code, Refusal};
use ambit_proto::{convert, v1};
use ambit_state::Command;

/// A seal made anew so often when a key or a replica came in between.
const TRIES: usize = 4;

impl Authorities {
    /// Who can split the root's key does, once the cell agreed; each share leaves only as its holder can read it.
    pub(super) async fn share(
        &self,
        actor: Actor,
        id: [u8; 16],
        m: v1::ShareRootRequest,
    ) -> Result<v1::ShareRootResponse, Refusal> {
        let root = match m.root.as_str() {
            "" => self.0.fingerprint(),
            text => crate::services::parse_fingerprint(text)?,
        };
        let (threshold, of) = (u8::try_from(m.threshold), u8::try_from(m.holders.len()));
        let (Ok(threshold), Ok(of)) = (threshold, of) else {
            return Err(Refusal::new(Code::BadRequest, "a few holders", m.holders.len().to_string()));
        };
        let holders: Vec<ShareHolder> = m
            .holders
            .into_iter()
            .map(|h| Ok(ShareHolder { name: h.name.parse()?, key: h.key }))
            .collect::<Result<_, Refusal>>()?;
        // Before anything is committed: whoever cannot open the root or encrypt to a holder commits nothing.
        let opened = self.0.open_root(&root).await?;
        let set = ShareSet::new(&opened, self.0.trust_domain(), threshold, of, random()?)?;
        let mut shares = Vec::new();
        for (holder, share) in holders.iter().zip(set.split(&opened)?) {
            let wrapped = wrap_for(Purpose::RootShare, &holder.key, share.text()?.as_bytes())?;
            shares.push(v1::WrappedShare { holder: holder.name.to_string(), index: share.index().into(), wrapped });
        }
        let act = Act::ShareRoot { root, threshold, holders };
        let command = Command::Act { act, approved: convert::approved(m.approved)?, by: actor.name };
        let command = seal::over_authority(&opened, command);
        drop(opened);
        self.0.propose(actor.client, id, command).await?.outcome?;
        tracing::info!(root = hex::encode(root), threshold, of, "recovery shares made");
        Ok(v1::ShareRootResponse { root: hex::encode(root), shares })
    }

    /// Seals, or says what lacks.
    pub(super) async fn seal(&self, actor: Actor, dry_run: bool) -> Result<v1::SealRootResponse, Refusal> {
        let answer = |lacks| v1::SealRootResponse { lacks, root_form: self.0.local(|s| s.root_form()) };
        if dry_run {
            let lacks = self.0.read(|s| s.seal_lacks()).await?;
            return Ok(answer(lacks));
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let command = seal::make(&self.0).await?;
            // Each try wraps anew and is another command, so each has a request id of its own.
            let outcome = match self.0.propose(actor.client.clone(), random()?, command).await?.outcome {
                Err(refusal) if refusal.code == Code::StaleRevision && tries < TRIES => continue,
                outcome => outcome,
            };
            outcome?;
            break;
        }
        // What tickets are sealed with was wrapped to keys in files too.
        let mut rotated = ticket::rotate(&self.0).await;
        while matches!(&rotated, Err(refusal) if refusal.code == Code::StaleRevision) && tries < TRIES {
            tries += 1;
            rotated = ticket::rotate(&self.0).await;
        }
        if let Err(refusal) = rotated {
            // The root is sealed all the same, and the key of tickets is made anew each day.
            tracing::warn!(%refusal, "the ticket key that was wrapped to files is still in use");
        }
        tracing::info!(by = actor.name, "the root is sealed to the TPMs of the cell");
        Ok(answer(Vec::new()))
    }
}
