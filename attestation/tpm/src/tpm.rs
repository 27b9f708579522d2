//! The TPM's own operations. Each opens the TPM, does its work inside guards that flush what they loaded, and closes it.

use crate::ak_file::{self, SavedAk};
use crate::error::TpmError;
use crate::{Bank, Quote, TpmIdentity};
use sha2::{Digest as _, Sha256};
use std::path::PathBuf;
use std::str::FromStr;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, ak, ek};
use tss_esapi::constants::response_code::Tss2ResponseCodeKind;
use tss_esapi::constants::{CapabilityType, SessionType};
use tss_esapi::handles::{AuthHandle, KeyHandle, ObjectHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, SignatureSchemeAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    CapabilityData, Data, EncryptedSecret, IdObject, PcrSelectionList, PcrSlot, Private, Public, SignatureScheme,
    SymmetricDefinition,
};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::traits::{Marshall, UnMarshall};
use tss_esapi::{Context, Error};
use zeroize::Zeroizing;

/// RSA-2048 EK of the low range (TCG EK Credential Profile 2.2.1.4), with its certificate.
const EK: AsymmetricAlgorithmSelection = AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048);
const EK_CERTIFICATE_INDEX: u32 = 0x01c0_0002;
/// Where provisioned machines keep that EK loaded (TCG TPM v2.0 Provisioning Guidance, 7.8). Making it anew takes a
/// hardware TPM many seconds.
const EK_PERSISTENT_HANDLE: u32 = 0x8101_0001;
const TRANSIENT_FIRST: u32 = 0x8000_0000;
const LOADED_SESSION_FIRST: u32 = 0x0200_0000;
/// PCR_Read answers with at most eight digests (Part 2, TPML_DIGEST).
const PCRS_PER_READ: usize = 8;
/// IMA extends PCR 10 whenever something new runs, also between reading and quoting.
const QUOTE_ATTEMPTS: u32 = 8;

type TssResult<T> = Result<T, Error>;
/// Index and value of PCRs, ascending.
type PcrValues = Vec<(u32, Vec<u8>)>;

pub(crate) struct Tpm {
    name: String,
    tcti: TctiNameConf,
    ak_path: PathBuf,
}

/// An EK in the TPM: its handle is flushed after use unless it is persistent.
enum LoadedEk {
    Persistent(KeyHandle),
    Transient(KeyHandle),
}

impl Tpm {
    pub(crate) fn new(tcti: &str, state_dir: PathBuf) -> Result<Tpm, TpmError> {
        let conf = TctiNameConf::from_str(tcti).map_err(|source| TpmError::Tcti { tcti: tcti.to_owned(), source })?;
        Ok(Tpm { name: tcti.to_owned(), tcti: conf, ak_path: ak_file::path(&state_dir) })
    }

    pub(crate) fn identity(&mut self) -> Result<TpmIdentity, TpmError> {
        let ak = self.saved_ak()?;
        self.run("read its identity", |ctx| {
            let ek_certificate =
                if handle_exists(ctx, EK_CERTIFICATE_INDEX)? { Some(ek::retrieve_ek_pubcert(ctx, EK)?) } else { None };
            let ek_public = with_ek(ctx, |ctx, ek| ctx.read_public(ek)?.0.marshall())?;
            Ok(TpmIdentity { ek_certificate, ek_public, ak_public: ak.public.clone() })
        })
    }

    pub(crate) fn activate(&mut self, blob: &[u8], secret: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let blob = IdObject::try_from(tpm2b(blob, "credential blob")?.to_vec())
            .map_err(|_| TpmError::Malformed { what: "credential blob" })?;
        let secret = EncryptedSecret::try_from(tpm2b(secret, "encrypted secret")?.to_vec())
            .map_err(|_| TpmError::Malformed { what: "encrypted secret" })?;
        self.with_keys("activate the credential", |ctx, ek, ak| {
            with_session(ctx, SessionType::Policy, |ctx, policy| {
                ctx.execute_with_nullauth_session(|ctx| {
                    let policy = PolicySession::try_from(policy)?;
                    let (auth, none) = (AuthHandle::Endorsement, Default::default());
                    ctx.policy_secret(policy, auth, none, Default::default(), Default::default(), None)
                })?;
                with_session(ctx, SessionType::Hmac, |ctx, hmac| {
                    ctx.execute_with_sessions((Some(hmac), Some(policy), None), |ctx| {
                        let opened = ctx.activate_credential(ak, ek, blob.clone(), secret.clone())?;
                        Ok(Zeroizing::new(opened.value().to_vec()))
                    })
                })
            })
        })
    }

