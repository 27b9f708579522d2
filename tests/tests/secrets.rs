//! The memory of live replicas and agents, dumped as root, and their logs: no key but those in use.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_identity::wrap::Purpose;
use ambit_lab::{Lab, Place, Ready};
use ambit_model::ReplicaId;
use ambit_tests::process::{Folder, SOON, binary, must_run, until};
use ambit_tests::secrets::{self, Secret, in_file};
use ambit_tests::small::Small;
use ambitd::raft::{Options, rebase};
use ambitd::replica::files::Files;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const REPLICAS: [&str; 3] = ["west-r1", "west-r2", "west-r3"];

fn identity(lab: &Lab, replica: &str, file: &str) -> PathBuf {
    lab.folder(replica).join("data/identity").join(file)
}

/// The name by key of a certificate or of what signed it.
fn name_in(file: &Path, extension: &str) -> String {
    let file = file.display().to_string();
    let told = must_run(&["openssl", "x509", "-in", &file, "-noout", "-ext", extension]).unwrap();
    told.lines().last().unwrap().trim().trim_start_matches("keyid:").replace(':', "").to_lowercase()
}

/// The SVID key of the pod and who signed it, as a workload without a library of its own gets it; its files are gone after.
fn fetched(lab: &Lab, pod: &str) -> Option<(Secret, String)> {
    let out = lab.folder("west-n1").join("fetched");
    std::fs::create_dir_all(&out).unwrap();
    let (agent, socket) = (binary("ambit-agent").unwrap(), lab.workload_socket("west-n1"));
    let argv = ["fetch", "--socket", socket.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let place = Place { uid: None, ..lab.place(pod).unwrap() };
    let told = lab.run_in(&place, &[&[agent.to_str().unwrap()], &argv[..]].concat(), SOON).unwrap();
    let file = |name| out.join(name);
    let key = told
        .status
        .success()
        .then(|| (in_file(&file("svid.key")).unwrap(), name_in(&file("svid.pem"), "authorityKeyIdentifier")));
    std::fs::remove_dir_all(&out).unwrap();
    key
}

/// Every replica goes on to another issuing key; the former ones by replica.
fn renew(lab: &Lab) -> BTreeMap<&'static str, Secret> {
    let keys = || REPLICAS.map(|replica| (replica, in_file(&identity(lab, replica, "issuer.pem")).unwrap()));
    let former: BTreeMap<_, _> = keys().into();
    for replica in REPLICAS {
        let authority = name_in(&identity(lab, replica, "issuer.pem"), "subjectKeyIdentifier");
        lab.ambit("west", &["trust", "taint", &authority]).unwrap();
    }
    until("every replica has another issuing key", || keys().iter().all(|(r, key)| former[r] != *key).then_some(()));
    former
}

/// What each process holds beside what it may.
fn found_wrong(
    small: &Small,
    of_process: &BTreeMap<&str, BTreeSet<String>>,
    known: &[(String, Secret)],
) -> BTreeSet<String> {
    let mut wrong = BTreeSet::new();
    for (process, allowed) in of_process {
        let pid = u32::try_from(small.process(process).unwrap().pid).unwrap();
        let (names, forms) = secrets::search(pid, known).unwrap();
        let unknown: Vec<&Secret> = forms.iter().filter(|f| known.iter().all(|(_, secret)| secret != *f)).collect();
        println!("{process}: {names:?}, and {} others", unknown.len());
        wrong.extend(names.iter().filter(|name| !allowed.contains(**name)).map(|name| format!("{name} in {process}")));
        wrong.extend(unknown.iter().map(|u| format!("{} in {process}", hex::encode(&u[..4]))));
        for sure in [format!("{process}'s issuing key"), "web's key".to_owned()] {
            let seen = !allowed.contains(&sure) || names.contains(sure.as_str());
            assert!(seen, "the search finds what is in use: {sure}");
        }
    }
    wrong
}

#[test]
fn live_processes_and_their_logs_hold_no_keys_but_those_in_use() {
    let small = Small::up("testkeys").unwrap();
    let lab = &small.lab;
    let whose = ["--spiffe-id", "spiffe://west/web", "--cluster", "west", "--selector", "cgroup:web"];
    lab.ambit("west", &[&["entry", "create", "--id", "web"], &whose[..]].concat()).unwrap();
    lab.start_pod("west-n1", "web", &["sleep", "600"], Ready::Started).unwrap();
    let svid = || fetched(lab, "west-n1-web");
    let (revoked, _) = until("an SVID", svid);
    lab.ambit("west", &["svid", "revoke", "spiffe://west/web"]).unwrap();
    let (former, _) = until("another SVID", || svid().filter(|(key, _)| *key != revoked));
    let [first, second] = [renew(lab), renew(lab)];
    // What tainted intermediates signed is issued anew, by push.
    let present = REPLICAS.map(|replica| name_in(&identity(lab, replica, "issuer.pem"), "subjectKeyIdentifier"));
    let (web, _) = until("an SVID under them", || svid().filter(|(_, by)| present.contains(by)));

    let mut known = vec![("web's key".to_owned(), web), ("web's revoked key".to_owned(), revoked)];
    known.push(("web's former key".into(), former));
    known.push(("the administrator's key".into(), in_file(&lab.folder("operator").join("west/admin.key")).unwrap()));
    known.push(("the root's key".into(), in_file(&identity(lab, "west-r1", "root.key")).unwrap()));
    let mut of_replica: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for replica in REPLICAS {
        for (file, what) in [
            ("issuer.pem", "issuing key"),
            ("tls.key", "TLS key"),
            ("record.key", "record key"),
            ("wrap.key", "wrap key"),
        ] {
            known.push((format!("{replica}'s {what}"), in_file(&identity(lab, replica, file)).unwrap()));
            of_replica.entry(replica).or_default().insert(format!("{replica}'s {what}"));
        }
        known.push((format!("{replica}'s former issuing key"), second[replica]));
        // What was committed under it is signed by no other.
        of_replica.entry(replica).or_default().insert(format!("{replica}'s former issuing key"));
        known.push((format!("{replica}'s first issuing key"), first[replica]));
    }
    let agents = [("west-n1-agent", BTreeSet::from(["web's key".to_owned()])), ("west-n2-agent", BTreeSet::new())];
    let of_process: BTreeMap<_, _> = of_replica.into_iter().chain(agents).collect();
    // A key that is asked a certificate for at that moment is in use, and a second later it is held in no such form: wrong
    // is what is found again and again.
    let mut wrong = found_wrong(&small, &of_process, &known);
    for _ in 0..4 {
        if !wrong.is_empty() {
            std::thread::sleep(Duration::from_secs(1));
            wrong = &wrong & &found_wrong(&small, &of_process, &known);
        }
    }
    assert_eq!(wrong, BTreeSet::new());
    assert_eq!(secrets::in_logs(&lab.spec().root()).unwrap(), [""; 0]);
}

