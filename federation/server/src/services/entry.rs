//! Entries: create, update, delete, list.

use super::{OrStatus, request_id};
use crate::authorise::{Actor, actor};
use crate::replica::Replica;
use ambit_model::policy::Peers;
use ambit_model::{ClusterId, Code, Entry, EntryId, Refusal, Revision, Selector};
use ambit_proto::v1;
use ambit_state::command::Presence;
use ambit_state::objects::EntryRow;
use ambit_state::{Command, Reply, State};
use prost::Message;
use tonic::{Request, Response, Status};

/// Entries in one request.
const BATCH_MAX: usize = 1_000;
/// Entries in one page of a list.
const PAGE_MAX: usize = 5_000;
/// Bytes of one page: what a client of gRPC takes unless told otherwise is 4 MiB.
const PAGE_BYTES_MAX: usize = 3 << 20;

pub(crate) struct Entries(pub(crate) Replica);

#[tonic::async_trait]
impl v1::entry_registry_server::EntryRegistry for Entries {
    async fn batch_create_entry(
        &self,
        request: Request<v1::BatchCreateEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let items = m.entries.iter().map(|entry| (entry.id.clone(), entry.try_into())).collect();
        self.write(actor, request_id(&m.request_id)?, items, Command::CreateEntries).await.or_status()
    }

    async fn batch_delete_entry(
        &self,
        request: Request<v1::BatchDeleteEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let items = m.items.iter().map(|item| (item.id.clone(), removal(item))).collect();
        self.write(actor, request_id(&m.request_id)?, items, Command::RemoveEntries).await.or_status()
    }

    async fn batch_update_entry(
        &self,
        request: Request<v1::BatchUpdateEntryRequest>,
    ) -> Result<Response<v1::BatchEntryResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let named = |item: &v1::EntryUpdate| item.entry.as_ref().map(|entry| entry.id.clone()).unwrap_or_default();
        let items = m.items.iter().map(|item| (named(item), update(item))).collect();
        self.write(actor, request_id(&m.request_id)?, items, Command::ReplaceEntries).await.or_status()
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
        let size = match m.page_size as usize {
            0 => PAGE_MAX,
            asked => asked.min(PAGE_MAX),
        };
        let read = |s: &State| {
            let rows = s.entries_after(after.as_ref()).filter(|row| reach.has(&row.entry.cluster));
            page(rows.filter(|row| filter.takes(&row.entry)).map(message), size)
        };
        Ok(Response::new(self.0.read(read).await.or_status()?))
    }

    async fn get_entry(&self, request: Request<v1::GetEntryRequest>) -> Result<Response<v1::Entry>, Status> {
        let reach = actor(&request)?.client.reach;
        let id: EntryId = request.into_inner().id.parse().or_status()?;
        let read = |s: &State| s.entry(&id).filter(|row| reach.has(&row.entry.cluster)).map(message);
        let found = self.0.read(read).await.or_status()?;
        found
            .map(Response::new)
            .ok_or_else(|| Refusal::new(Code::NotFound, "an entry of this cell", id.as_str()))
            .or_status()
    }
}

/// The first of them, and where to go on. A page has one entry at least, however long it is.
fn page(entries: impl Iterator<Item = v1::Entry>, size: usize) -> v1::ListEntriesResponse {
    let (mut page, mut bytes) = (v1::ListEntriesResponse::default(), 0);
    for entry in entries {
        bytes += entry.encoded_len();
        if page.entries.len() == size || (bytes > PAGE_BYTES_MAX && !page.entries.is_empty()) {
            page.next_after_id = page.entries.last().map(|last| last.id.clone()).unwrap_or_default();
            break;
        }
        page.entries.push(entry);
    }
    page
}

/// With the revision that wrote it.
pub(super) fn message(row: &EntryRow) -> v1::Entry {
    v1::Entry { revision: row.revision.0, ..v1::Entry::from(&row.entry) }
}

fn update(m: &v1::EntryUpdate) -> Result<(Entry, Presence), Refusal> {
    let entry = m.entry.as_ref().ok_or_else(|| Refusal::new(Code::BadRequest, "an entry", "none"))?;
    let presence = match (m.expected_revision, m.create) {
        (revision, false) => at(revision),
        (0, true) => Presence::Whatever,
        (_, true) => {
            return Err(Refusal::new(Code::BadRequest, "an expected revision, or create", "both"));
        }
    };
    Ok((entry.try_into()?, presence))
}

fn removal(m: &v1::EntryRemoval) -> Result<(EntryId, Presence), Refusal> {
    Ok((m.id.parse()?, at(m.expected_revision)))
}

fn at(revision: u64) -> Presence {
    if revision == 0 { Presence::There } else { Presence::At(Revision(revision)) }
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

impl Entries {
    /// What of a batch can be read is written; each item has its own outcome.
    async fn write<T>(
        &self,
        actor: Actor,
        id: [u8; 16],
        items: Vec<(String, Result<T, Refusal>)>,
        command: fn(Vec<T>) -> Command,
    ) -> Result<Response<v1::BatchEntryResponse>, Refusal> {
        if !(1..=BATCH_MAX).contains(&items.len()) {
            return Err(Refusal::new(Code::BadRequest, format!("1-{BATCH_MAX} items"), items.len().to_string()));
        }
        let mut readable = Vec::new();
        let mut outcomes: Vec<(String, Result<(), Refusal>)> =
            items.into_iter().map(|(name, item)| (name, item.map(|item| readable.push(item)))).collect();
        let mut revision = 0;
        if !readable.is_empty() {
            let applied = self.0.propose(actor.client, id, command(readable)).await?;
            revision = applied.index.0;
            let Reply::Items(written) = applied.outcome? else {
                return Err(Refusal::new(Code::Internal, "results per item", "another outcome"));
            };
            let read = outcomes.iter_mut().filter(|(_, outcome)| outcome.is_ok());
            read.zip(written).for_each(|((_, outcome), written)| *outcome = written);
        }
        let results = outcomes
            .into_iter()
            .map(|(id, outcome)| match outcome {
                Ok(()) => v1::EntryStatus { id, code: "ok".into(), message: String::new() },
                Err(r) => v1::EntryStatus { id, code: r.code.to_string(), message: r.to_string() },
            })
            .collect();
        Ok(Response::new(v1::BatchEntryResponse { results, revision }))
    }
}
