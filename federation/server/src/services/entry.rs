//! Entries: create, delete, list.

use super::{OrStatus, request_id};
use crate::authorise::actor;
use crate::replica::Replica;
use ambit_model::{Code, Entry, EntryId, Refusal};
use ambit_proto::v1;
use ambit_state::{Command, Reply};
use tonic::{Request, Response, Status};

/// Entries in one request.
const BATCH_MAX: usize = 1_000;

pub(crate) struct Entries(pub(crate) Replica);

#[tonic::async_trait]
impl v1::entry_registry_server::EntryRegistry for Entries {
    async fn batch_create_entry(
        &self,
        request: Request<v1::BatchCreateEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        bounded(m.entries.len()).or_status()?;
        let entries: Vec<Entry> = m.entries.iter().map(Entry::try_from).collect::<Result<_, _>>().or_status()?;
        let names: Vec<String> = entries.iter().map(|e| e.id.to_string()).collect();
        let applied = self.0.propose(actor.client, id, Command::CreateEntries(entries)).await.or_status()?;
        self.results(names, applied).or_status()
    }

    async fn batch_delete_entry(
        &self,
        request: Request<v1::BatchDeleteEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        bounded(m.ids.len()).or_status()?;
        let ids: Vec<EntryId> = m.ids.iter().map(|i| i.parse()).collect::<Result<_, _>>().or_status()?;
        let applied = self.0.propose(actor.client, id, Command::DeleteEntries(ids)).await.or_status()?;
        self.results(m.ids, applied).or_status()
    }

    async fn list_entries(
        &self,
        _: Request<v1::ListEntriesRequest>,
    ) -> Result<Response<v1::ListEntriesResponse>, Status> {
        let entries = self.0.read(|s| s.entries().map(|r| v1::Entry::from(&r.entry)).collect()).await.or_status()?;
        Ok(Response::new(v1::ListEntriesResponse { entries }))
    }

    async fn get_entry(&self, request: Request<v1::GetEntryRequest>) -> Result<Response<v1::Entry>, Status> {
        let id: EntryId = request.into_inner().id.parse().or_status()?;
        let found = self.0.read(|s| s.entry(&id).map(|r| v1::Entry::from(&r.entry))).await.or_status()?;
        found
            .map(Response::new)
            .ok_or_else(|| Refusal::new(Code::NotFound, "an entry of this cell", id.as_str()))
            .or_status()
    }
}

fn bounded(n: usize) -> Result<(), Refusal> {
    if (1..=BATCH_MAX).contains(&n) {
        return Ok(());
    }
    Err(Refusal::new(Code::BadRequest, format!("1-{BATCH_MAX} items"), n.to_string()))
}

impl Entries {
    fn results(
        &self,
        ids: Vec<String>,
        applied: ambit_state::Applied,
    ) -> Result<Response<v1::BatchEntryResponse>, Refusal> {
        let revision = applied.index.0;
        let Reply::Items(items) = applied.outcome? else {
            return Err(Refusal::new(Code::Internal, "results per item", "another outcome"));
        };
        let results = ids
            .into_iter()
            .zip(items)
            .map(|(id, item)| match item {
                Ok(()) => v1::EntryStatus { id, code: "ok".into(), message: String::new() },
                Err(r) => v1::EntryStatus { id, code: r.code.to_string(), message: r.to_string() },
            })
            .collect();
        Ok(Response::new(v1::BatchEntryResponse { results, revision }))
    }
}
