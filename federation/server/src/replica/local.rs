//! `ambitd admin`: what who has a replica's machine asks of the replica that runs there, over a socket in its data folder.
//!
//! Who opens that socket could read the replica's keys as well, so it asks for no certificate; what it is for is that no
//! administrator has one. What is done is another matter: the cell wants an approver's signature over it, and keeps a row.

use super::Replica;
use super::files::failed;
use crate::authorise::Standing;
use ambit_identity::Csr;
use ambit_identity::approver::{gather, proposal_text, propose};
use ambit_identity::keys::certificates_to_pem;
use ambit_model::{Act, Approved, Code, ObjectName, Refusal};
use ambit_state::Command;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// People at a machine's console.
const CONNECTIONS_MAX: usize = 4;
/// A request of some approvals, and an answer of a chain.
const MESSAGE_BYTES_MAX: u64 = 256 * 1024;
/// An election or two; who waits longer is told.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// As refusals name it.
const METHOD: &str = "ambitd admin break-glass";

/// What is asked.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The administrator.
    pub admin: ObjectName,
    /// PKCS#10, DER.
    pub csr: Vec<u8>,
    /// Files that approvers signed, by name; none to get the proposal.
    pub approvals: Vec<(String, String)>,
}

/// What comes back.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    /// To be signed by an approver.
    Proposal(String),
    /// The certificate and what is above it, PEM.
    Certified(String),
    /// Not done.
    Refused(Refusal),
}

/// In a folder of its own, which only the owner may enter: a socket cannot be made with a mode.
fn place(data_dir: &Path) -> PathBuf {
    data_dir.join("local")
}

/// A path to the socket that is short enough for the kernel (108 bytes), wherever the folder is.
fn socket(folder: &std::fs::File) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}/admin.sock", folder.as_raw_fd()))
}

/// Opens the socket of a replica that starts.
fn listen(data_dir: &Path) -> Result<UnixListener, Refusal> {
    let folder = place(data_dir);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|e| failed("a writable folder", &folder, e))?;
    let open = std::fs::File::open(&folder).map_err(|e| failed("a readable folder", &folder, e))?;
    let mode = open.metadata().map_err(|e| failed("a readable folder", &folder, e))?.mode() & 0o777;
    if mode != 0o700 {
        return Err(Refusal::new(
            Code::ConfigInvalid,
            format!("mode 700 on {}", folder.display()),
            format!("mode {mode:o}"),
        ));
    }
    let at = socket(&open);
    // What a replica left that was killed; another that runs holds the store's lock.
    match std::fs::remove_file(&at) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed("a socket in", &folder, e)),
        _ => {}
    }
    let listener = UnixListener::bind(&at).map_err(|e| failed("a socket in", &folder, e))?;
    let narrow = std::fs::set_permissions(&at, std::fs::Permissions::from_mode(0o600));
    narrow.map_err(|e| failed("a socket in", &folder, e))?;
    Ok(listener)
}

/// Answers until it is called off. A replica that cannot (its disk is full, say) is a replica all the same.
pub(super) async fn serve(data_dir: PathBuf, replica: Replica) {
    let listener = match listen(&data_dir) {
        Ok(listener) => listener,
        Err(refusal) => return tracing::error!(%refusal, "no glass can be broken at this replica"),
    };
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Ok(place) = places.clone().acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let replica = replica.clone();
        tokio::spawn(async move {
            if timeout(ANSWER_MAX, answer(&replica, stream)).await.is_err() {
                tracing::debug!("a local request took too long");
            }
            drop(place);
        });
    }
}

