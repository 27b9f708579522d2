//! The agent's annex and what listens in it: made, or taken over from the agent before with all that is open in it.

use super::sockets::start;
use crate::hbone;
use crate::kernel::{KernelHandle, chain};
use crate::netns::{Annex, Netns, NetnsThread};
use crate::takeover::{Socket, Sockets};
use ambit_ebpf::LetIn;
use ambit_model::{Code, Refusal};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};

/// The annex, and its listeners.
pub(super) struct AnnexPart {
    pub(super) annex: Annex,
    /// HBONE at pods' addresses.
    pub(super) at_pods: Vec<TcpListener>,
    /// Callers outside of the mesh.
    pub(super) strangers: Vec<TcpListener>,
    /// The same once more, to be handed over one day.
    pub(super) again: Sockets,
    /// What gives the strangers theirs.
    pub(super) let_in: LetIn,
}

impl AnnexPart {
    /// For `count` threads; takes out of `handed` what it uses. What a former agent handed over goes with its annex only.
    pub(super) async fn open(
        kernel: &KernelHandle,
        netns: &NetnsThread,
        count: usize,
        handed: &mut Sockets,
    ) -> Result<Self, Refusal> {
        let trouble = |e: ambit_ebpf::KernelError| Refusal::new(Code::Internal, "the agent's annex", chain(&e));
        let former = handed.remove(&Socket::Annex).map(ambit_ebpf::Annex::of).transpose();
        let former =
            former.inspect_err(|error| tracing::warn!(error = %chain(error), "the former annex is not used")).ok();
        let (made, taken) = match former.flatten() {
            Some(annex) => (annex, true),
            None => (ambit_ebpf::Annex::make().map_err(trouble)?, false),
        };
        if made.is_refused_by_the_node() {
            let setting = "net.ipv4.conf.all.rp_filter = 1";
            tracing::warn!(
                setting,
                "HBONE at pods' addresses, and callers by address, are dropped on this node; 2 or 0 let them pass"
            );
        }
        kernel.use_annex(&made);
        tracing::info!(device = made.device(), taken, "HBONE at pods' addresses, and callers by address");
        let again = |e: io::Error| start("descriptors to spare", e);
        let annex = Annex::new(netns.clone(), Netns::of(made.as_fd().try_clone_to_owned().map_err(again)?));
        let mut inherited = |name: fn(u16) -> Socket| -> Vec<TcpListener> {
            let all = (0..=u16::MAX).map_while(|n| handed.remove(&name(n))).map(TcpListener::from);
            if taken { all.collect() } else { all.take(0).collect() }
        };
        let (mut at_pods, mut strangers) = (inherited(Socket::AtPods), inherited(Socket::Strangers));
        if at_pods.is_empty() {
            at_pods = annex.listeners(hbone::PORT, count).await.map_err(|e| start("HBONE in the annex", e))?;
        }
        if strangers.is_empty() {
            strangers = annex.strangers(count).await.map_err(|e| start("callers by address in the annex", e))?;
        }
        let first = strangers.first().ok_or_else(|| start("a thread that carries", io::ErrorKind::NotFound.into()))?;
        let let_in = kernel.let_in(&made, first)?;
        let sockets = [(Socket::AtPods as fn(u16) -> Socket, &at_pods), (Socket::Strangers, &strangers)];
        let mut all = Sockets::new();
        for (name, listeners) in sockets {
            for (n, listener) in (0..).zip(listeners) {
                all.insert(name(n), listener.try_clone().map_err(again)?.into());
            }
        }
        all.insert(Socket::Annex, OwnedFd::from(made));
        Ok(Self { annex, at_pods, strangers, again: all, let_in })
    }
}
