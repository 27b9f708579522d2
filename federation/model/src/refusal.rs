//! Refusals: every "no" names a stable code, what was expected, what was found and what to do.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! codes {
    ($($(#[$m:meta])* $name:ident = $text:literal, $class:ident, $remedy:literal;)*) => {
        /// A stable denial or error code. The text never changes once released.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Code { $( #[doc = $remedy] $name, )* }

        impl Code {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];
            /// The stable text, `lower_snake_case`.
            pub fn as_str(self) -> &'static str { match self { $(Code::$name => $text),* } }
            /// What the reader should do next.
            pub fn remedy(self) -> &'static str { match self { $(Code::$name => $remedy),* } }
            /// The kind of failure, for mapping to a transport's status.
            pub fn class(self) -> Class { match self { $(Code::$name => Class::$class),* } }
            /// The code with this stable text.
            pub fn from_text(s: &str) -> Option<Code> { match s { $($text => Some(Code::$name),)* _ => None } }
        }
    };
}

/// What kind of failure a code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The request itself is wrong.
    Invalid,
    /// The caller may not do this.
    Denied,
    /// The caller did not prove who it is.
    Unauthenticated,
    /// The thing asked for does not exist.
    Missing,
    /// The thing exists already or was changed meanwhile.
    Conflict,
    /// Try again later.
    Unavailable,
    /// Not built.
    Unimplemented,
    /// The state of the system does not permit it.
    Precondition,
}

