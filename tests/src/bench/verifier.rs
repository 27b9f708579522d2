//! What one enrolment and one round cost the server, without network, disk and TPM: the verifier's chain of proofs and
//! the state machine, in the order in which the services call them.

use super::cpu::Meter;
use super::table::{Table, Target};
use crate::soft_tpm::maker::{CaKind, Maker};
use crate::soft_tpm::{EkKind, PCRS, SoftTpm};
use ambit_identity::{Csr, SvidKey, wrap};
use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_model::appraisal::{AppraisalPolicy, PcrBank};
use ambit_model::entry::is_boot_pcr;
use ambit_model::{ClusterId, Generation, NodeId, RaftIndex, Revision, Stamp, TrustVector};
use ambit_state::command::{Admission, RoundVerdict, Seen};
use ambit_state::objects::{
    AkFacts, BootPcrs, CellRow, Counters, EkFacts, ImaPoint, KeySetRow, Member, PolicyRef, PolicyVersion,
};
use ambit_state::{Command, LogEntry, Reply, State};
use ambit_verify::appraisal::{AllowList, CompiledPolicy};
use ambit_verify::ima::Checkpoint;
use ambit_verify::transcript::{Binding, Transcript, qualifying_data, round_data};
use ambit_verify::{
    ActivatedAk, Bank, Before, BeginInput, EkClass, EkRoot, Endorsements, Entropy, EvidenceHeader, Expected,
    KeptEvidence, KeyHome, KnownNode, LogExtent, NodeEvidence, PresentedEk, Round, RoundLogs, RoundQuote, Terms,
    TicketBody, Verified,
};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

const CLUSTER: &str = "bench";
/// TPMs of a kind; an RSA EK takes a tenth of a second to make.
const TPMS: usize = 96;
/// Enrolments measured of each kind, and rounds.
const ENROLMENTS: usize = 960;
const ROUNDS: usize = 4_000;
/// Verdicts that share a Raft entry while 10,000 nodes attest every 30 s.
const BATCH: usize = 80;
const TICKET_KEY: [u8; 32] = [7; 32];

/// A server without its sockets: what enrolment reads and writes.
struct Server {
    policy: AppraisalPolicy,
    list: Vec<u8>,
    compiled: Vec<Arc<CompiledPolicy>>,
    endorsements: Endorsements,
    state: State,
    now: Stamp,
}

impl Server {
    fn new(makers: &[&Maker]) -> Result<Server> {
        let quoted = PCRS.iter().cloned().collect();
        let kept = KeptEvidence::new("lab", "sha256", quoted, BOOT_LOG.to_vec(), IMA_LOG.to_vec())?;
        let learnt = kept.learn(&CLUSTER.parse()?, &CLUSTER.parse()?).map_err(|denial| denial.refusal)?;
        let list = learnt.allow_list.unwrap_or_default().into_bytes();
        let compiled = vec![compile(&learnt.policy, &list)?];
        let roots: Vec<EkRoot> =
            makers.iter().map(|maker| EkRoot { der: maker.root.clone(), class: EkClass::Lab }).collect();
        let now = Stamp(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?);
        let state = founded(now, &learnt.policy, &roots)?;
        let endorsements = Endorsements { roots, intermediates: Vec::new(), denied: Vec::new() };
        Ok(Server { policy: learnt.policy, list, compiled, endorsements, state, now })
    }

    fn revisions(&self) -> Result<(Revision, Revision)> {
        let cell = self.state.cell().context("a cell")?;
        Ok((cell.endorsement_revision, cell.policy_revision))
    }

    /// As an entry of the log: encoded by the leader, decoded and applied by every replica, rows taken for the tables.
    fn commit(&mut self, command: Command) -> Result<Reply> {
        let index = RaftIndex(self.state.applied().0 + 1);
        let mut request = [1; 16];
        request[..8].copy_from_slice(&index.0.to_be_bytes());
        let entry = LogEntry { stamp: self.now, client: [1; 32], request, command };
        let entry = LogEntry::decode(&entry.encode()?)?;
        let applied = self.state.apply(index, &entry);
        self.state.take_writes();
        Ok(applied.outcome?)
    }
}

fn compile(policy: &AppraisalPolicy, list: &[u8]) -> Result<Arc<CompiledPolicy>> {
    let list = Arc::new(AllowList::parse(list)?);
    Ok(Arc::new(CompiledPolicy::compile(policy, &mut |_| Some(list.clone()))?))
}