/// The key that signs tokens, as a replica's own files open it: those of one that does not run.
fn jwt_key(lab: &Lab, replica: &str, number: u64) -> Secret {
    let data = lab.folder(replica).join("data");
    // Its lock ends with its last thread.
    let survey = || rebase::survey(&Options::new(ReplicaId(number), data.clone())).ok();
    let state = until("its files are nobody's", survey).whole.state;
    let wrap = Files::create(&data).unwrap().wrap().unwrap();
    let private = wrap.unwrap_for(Purpose::JwtAuthority, &state.jwt_signer().unwrap().wrapped[&number]).unwrap();
    private.as_slice().try_into().unwrap()
}

#[test]
fn a_key_of_tokens_that_was_replaced_is_held_by_no_replica() {
    let small = Small::up("testtokens").unwrap();
    let lab = &small.lab;
    let mint = || lab.ambit("west", &["svid", "mint", "--audience", "a", "spiffe://west/ci"]);
    until("a token", || mint().ok());
    small.process("west-r3").unwrap().kill();
    let former = [("the former key of tokens".to_owned(), jwt_key(lab, "west-r3", 3))];
    lab.restart("west-r3").unwrap();
    let holders = || {
        let holds = |replica: &&str| {
            let pid = u32::try_from(small.process(replica).unwrap().pid).unwrap();
            !secrets::search(pid, &former).unwrap().0.is_empty()
        };
        REPLICAS.into_iter().filter(holds).count()
    };
    assert!(holders() > 0, "the search finds what signs");
    lab.ambit("west", &["trust", "rotate", "--jwt", "--wait", "60s"]).unwrap();
    until("another token", || mint().ok());
    until("nobody holds the former", || (holders() == 0).then_some(()));

    for name in ["west-r1", "west-n1-agent"] {
        let pid = u32::try_from(small.process(name).unwrap().pid).unwrap();
        assert_eq!(core_of(pid), None, "{name} leaves a core");
    }
}

/// The core that a process leaves when it crashes, which it is made to here and may, as far as its limits go.
fn core_of(pid: u32) -> Option<PathBuf> {
    let folder = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    let cores = || -> BTreeSet<PathBuf> {
        let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("core"))).collect()
    };
    let before = cores();
    must_run(&["prlimit", "--pid", &pid.to_string(), "--core=unlimited"]).unwrap();
    must_run(&["kill", "-ABRT", &pid.to_string()]).unwrap();
    until("its end", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X'])).then_some(())
    });
    let left = cores().difference(&before).next().cloned();
    left.iter().for_each(|core| std::fs::remove_file(core).unwrap());
    left
}

#[test]
fn another_process_that_crashes_so_leaves_a_core() {
    let folder = Folder::new().unwrap();
    let mut sleep = Command::new("sleep").arg("60").current_dir(folder.path("")).spawn().unwrap();
    let core = core_of(sleep.id());
    sleep.wait().unwrap();
    assert!(core.is_some(), "kernel.core_pattern makes cores elsewhere: what was looked for cannot be found");
}

#[test]
fn a_planted_key_is_found_by_the_same_search() {
    let key = SvidKey::generate().unwrap();
    let pem = key.pem();
    let planted = *secrets::by_form(pem.as_bytes()).first().unwrap();
    let another = SvidKey::generate().unwrap();
    let another = *secrets::by_form(&another.pkcs8()).first().unwrap();
    let mut holder = Command::new("sleep").arg("60").env("KEY", pem.as_str()).stdout(Stdio::null()).spawn().unwrap();
    // Until it is `sleep` and no more this process, and sleeps: its libraries are in their places then.
    until("its own memory", || {
        let names = std::fs::read_link(format!("/proc/{}/exe", holder.id())).ok()?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", holder.id())).ok()?;
        (names.ends_with("sleep") && status.contains("State:\tS")).then_some(())
    });
    let another = [("another".to_owned(), another)];
    let found = secrets::search(holder.id(), &another);
    holder.kill().unwrap();
    holder.wait().unwrap();
    let (names, forms) = found.unwrap();
    assert_eq!(forms, [planted].into());
    assert!(names.is_empty());
}
