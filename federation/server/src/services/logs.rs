//! Logs as machines send them: never more than was stated, and never more than there is room for.

use crate::replica::work::LogRoom;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use ambit_verify::LogExtent;
use std::time::Duration;
use tonic::Streaming;

/// The logs of a round as they come.
#[derive(Default)]
pub(super) struct Logs {
    pub(super) boot: Vec<u8>,
    pub(super) ima: Vec<u8>,
    /// Bytes that came, also those that were dropped.
    come: u64,
    /// Held until they are judged; none once something had to be dropped for want of it. Then all that was announced is
    /// still read, so that the stream goes on, and asked for again.
    pub(super) room: Option<LogRoom>,
}

impl Logs {
    /// None yet, and room for them.
    pub(super) fn in_room(room: LogRoom) -> Logs {
        Logs { room: Some(room), ..Logs::default() }
    }

    /// Whether all that was announced has come.
    pub(super) fn are_all_of(&self, answer: &v1::QuoteAnswer) -> bool {
        self.come == answer.boot_log_len.saturating_add(answer.ima_log_len)
    }

    /// Whether there was room for what came.
    pub(super) fn were_kept(&self) -> bool {
        self.room.is_some()
    }

    /// Takes the next bytes; a piece may belong to both logs.
    pub(super) fn take(&mut self, answer: &v1::QuoteAnswer, bytes: &[u8]) -> Result<(), Refusal> {
        let announced = answer.boot_log_len.saturating_add(answer.ima_log_len);
        let come = self.come.saturating_add(bytes.len() as u64);
        if bytes.is_empty() || come > announced {
            let expected = format!("the {announced} bytes that were announced");
            return Err(Refusal::new(Code::BadRequest, expected, format!("{come}, or none")));
        }
        self.come = come;
        let Some(room) = &mut self.room else { return Ok(()) };
        if room.grow(come).is_err() {
            *self = Logs { come, ..Logs::default() };
            return Ok(());
        }
        let boot_left = (answer.boot_log_len as usize).saturating_sub(self.boot.len());
        let (to_boot, to_ima) = bytes.split_at(bytes.len().min(boot_left));
        self.boot.extend_from_slice(to_boot);
        self.ima.extend_from_slice(to_ima);
        Ok(())
    }
}

/// Both logs of an enrolment and then the end.
pub(super) async fn read_logs(
    stream: &mut Streaming<v1::EvidenceRequest>,
    (boot, ima): (LogExtent, LogExtent),
    room: &mut LogRoom,
    within: Duration,
) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
    let both = async {
        let boot_log = read_exactly(stream, boot, 0, room).await?;
        let ima_log = read_exactly(stream, ima, boot.len, room).await?;
        match stream.message().await {
            Ok(None) => Ok((boot_log, ima_log)),
            Ok(Some(_)) => {
                Err(Refusal::new(Code::EvidenceMalformed, "an end after the logs stated", "another message"))
            }
            Err(status) => {
                Err(Refusal::new(Code::EvidenceMalformed, "an end after the logs stated", status.to_string()))
            }
        }
    };
    let late = || Refusal::new(Code::EvidenceMalformed, "both logs before the deadline", "silence");
    tokio::time::timeout(within, both).await.map_err(|_| late())?
}

/// Reads one log of the stated length; chunks never straddle the two logs.
async fn read_exactly(
    stream: &mut Streaming<v1::EvidenceRequest>,
    extent: LogExtent,
    before: u64,
    room: &mut LogRoom,
) -> Result<Vec<u8>, Refusal> {
    let wanted = usize::try_from(extent.len).unwrap_or(usize::MAX);
    let mut log = Vec::new();
    while log.len() < wanted {
        match stream.message().await.ok().flatten().and_then(|m| m.part) {
            Some(v1::evidence_request::Part::Chunk(chunk))
                if !chunk.is_empty() && log.len() + chunk.len() <= wanted =>
            {
                room.grow(before + (log.len() + chunk.len()) as u64)?;
                log.extend(chunk);
            }
            _ => {
                let found = format!("{} bytes and then something else", log.len());
                return Err(Refusal::new(Code::EvidenceMalformed, format!("a log of {wanted} bytes"), found));
            }
        }
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::work::{Lane, Work};

    fn answer(boot: u64, ima: u64) -> v1::QuoteAnswer {
        v1::QuoteAnswer { boot_log_len: boot, ima_log_len: ima, ..Default::default() }
    }

    #[tokio::test]
    async fn logs_are_cut_where_one_ends_and_hold_what_was_announced_and_no_more() {
        let work = Work::start().unwrap();
        let (answer, mut logs) = (answer(3, 4), Logs::in_room(work.log_room(Lane::Small)));
        assert_eq!(logs.take(&answer, &[]).unwrap_err().code, Code::BadRequest);
        logs.take(&answer, b"bo").unwrap();
        logs.take(&answer, b"oim").unwrap();
        assert_eq!(logs.take(&answer, b"a! ").unwrap_err().code, Code::BadRequest, "one too many");
        logs.take(&answer, b"a!").unwrap();
        assert_eq!((&logs.boot[..], &logs.ima[..], logs.come), (&b"boo"[..], &b"ima!"[..], 7));
        assert!(logs.are_all_of(&answer) && logs.were_kept());
    }

    #[tokio::test]
    async fn logs_without_room_are_read_to_their_end_and_dropped() {
        const MIB: usize = 1 << 20;
        let work = Work::start().unwrap();
        let (answer, mut logs) = (answer(0, 3 * MIB as u64), Logs::in_room(work.log_room(Lane::Large)));
        let mut others = work.log_room(Lane::Large);
        others.grow(94 * MIB as u64).unwrap();
        for come in 1..=3 {
            logs.take(&answer, &vec![0; MIB]).unwrap();
            assert_eq!((logs.come, logs.were_kept()), ((come * MIB) as u64, come < 3));
        }
        assert_eq!((logs.ima.len(), logs.ima.capacity()), (0, 0));
        assert_eq!(logs.take(&answer, &[0]).unwrap_err().code, Code::BadRequest);
        others.grow(96 * MIB as u64).unwrap();
    }
}
