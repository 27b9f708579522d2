//! Faults planted on purpose, so that the simulator shows that it would find them. They exist under `--cfg ambit_mutant`
//! only, which `ambitd` refuses to be built with.

use std::sync::OnceLock;

/// Name, the oracles that must see it, and the wrong done. That another sees it, or raft's own panic, shows nothing.
pub const ALL: [(&str, &str, &str); 29] = [
    ("ack-before-sync", "I1 I2", "a follower acknowledges entries before they are on disk"),
    ("hard-state-unsynced", "I2", "term and vote are written without a sync"),
    ("read-without-quorum", "I3", "a read is answered from what is applied here, unconfirmed"),
    ("no-dedupe", "I10", "a request that is sent again has its effect again"),
    ("dedupe-of-leaves-only", "I10", "a request that is sent again has its effect again, but for leaves"),
    ("revocation-unchecked", "I4", "leaves are issued to nodes that were put out"),
    ("policy-version-of-document", "I7", "a policy's revision is what its document says"),
    ("nonce-kept", "I5", "an admission does not consume its nonce"),
    ("serial-of-second", "I6", "serials are made of the second instead of the index"),
    ("snapshot-without-suffix", "I1 I2 I13", "a restart takes the log after its snapshot for applied"),
    ("restore-forgets-denials", "I4 I13", "an imported state has no denials and no bans"),
    ("stamp-of-own-wall", "I15", "a leader stamps with its own wall clock"),
    ("stamp-without-floor", "I15", "a leader's stamps do not continue those before it"),
    ("removed-leader-leads", "L1", "a leader that was taken out leads on"),
    ("outage-counts", "I22", "time without a leader counts against nodes"),
    ("anew-forgets-entries", "I1", "a cell that begins anew has no entries"),
    ("import-unsigned", "I9", "records are imported whoever signed their head"),
    ("key-set-uncertified", "I9", "record keys are believed whoever certified them"),
    ("import-unchained", "I9", "records are imported that do not lead to the signed head"),
    ("pull-nonce-unchecked", "I12", "an answer to an earlier pull is believed"),
    ("equivocation-heard", "I9 I12", "another history up to what was imported is believed"),
    ("lost-incarnation-heard", "I9 I12", "a cell that began anew is heard through its lost incarnation"),
    ("begun-anew-trusts", "I4", "a cell that began anew issues to nodes before a verdict of its own"),
    ("import-goes-back", "I9", "an import that overlaps another sets the position to its own end"),
    ("grant-before-lease-ends", "I20", "a grant takes effect before the home's lease has run out"),
    ("lease-at-apply-only", "I20", "the home's lease is looked at when it commits, and not when it signs"),
    ("approver-signs-twice", "I20", "a grant that one approver signed twice is believed"),
    ("older-ban-dropped", "I20", "a ban of a fenced epoch is dropped with what else comes late"),
    ("full-batch-heard", "I12", "what is known of a peer counts as new though there was more than fits one pull"),
    ("head-minority", "I9", "one voter's signature is enough on a head"),
    ("cosign-unchecked", "I9 I12", "a voter signs whatever another replica is about to tell"),
    ("cosign-without-floor", "I12", "a voter signs an end that it knows to be none"),
    ("key-set-goes-back", "I9", "record keys that were replaced are believed again"),
];

static PLANTED: OnceLock<String> = OnceLock::new();

/// Plants one, for the life of the process. False where there is none of that name, or one is planted already.
pub fn plant(name: &str) -> bool {
    ALL.iter().any(|(known, ..)| *known == name) && PLANTED.set(name.to_owned()).is_ok()
}

/// Whether it is the one.
pub fn is(name: &str) -> bool {
    PLANTED.get().is_some_and(|planted| planted == name)
}
