//! Faults planted on purpose, so that the simulator shows that it would find them. They exist under `--cfg ambit_mutant`
//! only, which `ambitd` refuses to be built with.

use std::sync::OnceLock;

/// Name, and the wrong done.
pub const ALL: [(&str, &str); 22] = [
    ("ack-before-sync", "a follower acknowledges entries before they are on disk"),
    ("hard-state-unsynced", "term and vote are written without a sync"),
    ("read-without-quorum", "a read is answered from what is applied here, unconfirmed"),
    ("no-dedupe", "a request that is sent again has its effect again"),
    ("revocation-unchecked", "leaves are issued whatever the node's state is"),
    ("policy-version-of-document", "a policy's revision is what its document says"),
    ("nonce-kept", "an admission does not consume its nonce"),
    ("serial-of-second", "serials are made of the second instead of the index"),
    ("snapshot-without-suffix", "a restart takes the log after its snapshot for applied"),
    ("restore-forgets-denials", "an imported state has no denials and no bans"),
    ("stamp-of-own-wall", "a leader stamps with its own wall clock"),
    ("removed-leader-leads", "a leader that was taken out leads on"),
    ("outage-counts", "time without a leader counts against nodes"),
    ("import-unsigned", "records are imported whoever signed their head"),
    ("key-set-uncertified", "record keys are believed whoever certified them"),
    ("import-unchained", "records are imported that do not lead to the signed head"),
    ("pull-nonce-unchecked", "an answer to an earlier pull is believed"),
    ("equivocation-heard", "another history up to what was imported is believed"),
    ("lost-incarnation-heard", "a cell that began anew is heard through its lost incarnation"),
    ("begun-anew-trusts", "a cell that began anew issues to nodes before a verdict of its own"),
    ("import-goes-back", "an import that overlaps another sets the position to its own end"),
    ("full-batch-heard", "what is known of a peer counts as new though there was more than fits one pull"),
];

static PLANTED: OnceLock<String> = OnceLock::new();

/// Plants one, for the life of the process. False where there is none of that name, or one is planted already.
pub fn plant(name: &str) -> bool {
    ALL.iter().any(|(known, _)| *known == name) && PLANTED.set(name.to_owned()).is_ok()
}

/// Whether it is the one.
pub fn is(name: &str) -> bool {
    PLANTED.get().is_some_and(|planted| planted == name)
}
