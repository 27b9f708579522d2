//! Clients: one request after the other, retried under the same id at another replica until it is answered or given up.

use ambit_state::Command;
use std::fmt;

/// Who asks a replica for something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Asker {
    Client(usize),
    /// A replica of the cell, on its own account: what its chores commit.
    Replica(u64),
}

/// Whose request, and which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OpId {
    pub(crate) asker: Asker,
    pub(crate) number: u64,
}

/// What a client wants.
#[derive(Clone, Debug)]
pub(crate) enum Wish {
    Write(Box<Command>),
    /// A linearizable read. The index of the last write acknowledged to anyone before it began.
    Read {
        after: u64,
    },
}

/// A request under way.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub(crate) id: OpId,
    pub(crate) wish: Wish,
    pub(crate) tries: u32,
    /// Where it was sent last, and in which life of that machine.
    pub(crate) at: (u64, u64),
}

/// One client.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) made: u64,
    pub(crate) op: Option<Op>,
}

impl Client {
    pub(crate) fn new() -> Client {
        Client { made: 0, op: None }
    }
}

impl OpId {
    /// SHA-256 of the caller's identity, as the server would derive it.
    pub(crate) fn identity(&self) -> [u8; 32] {
        match self.asker {
            Asker::Client(n) => [u8::try_from(n + 1).unwrap_or(u8::MAX); 32],
            Asker::Replica(id) => {
                let mut out = [0x5a; 32];
                out[24..].copy_from_slice(&id.to_be_bytes());
                out
            }
        }
    }

    /// The request id; never zeros, and unique of its asker.
    pub(crate) fn request(&self) -> [u8; 16] {
        let mut out = [0xa5; 16];
        out[8..].copy_from_slice(&self.number.to_be_bytes());
        out
    }
}

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.asker {
            Asker::Client(n) => write!(f, "client {n}'s request {}", self.number),
            Asker::Replica(id) => write!(f, "replica {id}'s own request {}", self.number),
        }
    }
}
