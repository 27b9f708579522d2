//! Entries: create, update, delete, list.

use super::{OrStatus, request_id};
use crate::authorise::actor;
use crate::replica::Replica;
use ambit_model::policy::Peers;
use ambit_model::{ClusterId, Code, Entry, EntryId, Refusal, Revision, Selector};
use ambit_proto::v1;
use ambit_state::command::Presence;
use ambit_state::objects::EntryRow;
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
        let applied = self.0.propose(actor.client, id, Command::RetireEntries(ids)).await.or_status()?;
        self.results(m.ids, applied).or_status()
    }

    async fn batch_update_entry(
        &self,
        request: Request<v1::BatchUpdateEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        bounded(m.items.len()).or_status()?;
        let entries: Vec<(Entry, Presence)> = m.items.iter().map(update).collect::<Result<_, _>>().or_status()?;
        let names: Vec<String> = entries.iter().map(|(e, _)| e.id.to_string()).collect();
        let applied = self.0.propose(actor.client, id, Command::ReplaceEntries(entries)).await.or_status()?;
        self.results(names, applied).or_status()
    }

    async fn list_entries(
        &self,
        request: Request<v1::ListEntriesRequest>,
    ) -> Result<Response<v1::ListEntriesResponse>, Status> {
        let reach = actor(&request)?.client.reach;
        let m = request.into_inner();
        let filter = Filter::of(&m).or_status()?;
        let after: Option<EntryId> = match m.after_id.as_str() {
            "" => None,
            id => Some(id.parse().or_status()?),
        };
        let size = if m.page_size == 0 { usize::MAX } else { m.page_size as usize };
        let mut entries: Vec<v1::Entry> = self
            .0
            .read(|s| {
                let rows = s.entries_after(after.as_ref()).filter(|row| reach.has(&row.entry.cluster));
                let rows = rows.filter(|row| filter.takes(&row.entry));
                rows.take(size.saturating_add(1)).map(message).collect()
            })
            .await
            .or_status()?;
        let more = entries.len() > size;
        entries.truncate(size);
        let next_after_id = entries.last().filter(|_| more).map(|e| e.id.clone()).unwrap_or_default();
        Ok(Response::new(v1::ListEntriesResponse { entries, next_after_id }))
    }

    async fn get_entry(&self, request: Request<v1::GetEntryRequest>) -> Result<Response<v1::Entry>, Status> {
        let reach = actor(&request)?.client.reach;
        let id: EntryId = request.into_inner().id.parse().or_status()?;
        let read = |s: &ambit_state::State| s.entry(&id).filter(|row| reach.has(&row.entry.cluster)).map(message);
        let found = self.0.read(read).await.or_status()?;
        found
            .map(Response::new)
            .ok_or_else(|| Refusal::new(Code::NotFound, "an entry of this cell", id.as_str()))
            .or_status()
    }
}

/// With the revision that wrote it.
pub(super) fn message(row: &EntryRow) -> v1::Entry {
    v1::Entry { revision: row.revision.0, ..v1::Entry::from(&row.entry) }
}

fn update(m: &v1::EntryUpdate) -> Result<(Entry, Presence), Refusal> {
    let entry = m.entry.as_ref().ok_or_else(|| Refusal::new(Code::BadRequest, "an entry", "none"))?;
    let presence = match (m.expected_revision, m.create) {
        (0, true) => Presence::Whatever,
        (0, false) => Presence::There,
        (revision, false) => Presence::At(Revision(revision)),
        (_, true) => {
            return Err(Refusal::new(Code::BadRequest, "an expected revision, or create", "both"));
        }
    };
    Ok((entry.try_into()?, presence))
}

/// What a list is asked for.
struct Filter {
    cluster: Option<ClusterId>,
    ids: Option<Peers>,
    selectors: Vec<Selector>,
    downstream: bool,
    admin: bool,
    with: Option<String>,
}

impl Filter {
    fn of(m: &v1::ListEntriesRequest) -> Result<Filter, Refusal> {
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Ok(Filter {
            cluster: given(&m.cluster).map(|cluster| cluster.parse()).transpose()?,
            ids: given(&m.spiffe_id).map(|ids| ids.parse()).transpose()?,
            selectors: m.selectors.iter().map(|s| s.parse()).collect::<Result<_, _>>()?,
            downstream: m.downstream,
            admin: m.admin,
            with: given(&m.federates_with),
        })
    }
    fn takes(&self, entry: &Entry) -> bool {
        let federates = |with: &String| {
            entry.federates_with.iter().any(|td| td.as_str() == with)
                || entry.extras.federates_with_groups.iter().any(|group| group.as_str() == with)
        };
        self.cluster.as_ref().is_none_or(|cluster| *cluster == entry.cluster)
            && (entry.extras.downstream || !self.downstream)
            && (entry.extras.admin || !self.admin)
            && self.with.as_ref().is_none_or(federates)
            && self.ids.as_ref().is_none_or(|ids| ids.contains(&entry.spiffe_id))
            && self.selectors.iter().all(|selector| entry.selectors.contains(selector))
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
