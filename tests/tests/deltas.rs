//! What a real cell sends of what changed: little, first whom to refuse, and to who comes back only what is new.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::resources::{Held, Taken};
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::policy_registry_client::PolicyRegistryClient;
use ambit_tests::agent::Agent;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Machine, register_cluster};
use ambit_tests::operator::{admit, create_entry, say, within};
use ambit_tests::tpm::Maker;
use tonic::transport::Channel;

async fn allow(cell: &Cell, name: &str, port: u16) -> u64 {
    let yaml = format!(
        "kind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: spiffe://west/db, action: allow, \
         from: [spiffe://west/web], ports: [{port}]}}\n"
    );
    write(cell, yaml).await
}

async fn write(cell: &Cell, yaml: String) -> u64 {
    let request = v1::ApplyRequest { request_id: fresh(), yaml, over: None, unlimited: true };
    let call = |channel: Channel| {
        let request = request.clone();
        async move { PolicyRegistryClient::new(channel).apply(request).await }
    };
    cell.insist(call).await.unwrap().revision
}

/// Everything of this revision, and what it weighed.
async fn all(agent: &mut Agent, held: &mut Held, revision: u64) -> usize {
    let mut weight = 0;
    loop {
        let (taken, bytes) = agent.delta(held).await.unwrap();
        weight += bytes;
        if taken == Taken::All && held.revision() >= revision {
            return weight;
        }
    }
}

/// Says that this is in the kernel.
async fn acknowledge(agent: &mut Agent, revision: u64) {
    agent.send(vec![Up::Ack(v1::Ack { revision, ..v1::Ack::default() })]).await;
}

/// This replica counted so many changes on their way into kernels.
async fn propagated(cell: &Cell, replica: usize, want: u64) {
    let line = format!("ambit_policy_propagation_seconds_count {want}\n");
    within(&line, async || cell.metrics_page(replica).unwrap().contains(&line).then_some(())).await;
}

