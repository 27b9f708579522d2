//! The audit log: its head, its records, proofs of them; and what was refused without being committed.

use super::{OrStatus, request_id};
use crate::authorise::{LeftOut, actor, authorise};
use crate::replica::Replica;
use crate::replica::audit::{READ_BYTES_MAX, proof_of, unreadable};
use ambit_audit::{Record, consistency};
use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_state::Command;
use ambit_transport::Caller;
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

const WATCH: &str = "/ambit.v1.Audit/WatchAudit";
/// Records that a reader has not taken.
const QUEUE: usize = 256;
/// What is exported, in a few words.
const WHAT_BYTES_MAX: usize = 256;

pub(crate) struct Audit(pub(crate) Replica);

type Told = Result<v1::AuditRecord, Status>;

#[tonic::async_trait]
impl v1::audit_server::Audit for Audit {
    type WatchAuditStream = Pin<Box<dyn Stream<Item = Told> + Send>>;

    async fn watch_audit(
        &self,
        request: Request<v1::WatchAuditRequest>,
    ) -> Result<Response<Self::WatchAuditStream>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        self.0.cell().read_barrier().await.or_status()?;
        let (epoch, _) = self.0.audited().or_status()?;
        let (down, queue) = mpsc::channel::<Told>(QUEUE);
        let reader = Reader { replica: self.0.clone(), epoch, caller, wanted: request.into_inner(), down };
        tokio::spawn(reader.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn audit_head(&self, _: Request<v1::AuditHeadRequest>) -> Result<Response<v1::AuditHeadResponse>, Status> {
        self.0.cell().read_barrier().await.or_status()?;
        self.0.audit_head().or_status().map(Response::new)
    }

    async fn read_audit(
        &self,
        request: Request<v1::ReadAuditRequest>,
    ) -> Result<Response<v1::ReadAuditResponse>, Status> {
        let m = request.into_inner();
        let (present, _) = self.0.audited().or_status()?;
        let epoch = if m.epoch == 0 { present } else { m.epoch };
        if epoch != present {
            let expected = format!("the log of incarnation {present}");
            return Err(Refusal::new(Code::NotFound, expected, epoch.to_string())).or_status();
        }
        let files = self.0.audit().or_status()?.clone();
        let read = tokio::task::spawn_blocking(move || {
            let view = files.view(epoch).map_err(unreadable)?;
            let records = files.read(epoch, m.from, m.to.min(view.size), READ_BYTES_MAX).map_err(unreadable)?;
            let count = records.len() as u64;
            let leaf_hashes = view.leaves(m.from, count).map_err(unreadable)?;
            let end = m.from.saturating_add(count);
            let proof = if m.size == 0 || end == 0 || end > m.size {
                Vec::new()
            } else {
                consistency(&view, end, m.size).map_err(unreadable)?
            };
            let consistency = proof.iter().map(|hash| hash.to_vec()).collect();
            Ok(v1::ReadAuditResponse { records, leaf_hashes, consistency })
        });
        let read = read.await.map_err(|e| Refusal::new(Code::Internal, "records read", e.to_string()));
        read.and_then(|read| read).or_status().map(Response::new)
    }

    async fn prove_audit(
        &self,
        request: Request<v1::ProveAuditRequest>,
    ) -> Result<Response<v1::ProveAuditResponse>, Status> {
        self.0.cell().read_barrier().await.or_status()?;
        let m = request.into_inner();
        let head = self.0.audit_head().or_status()?;
        let note = ambit_audit::Note::parse(&head.checkpoint).or_status()?;
        let (epoch, _) = self.0.audited().or_status()?;
        let size = note.checkpoint.size;
        let view = self.0.audit_view(epoch, size).or_status()?;
        let (n, record) = match m.what {
            Some(v1::prove_audit_request::What::N(n)) => (n, self.record(epoch, n, size).or_status()?),
            Some(v1::prove_audit_request::What::Serial(serial)) => self.issuance(epoch, size, &serial).or_status()?,
            None => return Err(Refusal::new(Code::BadRequest, "a record's place or a serial", "neither")).or_status(),
        };
        let grown = match m.old_size {
            0 => Vec::new(),
            old if old <= size => consistency(&view, old, size).map_err(unreadable).or_status()?,
            old => {
                let expected = format!("a size up to {size}");
                return Err(Refusal::new(Code::AuditMismatch, expected, old.to_string())).or_status();
            }
        };
        let inclusion = proof_of(&view, n, size).or_status()?;
        let consistency = grown.iter().map(|hash| hash.to_vec()).collect();
        Ok(Response::new(v1::ProveAuditResponse { n, record, inclusion, consistency, head: Some(head) }))
    }

    async fn begin_audit(
        &self,
        request: Request<v1::BeginAuditRequest>,
    ) -> Result<Response<v1::AuditHeadResponse>, Status> {
        let actor = actor(&request)?;
        let id = request_id(&request.into_inner().request_id)?;
        self.0.propose(actor.client, id, Command::BeginAudit).await.or_status()?.outcome.or_status()?;
        self.0.audit_head().or_status().map(Response::new)
    }

    async fn note_audit_export(
        &self,
        request: Request<v1::NoteAuditExportRequest>,
    ) -> Result<Response<v1::AuditHeadResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        if m.what.len() > WHAT_BYTES_MAX {
            let found = format!("{} bytes", m.what.len());
            return Err(Refusal::new(Code::BadRequest, format!("at most {WHAT_BYTES_MAX} bytes"), found)).or_status();
        }
        self.0.audited().or_status()?;
        let command = Command::NoteExport { what: m.what, by: actor.name.clone() };
        self.0.propose(actor.client, request_id(&m.request_id)?, command).await.or_status()?.outcome.or_status()?;
        self.0.audit_head().or_status().map(Response::new)
    }

