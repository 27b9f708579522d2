//! Clients: one request after the other, retried under the same id at another replica until it is answered or given up.

use ambit_state::Command;

/// Which client, and which of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OpId {
    pub(crate) client: usize,
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

    /// SHA-256 of the caller's identity, as the server would derive it.
    pub(crate) fn identity(number: usize) -> [u8; 32] {
        [u8::try_from(number + 1).unwrap_or(u8::MAX); 32]
    }

    /// The request id; never zeros, and unique of its client.
    pub(crate) fn request(number: u64) -> [u8; 16] {
        let mut out = [0xa5; 16];
        out[8..].copy_from_slice(&number.to_be_bytes());
        out
    }
}