async fn answer(replica: &Replica, mut stream: UnixStream) {
    let who = stream.peer_cred().map_or_else(|_| "local".to_owned(), |cred| format!("local uid {}", cred.uid()));
    let answer = match read(&mut stream).await {
        Ok(asked) => break_glass(replica, &asked, &who).await,
        Err(refusal) => Err(refusal),
    };
    let answer = answer.unwrap_or_else(|refusal| {
        replica.refusals().note(&who, Standing::Role, METHOD, refusal.code, super::wall_clock().0);
        Answer::Refused(refusal)
    });
    let sent = async { stream.write_all(&encoded(&answer)?).await };
    if let Err(error) = sent.await {
        tracing::debug!(%error, "a local request's answer was not read");
    }
}

fn encoded(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    serde_json::to_vec(message).map_err(std::io::Error::other)
}

/// Up to the end of what the other side writes.
async fn read<T: for<'a> Deserialize<'a>>(stream: &mut UnixStream) -> Result<T, Refusal> {
    let bad = |found: String| Refusal::new(Code::BadRequest, "a message of this release's ambitd", found);
    let mut bytes = Vec::new();
    let read = stream.take(MESSAGE_BYTES_MAX).read_to_end(&mut bytes).await;
    read.map_err(|e| bad(e.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))
}

async fn break_glass(replica: &Replica, asked: &Asked, who: &str) -> Result<Answer, Refusal> {
    let csr = Csr::parse(&asked.csr)?;
    let act = Act::BreakGlass(asked.admin.clone(), csr.spki_sha256());
    match gather(replica.trust_domain(), &act, &asked.approvals)? {
        None => proposal(replica, act).await,
        Some(approved) => certify(replica, asked, approved, &csr, who).await,
    }
}

/// Nobody is asked to sign what cannot be done.
async fn proposal(replica: &Replica, act: Act) -> Result<Answer, Refusal> {
    let (epoch, approvers, now) =
        replica.read(|s| (s.cell().map_or(0, |c| c.epoch), s.approvers().count(), s.stamp())).await?;
    act.needs(approvers)?;
    proposal_text(&propose(replica.trust_domain().clone(), epoch, now, act)?).map(Answer::Proposal)
}

async fn certify(
    replica: &Replica,
    asked: &Asked,
    approved: Approved,
    csr: &Csr,
    who: &str,
) -> Result<Answer, Refusal> {
    let command = Command::BreakGlass {
        admin: asked.admin.clone(),
        key_hash: csr.spki_sha256(),
        authority: replica.issuer().authority().to_owned(),
        replica: replica.id(),
        approved,
    };
    let applied = replica.propose_own(command).await?;
    let (chain, not_after_ms) = crate::services::one_leaf(replica, applied, csr)?;
    let (admin, replica) = (asked.admin.as_str(), replica.id());
    tracing::warn!(
        event = "break_glass",
        admin,
        replica,
        by = who,
        not_after_ms,
        "an administrator was certified here"
    );
    Ok(Answer::Certified(certificates_to_pem(chain.iter().map(Vec::as_slice))))
}

/// Asks the replica that runs on this machine.
///
/// # Errors
/// [`Code::Unavailable`] where none runs there, or one without a majority; else what it refuses.
pub async fn ask(data_dir: &Path, asked: &Asked) -> Result<Answer, Refusal> {
    let folder = place(data_dir);
    let none = |e: std::io::Error| {
        let expected = format!("a running replica with the data folder {}, and root's rights", data_dir.display());
        Refusal::new(Code::Unavailable, expected, e.to_string())
    };
    let open = std::fs::File::open(&folder).map_err(none)?;
    let exchange = async {
        let mut stream = UnixStream::connect(socket(&open)).await.map_err(none)?;
        stream.write_all(&encoded(asked).map_err(none)?).await.map_err(none)?;
        stream.shutdown().await.map_err(none)?;
        read(&mut stream).await
    };
    let late = |_| Refusal::new(Code::Unavailable, "an answer of the replica within 35 s", "none");
    match timeout(ANSWER_MAX + Duration::from_secs(5), exchange).await.map_err(late)?? {
        Answer::Refused(refusal) => Err(refusal),
        answer => Ok(answer),
    }
}