    async fn list_refusals(
        &self,
        _: Request<v1::ListRefusalsRequest>,
    ) -> Result<Response<v1::ListRefusalsResponse>, Status> {
        let rows = self.0.refusals().rows().into_iter();
        let refused = rows.map(|(key, row)| v1::RefusedCall {
            caller: key.caller,
            method: key.method,
            code: key.code.to_owned(),
            count: row.count,
            first_ms: row.first_ms,
            last_ms: row.last_ms,
        });
        let (refused, replica) = (refused.collect(), self.0.id());
        let LeftOut { unlogged, forgotten } = self.0.refusals().left_out();
        Ok(Response::new(v1::ListRefusalsResponse { refused, replica, unlogged, forgotten }))
    }
}

impl Audit {
    fn record(&self, epoch: u64, n: u64, size: u64) -> Result<Vec<u8>, Refusal> {
        let none = || Refusal::new(Code::NotFound, format!("a record below {size}"), n.to_string());
        if n >= size {
            return Err(none());
        }
        let read = self.0.audit()?.read(epoch, n, n + 1, READ_BYTES_MAX).map_err(unreadable)?;
        read.into_iter().next().ok_or_else(none)
    }

    /// The record of an issuance. Its serial holds the index of the entry that caused it, by which records are in order.
    fn issuance(&self, epoch: u64, size: u64, serial: &[u8]) -> Result<(u64, Vec<u8>), Refusal> {
        let text = hex::encode(serial);
        let none = || Refusal::new(Code::NotFound, "an issuance in the audit log of this incarnation", text.clone());
        let index = serial.get(4..12).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let index = index.filter(|_| serial.len() == 16).ok_or_else(none)?;
        let at = |n: u64| Record::decode(&self.record(epoch, n, size)?);
        let (mut low, mut high) = (0, size);
        while low < high {
            let middle = low + (high - low) / 2;
            if at(middle)?.index < index { low = middle + 1 } else { high = middle }
        }
        while low < size {
            let record = at(low)?;
            if record.index != index {
                break;
            }
            if record.facts.get("serial") == Some(&text) {
                return Ok((low, record.encode()));
            }
            low += 1;
        }
        Err(none())
    }
}

/// Tells one caller records.
struct Reader {
    replica: Replica,
    epoch: u64,
    caller: Option<Caller>,
    wanted: v1::WatchAuditRequest,
    down: mpsc::Sender<Told>,
}

impl Reader {
    async fn run(self) {
        if let Err(refusal) = self.tell().await {
            let _ = self.down.send(Err(to_status(&refusal))).await;
        }
    }

    async fn tell(&self) -> Result<(), Refusal> {
        let mut applied = self.replica.cell().watch_applied();
        let mut n = self.wanted.from;
        loop {
            let own = self.replica.trust_domain();
            let state = || self.replica.cell().state();
            authorise(WATCH, self.caller.as_ref(), own, state, self.replica.now())?;
            let (files, epoch) = (self.replica.audit()?.clone(), self.epoch);
            let (from, agreed) = (n, self.replica.audited()?.1);
            let read = tokio::task::spawn_blocking(move || files.read(epoch, from, agreed, READ_BYTES_MAX));
            let read = read.await.map_err(|e| Refusal::new(Code::Internal, "records read", e.to_string()))?;
            let read = read.map_err(unreadable)?;
            let none = read.is_empty();
            for bytes in read {
                // What does not decode is told as it is: whoever verifies finds it.
                let fits = Record::decode(&bytes).map_or(true, |record| fits(&self.wanted, &record));
                if fits && self.down.send(Ok(v1::AuditRecord { n, record: bytes })).await.is_err() {
                    return Ok(());
                }
                n += 1;
            }
            if !none {
                continue;
            }
            if !self.wanted.follow {
                return match n < agreed {
                    true => {
                        Err(Refusal::new(Code::Unavailable, format!("records up to {agreed}"), format!("{n} here")))
                    }
                    false => Ok(()),
                };
            }
            tokio::select! {
                () = self.down.closed() => return Ok(()),
                changed = applied.changed() => if changed.is_err() { return Ok(()) },
            }
        }
    }
}

fn fits(wanted: &v1::WatchAuditRequest, record: &Record) -> bool {
    let text = |wanted: &str, found: &str| match wanted.strip_suffix('*') {
        Some(beginning) => found.starts_with(beginning),
        None => wanted.is_empty() || wanted == found,
    };
    // Of whom the cell knew no name the log has the hash of it.
    let hashed = format!("sha256:{}", hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&wanted.actor)));
    (text(&wanted.actor, &record.actor) || hashed == record.actor)
        && text(&wanted.act, &record.act)
        && (text(&wanted.object, &record.object) || record.facts.values().any(|fact| text(&wanted.object, fact)))
        && text(&wanted.code, &record.code)
        && text(&wanted.outcome, record.outcome.as_str())
        && record.stamp_ms >= wanted.since_ms
        && (wanted.until_ms == 0 || record.stamp_ms < wanted.until_ms)
}