codes! {
    BadRequest = "bad_request", Invalid, "correct the field named and send the request again";
    Unauthenticated = "unauthenticated", Unauthenticated, "present a certificate of this trust domain";
    PermissionDenied = "permission_denied", Denied, "use an identity whose role may call this method";
    NotFound = "not_found", Missing, "list the objects and check the name";
    AlreadyExists = "already_exists", Conflict, "choose another name, or update the object";
    StaleRevision = "stale_revision", Conflict, "read the object again and repeat the change on the new revision";
    RequestIdReused = "request_id_reused", Conflict, "use a new request id for a new request";
    Busy = "busy", Unavailable, "wait a moment and retry with the same request id";
    Unavailable = "unavailable", Unavailable, "retry with the same request id; check that a majority of replicas is up";
    Unimplemented = "unimplemented", Unimplemented, "this part is not built yet; see the limits in README.md";
    Internal = "internal", Unavailable, "read the server's log for this code; retry with the same request id";
    ConfigUnknownKey = "config_unknown_key", Invalid, "remove the key or correct its spelling";
    ConfigInvalid = "config_invalid", Invalid, "correct the configuration value named";
    NeedsRoot = "needs_root", Denied, "run the command as root";
    KernelFeatureMissing = "kernel_feature_missing", Precondition, "use a kernel with the feature named (6.1 or newer)";
    EkNotExpected = "ek_not_expected", Denied, "add the EK to the cluster's allow-list, or give the node an unused join token";
    EkChainUntrusted = "ek_chain_untrusted", Denied, "add the manufacturer's root to the cluster's EK roots, if you trust it";
    EkMalformed = "ek_malformed", Invalid, "send the EK certificate as read from NV, and the EK public as TPMT_PUBLIC";
    EkMismatch = "ek_mismatch", Denied, "send the certificate of the very EK whose public area is sent";
    AkAttributes = "ak_attributes", Denied, "create the AK restricted, signing, fixedTPM, fixedParent, with a fixed scheme";
    AkWeak = "ak_weak", Denied, "use a P-256, P-384 or RSA >= 2048 AK with SHA-256 or better";
    EvidenceMalformed = "evidence_malformed", Invalid, "send the raw TPM structures untouched";
    EvidenceTooLarge = "evidence_too_large", Invalid, "a boot log is at most 2 MiB, an IMA log at most 64 MiB";
    TicketInvalid = "ticket_invalid", Denied, "begin again: the ticket was not sealed by this cell or not for this node";
    TicketExpired = "ticket_expired", Denied, "begin again and answer within the deadline";
    ActivationFailed = "activation_failed", Denied, "the TPM that holds the EK must also hold the AK; begin again";
    QuoteSignature = "quote_signature", Denied, "quote with the AK that was sent";
    QuoteMagic = "quote_magic", Denied, "only structures made by a TPM are accepted";
    QuoteType = "quote_type", Denied, "send TPM2_Quote output, not another attestation type";
    QuoteSigner = "quote_signer", Denied, "quote with the AK under the EK that was sent";
    QuoteNonce = "quote_nonce", Denied, "quote over the qualifying data of this very session and key";
    QuoteSelection = "quote_selection", Denied, "quote exactly the bank and the PCRs that the challenge names";
    QuotePcrDigest = "quote_pcr_digest", Denied, "send the PCR values that the quote covers";
    ClockStepBack = "clock_step_back", Denied, "two holders of one TPM state, or a rollback: investigate the machine before re-enrolling";
    BootLogMissing = "boot_log_missing", Denied, "boot with firmware that hands over its TCG2 event log";
    BootLogMalformed = "boot_log_malformed", Denied, "send binary_bios_measurements as the kernel shows it";
    BootLogEventAltered = "boot_log_event_altered", Denied, "the boot log was changed after boot: investigate the machine";
    BootLogPcrMismatch = "boot_log_pcr_mismatch", Denied, "the boot log does not lead to the quoted PCRs: investigate the machine";
    ImaLogMalformed = "ima_log_malformed", Denied, "send binary_runtime_measurements as the kernel shows it";
    ImaLogMismatch = "ima_log_mismatch", Denied, "the IMA log does not lead to the quoted PCR 10: investigate the machine";
    NonceConsumed = "nonce_consumed", Denied, "evidence is accepted once; begin again";
    StaleAppraisal = "stale_appraisal", Conflict, "begin again: the rules changed while the evidence was judged";
    CsrMalformed = "csr_malformed", Invalid, "send a PKCS#10 request that carries a P-256 key and nothing else";
    JoinTokenInvalid = "join_token_invalid", Denied, "ask the operator for a new join token of this cluster";
    JoinTokenUsed = "join_token_used", Denied, "a join token works once; ask the operator for a new one";
    NodeUntrusted = "node_untrusted", Denied, "the node must be admitted again by a fresh quote";
    NodeUnknown = "node_unknown", Denied, "enrol the node first";
    EntryNotOnNode = "entry_not_on_node", Denied, "name this node in the entry, or run the workload where the entry says";
    AuthorityMismatch = "authority_mismatch", Precondition, "send the request again: the committed issuance names another authority";
    IssuerUnavailable = "issuer_unavailable", Unavailable, "retry: this replica has no valid intermediate at the moment";
    SvidMalformed = "svid_malformed", Denied, "present an X.509-SVID with exactly one URI SAN, issued by this mesh";
    SvidUntrusted = "svid_untrusted", Denied, "present an X.509-SVID that chains to the trust domain's bundle and is in time";
    TrustDomainUnknown = "trust_domain_unknown", Precondition, "register the peer cell of that trust domain";
    FingerprintMismatch = "fingerprint_mismatch", Denied, "compare the fingerprints out of band; do not go on if they differ";
    ClusterTokenInvalid = "cluster_token_invalid", Denied, "ask the other cell's operator for a new cluster token";
    ClusterTokenUsed = "cluster_token_used", Denied, "a cluster token works once; ask for a new one";
    PossessionUnproved = "possession_unproved", Denied, "sign the transcript with the record key that the root certified";
    PeerNotActive = "peer_not_active", Precondition, "approve the peer on both sides first";
    RecordChainBroken = "record_chain_broken", Precondition, "the origin's records do not chain: stop, compare heads, then re-import";
    RecordEquivocation = "record_equivocation", Precondition, "the origin signed two histories: suspend the peer and investigate";
    RecordSignature = "record_signature", Denied, "only heads signed by the origin's root-certified record keys are imported";
    NotOwner = "not_owner", Denied, "a cell speaks only for its own identities; change the object at its origin";
    PolicyMalformed = "policy_malformed", Invalid, "correct the document at the place shown";
    PolicyLayer7 = "policy_layer7", Invalid, "Ambit decides on identity and port; use a waypoint of your own for HTTP rules";
    PolicyDenied = "policy_denied", Denied, "add an allow policy for this caller, target and port";
    MapFull = "map_full", Unavailable, "raise the map's capacity in the agent's configuration";
    DrillGuard = "drill_guard", Precondition, "the drill's guard refused: mend what it names, then run it again";
    DrillReportInvalid = "drill_report_invalid", Denied, "the report was altered, or is of another trust domain";
    EkDenied = "ek_denied", Denied, "this TPM model or firmware is on the cell's deny list: update the firmware or use another TPM";
    EkWeak = "ek_weak", Denied, "the EK was made by a flawed key generator (ROCA, CVE-2017-15361): renew the TPM's firmware and EK";
    EkClassNotAccepted = "ek_class_not_accepted", Denied, "use a TPM of a class that the appraisal policy accepts, or name the class in the policy";
    AppraisalPolicyMissing = "appraisal_policy_missing", Denied, "apply an appraisal policy that names the node's cluster (ambit attest policy apply)";
    AppraisalPolicyMalformed = "appraisal_policy_malformed", Invalid, "correct the appraisal policy at the place shown";
    AllowListMissing = "allow_list_missing", Precondition, "upload the IMA allow-list that the policy names";
    BootVariableRepeated = "boot_variable_repeated", Denied, "one boot measures a Secure Boot variable once: investigate the machine";
    BootFirmwareError = "boot_firmware_error", Denied, "the firmware reported a failed measurement: reboot, then investigate the machine";
    SecureBootOff = "secure_boot_off", Denied, "turn Secure Boot on and reboot";
    BootVariableNotAllowed = "boot_variable_not_allowed", Denied, "enrol only the Secure Boot keys that the policy lists, or learn the policy again";
    DbxTooOld = "dbx_too_old", Denied, "install the current dbx revocations and reboot";
    SbatTooOld = "sbat_too_old", Denied, "install the current shim and SbatLevel and reboot";
    MokListNotAllowed = "mok_list_not_allowed", Denied, "remove the machine owner keys that the policy does not list and reboot";
    BootAuthorityNotAllowed = "boot_authority_not_allowed", Denied, "boot only what was signed by an authority that the policy lists";
    BootImageNotAllowed = "boot_image_not_allowed", Denied, "boot an image that the policy lists, or add this one's authenticode hash to it";
    BootFileNotAllowed = "boot_file_not_allowed", Denied, "boot with files that the policy lists, or add this one's hash to it";
    CommandLineNotAllowed = "command_line_not_allowed", Denied, "boot with a command line that the policy matches";
    PcrNotAllowed = "pcr_not_allowed", Denied, "boot into a state whose PCR the policy lists, or add this value to it";
    BootEventNotCovered = "boot_event_not_covered", Denied, "add a rule for the event named to the appraisal policy, or investigate why it was measured";
    ImaFileNotAllowed = "ima_file_not_allowed", Denied, "put the listed file back and reboot, or add its digest to the allow-list";
    ImaViolation = "ima_violation", Denied, "a file was changed while it was measured: reboot, or let the policy tolerate violations";
    ImaWeakDigest = "ima_weak_digest", Denied, "quote the sha256 bank, and let IMA hash with SHA-256 (ima_hash=sha256)";
    ImaLogMissing = "ima_log_missing", Denied, "enable IMA in the kernel (ima_policy=tcb) or drop the IMA rules from the policy";
    KeyNotCertified = "key_not_certified", Denied, "certify the SVID key with TPM2_Certify by the AK, over this session's qualifying data";
    NodeLate = "node_late", Unavailable, "let the node answer the cell's next attestation request; check its TPM and its stream";
    NodeQuarantined = "node_quarantined", Denied, "ask an operator to release the node (ambit node release)";
    NodeBanned = "node_banned", Denied, "ask an operator to unban the node (ambit node unban)";
    TpmStateForked = "tpm_state_forked", Denied, "two machines hold one TPM state: keep one, evict the node and enrol it again";
    BlobMissing = "blob_missing", Missing, "the object was never stored here or is past its retention";
    BootEventOutOfOrder = "boot_event_out_of_order", Denied, "one separator ends the firmware's part of each PCR: update the firmware, or investigate the machine";
    QuoteMissing = "quote_missing", Denied, "give the quote, its signature and the AK, or accept logs that nothing proves with --unquoted";
    AkChanged = "ak_changed", Denied, "another AK than the one this EK enrolled with: `ambit node evict NODE` first";
    ResultInvalid = "result_invalid", Denied, "the attestation result was altered, or is of another trust domain";
    BackupDamaged = "backup_damaged", Invalid, "this file is no whole backup: take another copy (ambit raft restore --snapshot FILE checks one)";
    StoreDamaged = "store_damaged", Precondition, "recover another replica of the cell (ambitd recover), or restore it from a backup (ambitd restore)";
    StoreUnusable = "store_unusable", Precondition, "mend what is named: space, leave to write, another process, the release; nothing is lost";
    RecoverUnsafe = "recover_unsafe", Precondition, "recover only a stopped voter, and only where the majority is lost for good: start what can be started first";
    RecoverUnconfirmed = "recover_unconfirmed", Precondition, "read what would be given up, then name exactly these replicas with --i-accept-the-loss-of";
    BundleMalformed = "bundle_malformed", Invalid, "publish a SPIFFE bundle: keys of use x509-svid (with x5c) or jwt-svid (with kid)";
    JwtMalformed = "jwt_malformed", Denied, "present a JWT-SVID: a compact JWS with no header but alg, kid and typ, and with sub, aud and exp";
    JwtUntrusted = "jwt_untrusted", Denied, "present a JWT-SVID that a key of its trust domain's bundle signed and that is in time";
    JwtAudience = "jwt_audience", Denied, "fetch a JWT-SVID for this very audience";
    LastAdmin = "last_admin", Precondition, "make another administrator federation-admin first (ambit admin grant)";
    SvidRevoked = "svid_revoked", Denied, "get a new SVID: this one was revoked; where its identity is denied, ask an operator (ambit deny list)";
    BundleRollback = "bundle_rollback", Precondition, "the endpoint serves an older bundle than it did: ask its operator; remove and add the relationship if it began anew";
    BundleEquivocation = "bundle_equivocation", Precondition, "the endpoint served two bundles under one sequence: do not trust it before its operator explains them";
    BundleShrunk = "bundle_shrunk", Precondition, "all roots, or all JWT keys, are gone from the bundle, which revokes what they signed: confirm it (ambit federation confirm) if that is meant";
    EndpointRefused = "endpoint_refused", Unavailable, "check the URL, profile and endpoint SPIFFE ID of the relationship, and what answers there";
    RootState = "root_state", Precondition, "roots and JWT authorities go from prepared to active, old, tainted and revoked, one at a time (ambit trust check)";
    AcksMissing = "acks_missing", Precondition, "wait until those named hold what they must, or go on without them (--without-acks)";
    AuthorityInUse = "authority_in_use", Precondition, "wait until nothing in use is under it (ambit trust show), or go on regardless (--without-acks)";
    NeedsSecondApprover = "needs_second_approver", Precondition, "add a second approver first (ambit approver add): one alone does not do this";
    ApprovalMissing = "approval_missing", Precondition, "have approvers sign the proposal (ambit approve), and give what each signed (--approval)";
    ApprovalInvalid = "approval_invalid", Denied, "have approvers of this cell sign a proposal of this very act, each once";
    ApprovalExpired = "approval_expired", Denied, "propose the act again: what was signed is no longer good";
    ApprovalUsed = "approval_used", Denied, "propose the act again: what was signed is good for one time";
    AdminExpired = "admin_expired", Unauthenticated, "have a federation-admin issue a new one (ambit admin issue); where none has one in time, break glass: ambit admin request, ambitd admin break-glass, ambit admin install";
    NodeAddressMismatch = "node_address_mismatch", Denied, "call from the address that the SVID's node registered (node_address), with no translation between nodes; an agent whose address changed: restart it, it enrols anew; otherwise the SVID is a copy: revoke it";
    ShareInvalid = "share_invalid", Denied, "bring enough undamaged shares of this root, all made together (ambit trust shares)";
    ReplicaUnattested = "replica_unattested", Denied, "give the replica a TPM (tpm in its configuration) that is on the allow-list of cluster `replica` and booted as the policy `replica` says";
    SealIncomplete = "seal_incomplete", Precondition, "see what lacks (ambit trust seal --dry-run): every replica attested, and recovery shares of each root";
    ExternalCertificate = "external_certificate", Invalid, "have the CA sign the very CSR (ambit trust external csr) as a CA certificate with its SAN and usages, and give its whole chain without the root, nearest first";
    ExternalRoot = "external_root", Precondition, "an external root's key is not in the cell: both roots stay in the bundle until everybody holds the next; wait (ambit trust check), or name what you mean (ambit trust rotate --own)";
    PolicyUnenforceable = "policy_unenforceable", Invalid, "leave it out: no kernel of this release enforces it, and a rule that is accepted and not enforced is worse than none";
    PolicyBlastRadius = "policy_blast_radius", Precondition, "read what would flip (ambit policy plan); if it is meant, allow as many (--max-flips N), or any number at once (--max-flips any)";
    // At the end, where every new one belongs: replies that are remembered in the state hold a code's place here.
    AgentRunning = "agent_running", Precondition, "an agent serves this node: end it, or start the new one with --take-over";
    TakeOverRefused = "take_over_refused", Precondition, "the running agent goes on as before: mend what is named, or end it and start the new one";
    PolicyStale = "policy_stale", Unavailable, "see why the node does not hear its cell (/state of its agent); what a node does meanwhile is its 'fail_mode' and 'stale_after_s'";
    PeerActive = "peer_active", Precondition, "suspend the peer, see what fails without it, then remove it";
    AuditMismatch = "audit_mismatch", Precondition, "the audit log was altered, or is another one: keep what you have, and compare it with another replica and with a witness";
    AuditUnwitnessed = "audit_unwitnessed", Precondition, "the log shrank or was rewritten since this cell last cosigned it: ask its operators, and trust no proof of it meanwhile";
    AuditNotBegun = "audit_not_begun", Precondition, "upgrade every replica of the cell, then begin its audit log (ambit audit begin)";
    StandbyUnknown = "standby_unknown", Precondition, "have the home name a standby while it lives (ambit cluster standby set), and wait until its records are imported here";
    StandbyUnsettled = "standby_unsettled", Precondition, "wait until the former standby has heard that it is none any more (ambit cluster standby show), or remove that peer";
    GrantHolder = "grant_holder", Denied, "grant the authority to the standby that the home named, and commit it there";
    GrantWindow = "grant_window", Invalid, "grant for whole seconds, a day at most; have approvers sign another when it ends";
    GrantExpired = "grant_expired", Denied, "have the home's approvers sign a new grant: this one is over";
    GrantReplayed = "grant_replayed", Denied, "have the home's approvers sign a grant of an epoch above every one that is known (ambit cluster standby show)";
    ApprovalRepeated = "approval_repeated", Denied, "have two different approvers sign: one who signs twice is one";
    EpochFenced = "epoch_fenced", Precondition, "this cell's authority was granted to its standby: wait until that grant is over, then take it back (ambit cluster take-back)";
    LeaseEnded = "lease_ended", Unavailable, "wait until the standby or the witness renews this cell's lease; where neither can be reached, nothing is signed";
    StandbyUngranted = "standby_ungranted", Denied, "a standby's authority is believed under a live grant only: commit one (ambit cluster grant)";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One refusal. `expected` and `found` are for operators; see [`Refusal::for_node`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The stable code.
    pub code: Code,
    /// What would have been accepted.
    pub expected: String,
    /// What came instead.
    pub found: String,
}

impl Refusal {
    /// A refusal of `code`.
    pub fn new(code: Code, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { code, expected: expected.into(), found: found.into() }
    }
    /// The same refusal without what it would teach an attacker (design.md section 3): the code and its remedy only.
    #[must_use]
    pub fn for_node(&self) -> Refusal {
        Refusal { code: self.code, expected: String::new(), found: String::new() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if !self.expected.is_empty() {
            write!(f, ": expected {}", self.expected)?;
        }
        if !self.found.is_empty() {
            write!(f, ", found {}", self.found)?;
        }
        write!(f, "; try: {}", self.code.remedy())
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_round_trip() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{code} twice");
            assert_eq!(Code::from_text(code.as_str()), Some(*code));
            assert!(code.remedy().len() > 10);
        }
    }
}
