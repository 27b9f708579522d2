//! Policies at a real replica: planned before they are made, explained, asked about, undone, and ended by the cell's time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::Refusal;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::policy_registry_client::PolicyRegistryClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::contexts::ambit;
use ambit_tests::machine::register_bare_cluster;
use ambit_tests::operator::create_entry;
use ambit_tests::process::Folder;
use ambit_tests::tpm::Maker;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tonic::transport::Channel;

type Registry = PolicyRegistryClient<Channel>;

const PATIENCE: Duration = Duration::from_secs(20);

fn policy(name: &str, spec: &str) -> String {
    format!("---\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: spiffe://west/db, {spec}}}\n")
}

async fn apply(registry: &mut Registry, yaml: &str, over: Option<u64>) -> Result<v1::ApplyResponse, Refusal> {
    let request = v1::ApplyRequest { request_id: fresh(), yaml: yaml.to_owned(), over, unlimited: false };
    registry.apply(request).await.map(|a| a.into_inner()).map_err(|s| from_status(&s))
}

async fn plan(registry: &mut Registry, request: v1::PlanRequest) -> v1::PlanResponse {
    registry.plan(request).await.unwrap().into_inner()
}

fn writing(yaml: String) -> v1::PlanRequest {
    v1::PlanRequest { yaml, ..Default::default() }
}

async fn explain(registry: &mut Registry, source: &str, port: u32, at_ms: u64) -> v1::ExplainResponse {
    let (source, destination) = (format!("spiffe://west/{source}"), "spiffe://west/db".to_owned());
    let request = v1::ExplainRequest { source, destination, port, at_ms };
    registry.explain(request).await.unwrap().into_inner()
}

fn flips(plan: &v1::PlanResponse) -> Vec<String> {
    let text =
        |f: &v1::Flip| format!("{} +{} -{}", f.source.rsplit('/').next().unwrap_or_default(), f.opened, f.closed);
    plan.flips.iter().map(text).collect()
}