/// A cell of one replica with one cluster and one policy.
fn founded(now: Stamp, policy: &AppraisalPolicy, roots: &[EkRoot]) -> Result<State> {
    let row = CellRow::founded("bench".parse()?, vec![1]);
    let member = Member {
        address: "127.0.0.1:1".into(),
        authority: "a1".into(),
        authority_not_after: now.plus_ms(30 * 24 * 3_600_000),
        wrap_key: Vec::new(),
        record_key: [0; 32],
    };
    let canonical = policy.encode()?;
    let version = PolicyVersion {
        version: 0,
        sha256: ambit_verify::hash::sha256(&canonical),
        canonical,
        clusters: [CLUSTER.parse()?].into(),
    };
    let roots = roots.iter().map(|root| (root.der.clone(), "lab".to_owned())).collect();
    let mut state = State::new();
    let put = Command::PutAppraisalPolicy { name: CLUSTER.parse()?, content: version, staged: false, by: "b".into() };
    let commands = [
        Command::FoundCell(row, 1, member, KeySetRow::default()),
        Command::RegisterCluster(CLUSTER.parse()?, roots, 30_000),
        put,
    ];
    for (index, command) in (1..).zip(commands) {
        let entry = LogEntry { stamp: now, client: [0; 32], request: [0; 16], command };
        state.apply(RaftIndex(index), &entry).outcome?;
    }
    state.take_writes();
    Ok(state)
}

/// One enrolment: the server's parts under the meter, the machine's beside it.
fn enrol(server: &mut Server, maker: &Maker, tpm: &SoftTpm, meter: &mut Meter, cold: bool) -> Result<()> {
    let cluster: ClusterId = CLUSTER.parse()?;
    let agent_nonce = random::<32>()?;
    let input = BeginInput {
        cluster: cluster.clone(),
        ek_certificate: tpm.ek_certificate.clone(),
        ek_intermediates: vec![maker.intermediate.clone()],
        ek_public: tpm.ek_public.clone(),
        ak_public: tpm.ak_public.clone(),
        agent_nonce: agent_nonce.to_vec(),
    };
    let (challenge, ticket) = meter.once(|| begin(server, input))?;

    let secret = tpm.activate(&challenge.credential_blob, &challenge.encrypted_secret)?;
    let key = SvidKey::generate()?;
    let csr = key.csr()?;
    let ticket_sha256 = ambit_verify::hash::sha256(&ticket);
    let quoted = tpm.quote(&qualifying_data(&Binding {
        agent_nonce: &agent_nonce,
        server_nonce: &challenge.server_nonce,
        ticket_sha256: &ticket_sha256,
        csr_spki: &ambit_verify::csr::p256_spki(&csr)?,
        cluster: &cluster,
        ak_name: &tpm.ak_name,
    }))?;
    let transcript = Transcript {
        ticket_sha256,
        csr: &csr,
        quote: &quoted.attest,
        signature: &quoted.signature,
        pcrs: &PCRS,
        boot_log: LogExtent::of(BOOT_LOG),
        ima_log: LogExtent::of(IMA_LOG),
        svid_key: &KeyHome::InMemory,
    };
    let header = EvidenceHeader {
        boot_log: transcript.boot_log,
        ima_log: transcript.ima_log,
        hmac: transcript.hmac(&secret).to_vec(),
        csr: csr.clone(),
        quote: quoted.attest.clone(),
        signature: quoted.signature.clone(),
        pcrs: PCRS.clone(),
        ek_public: tpm.ek_public.clone(),
        ak_public: tpm.ak_public.clone(),
        svid_key: KeyHome::InMemory,
    };
    meter.also(|| {
        if cold {
            server.compiled = vec![compile(&server.policy, &server.list)?];
        }
        let opened = wrap::open(&TICKET_KEY, wrap::Purpose::Ticket, &ticket)?;
        let activated = ActivatedAk::open(TicketBody::decode(&opened)?, &ticket, header, server.now)?;
        let quote = activated.quote(&[])?;
        let verified = quote
            .appraise(BOOT_LOG, IMA_LOG, None, &server.compiled, server.revisions()?.1)
            .map_err(|denial| denial.refusal)?;
        let csr = Csr::parse(&csr)?;
        let command = Command::AdmitNode(admission(&verified, &csr, verified.claims_json(server.now)));
        match server.commit(command)? {
            Reply::Admitted(..) => Ok(()),
            other => bail!("an admission answered with {other:?}"),
        }
    })
}

