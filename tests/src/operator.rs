//! What operators ask and say of nodes, and what a node is answered for it.

use crate::agent::Admitted;
use crate::cell::{Cell, fresh};
use crate::machine::{Lies, Machine, join_token};
use ambit_identity::SvidKey;
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::appraisal_client::AppraisalClient;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::svid_client::SvidClient;
use anyhow::{Context, Result, bail, ensure};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what a check yields.
///
/// # Panics
/// Where it yields nothing in time.
#[allow(clippy::panic, reason = "a test says that it failed by panicking")]
pub async fn within<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        if Instant::now() > until {
            panic!("{what}: not within {PATIENCE:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The nodes as a replica shows them; none while there is no quorum.
pub async fn nodes(cell: &Cell, replica: usize) -> Option<Vec<v1::Node>> {
    let mut client = NodeAttestationClient::new(cell.admin(replica).await.ok()?);
    Some(client.list_nodes(v1::ListNodesRequest {}).await.ok()?.into_inner().nodes)
}

/// One node as the first replica shows it.
pub async fn node(cell: &Cell, id: &str) -> Result<v1::Node> {
    let all = nodes(cell, 1).await.context("a list of nodes")?;
    all.into_iter().find(|n| n.id == id).context("the node")
}

/// Waits until a node is in this state with this code.
pub async fn becomes(cell: &Cell, id: &str, state: &str, code: &str) -> v1::Node {
    within(&format!("{state} {code}"), async || {
        node(cell, id).await.ok().filter(|n| n.state == state && n.code == code)
    })
    .await
}

/// Why a node was trusted, or not, at an instant (0: now).
pub async fn attestation_at(cell: &Cell, replica: usize, id: &str, at_ms: u64) -> Result<v1::AttestationAtResponse> {
    let request = v1::AttestationAtRequest { id: id.to_owned(), at_ms };
    Ok(NodeAttestationClient::new(cell.admin(replica).await?).attestation_at(request).await?.into_inner())
}

/// Says a verb of nodes; their rows, or why of none.
pub async fn say(cell: &Cell, verb: &str, ids: &[String]) -> Result<Vec<v1::Node>, Refusal> {
    let selection = v1::NodeSelection { request_id: fresh(), ids: ids.to_vec(), cluster: String::new() };
    let call = |channel| {
        let (selection, verb) = (selection.clone(), verb.to_owned());
        async move {
            let mut client = NodeAttestationClient::new(channel);
            match verb.as_str() {
                "ban" => client.ban_node(selection).await,
                "unban" => client.unban_node(selection).await,
                "evict" => client.evict_node(selection).await,
                "quarantine" => client.quarantine_node(selection).await,
                "release" => client.release_node(selection).await,
                other => Err(tonic::Status::internal(other.to_owned())),
            }
        }
    };
    cell.insist(call).await.map(|answer| answer.nodes)
}

/// What a policy would say of the nodes it governs.
pub async fn test_policy(cell: &Cell, replica: usize, yaml: &str) -> Result<Vec<v1::TestedNode>> {
    let request = v1::TestAppraisalPolicyRequest { yaml: yaml.to_owned(), ..Default::default() };
    Ok(AppraisalClient::new(cell.admin(replica).await?).test_appraisal_policy(request).await?.into_inner().nodes)
}

/// An entry of this name that nodes of the cluster may have SVIDs for.
pub async fn create_entry(cell: &Cell, id: &str, cluster: &str) -> Result<()> {
    let entry = v1::Entry {
        id: id.to_owned(),
        spiffe_id: format!("spiffe://{}/{id}", cell.trust_domain),
        cluster: cluster.to_owned(),
        selectors: vec!["unix:uid:1000".to_owned()],
        ..Default::default()
    };
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![entry] };
    let call = |channel| {
        let request = request.clone();
        async move { EntryRegistryClient::new(channel).batch_create_entry(request).await }
    };
    let answer = cell.insist(call).await?;
    ensure!(answer.results.iter().all(|r| r.code == "ok"), "{answer:?}");
    Ok(())
}

/// What a node is answered that asks for an SVID of an entry: `ok`, or the code.
pub async fn svid(cell: &Cell, me: &Admitted, entry: &str) -> Result<String> {
    let items = vec![v1::NewX509svid { entry_id: entry.to_owned(), csr: SvidKey::generate()?.csr()? }];
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items };
    let mut client = SvidClient::new(cell.channel_as(me.identity.clone(), 1).await?);
    match client.batch_new_x509svid(request).await {
        Ok(answer) => Ok(answer.into_inner().results.first().map(|r| r.code.clone()).context("one result")?),
        Err(status) => match from_status(&status) {
            refusal if refusal.code == Code::Unavailable => bail!("{refusal}"),
            refusal => Ok(refusal.code.to_string()),
        },
    }
}

/// Enrols an honest machine with a token of its own.
pub async fn admit(cell: &Cell, machine: &Machine, cluster: &str) -> Result<Admitted> {
    let token = join_token(cell, cluster).await?;
    match machine.enrol(cell, 1, cluster, &token, &Lies::default()).await? {
        Ok((verdict, answer)) => Admitted::by(&verdict, &answer, cluster),
        Err(denied) => bail!("{denied:?}"),
    }
}