async fn cell() -> (Cell, Registry) {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    // Its roots are there once it made a TPM.
    maker.tpm("n1").unwrap();
    register_bare_cluster(&cell, "west", &maker).await.unwrap();
    for id in ["db", "web", "ops"] {
        create_entry(&cell, id, "west").await.unwrap();
    }
    let registry = PolicyRegistryClient::new(cell.admin(1).await.unwrap());
    (cell, registry)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_planned_made_explained_and_undone() {
    let (_cell, mut registry) = cell().await;
    let open = policy("web", "action: allow, from: [spiffe://west/web, spiffe://west/later], ports: [80]");
    let planned = plan(&mut registry, writing(open.clone())).await;
    assert_eq!((planned.over, flips(&planned)), (0, vec!["web +80 -none".to_owned()]));
    assert_eq!((planned.pairs, planned.compared), (1, 1), "who is not known is not counted");
    assert!(!explain(&mut registry, "web", 80, 0).await.allowed, "a plan changes nothing");
    let first = apply(&mut registry, &open, Some(planned.over)).await.unwrap().revision;

    // Who planned over something else changes nothing.
    let wider = policy("web", "action: allow, from: ['spiffe://west/*'], ports: [80, 443]");
    let late = apply(&mut registry, &wider, Some(planned.over)).await.unwrap_err();
    assert_eq!(late.code.as_str(), "stale_revision", "{late}");
    let planned = plan(&mut registry, writing(wider.clone())).await;
    assert_eq!(flips(&planned), ["db +80, 443 -none", "ops +80, 443 -none", "web +443 -none"]);
    let second = apply(&mut registry, &wider, Some(planned.over)).await.unwrap().revision;
    let before = now_ms();

    let told = explain(&mut registry, "ops", 443, 0).await;
    assert!(told.allowed && told.rule == "west/web" && told.written_revision == second, "{told:?}");
    assert!(told.written_by.contains("/ambit/admin/") && told.written_ms > 0, "{told:?}");
    let source = told.source.unwrap();
    assert_eq!(
        (source.entries.as_slice(), source.clusters.as_slice()),
        (&["ops".to_owned()][..], &["west".to_owned()][..])
    );

    let who = registry.who_can(v1::WhoCanRequest { destination: "spiffe://west/db".into(), port: 80 });
    let who = who.await.unwrap().into_inner();
    assert_eq!((who.callers.len(), who.rules.len()), (3, 1), "{who:?}");

    let back = plan(&mut registry, v1::PlanRequest { rollback_to: first, ..Default::default() }).await;
    assert_eq!(flips(&back), ["db +none -80, 443", "ops +none -80, 443", "web +none -443"]);
    let request = v1::RollbackRequest { request_id: fresh(), revision: first, over: Some(back.over), unlimited: false };
    let undone = registry.rollback(request.clone()).await.unwrap().into_inner();
    assert_eq!(undone.objects.len(), 1, "{undone:?}");
    // Sent again it is answered, and done once (I10): the history below has it once.
    registry.rollback(request).await.unwrap();
    assert!(!explain(&mut registry, "ops", 443, 0).await.allowed);
    assert!(explain(&mut registry, "ops", 443, before).await.allowed, "as it was then");

    // Nobody knows what will be allowed: what is asked is not answered by what is allowed now.
    let (source, destination) = ("spiffe://west/ops".to_owned(), "spiffe://west/db".to_owned());
    let later = v1::ExplainRequest { source, destination, port: 443, at_ms: now_ms() + 3_600_000 };
    let refusal = from_status(&registry.explain(later).await.unwrap_err());
    assert!(refusal.code.as_str() == "bad_request" && refusal.expected.contains("up to now"), "{refusal}");

    let history = registry.history(v1::HistoryRequest { limit: 0 }).await.unwrap().into_inner();
    let rows: Vec<_> = history.rows.iter().map(|row| (row.revision, row.note.clone(), row.documents.len())).collect();
    let note = format!("rollback to {first}");
    assert_eq!(rows, [(undone.revision, note, 1), (second, String::new(), 1), (first, String::new(), 1)]);
    let unknown = v1::RollbackRequest { request_id: fresh(), revision: first + 1, over: None, unlimited: false };
    assert_eq!(from_status(&registry.rollback(unknown).await.unwrap_err()).code.as_str(), "not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_ends_and_is_shown_as_over_and_unused() {
    let (_cell, mut registry) = cell().await;
    let end = ambit_model::utc::text((now_ms() / 1000 + 8) * 1000);
    let text = [
        policy("brief", &format!("action: allow, from: [spiffe://west/web], expires: {end}")),
        policy("nobody", "action: allow, from: [spiffe://west/nobody]"),
        policy("watch", "action: audit, from: ['spiffe://west/*']"),
        "---\nkind: Group\nmetadata: {name: crew}\nspec: {members: [spiffe://west/ops, spiffe://west/later]}\n"
            .to_owned(),
        policy("crew", "action: allow, from: ['group:west/crew'], ports: [22]"),
    ];
    apply(&mut registry, &text.concat(), None).await.unwrap();
    let told = explain(&mut registry, "web", 80, 0).await;
    assert!(told.allowed && told.audited == "west/watch" && told.expires_at_ms > 0, "{told:?}");
    assert!(explain(&mut registry, "ops", 22, 0).await.allowed, "by its group");
    // The same that ends at once and at its end; and what is said of UDP says nothing of who can connect.
    let sooner = policy("crew", &format!("action: allow, from: ['group:west/crew'], ports: [22], expires: {end}"));
    let planned = plan(&mut registry, writing(sooner)).await;
    assert_eq!(flips(&planned), ["ops +none -22"]);
    assert!(planned.flips[0].at_ms > now_ms() && (planned.opened, planned.closed) == (0, 1), "{planned:?}");
    let udp = policy("no-udp", "action: deny, from: ['spiffe://west/*'], protocols: [udp]");
    apply(&mut registry, &udp, None).await.unwrap();
    let who = registry.who_can(v1::WhoCanRequest { destination: "spiffe://west/db".into(), port: 22 });
    let who = who.await.unwrap().into_inner();
    let names: Vec<_> = who.rules.iter().map(|rule| rule.name.as_str()).filter(|name| *name != "brief").collect();
    assert_eq!(names, ["crew", "nobody", "watch"], "{who:?}");
    let delete = v1::DeletePolicyRequest {
        request_id: fresh(),
        kind: "Policy".into(),
        name: "no-udp".into(),
        ..Default::default()
    };
    registry.delete(delete).await.unwrap();
    let listed = registry.list(v1::ListPoliciesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.groups[0].members, ["spiffe://west/later", "spiffe://west/ops"]);

    let began = std::time::Instant::now();
    while explain(&mut registry, "web", 80, 0).await.allowed {
        assert!(began.elapsed() < PATIENCE, "it never ends");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(explain(&mut registry, "web", 80, 0).await.nearest.contains("it is over since"), "the nearest says so");
    let unused = registry.unused(v1::UnusedRequest::default()).await.unwrap().into_inner();
    let whys: Vec<_> = unused.policies.iter().map(|p| (p.name.as_str(), p.why.as_str())).collect();
    assert_eq!(whys.len(), 2, "{whys:?}");
    assert!(whys[0].0 == "brief" && whys[0].1.starts_with("it is over since"), "{whys:?}");
    assert_eq!(whys[1], ("nobody", "none of its callers is known"));
}

/// The way of somebody who writes a first policy, by the command line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_guards_and_undoes() {
    let (cell, _registry) = cell().await;
    let (context, folder) = (cell.admin_file("context.json").display().to_string(), Folder::new().unwrap());
    let file = |name: &str, text: &str| {
        let path = folder.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let run = |args: &[&str], code: i32, words: &[&str]| -> String {
        let out = ambit(&context, &[&["policy"], args].concat());
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        println!("$ ambit policy {}\n{said}", args.join(" "));
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: '{word}' is missing in: {said}"));
        said
    };
    let bad = file("bad.yaml", &policy("web", "action: allow, from: [spiffe://west/web], port: [80]"));
    run(&["lint", &bad], 2, &["error[policy_malformed]", "bad.yaml:4:", "| ", "^", "did you mean `ports`?", "try: "]);
    let udp = file("udp.yaml", &policy("web", "action: allow, from: [spiffe://west/web], protocols: [udp]"));
    run(&["apply", "-f", &udp], 2, &["error[policy_unenforceable]", "Policy web: allow over udp"]);
    let open = file("open.yaml", &policy("web", "action: allow, from: ['spiffe://west/*'], ports: [80]"));
    run(&["lint", &open], 0, &["warning: policy web: whoever gets an identity of west may call"]);
    run(&["plan", "-f", &open], 0, &["policy web: added", "spiffe://west/ops", "3 pairs of known identities change"]);
    run(&["apply", "-f", &open, "--max-flips", "2"], 5, &["error[policy_blast_radius]", "3 pairs: ", "--max-flips"]);
    run(&["list"], 0, &["0 objects"]);
    let said = run(&["apply", "-f", &open], 0, &["policy web: changed", "opens ports of 3 pairs"]);
    let revision = said.lines().find_map(|line| line.rsplit_once("revision ")).unwrap().1.to_owned();
    run(&["who-can", "spiffe://west/db:80"], 0, &["spiffe://west/ops", "3 callers", "allow west/web: spiffe://west/*"]);
    run(&["delete", "web", "--max-flips", "0"], 5, &["error[policy_blast_radius]", "closes 80"]);
    run(&["delete", "web"], 0, &["closes ports of 3 pairs"]);
    // In an emergency nothing comes between, and everybody can read it afterwards.
    let stop = file("stop.yaml", &policy("stop", "action: deny, from: ['spiffe://west/*']"));
    run(&["apply", "-f", &stop, "--max-flips", "any"], 0, &["policy stop: changed"]);
    run(&["history", "--limit", "1"], 0, &["(without a limit of flips)", "policy stop: added"]);
    run(&["delete", "stop", "--max-flips", "any"], 0, &["policy stop: changed"]);
    run(&["plan", "-f", &open, "--max-flips", "any"], 0, &["3 pairs of known identities change"]);
    run(&["apply", "-f", &open, "--max-flips", "many"], 2, &["expected a number of pairs, or any"]);
    run(&["history"], 0, &["policy web: removed", "policy web: added", "4 changes", "/ambit/admin/"]);
    run(&["plan", "--rollback", &revision], 0, &["policy web: added"]);
    run(&["rollback", &revision], 0, &["policy web: changed"]);
    run(&["rollback", "1"], 1, &["error[not_found]", "ambit policy history"]);
    run(&["unused"], 0, &["0 policies"]);
    run(
        &["explain", "spiffe://west/web", "spiffe://west/db:81"],
        0,
        &["denied", "nearest", "it is for ports 80", "agents"],
    );
    let crew = "kind: Group\nmetadata: {name: crew}\nspec: {members: [spiffe://west/ops]}\n";
    run(&["apply", "-f", &file("crew.yaml", crew)], 0, &["group crew: changed"]);
    let out = ambit(&context, &["watch", "group", "--once"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("group    west/crew members=spiffe://west/ops"), "{said}");
    let suite = |expect: &str| {
        let case = format!("{{from: spiffe://west/web, to: spiffe://west/db, ports: [80], expect: {expect}}}");
        format!("kind: PolicyTest\nmetadata: {{name: web}}\nspec:\n  cases:\n  - {case}\n")
    };
    let (good, wrong) = (file("good.yaml", &suite("allow")), file("wrong.yaml", &suite("deny")));
    run(&["test", &good, "-f", &open], 0, &["1 suite"]);
    run(&["test", &good, "-f", &open, "-f", &open], 2, &["error[policy_malformed]", "Policy web twice"]);
    run(&["test", &good, "-f", &udp], 2, &["error[policy_unenforceable]"]);
    run(&["test", &wrong, "-f", &open], 1, &["web: case 1: expected deny, found allowed by policy (west/web)"]);
}

/// The document of the README, by the command line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_out_is_planned_opened_explained_and_shut() {
    let (cell, _registry) = cell().await;
    let (context, folder) = (cell.admin_file("context.json").display().to_string(), Folder::new().unwrap());
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let block = readme.split("```yaml\n").find(|block| block.starts_with("kind: Egress")).unwrap();
    let document = block.split("```").next().unwrap().to_owned();
    let file = |name: &str, text: &str| {
        let path = folder.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let run = |args: &[&str], code: i32, words: &[&str]| {
        let out = ambit(&context, args);
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        println!("$ ambit {}\n{said}", args.join(" "));
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: '{word}' is missing in: {said}"));
        said
    };
    let open = file("open.yaml", &document);
    let (web, to) = ("spiffe://west/web", "203.0.113.7:443");
    run(
        &["explain", web, to],
        0,
        &["denied: spiffe://west/web -> 203.0.113.7:443", "outside of the mesh, and no egress"],
    );
    run(
        &["policy", "plan", "-f", &open],
        0,
        &["egress web-to-payments: added", "clear text", "203.0.113.0/24", "1 pair of known identities change"],
    );
    run(&["policy", "apply", "-f", &open, "--max-flips", "0"], 5, &["error[policy_blast_radius]", "opens 443"]);
    let said = run(&["policy", "apply", "-f", &open], 0, &["egress web-to-payments: changed", "opens ports of 1 pair"]);
    let revision = said.lines().find_map(|line| line.rsplit_once("revision ")).unwrap().1.to_owned();
    run(
        &["explain", web, to],
        0,
        &[
            "allowed: ",
            "west/web-to-payments, written by",
            "passthrough: in clear text, carried by the agent",
            "allowed by egress",
        ],
    );
    for (source, to, why) in [
        (web, "203.0.113.7:80", "west/web-to-payments: it is for ports 443"),
        ("spiffe://west/db", to, "west/web-to-payments: it is for other callers"),
        (web, "203.0.114.7:443", "west/web-to-payments: it is for 203.0.113.0/24"),
        (web, "169.254.169.254:443", "denied: link-local"),
    ] {
        run(&["explain", source, to], 0, &["denied: ", why]);
    }
    run(&["policy", "who-can", to], 0, &[web, "1 caller", "egress web-to-payments", "passthrough"]);
    run(&["policy", "who-can", "203.0.113.7:80"], 0, &["0 callers"]);
    run(&["policy", "list"], 0, &["egress", "203.0.113.0/24", "passthrough"]);
    run(&["watch", "egress", "--once"], 0, &["web-to-payments", "to=203.0.113.0/24"]);
    // An address of the mesh is judged by policies.
    let service =
        "kind: Service\nmetadata: {name: s}\nspec: {address: 203.0.113.9, port: 443, backends: [spiffe://west/db]}\n";
    run(&["policy", "apply", "-f", &file("service.yaml", service)], 0, &["service s: changed"]);
    run(&["explain", web, "203.0.113.9:443"], 2, &["error[bad_request]", "which is service west/s"]);
    run(&["policy", "who-can", "203.0.113.9"], 2, &["error[bad_request]", "outside of the mesh"]);
    for (old, new, why) in [
        ("203.0.113.0/24", "'2001:db8::/32'", "ranges of IPv4"),
        ("ports: [443]", "protocols: [udp]", "nothing carries datagrams"),
        ("203.0.113.0/24", "169.254.169.254/32", "link-local"),
    ] {
        let bad = file("bad.yaml", &document.replace(old, new));
        run(&["policy", "apply", "-f", &bad], 2, &["error[policy_unenforceable]", "Egress web-to-payments", why]);
    }
    let nobody = document.replace("spiffe://west/web", "spiffe://west/nobody").replace("web-to-payments", "idle");
    run(&["policy", "apply", "-f", &file("idle.yaml", &nobody)], 0, &["egress idle: changed"]);
    run(&["policy", "unused"], 0, &["egress  west    idle  none of its callers is known"]);
    run(&["policy", "delete", "web-to-payments", "--kind", "egress"], 0, &["closes ports of 1 pair"]);
    run(&["explain", web, to], 0, &["denied: "]);
    run(&["policy", "rollback", &revision], 0, &["egress web-to-payments: changed", "egress idle: changed"]);
    run(&["explain", web, to], 0, &["allowed: "]);
    run(
        &["policy", "history"],
        0,
        &["egress web-to-payments: removed", "- spiffe://west/web to 203.0.113.0/24 on 443, passthrough"],
    );
}

/// The document of the README about callers by address, by the command line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_in_is_planned_opened_explained_and_shut() {
    let (cell, _registry) = cell().await;
    let (context, folder) = (cell.admin_file("context.json").display().to_string(), Folder::new().unwrap());
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let block = readme.split("```yaml\n").find(|block| block.contains("name: clients-to-db")).unwrap();
    let document = block.split("```").next().unwrap().to_owned();
    let file = |name: &str, text: &str| {
        let path = folder.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let run = |args: &[&str], code: i32, words: &[&str]| {
        let out = ambit(&context, args);
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        println!("$ ambit {}\n{said}", args.join(" "));
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: '{word}' is missing in: {said}"));
        said
    };
    let open = file("open.yaml", &document);
    let (client, db) = ("198.51.100.7", "spiffe://west/db:8080");
    run(&["explain", client, db], 0, &["denied: 198.51.100.7 -> spiffe://west/db:8080", "denied by default"]);
    run(&["policy", "lint", &open], 0, &["2 objects"]);
    run(
        &["policy", "plan", "-f", &open],
        0,
        &[
            "policy clients-to-db: added",
            "passthrough: in clear text",
            "cidr:198.51.100.0/24",
            "1 pair of known identities",
        ],
    );
    run(&["policy", "apply", "-f", &open, "--max-flips", "0"], 5, &["error[policy_blast_radius]", "opens 8080"]);
    let said = run(&["policy", "apply", "-f", &open], 0, &["policy clients-to-db: changed", "opens ports of 1 pair"]);
    let revision = said.lines().find_map(|line| line.rsplit_once("revision ")).unwrap().1.to_owned();
    let words = ["allowed: ", "west/clients-to-db, written by", "passthrough: in clear text, carried by the agent"];
    run(&["explain", client, db], 0, &words);
    for (from, to, why) in [
        (client, "spiffe://west/db:80", "west/clients-to-db: it is for ports 8080"),
        ("203.0.113.7", db, "west/clients-to-db: it is for addresses in 198.51.100.0/24"),
        ("198.51.100.66", db, "denied by policy"),
        ("127.0.0.1", db, "denied: loopback"),
        ("spiffe://west/web", db, "denied by default"),
    ] {
        run(&["explain", from, to], 0, &["denied: ", why]);
    }
    run(&["explain", "2001:db8::1", db], 2, &["error[bad_request]", "an IPv4 address"]);
    let who = ["0 callers", "allow west/clients-to-db: cidr:198.51.100.0/24 on 8080, passthrough: in clear text"];
    run(&["policy", "who-can", db], 0, &who);
    run(&["policy", "list"], 0, &["allow, passthrough", "cidr:198.51.100.0/24"]);
    run(
        &["watch", "policy", "--once"],
        0,
        &["west/clients-to-db", "from=cidr:198.51.100.0/24", "transport=passthrough"],
    );
    run(&["policy", "unused"], 0, &["0 policies"]);
    // An address of the mesh is not a caller's.
    let service =
        "kind: Service\nmetadata: {name: s}\nspec: {address: 198.51.100.9, port: 443, backends: [spiffe://west/db]}\n";
    run(&["policy", "apply", "-f", &file("service.yaml", service)], 0, &["service s: changed"]);
    run(&["explain", "198.51.100.9", db], 0, &["denied: this is the address of service west/s"]);
    for (old, new, code, why) in [
        ("  transport: passthrough", "  # nothing said", "policy_malformed", "transport: passthrough"),
        ("[cidr:198.51.100.0/24]", "['cidr:2001:db8::/32']", "policy_unenforceable", "ranges of IPv4"),
        ("[cidr:198.51.100.0/24]", "['cidr:169.254.0.0/16']", "policy_unenforceable", "link-local"),
        (
            "[cidr:198.51.100.0/24]",
            "[cidr:198.51.100.0/24, spiffe://west/web]",
            "policy_malformed",
            "one policy for each",
        ),
        ("target: spiffe://west/db", "target: spiffe://east/db", "not_owner", "clients-to-db"),
    ] {
        let bad = file("bad.yaml", &document.replacen(old, new, 1));
        let exit = if code == "not_owner" { 4 } else { 2 };
        run(&["policy", "apply", "-f", &bad], exit, &[&format!("error[{code}]"), why]);
    }
    let nobody = document.replace("spiffe://west/db", "spiffe://west/nobody").replace("clients-to-db", "idle");
    let nobody = nobody.split("---").next().unwrap().to_owned();
    run(&["policy", "apply", "-f", &file("idle.yaml", &nobody)], 0, &["policy idle: changed"]);
    run(&["policy", "unused"], 0, &["idle", "no known workload is spiffe://west/nobody"]);
    run(&["policy", "delete", "clients-to-db"], 0, &["closes ports of 1 pair"]);
    run(&["explain", client, db], 0, &["denied: "]);
    run(&["policy", "rollback", &revision], 0, &["policy clients-to-db: changed", "policy idle: changed"]);
    run(&["explain", client, db], 0, &["allowed: "]);
}

fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}
