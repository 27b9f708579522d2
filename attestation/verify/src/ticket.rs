//! The plain text of a ticket: what one replica promised a node, so that any replica can take the answer.
//!
//! Sealing (AEAD under a key of the cell) is the server's. A [`TicketBody`] made by [`TicketBody::decode`] is only as
//! true as the seal it was opened from: decode nothing that an AEAD of this cell did not authenticate.

use crate::chain::Backing;
use crate::ek::{EkClass, EkMake, NAME_BYTES_MAX};
use crate::hash::Bank;
use crate::wire::{Malformed, Reader};
use ambit_model::{ClusterId, Code, NodeId, Refusal, Revision, Stamp};
use std::fmt;
use zeroize::Zeroizing;

const VERSION: u8 = 2;

/// What a ticket says.
pub struct TicketBody {
    pub(crate) cluster: ClusterId,
    pub(crate) node: NodeId,
    pub(crate) backing: Backing,
    pub(crate) ek_public_sha256: [u8; 32],
    pub(crate) ak_public_sha256: [u8; 32],
    pub(crate) secret: Zeroizing<[u8; 32]>,
    pub(crate) agent_nonce: [u8; 32],
    pub(crate) server_nonce: [u8; 32],
    pub(crate) bank: Bank,
    pub(crate) pcr_mask: u32,
    pub(crate) ima_offset: u64,
    pub(crate) deadline: Stamp,
    pub(crate) endorsement_revision: Revision,
    pub(crate) policy_revision: Revision,
}

impl TicketBody {
    /// The cluster that the node asked to enrol in.
    pub fn cluster(&self) -> &ClusterId {
        &self.cluster
    }
    /// The node.
    pub fn node(&self) -> NodeId {
        self.node
    }
    /// The server's nonce: what is consumed, once.
    pub fn nonce(&self) -> [u8; 32] {
        self.server_nonce
    }
    /// After this instant the ticket is refused, and the consumed nonce may be forgotten.
    pub fn deadline(&self) -> Stamp {
        self.deadline
    }
    /// SHA-256 of the join token that made the EK expected, if it was one.
    pub fn join_token(&self) -> Option<[u8; 32]> {
        self.backing.join_token
    }

    /// The body as bytes to seal.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(Vec::with_capacity(400));
        out.push(VERSION);
        let cluster = self.cluster.as_str().as_bytes();
        // A cluster name has at most 63 bytes, by its grammar.
        out.push(u8::try_from(cluster.len()).unwrap_or(u8::MAX));
        out.extend_from_slice(cluster);
        out.extend_from_slice(&self.node.0);
        out.push(self.backing.class.wire());
        for part in
            [&self.ek_public_sha256, &self.ak_public_sha256, &*self.secret, &self.agent_nonce, &self.server_nonce]
        {
            out.extend_from_slice(part);
        }
        out.extend_from_slice(&self.bank.hash().id().to_be_bytes());
        out.extend_from_slice(&self.pcr_mask.to_be_bytes());
        for number in [self.ima_offset, self.deadline.0, self.endorsement_revision.0, self.policy_revision.0] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        for hash in [&self.backing.join_token, &self.backing.root_sha256] {
            match hash {
                None => out.push(0),
                Some(hash) => {
                    out.push(1);
                    out.extend_from_slice(hash);
                }
            }
        }
        match &self.backing.make {
            EkMake::Unnamed => out.push(0),
            EkMake::Unreadable => out.push(1),
            EkMake::Named { manufacturer, model } => {
                out.push(2);
                // Neither is longer than NAME_BYTES_MAX, by how it was read.
                for text in [manufacturer, model] {
                    out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
                    out.extend_from_slice(text.as_bytes());
                }
            }
        }
        out
    }

    /// Reads a body that an AEAD of this cell opened. Strict: one encoding for each body.
    pub fn decode(bytes: &[u8]) -> Result<TicketBody, Refusal> {
        Self::read(bytes).map_err(|e| e.refuse(Code::TicketInvalid, "ticket of this version"))
    }

    fn read(bytes: &[u8]) -> Result<TicketBody, Malformed> {
        let mut r = Reader::new(bytes);
        if r.u8("version")? != VERSION {
            return Err(Malformed::new("version", 0));
        }
        let n = usize::from(r.u8("cluster")?);
        let cluster = std::str::from_utf8(r.take(n, "cluster")?)
            .ok()
            .and_then(|s| s.parse().ok())
            .ok_or(Malformed::new("cluster", 1))?;
        let node = NodeId(r.array("node")?);
        let class = EkClass::from_wire(r.u8("EK class")?).ok_or(Malformed::new("EK class", r.at()))?;
        let ek_public_sha256 = r.array("EK hash")?;
        let ak_public_sha256 = r.array("AK hash")?;
        let secret = Zeroizing::new(r.array("secret")?);
        let agent_nonce = r.array("agent nonce")?;
        let server_nonce = r.array("server nonce")?;
        let bank = match r.u16("bank")? {
            0x000b => Bank::Sha256,
            0x000c => Bank::Sha384,
            _ => return Err(Malformed::new("bank", r.at())),
        };
        let pcr_mask = r.u32("PCR mask")?;
        let ima_offset = r.u64("IMA offset")?;
        let deadline = Stamp(r.u64("deadline")?);
        let endorsement_revision = Revision(r.u64("endorsement revision")?);
        let policy_revision = Revision(r.u64("policy revision")?);
        let join_token = optional(&mut r, "join token")?;
        let root_sha256 = optional(&mut r, "EK root")?;
        let make = match r.u8("EK make")? {
            0 => EkMake::Unnamed,
            1 => EkMake::Unreadable,
            2 => EkMake::Named { manufacturer: name(&mut r)?, model: name(&mut r)? },
            _ => return Err(Malformed::new("EK make", r.at())),
        };
        r.end("trailing bytes")?;
        Ok(TicketBody {
            cluster,
            node,
            backing: Backing { class, root_sha256, make, join_token },
            ek_public_sha256,
            ak_public_sha256,
            secret,
            agent_nonce,
            server_nonce,
            bank,
            pcr_mask,
            ima_offset,
            deadline,
            endorsement_revision,
            policy_revision,
        })
    }
}

fn optional(r: &mut Reader<'_>, what: &'static str) -> Result<Option<[u8; 32]>, Malformed> {
    match r.u8(what)? {
        0 => Ok(None),
        1 => Ok(Some(r.array(what)?)),
        _ => Err(Malformed::new(what, r.at())),
    }
}

fn name(r: &mut Reader<'_>) -> Result<String, Malformed> {
    let at = r.at();
    let n = usize::from(r.u8("EK make")?);
    let text = std::str::from_utf8(r.take(n, "EK make")?).ok().filter(|_| n <= NAME_BYTES_MAX);
    text.map(str::to_owned).ok_or(Malformed::new("EK make", at))
}

impl fmt::Debug for TicketBody {
    /// Never the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketBody").field("cluster", &self.cluster).field("node", &self.node).finish_non_exhaustive()
    }
}