    pub(crate) fn quote(&mut self, bank: Bank, mask: u32, qualifying: [u8; 32]) -> Result<Quote, TpmError> {
        let slots: Vec<(u32, PcrSlot)> = (0..24u32)
            .filter(|n| mask & (1 << n) != 0)
            .filter_map(|n| PcrSlot::try_from(1u32 << n).ok().map(|slot| (n, slot)))
            .collect();
        if slots.is_empty() || mask >> 24 != 0 {
            return Err(TpmError::Selection { mask });
        }
        self.with_keys("quote", |ctx, _, ak| {
            for _ in 0..QUOTE_ATTEMPTS {
                let Some(pcrs) = read_pcrs(ctx, bank, &slots)? else { return Ok(Err(TpmError::Selection { mask })) };
                let selection = selection(bank, slots.iter().map(|(_, slot)| *slot))?;
                let data = Data::try_from(qualifying.to_vec())?;
                let (attest, signature) =
                    ctx.execute_with_nullauth_session(|ctx| ctx.quote(ak, data, SignatureScheme::Null, selection))?;
                let attest = attest.marshall()?;
                let mut digest = Sha256::new();
                pcrs.iter().for_each(|(_, value)| digest.update(value));
                // TPMS_ATTEST of a quote ends with the digest over the PCR values.
                if attest.ends_with(&digest.finalize()) {
                    return Ok(Ok(Quote { attest, signature: signature.marshall()?, pcrs }));
                }
            }
            Ok(Err(TpmError::PcrsMoving { attempts: QUOTE_ATTEMPTS }))
        })?
    }

    /// The saved AK; at the very first time, a new one.
    fn saved_ak(&mut self) -> Result<SavedAk, TpmError> {
        if let Some(saved) = ak_file::load(&self.ak_path)? {
            return Ok(saved);
        }
        let saved = self.run("create the AK", |ctx| {
            with_ek(ctx, |ctx, ek| {
                let algorithm = AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256);
                let (hash, scheme) = (HashingAlgorithm::Sha256, SignatureSchemeAlgorithm::EcDsa);
                let created = ak::create_ak_2(ctx, ek, hash, algorithm, scheme, None, None)?;
                Ok(SavedAk { public: created.out_public.marshall()?, private: created.out_private.value().to_vec() })
            })
        })?;
        ak_file::save(&self.ak_path, &saved)?;
        tracing::info!(path = %self.ak_path.display(), "AK created");
        Ok(saved)
    }

    /// Runs `work` with the EK and the AK loaded, and unloads them whatever comes of it.
    fn with_keys<T>(
        &mut self,
        operation: &'static str,
        mut work: impl FnMut(&mut Context, KeyHandle, KeyHandle) -> TssResult<T>,
    ) -> Result<T, TpmError> {
        let saved = self.saved_ak()?;
        let damaged = || TpmError::StateDamaged { path: self.ak_path.clone() };
        let public = Public::unmarshall(&saved.public).map_err(|_| damaged())?;
        let private = Private::try_from(saved.private).map_err(|_| damaged())?;
        let mut loaded = false;
        let outcome = self.run(operation, |ctx| {
            with_ek(ctx, |ctx, ek| {
                let ak = ak::load_ak(ctx, ek, None, private.clone(), public.clone())?;
                loaded = true;
                ctx.execute_with_temporary_object(ak.into(), |ctx, _| work(ctx, ek, ak))
            })
        });
        match outcome {
            // Part 1, 27.5: a wrapped key whose integrity value is of another parent.
            Err(TpmError::Command { source, .. })
                if !loaded && kind(&source) == Some(Tss2ResponseCodeKind::Integrity) =>
            {
                Err(TpmError::OtherTpm { path: self.ak_path.clone(), source })
            }
            other => other,
        }
    }

    /// Opens the TPM for one operation. Where its slots are full of what killed processes left behind, they are
    /// emptied, once: with a resource manager or a TPM of one client at a time nobody else's objects are there.
    fn run<T>(
        &self,
        operation: &'static str,
        mut work: impl FnMut(&mut Context) -> TssResult<T>,
    ) -> Result<T, TpmError> {
        let open = || {
            Context::new(self.tcti.clone()).map_err(|source| TpmError::Unreachable { tcti: self.name.clone(), source })
        };
        let mut ctx = open()?;
        match work(&mut ctx) {
            Err(source) if slots_full(&source) => {
                tracing::warn!(operation, "TPM slots full of left objects: flushing them");
                drop(ctx);
                let mut ctx = open()?;
                flush_left(&mut ctx, TRANSIENT_FIRST);
                flush_left(&mut ctx, LOADED_SESSION_FIRST);
                work(&mut ctx).map_err(|source| TpmError::Command { operation, source })
            }
            other => other.map_err(|source| TpmError::Command { operation, source }),
        }
    }
}

/// Runs `work` with the EK: the provisioned one if it is the template's, else one made for this operation.
fn with_ek<T>(ctx: &mut Context, work: impl FnOnce(&mut Context, KeyHandle) -> TssResult<T>) -> TssResult<T> {
    match load_ek(ctx)? {
        LoadedEk::Persistent(ek) => work(ctx, ek),
        LoadedEk::Transient(ek) => ctx.execute_with_temporary_object(ek.into(), |ctx, _| work(ctx, ek)),
    }
}

