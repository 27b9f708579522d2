//! What nodes say of themselves on its way into the log, many to one entry: where their tunnels come from, and their
//! endpoints. Nodes come in crowds, and each entry costs every replica an edition of slices.

use super::Replica;
use ambit_model::{Code, Refusal};
use ambit_state::command::{NodeReport, Reported};
use ambit_state::{Command, NODE_REPORTS_MAX, Reply};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Reports waiting; whoever comes with more waits with it. A stream has one under way.
const QUEUE: usize = 4_096;
/// Endpoints in one entry, and those of one node more: an entry then fits a message between replicas.
const ENDPOINTS_MAX: usize = 2_048;
/// Who comes in a crowd waits this long for more of it: as long as it takes a cell to commit an entry, which it would have
/// waited for its own behind the others'. Who comes alone does not wait.
const GATHER: Duration = Duration::from_millis(10);

/// What waits to be committed.
pub type Queue = mpsc::Receiver<Waiting>;

type Waiting = (NodeReport, oneshot::Sender<Reported>);

/// Where streams hand in what their nodes say.
#[derive(Clone)]
pub struct Reports {
    queue: mpsc::Sender<Waiting>,
}

impl Reports {
    /// The handle, and what [`run`] takes.
    pub fn new() -> (Reports, Queue) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        (Reports { queue }, waiting)
    }

    /// Returns once the report is committed and applied, with what came of it. Those of one caller, who waits for each,
    /// are applied in its order.
    pub async fn put(&self, report: NodeReport) -> Reported {
        let ending = || Refusal::new(Code::Unavailable, "a running replica", "it is ending");
        let (tell, told) = oneshot::channel();
        self.queue.send((report, tell)).await.map_err(|_| ending())?;
        told.await.map_err(|_| ending())?
    }
}

/// Commits what gathers, one entry after the other, until every handle is gone.
pub async fn run(replica: Replica, waiting: Queue) {
    let replica = &replica;
    serve(waiting, |reports| async move {
        match replica.propose_own(Command::NodeReports(reports)).await?.outcome? {
            Reply::Reports(each) => Ok(each),
            _ => Err(Refusal::new(Code::Internal, "an outcome per report", "another reply")),
        }
    })
    .await;
}

async fn serve<F>(mut waiting: Queue, commit: impl Fn(Vec<NodeReport>) -> F)
where
    F: Future<Output = Result<Vec<Reported>, Refusal>>,
{
    let mut crowd = false;
    while let Some(first) = waiting.recv().await {
        if crowd {
            tokio::time::sleep(GATHER).await;
        }
        if first.1.is_closed() {
            continue;
        }
        let (reports, tell): (Vec<_>, Vec<_>) = gather(first, &mut waiting).into_iter().unzip();
        let told = commit(reports).await.unwrap_or_else(|refusal| vec![Err(refusal); tell.len()]);
        crowd = !waiting.is_empty();
        // Whoever has gone meanwhile need not hear of it.
        tell.into_iter().zip(told).for_each(|(tell, one)| drop(tell.send(one)));
    }
}

/// As many of those that wait as one entry takes.
fn gather(first: Waiting, waiting: &mut Queue) -> Vec<Waiting> {
    let (mut endpoints, mut batch) = (endpoints_of(&first.0), vec![first]);
    while batch.len() < NODE_REPORTS_MAX && endpoints < ENDPOINTS_MAX {
        let Ok(one) = waiting.try_recv() else { break };
        // Its stream is over: what the node says on the next one is newer.
        if one.1.is_closed() {
            continue;
        }
        endpoints += endpoints_of(&one.0);
        batch.push(one);
    }
    batch
}

fn endpoints_of(report: &NodeReport) -> usize {
    match report {
        NodeReport::Address(..) => 0,
        NodeReport::Endpoints(_, endpoints) => endpoints.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::policy::Endpoint;
    use ambit_model::{Generation, NodeId};
    use std::sync::{Arc, Mutex};
    use tokio::sync::Semaphore;

    fn endpoint() -> Endpoint {
        Endpoint {
            address: [10, 1, 0, 1].into(),
            spiffe_id: "spiffe://west/web".parse().unwrap(),
            node: NodeId([1; 32]),
            generation: Generation(1),
            node_address: [10, 0, 0, 1].into(),
            cluster: "west".parse().unwrap(),
        }
    }

    fn report(n: u8, endpoints: usize) -> NodeReport {
        NodeReport::Endpoints(NodeId([n; 32]), vec![endpoint(); endpoints])
    }

    fn node(report: &NodeReport) -> u8 {
        match report {
            NodeReport::Address(node, ..) | NodeReport::Endpoints(node, _) => node.0[0],
        }
    }

    #[tokio::test]
    async fn a_lone_report_goes_at_once_and_those_that_come_meanwhile_share_an_entry() {
        let (reports, waiting) = Reports::new();
        let (entries, commits) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(0)));
        let (log, may) = (entries.clone(), commits.clone());
        // A cell that refuses what node 9 says, and then an entry.
        tokio::spawn(serve(waiting, move |reports| {
            let (log, may, nodes) = (log.clone(), may.clone(), reports.iter().map(node).collect::<Vec<_>>());
            async move {
                log.lock().unwrap().push(nodes.clone());
                may.acquire().await.unwrap().forget();
                let refused = || Refusal::new(Code::NodeUntrusted, "an admitted node", "another");
                if nodes == [7] {
                    return Err(refused());
                }
                Ok(nodes.into_iter().map(|n| if n == 9 { Err(refused()) } else { Ok(Vec::new()) }).collect())
            }
        }));
        let put = |n: u8| {
            let reports = reports.clone();
            tokio::spawn(async move { reports.put(report(n, 0)).await.is_ok() })
        };
        let first = put(1);
        while entries.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let crowd: Vec<_> = (2..=9).map(put).collect();
        while reports.queue.capacity() > QUEUE - 8 {
            tokio::task::yield_now().await;
        }
        commits.add_permits(3);
        assert!(first.await.unwrap());
        for (n, one) in (2..=9).zip(crowd) {
            assert_eq!(one.await.unwrap(), n != 9, "{n}");
        }
        assert!(!put(7).await.unwrap(), "an entry that is refused refuses what is in it");
        assert_eq!(*entries.lock().unwrap(), [vec![1], (2..=9).collect(), vec![7]]);
    }

    #[test]
    fn an_entry_takes_what_waits_up_to_its_bounds_and_in_order_and_nothing_of_a_stream_that_is_over() {
        let (reports, mut waiting) = Reports::new();
        let mut told = Vec::new();
        for n in 1..=6 {
            let (tell, one) = oneshot::channel();
            reports.queue.try_send((report(n, 1_000), tell)).unwrap();
            told.extend(Some(one).filter(|_| n != 2));
        }
        let mut next = || {
            let first = waiting.try_recv().unwrap();
            gather(first, &mut waiting).iter().map(|(report, _)| node(report)).collect::<Vec<_>>()
        };
        assert_eq!(next(), [1, 3, 4]);
        assert_eq!(next(), [5, 6]);
    }
}