fn ports(held: &Held) -> Vec<u32> {
    held.set().slice(0, 0).unwrap().policies.iter().flat_map(|policy| policy.ports.clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_is_told_what_changed_at_any_replica_and_everything_when_it_lost_it() {
    let cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let (machine, other) = (Machine::new(&maker, "a").await.unwrap(), Machine::new(&maker, "b").await.unwrap());
    register_cluster(&cell, "west", &maker).await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    let them = admit(&cell, &other, "west").await.unwrap();
    for n in 0..50 {
        create_entry(&cell, &format!("w{n}"), "west").await.unwrap();
    }
    create_entry(&cell, "db", "west").await.unwrap();
    let first = allow(&cell, "p", 80).await;

    let (mut held, me) = (Held::default(), me.identity);
    let mut agent = Agent::open_holding(&cell, 1, me.clone(), &held).await.unwrap();
    let everything = all(&mut agent, &mut held, first).await;
    assert!(everything > 5_000 && ports(&held) == [80], "{everything}");
    // What it starts with is not counted, and each change once.
    acknowledge(&mut agent, held.revision()).await;
    let second = allow(&cell, "p", 81).await;
    let changed = all(&mut agent, &mut held, second).await;
    assert!(changed < 500 && ports(&held) == [81], "{changed}");
    acknowledge(&mut agent, held.revision()).await;
    acknowledge(&mut agent, held.revision()).await;
    propagated(&cell, 1, 1).await;

    // Where it may connect to outside of the mesh, and what is not outside there, are resources like any other.
    let outside = |held: &Held| {
        let slice = held.set().slice(0, 0).unwrap();
        let egress: Vec<_> = slice.egress.iter().map(|e| format!("{} {:?} {:?}", e.name, e.from, e.to)).collect();
        (egress, slice.meshed)
    };
    assert_eq!(outside(&held), (vec![], vec![]));
    let text = "kind: Egress\nmetadata: {name: e}\nspec: {from: [spiffe://west/db], to: [10.0.0.0/8], transport: passthrough}\n\
                ---\nkind: Service\nmetadata: {name: s}\nspec: {address: 10.96.0.1, port: 80, backends: [spiffe://west/db]}\n";
    let opened = write(&cell, text.to_owned()).await;
    let changed = all(&mut agent, &mut held, opened).await;
    let want = "e [\"spiffe://west/db\"] [\"10.0.0.0/8\"]".to_owned();
    assert!(changed < 500 && outside(&held) == (vec![want], vec!["10.96.0.1".to_owned()]), "{:?}", outside(&held));
    let shut = write(&cell, text.replace("west/db], to", "west/nobody], to")).await;
    let changed = all(&mut agent, &mut held, shut).await;
    assert!(changed < 500 && outside(&held) == (vec![], vec![]), "{:?}", outside(&held));
    // So are those who come in by address, and who is of the mesh there. What is about them is told apart: who does not know of it
    // lets none of them in.
    let inside = |held: &Held| {
        let slice = held.set().slice(0, 0).unwrap();
        let by_identity = slice.policies.iter().filter(|p| !p.unmeshed.is_empty() || p.from.is_empty()).count();
        let told: Vec<_> =
            slice.unmeshed.iter().map(|p| format!("{} {:?} {}", p.name, p.unmeshed, p.transport)).collect();
        (by_identity, told, slice.claimed)
    };
    let text = "kind: Policy\nmetadata: {name: in}\nspec: {target: spiffe://west/db, action: allow, from: ['cidr:10.0.0.0/8'], \
                transport: passthrough}\n";
    let opened = write(&cell, text.to_owned()).await;
    let changed = all(&mut agent, &mut held, opened).await;
    let want = vec!["in [\"10.0.0.0/8\"] passthrough".to_owned()];
    assert!(changed < 500 && inside(&held) == (0, want, vec!["10.96.0.1".to_owned()]), "{:?}", inside(&held));
    let shut = write(&cell, text.replace("west/db, action", "west/nobody, action")).await;
    let changed = all(&mut agent, &mut held, shut).await;
    assert!(changed < 500 && inside(&held) == (0, vec![], vec![]), "{:?}", inside(&held));
    let second = shut;

    // At another replica, where nothing changed since; and where something did, at one that sent what the agent holds.
    let mut agent = Agent::open_holding(&cell, 2, me.clone(), &held).await.unwrap();
    let nothing = all(&mut agent, &mut held, second).await;
    assert!(nothing < 200, "{nothing}");
    acknowledge(&mut agent, held.revision()).await;
    drop(agent);
    let third = allow(&cell, "p", 82).await;
    let mut agent = Agent::open_holding(&cell, 2, me.clone(), &held).await.unwrap();
    let changed = all(&mut agent, &mut held, third).await;
    assert!(changed < 500 && ports(&held) == [82], "{changed}");
    // The change that it missed is counted where it came back, and what it came back with is not.
    acknowledge(&mut agent, held.revision()).await;
    propagated(&cell, 2, 1).await;
    propagated(&cell, 1, 1).await;

    // It says that it lost what it held.
    held = Held::default();
    agent.send(vec![Up::Nack(v1::Nack { revision: third, reason: "a test".into(), lost: true })]).await;
    assert!(all(&mut agent, &mut held, third).await > 5_000 && ports(&held) == [82]);

    // Whom to refuse comes ahead, and the rest of that revision after it.
    say(&cell, "ban", &[other.node()]).await.unwrap();
    let denied = |held: &Held| held.set().slice(0, 0).unwrap().denials.len();
    let mut seen = Vec::new();
    while denied(&held) == 0 || seen.last() != Some(&Taken::All) {
        seen.push(agent.delta(&mut held).await.unwrap().0);
    }
    assert_eq!(seen, [Taken::Denials, Taken::All]);
    // Who was put out is told nothing more.
    let refused = within("its refusal", async || {
        Agent::open_holding(&cell, 3, them.identity.clone(), &Held::default()).await.err()
    });
    assert_eq!(refused.await.code.as_str(), "node_banned");
}