/// The first round trip: parse, endorse, challenge, seal.
fn begin(server: &Server, input: BeginInput) -> Result<(ambit_verify::Challenge, Vec<u8>)> {
    let (endorsement_revision, policy_revision) = server.revisions()?;
    let endorsed = PresentedEk::parse(input)?.endorse(Expected::AllowListed, &server.endorsements, server.now)?;
    let entropy =
        Entropy { secret: Zeroizing::new(random()?), server_nonce: random()?, seed: Zeroizing::new(random()?) };
    let terms = Terms {
        bank: Bank::Sha256,
        pcr_mask: 0x47ff,
        ima_offset: 0,
        deadline: server.now.plus_ms(60_000),
        endorsement_revision,
        policy_revision,
    };
    let (challenge, body) = endorsed.challenge(entropy, terms)?;
    let ticket = wrap::seal(&TICKET_KEY, wrap::Purpose::Ticket, &body.encode())?;
    Ok((challenge, ticket))
}

fn admission(e: &Verified<NodeEvidence>, csr: &Csr, claims: String) -> Admission {
    Admission {
        node: e.node,
        cluster: e.cluster.clone(),
        nonce: e.nonce,
        deadline: e.deadline,
        join_token: e.join_token,
        endorsement_revision: e.endorsement_revision,
        policy_revision: e.policy_revision,
        ak: AkFacts {
            name: e.ak_name.clone(),
            public: e.ak_public.clone(),
            qualified_signer: e.qualified_signer.clone(),
        },
        ek: EkFacts {
            class: e.ek_class.as_str().to_owned(),
            root_sha256: e.ek_root_sha256,
            manufacturer: e.ek_make.manufacturer().to_owned(),
            model: e.ek_make.model().to_owned(),
            unreadable: false,
            firmware_version: e.firmware_version,
            by_allow_list: false,
        },
        seen: seen(
            e.counters,
            e.firmware_version,
            &e.appraised.checkpoint,
            (Some(&e.pcrs), e.boot_pcrs_sha256),
            e.trust_vector(),
        ),
        key_hash: csr.spki_sha256(),
        authority: "a1".to_owned(),
        claims,
    }
}

fn seen(
    c: ambit_verify::Counters,
    firmware_version: u64,
    ima: &Checkpoint,
    (pcrs, boot_pcrs_sha256): (Option<&BTreeMap<u32, Vec<u8>>>, [u8; 32]),
    trust: TrustVector,
) -> Seen {
    let form = ima.form.as_str().to_owned();
    Seen {
        counters: Counters { resets: c.reset, restarts: c.restart, clock: c.clock_ms },
        firmware_version,
        ima: ImaPoint { offset: ima.offset, entries: ima.entries, pcr: ima.pcr.clone(), form },
        pcrs: pcrs.map(|pcrs| BootPcrs {
            bank: PcrBank::Sha256,
            values: pcrs.iter().filter(|(n, _)| is_boot_pcr(**n)).map(|(n, v)| (*n as u8, v.clone())).collect(),
        }),
        boot_pcrs_sha256,
        boot_log_sha256: ambit_verify::hash::sha256(BOOT_LOG),
        trust,
        policy: PolicyRef { name: CLUSTER.parse().unwrap_or_else(|_| unreachable!()), version: 1 },
        evidence_sha256: [9; 32],
        evidence_depth: 0,
    }
}

/// Enrolments with EKs of one kind: all cold, then all cached. A fresh cell for each pass over the TPMs, so that every
/// enrolment is a first one.
fn enrolments(table: &mut Table, name: &str, kind: EkKind, ca: CaKind, target: f64) -> Result<()> {
    let maker = Maker::new(ca)?;
    let tpms: Vec<SoftTpm> = (0..TPMS).map(|_| SoftTpm::new(kind, &maker)).collect::<Result<_>>()?;
    for cold in [true, false] {
        let mut meter = Meter::default();
        for _ in 0..ENROLMENTS / TPMS {
            let mut server = Server::new(&[&maker])?;
            allow(&mut server, &tpms)?;
            for tpm in &tpms {
                enrol(&mut server, &maker, tpm, &mut meter, cold)?;
            }
        }
        let how = if cold { "nothing cached" } else { "policy and allow-list cached" };
        let target = if cold { Target::None } else { Target::AtLeast(target) };
        let what = format!("first enrolment, EK {name}, {how}");
        table.figure(&what, meter.per_second(), "nodes/s/core", target);
    }
    Ok(())
}

fn allow(server: &mut Server, tpms: &[SoftTpm]) -> Result<()> {
    server.commit(Command::AllowEk(CLUSTER.parse()?, tpms.iter().map(|t| NodeId(t.node)).collect()))?;
    Ok(())
}

