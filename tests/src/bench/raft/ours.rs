//! Our side: a cell of real replicas. A write creates an entry under a request id of its own; a read gets it.

use super::load::Client;
use super::{MEMBERS, System, VALUE_BYTES};
use crate::cell::{Cell, fresh};
use crate::process::Started;
use crate::soft_tpm::maker::{CaKind, Maker};
use ambit_proto::v1;
use ambit_proto::v1::cluster_registry_client::ClusterRegistryClient;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use anyhow::Result;
use prost::Message;
use tonic::Status;
use tonic::transport::Channel;

pub(super) struct Ours {
    cell: Cell,
}

impl Ours {
    /// Three voters and the cluster that all entries are of.
    pub(super) async fn start() -> Result<Ours> {
        let cell = Cell::start("west", MEMBERS).await?;
        let request = v1::RegisterClusterRequest {
            request_id: fresh(),
            name: "bench".to_owned(),
            ek_root_classes: vec!["lab".to_owned()],
            ek_roots_der: vec![Maker::new(CaKind::P256)?.root],
            attest_interval_s: 60,
        };
        let call = |channel| {
            let request = request.clone();
            async move { ClusterRegistryClient::new(channel).register_cluster(request).await }
        };
        cell.insist(call).await?;
        Ok(Ours { cell })
    }

    /// The last entry in a member's Raft log.
    pub(super) async fn last_index(&self, member: usize) -> Result<u64> {
        Ok(self.cell.status(member).await?.commit_index)
    }

    /// A counter or gauge of a member's metrics page.
    pub(super) fn metric(&self, member: usize, name: &str) -> Result<f64> {
        let page = self.cell.metrics_page(member)?;
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.map_or(Ok(0.0), str::parse)?)
    }
}

impl System for Ours {
    type Client = Entries;

    async fn connect(&self, member: usize) -> Result<Entries> {
        Ok(Entries { client: EntryRegistryClient::new(self.cell.admin(member).await?) })
    }
    async fn leader(&self) -> Result<usize> {
        self.cell.leader().await
    }
    fn kill(&mut self, member: usize) -> Result<()> {
        self.cell.kill(member)
    }
    fn restart(&mut self, member: usize) -> Result<()> {
        self.cell.restart(member)
    }
    fn process(&mut self, member: usize) -> Result<&mut Started> {
        self.cell.process(member)
    }
}

/// A connection to one replica, as the administrator.
#[derive(Clone)]
pub(super) struct Entries {
    client: EntryRegistryClient<Channel>,
}

impl Client for Entries {
    async fn put(&mut self, n: u64) -> Result<(), Status> {
        // Never zero, and the same whenever this entry is sent again.
        let request_id = [u64::MAX.to_be_bytes(), n.to_be_bytes()].concat();
        let request = v1::BatchCreateEntryRequest { request_id, entries: vec![entry(n)] };
        let answer = self.client.batch_create_entry(request).await?.into_inner();
        match answer.results.first() {
            Some(result) if result.code == "ok" => Ok(()),
            other => Err(Status::aborted(format!("{other:?}"))),
        }
    }
    async fn get(&mut self, n: u64) -> Result<(), Status> {
        let answer = self.client.get_entry(v1::GetEntryRequest { id: name(n) }).await?.into_inner();
        if answer.id == name(n) { Ok(()) } else { Err(Status::aborted("another entry")) }
    }
}

fn name(n: u64) -> String {
    format!("bench-{n:09}")
}

/// An entry whose message has the size of the other side's value.
fn entry(n: u64) -> v1::Entry {
    let mut entry = v1::Entry {
        id: name(n),
        spiffe_id: format!("spiffe://west/bench/{n:09}/"),
        cluster: "bench".to_owned(),
        selectors: vec!["unix:uid:1000".to_owned(), format!("cgroup:workload-{n:09}")],
        ttl_seconds: 3_600,
        ..Default::default()
    };
    // A path of 128 bytes or more has a length of two bytes.
    let pad = VALUE_BYTES.saturating_sub(entry.encoded_len() + 1);
    entry.spiffe_id.extend(std::iter::repeat_n('x', pad));
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_as_large_as_a_value() {
        for n in [0, 7, 999_999_999] {
            assert_eq!(entry(n).encoded_len(), VALUE_BYTES);
        }
    }
}