fn load_ek(ctx: &mut Context) -> TssResult<LoadedEk> {
    if handle_exists(ctx, EK_PERSISTENT_HANDLE)? {
        let template = ek::create_ek_public_from_default_template_2(EK, None)?;
        let object = ctx.tr_from_tpm_public(TpmHandle::try_from(EK_PERSISTENT_HANDLE)?)?;
        let handle = KeyHandle::from(object);
        if same_but_key(&ctx.read_public(handle)?.0, &template) {
            return Ok(LoadedEk::Persistent(handle));
        }
    }
    Ok(LoadedEk::Transient(ek::create_ek_object_2(ctx, EK, None)?))
}

/// Whether two RSA public areas differ at most in their key.
fn same_but_key(a: &Public, b: &Public) -> bool {
    match (a, b) {
        (
            Public::Rsa { object_attributes: a0, name_hashing_algorithm: a1, auth_policy: a2, parameters: a3, .. },
            Public::Rsa { object_attributes: b0, name_hashing_algorithm: b1, auth_policy: b2, parameters: b3, .. },
        ) => a0 == b0 && a1 == b1 && a2 == b2 && a3 == b3,
        _ => false,
    }
}

fn handle_exists(ctx: &mut Context, handle: u32) -> TssResult<bool> {
    Ok(handles(ctx, handle, 1)?.first() == Some(&handle))
}

fn handles(ctx: &mut Context, first: u32, count: u32) -> TssResult<Vec<u32>> {
    match ctx.get_capability(CapabilityType::Handles, first, count)? {
        (CapabilityData::Handles(list), _) => Ok(list.into_inner().into_iter().map(u32::from).collect()),
        _ => Ok(Vec::new()),
    }
}

/// Runs `work` with a session of its own.
fn with_session<T>(
    ctx: &mut Context,
    kind: SessionType,
    work: impl FnOnce(&mut Context, AuthSession) -> TssResult<T>,
) -> TssResult<T> {
    let (symmetric, hash) = (SymmetricDefinition::AES_128_CFB, HashingAlgorithm::Sha256);
    let Some(session) = ctx.start_auth_session(None, None, None, kind, symmetric, hash)? else {
        return Err(Error::WrapperError(tss_esapi::WrapperErrorKind::WrongValueFromTpm));
    };
    ctx.execute_with_temporary_object(SessionHandle::from(session).into(), |ctx, _| work(ctx, session))
}

fn selection(bank: Bank, slots: impl Iterator<Item = PcrSlot>) -> TssResult<PcrSelectionList> {
    let hash = match bank {
        Bank::Sha256 => HashingAlgorithm::Sha256,
        Bank::Sha384 => HashingAlgorithm::Sha384,
    };
    PcrSelectionList::builder().with_selection(hash, &slots.collect::<Vec<_>>()).build()
}

/// The values of `slots`, or none where the bank is not active.
fn read_pcrs(ctx: &mut Context, bank: Bank, slots: &[(u32, PcrSlot)]) -> TssResult<Option<PcrValues>> {
    let mut out = Vec::with_capacity(slots.len());
    for some in slots.chunks(PCRS_PER_READ) {
        let wanted = selection(bank, some.iter().map(|(_, slot)| *slot))?;
        let (_, _, digests) = ctx.execute_without_session(|ctx| ctx.pcr_read(wanted))?;
        if digests.len() != some.len() {
            return Ok(None);
        }
        out.extend(some.iter().zip(digests.value()).map(|((n, _), digest)| (*n, digest.value().to_vec())));
    }
    Ok(Some(out))
}

fn kind(error: &Error) -> Option<Tss2ResponseCodeKind> {
    match error {
        Error::Tss2Error(code) => code.kind(),
        Error::WrapperError(_) => None,
    }
}

fn slots_full(error: &Error) -> bool {
    use Tss2ResponseCodeKind::{ObjectHandles, ObjectMemory, SessionHandles, SessionMemory};
    matches!(kind(error), Some(ObjectMemory | ObjectHandles | SessionMemory | SessionHandles))
}

/// Flushes every handle from `first` on that the TPM lists. What cannot be flushed is left for the next error to name.
fn flush_left(ctx: &mut Context, first: u32) {
    for handle in handles(ctx, first, 64).unwrap_or_default() {
        let flushed = TpmHandle::try_from(handle)
            .and_then(|h| ctx.execute_without_session(|ctx| ctx.tr_from_tpm_public(h)))
            .and_then(|object: ObjectHandle| ctx.flush_context(object));
        if let Err(error) = flushed {
            tracing::warn!(handle = format!("{handle:#010x}"), %error, "left object not flushed");
        }
    }
}

/// The content of a TPM2B that fills all of `bytes`.
fn tpm2b<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a [u8], TpmError> {
    match bytes.split_first_chunk::<2>() {
        Some((size, content)) if usize::from(u16::from_be_bytes(*size)) == content.len() => Ok(content),
        _ => Err(TpmError::Malformed { what }),
    }
}
