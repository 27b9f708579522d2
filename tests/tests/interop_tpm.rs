//! A node made of tools that nobody here wrote: tpm2-tools for the TPM, OpenSSL for the rest, and a thin gRPC client.
//! Nothing of ambit-tpm or ambit-verify takes part in its enrolment: what is hashed is written down here once more, from
//! design.md section 3, so that the agent and the verifier cannot be wrong together.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_model::Code;
use ambit_proto::status::from_status;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::{self, begin_response, evidence_request};
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{evidence, explain, join_token, register_cluster};
use ambit_tests::process::must_run;
use ambit_tests::tpm::{Maker, Tpm};
use ambit_tpm::{Attester, EkChoice, EkKind, Options};
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const CLUSTER: &str = "west";

/// A cell with one cluster that takes the TPMs of `maker`. All that an enrolment needs besides its token is here.
async fn cell_for(maker: &Maker) -> Cell {
    let cell = Cell::start("west", 1).await.unwrap();
    register_cluster(&cell, CLUSTER, maker).await.unwrap();
    cell
}

/// An EK as tpm2-tools name it.
struct Ek {
    algorithm: &'static str,
    certificate: &'static str,
    /// The hash of its policy session.
    hash: &'static str,
}

const RSA2048: Ek = Ek { algorithm: "rsa", certificate: "0x1c00002", hash: "sha256" };
const P384: Ek = Ek { algorithm: "ecc384", certificate: "0x1c00016", hash: "sha384" };

/// PolicyOR branches of high-range EKs (TCG EK Credential Profile 2.5, B.6).
const POLICY_A_SHA384: &str =
    "8bbf2266537c171cb56e403c4dc1d4b64f432611dc386e6f532050c3278c930e143e8bb1133824ccb431053871c6db53";
const POLICY_C_SHA384: &str =
    "d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165";

/// A machine that is a folder of files and a TPM.
struct Tools<'a> {
    tpm: &'a Tpm,
    ek: Ek,
    /// The AK's scheme.
    scheme: &'a str,
    dir: PathBuf,
}

