//! The audit log for outsiders: its signed head and its hashes (C2SP tlog-tiles), by which anybody sees that it only grows. Not
//! its records: who did what is for the cell's auditors.

use crate::replica::Replica;
use crate::replica::audit::unreadable;
use ambit_audit::tile::Tile;
use ambit_model::{Code, Refusal};

/// What is asked for below `audit/EPOCH/`, and its media type.
pub(super) fn page(replica: &Replica, epoch: &str, path: &str) -> Result<(Vec<u8>, &'static str), Refusal> {
    let not_found = || Refusal::new(Code::NotFound, "a part of the audit log", path);
    let (present, size) = replica.audited()?;
    if epoch != present.to_string() {
        return Err(not_found());
    }
    if path == "checkpoint" {
        return Ok((replica.audit_head()?.checkpoint.into_bytes(), "text/plain; charset=utf-8"));
    }
    let view = replica.audit()?.view(present).map_err(unreadable)?;
    let tile = view.tile(Tile::parse(path)?, size).ok_or_else(not_found)?.map_err(unreadable)?;
    Ok((tile, "application/octet-stream"))
}
