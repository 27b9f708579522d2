//! What the agent that serves hears of who comes after it.

use super::bad;
use ambit_model::Refusal;
use ambit_proto::v1::server_message::Body as Down;
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc, watch};

/// What a successor passes on.
#[derive(Debug)]
pub enum Heard {
    /// What the cell said.
    Cell(Box<Down>),
    /// Whether this node was put out.
    Out(bool),
}

/// What an agent that serves needs to know of who comes after it. Cloning shares.
#[derive(Clone, Debug)]
pub struct Succession {
    present: watch::Receiver<bool>,
    heard: Arc<Mutex<mpsc::Receiver<Heard>>>,
}

/// The other side of [`Succession`].
#[derive(Debug)]
pub struct Successor {
    present: watch::Sender<bool>,
    heard: mpsc::Sender<Heard>,
}

impl Successor {
    /// Somebody is about to take over: from now on no admission is asked of the cell here.
    pub fn begin(&self) {
        self.present.send_replace(true);
    }
    /// Nobody is, any more.
    pub fn end(&self) {
        self.present.send_replace(false);
    }
    /// What whoever takes over passes on.
    ///
    /// # Errors
    /// Nobody hears it.
    pub async fn tell(&self, heard: Heard) -> Result<(), Refusal> {
        self.heard.send(heard).await.map_err(|_| bad("a stream's end that hears", "none"))
    }
}

/// Both.
pub fn succession() -> (Successor, Succession) {
    let (present, is_present) = watch::channel(false);
    let (tell, heard) = mpsc::channel(4);
    let succession = Succession { present: is_present, heard: Arc::new(Mutex::new(heard)) };
    (Successor { present, heard: tell }, succession)
}

impl Default for Succession {
    /// Of one after which nobody comes.
    fn default() -> Self {
        succession().1
    }
}

impl Succession {
    /// Returns once another agent is about to take over.
    pub async fn begun(&self) {
        if self.present.clone().wait_for(|present| *present).await.is_err() {
            std::future::pending().await
        }
    }
    /// Returns once none is.
    pub async fn over(&self) {
        // A sender that is gone leaves the word that it said last: nobody, or that the successor serves.
        if self.present.clone().wait_for(|present| !*present).await.is_err() {
            std::future::pending().await
        }
    }
    /// The next word that the successor passes on: it has a stream of its own then.
    pub async fn heard(&self) -> Heard {
        match self.heard.lock().await.recv().await {
            Some(heard) => heard,
            None => std::future::pending().await,
        }
    }
    /// Leaves out what one passed on that has ended since.
    pub async fn forget(&self) {
        let mut heard = self.heard.lock().await;
        while heard.try_recv().is_ok() {}
    }
}