impl<'a> Tools<'a> {
    /// Makes an EK and an AK of this algorithm and scheme, and reads the EK's certificate.
    fn new(tpm: &'a Tpm, ek: Ek, (algorithm, scheme): (&str, &'a str)) -> Tools<'a> {
        let dir = tpm.state().join(format!("{}-{scheme}", ek.algorithm));
        std::fs::create_dir_all(&dir).unwrap();
        let tools = Tools { tpm, ek, scheme, dir };
        tools.run("tpm2_createek", &["-Q", "-G", tools.ek.algorithm, "-c", "ek.ctx", "-u", "ek.pub"]);
        let ak = ["-G", algorithm, "-g", "sha256", "-s", scheme, "-c", "ak.ctx", "-u", "ak.pub", "-n", "ak.name"];
        tools.run("tpm2_createak", &[&["-Q", "-C", "ek.ctx"][..], &ak].concat());
        tools.run("tpm2_nvread", &["-Q", "-C", "o", "-o", "ek.der", tools.ek.certificate]);
        tools
    }

    fn output(&self, name: &str, args: &[&str]) -> Output {
        let mut command = Command::new(name);
        command.args(args).current_dir(&self.dir).env("TPM2TOOLS_TCTI", self.tpm.tcti());
        command.output().unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Runs a tool and then frees what it left in the TPM, which has three slots and no resource manager.
    fn run(&self, name: &str, args: &[&str]) {
        let out = self.output(name, args);
        assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        if name.starts_with("tpm2_") {
            assert!(self.output("tpm2_flushcontext", &["-t"]).status.success());
        }
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.join(name), bytes).unwrap();
    }

    /// TPMT_PUBLIC of a file with TPM2B_PUBLIC.
    fn public(&self, name: &str) -> Vec<u8> {
        self.read(name)[2..].to_vec()
    }

    /// SHA-256 of the SubjectPublicKeyInfo in the EK's certificate, by OpenSSL: the node's id.
    fn node(&self) -> String {
        self.run("openssl", &["x509", "-inform", "DER", "-in", "ek.der", "-noout", "-pubkey", "-out", "ek.pem"]);
        self.run("openssl", &["pkey", "-pubin", "-in", "ek.pem", "-outform", "DER", "-out", "ek.spki"]);
        hex::encode(Sha256::digest(self.read("ek.spki")))
    }

    async fn begin(&self, cell: &Cell, token: &str, agent_nonce: &[u8]) -> v1::Challenge {
        let request = v1::BeginRequest {
            cluster: CLUSTER.to_owned(),
            ek_certificate: self.read("ek.der"),
            ek_intermediates: Vec::new(),
            ek_public: self.public("ek.pub"),
            ak_public: self.public("ak.pub"),
            agent_nonce: agent_nonce.to_vec(),
            join_token: token.to_owned(),
        };
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let answer = NodeAttestationClient::new(cell.anonymous(1).await.unwrap()).begin(request.clone()).await;
            match answer {
                // A cell has no ticket key in the second after its founding.
                Err(s) if from_status(&s).code == Code::Unavailable && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                answer => match answer.unwrap().into_inner().result.unwrap() {
                    begin_response::Result::Challenge(challenge) => return challenge,
                    begin_response::Result::Denied(denied) => panic!("{denied:?}"),
                },
            }
        }
    }

    /// The secret in a credential (TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET).
    fn activate(&self, blob: &[u8], secret: &[u8]) -> Vec<u8> {
        let head = [0xbadc_c0deu32.to_be_bytes(), 1u32.to_be_bytes()].concat();
        self.write("credential", &[&head, blob, secret].concat());
        self.run("tpm2_startauthsession", &["--policy-session", "-g", self.ek.hash, "-S", "session.ctx"]);
        self.run("tpm2_policysecret", &["-Q", "-S", "session.ctx", "-c", "e"]);
        if self.ek.hash == "sha384" {
            self.write("policy-a", &hex::decode(POLICY_A_SHA384).unwrap());
            self.write("policy-c", &hex::decode(POLICY_C_SHA384).unwrap());
            self.run("tpm2_policyor", &["-Q", "-S", "session.ctx", "-l", "sha384:policy-a,policy-c"]);
        }
        let files = ["-i", "credential", "-o", "secret", "-P", "session:session.ctx"];
        self.run("tpm2_activatecredential", &[&["-Q", "-c", "ak.ctx", "-C", "ek.ctx"][..], &files].concat());
        self.run("tpm2_flushcontext", &["session.ctx"]);
        self.read("secret")
    }

    /// A key, and the DER of its request and of its SubjectPublicKeyInfo.
    fn request(&self) -> (Vec<u8>, Vec<u8>) {
        let curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
        self.run("openssl", &[&["genpkey"][..], &curve, &["-out", "node.key"]].concat());
        let request = ["req", "-new", "-sha256", "-key", "node.key", "-subj", "/", "-outform", "DER"];
        self.run("openssl", &[&request[..], &["-out", "node.csr"]].concat());
        self.run("openssl", &["pkey", "-in", "node.key", "-pubout", "-outform", "DER", "-out", "node.spki"]);
        (self.read("node.csr"), self.read("node.spki"))
    }

    /// TPMS_ATTEST, TPMT_SIGNATURE, and the values of the PCRs.
    fn quote(&self, bank: &str, mask: u32, qualifying: &[u8]) -> (Vec<u8>, Vec<u8>, Vec<v1::PcrValue>) {
        let indices: Vec<u32> = (0..24).filter(|n| mask & (1 << n) != 0).collect();
        let list = indices.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let (list, qualifying) = (format!("{bank}:{list}"), hex::encode(qualifying));
        // Told the scheme, since it asks for PKCS #1 v1.5 with every RSA key otherwise.
        let key = ["-Q", "-c", "ak.ctx", "-g", "sha256", "--scheme", self.scheme];
        let asked = ["-l", &list, "-q", &qualifying];
        let files = ["-m", "quote", "-s", "signature", "-o", "pcrs", "-F", "values"];
        self.run("tpm2_quote", &[&key[..], &asked, &files].concat());
        let values = self.read("pcrs");
        assert_eq!(values.len() % indices.len(), 0);
        let values = values.chunks(values.len() / indices.len()).map(<[u8]>::to_vec);
        let pcrs = indices.into_iter().zip(values).map(|(index, value)| v1::PcrValue { index, value }).collect();
        (self.read("quote"), self.read("signature"), pcrs)
    }

    /// The frames of Evidence for `challenge`.
    fn evidence(&self, token: &str, agent_nonce: &[u8], challenge: &v1::Challenge) -> Vec<v1::EvidenceRequest> {
        let secret = self.activate(&challenge.credential_blob, &challenge.encrypted_secret);
        let (csr, spki) = self.request();
        let ticket = sha256(&challenge.ticket);
        let qualifying = sha256(
            &[
                b"ambit/quote/v1\0",
                agent_nonce,
                &challenge.server_nonce,
                &ticket,
                &sha256(&spki),
                &(CLUSTER.len() as u64).to_be_bytes(),
                CLUSTER.as_bytes(),
                &sha256(&self.read("ak.name")),
            ]
            .concat(),
        );
        let (quote, signature, pcrs) = self.quote(&challenge.bank, challenge.pcr_mask, &qualifying);
        let mut said = [b"ambit/evidence-hmac/v1\0".as_slice(), &ticket].concat();
        let mut put = |part: &[u8]| said.extend([&(part.len() as u64).to_be_bytes(), part].concat());
        [csr.as_slice(), &quote, &signature, &(pcrs.len() as u64).to_be_bytes()].into_iter().for_each(&mut put);
        for pcr in &pcrs {
            put(&pcr.index.to_be_bytes());
            put(&pcr.value);
        }
        for log in [BOOT_LOG, IMA_LOG] {
            put(&(log.len() as u64).to_be_bytes());
            put(&sha256(log));
        }
        // The SVID key is in memory: no certification of it follows.
        put(&[0]);
        let header = v1::EvidenceHeader {
            ticket: challenge.ticket.clone(),
            hmac: hmac_sha256(&secret, &said).to_vec(),
            csr,
            quote,
            signature,
            pcrs,
            boot_log_len: BOOT_LOG.len() as u64,
            boot_log_sha256: sha256(BOOT_LOG).to_vec(),
            ima_log_len: IMA_LOG.len() as u64,
            ima_log_sha256: sha256(IMA_LOG).to_vec(),
            join_token: token.to_owned(),
            ek_public: self.public("ek.pub"),
            ak_public: self.public("ak.pub"),
            svid_public: Vec::new(),
            svid_certify: Vec::new(),
            svid_certify_signature: Vec::new(),
            ..Default::default()
        };
        let chunks = [BOOT_LOG, IMA_LOG].map(|log| evidence_request::Part::Chunk(log.to_vec()));
        let parts = std::iter::once(evidence_request::Part::Header(header)).chain(chunks);
        parts.map(|part| v1::EvidenceRequest { part: Some(part) }).collect()
    }

    async fn enrol(&self, cell: &Cell) -> v1::Verdict {
        let token = join_token(cell, CLUSTER).await.unwrap();
        let agent_nonce = [fresh(), fresh()].concat();
        let challenge = self.begin(cell, &token, &agent_nonce).await;
        let frames = self.evidence(&token, &agent_nonce, &challenge);
        let verdict = evidence(cell.anonymous(1).await.unwrap(), &frames).await.unwrap();
        verdict.unwrap_or_else(|denied| panic!("{denied:?}"))
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// RFC 2104, for keys of at most a block.
fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    let pad = |with: u8| {
        let mut block = [with; 64];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    sha256(&[pad(0x5c).as_slice(), &sha256(&[&pad(0x36), message].concat())].concat())
}

/// RFC 4231, test case 2: what this file computes by itself is right.
#[test]
fn the_hmac_of_this_test_is_the_standards() {
    let tag = hmac_sha256(b"Jefe", b"what do ya want for nothing?");
    assert_eq!(hex::encode(tag), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_made_of_tpm2_tools_alone_enrol() {
    let maker = Maker::new().unwrap();
    let tpms = [maker.tpm("tools1").unwrap(), maker.tpm("tools2").unwrap()];
    let cell = cell_for(&maker).await;
    // Each is a node of its own: a node's id is that of its EK, and an enrolled EK keeps its AK.
    for (tpm, ek, ak) in [
        (&tpms[0], RSA2048, ("ecc", "ecdsa")),
        (&tpms[0], P384, ("rsa", "rsassa")),
        (&tpms[1], RSA2048, ("rsa", "rsapss")),
        (&tpms[1], P384, ("ecc", "ecdsa")),
    ] {
        let what = format!("EK {}, AK {} {}", ek.algorithm, ak.0, ak.1);
        let tools = Tools::new(tpm, ek, ak);
        let verdict = tools.enrol(&cell).await;
        assert_eq!((verdict.node_id.clone(), verdict.generation), (tools.node(), 1), "{what}");
        let claims: serde_json::Value = serde_json::from_str(&verdict.attestation_result_json).unwrap();
        assert_eq!(claims["submods"]["node"]["ambit.ek-class"], "lab", "{what}");
        // The certificate is of the key that OpenSSL made, for this node, below the cell's root.
        let pem = ambit_identity::keys::certificates_to_pem(verdict.svid_chain_der.iter().map(Vec::as_slice));
        tools.write("svid.pem", pem.as_bytes());
        tools.run("openssl", &["x509", "-in", "svid.pem", "-noout", "-pubkey", "-out", "svid.pub"]);
        tools.run("openssl", &["pkey", "-in", "node.key", "-pubout", "-out", "node.pub"]);
        assert_eq!(tools.read("svid.pub"), tools.read("node.pub"), "{what}");
        let (root, svid) = (cell.admin_file("root.pem"), tools.dir.join("svid.pem"));
        let (root, svid) = (root.to_str().unwrap(), svid.to_str().unwrap());
        let said = must_run(&["openssl", "verify", "-x509_strict", "-CAfile", root, "-untrusted", svid, svid]).unwrap();
        assert!(said.trim().ends_with(": OK"), "{said}");
        println!("{what}: node {}", verdict.node_id);
    }
}

/// The same with one thing wrong in what the tools made: it is the verifier that lets nodes in, not this client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_made_of_tpm2_tools_gets_no_further_than_its_tpm() {
    let maker = Maker::new().unwrap();
    let tpm = maker.tpm("tools").unwrap();
    let cell = cell_for(&maker).await;
    let tools = Tools::new(&tpm, P384, ("ecc", "ecdsa"));
    let token = join_token(&cell, CLUSTER).await.unwrap();
    let agent_nonce = [fresh(), fresh()].concat();
    for (wrong, code) in [("secret", "activation_failed"), ("quote", "quote_nonce"), ("boot", "boot_log_pcr_mismatch")]
    {
        let mut challenge = tools.begin(&cell, &token, &agent_nonce).await;
        match wrong {
            "quote" => challenge.server_nonce[0] ^= 1,
            // Something ran that no log tells of.
            "boot" => tools.run("tpm2_pcrextend", &[&format!("9:sha256={}", "11".repeat(32))]),
            _ => {}
        }
        let mut frames = tools.evidence(&token, &agent_nonce, &challenge);
        if let (true, Some(evidence_request::Part::Header(header))) = (wrong == "secret", &mut frames[0].part) {
            header.hmac[0] ^= 1;
        }
        let denied = evidence(cell.anonymous(1).await.unwrap(), &frames).await.unwrap().unwrap_err();
        assert_eq!(denied.code, code, "{wrong}: {denied:?}");
    }
    assert!(explain(&cell, 1, &tools.node()).await.unwrap().node.is_none(), "nothing was admitted");
}

/// The other way round: a credential of tpm2_makecredential, which computes it without a TPM, opens in our attester.
#[tokio::test]
async fn our_attester_opens_credentials_of_tpm2_makecredential() {
    let maker = Maker::new().unwrap();
    let tpm = maker.tpm("ours").unwrap();
    for ek in [EkKind::Rsa2048, EkKind::EccP384] {
        let options = Options { ek: EkChoice::Fixed(ek), ..Options::new(&tpm.tcti(), &tpm.state()) };
        let attester = Attester::start(options).unwrap();
        let identity = attester.identity().await.unwrap();
        let at = |name: &str| tpm.state().join(name).display().to_string();
        let (ek_file, secret, out) = (at("ek.tpm2b"), at("secret"), at("credential"));
        let size = u16::try_from(identity.ek_public.len()).unwrap().to_be_bytes();
        std::fs::write(&ek_file, [&size[..], &identity.ek_public].concat()).unwrap();
        std::fs::write(&secret, b"only in this TPM").unwrap();
        // The AK's name: SHA-256 over its public area, after the algorithm (TPM 2.0 Part 1, 16).
        let name = format!("000b{}", hex::encode(sha256(&identity.ak_public)));
        let make = ["tpm2_makecredential", "-Q", "-T", "none", "-u", &ek_file, "-s", &secret, "-n", &name, "-o", &out];
        must_run(&make).unwrap();
        let file = std::fs::read(&out).unwrap();
        assert_eq!(file[..8], [0xba, 0xdc, 0xc0, 0xde, 0, 0, 0, 1]);
        let blob = 2 + usize::from(u16::from_be_bytes([file[8], file[9]]));
        let (blob, encrypted) = file[8..].split_at(blob);
        let opened = attester.activate(blob.to_vec(), encrypted.to_vec()).await.unwrap();
        assert_eq!(opened.as_slice(), b"only in this TPM", "{ek:?}");
        // For another name it stays closed.
        let other = format!("000b{}", hex::encode(sha256(b"another key")));
        let make = make.map(|arg| if arg == name { other.as_str() } else { arg });
        must_run(&make).unwrap();
        let file = std::fs::read(&out).unwrap();
        let (blob, encrypted) = file[8..].split_at(2 + usize::from(u16::from_be_bytes([file[8], file[9]])));
        attester.activate(blob.to_vec(), encrypted.to_vec()).await.unwrap_err();
    }
}