/// Rounds of nodes whose AK is decoded and whose logs did not grow.
fn rounds(table: &mut Table) -> Result<()> {
    let maker = Maker::new(CaKind::P256)?;
    let tpms: Vec<SoftTpm> = (0..BATCH).map(|_| SoftTpm::new(EkKind::P256, &maker)).collect::<Result<_>>()?;
    let mut server = Server::new(&[&maker])?;
    let empty = rows_bytes(&server.state);
    allow(&mut server, &tpms)?;
    for tpm in &tpms {
        enrol(&mut server, &maker, tpm, &mut Meter::default(), false)?;
    }
    let each = rows_bytes(&server.state).saturating_sub(empty) as f64 / 1024.0 / BATCH as f64;
    table.figure("rows of an enrolled node, all tables", each, "KiB", Target::AtMost(8.0));
    let mut known = Vec::new();
    for tpm in &tpms {
        let row = server.state.node(&NodeId(tpm.node)).context("a node")?;
        let (cluster, signer) = (row.cluster.clone(), row.ak.qualified_signer.clone());
        known.push(KnownNode::parse(NodeId(tpm.node), cluster, Generation(1), &tpm.ak_public, signer)?);
    }
    let (mut verifying, mut applying) = (Meter::default(), Meter::default());
    for _ in 0..ROUNDS / BATCH {
        // A TPM makes no two quotes in a millisecond of its clock.
        std::thread::sleep(std::time::Duration::from_millis(2));
        let mut verdicts = Vec::new();
        for (tpm, known) in tpms.iter().zip(&known) {
            verdicts.push(round(&server, tpm, known, &mut verifying)?);
        }
        let count = verdicts.len();
        let outcome = applying.once(|| server.commit(Command::PutVerdicts(verdicts)))?;
        let good = |r: &Reply| matches!(r, Reply::Items(i) if i.len() == count && i.iter().all(Result::is_ok));
        anyhow::ensure!(good(&outcome), "verdicts answered with {outcome:?}");
    }
    table.figure("round of a cached node: verifier", verifying.micros(), "us", Target::AtMost(120.0));
    let each = applying.micros() / BATCH as f64;
    table.floor(&format!("its part of a Raft entry of {BATCH} verdicts, applied"), each, "us");
    Ok(())
}

/// What a snapshot holds.
fn rows_bytes(state: &State) -> usize {
    state.export().iter().map(|row| row.key.len() + row.value.as_ref().map_or(0, Vec::len)).sum()
}

fn round(server: &Server, tpm: &SoftTpm, known: &KnownNode, meter: &mut Meter) -> Result<RoundVerdict> {
    let node = NodeId(tpm.node);
    let standing = server.state.standing(&node).context("a standing")?;
    let (policy_revision, cluster) = (server.revisions()?.1, CLUSTER.parse()?);
    let question = Round::new(random()?, Bank::Sha256, 0x47ff)?;
    let extra = round_data(&question.nonce(), &node, Generation(1), &cluster, &tpm.ak_name);
    let quoted = tpm.quote(&extra)?;
    let answer = RoundQuote { quote: quoted.attest, signature: quoted.signature, pcrs: PCRS.clone() };
    meter.once(|| {
        let fresh = question.quote(known, answer)?;
        let form = ambit_verify::ima::ImaForm::from_text(&standing.ima.form).context("a form")?;
        let ima = Checkpoint {
            offset: standing.ima.offset,
            entries: standing.ima.entries,
            pcr: standing.ima.pcr.clone(),
            form,
        };
        let c = standing.counters;
        let counters = ambit_verify::Counters { reset: c.resets, restart: c.restarts, clock_ms: c.clock, safe: false };
        let policy = server.compiled.first().context("a policy")?.clone();
        let before = Before { counters, boot_pcrs_sha256: standing.boot_pcrs_sha256, ima, policy };
        let logs = RoundLogs::Grown { ima_log: &[] };
        let e = fresh.appraise(&before, EkClass::Lab, logs, &server.compiled).map_err(|denial| denial.refusal)?;
        let seen = seen(e.counters, e.firmware_version, &e.appraised.checkpoint, (None, e.boot_pcrs_sha256), e.trust);
        Ok(RoundVerdict { node, generation: Generation(1), policy_revision, seen })
    })
}

/// All figures of this part.
pub(super) fn run(table: &mut Table) -> Result<()> {
    table.head("CPU time of verifier and state machine, in one thread");
    enrolments(table, "RSA-2048", EkKind::Rsa2048, CaKind::Rsa2048, 1_500.0)?;
    enrolments(table, "P-384", EkKind::P384, CaKind::P384, 800.0)?;
    rounds(table)
}

pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut out = [0; N];
    aws_lc_rs::rand::fill(&mut out)?;
    Ok(out)
}
