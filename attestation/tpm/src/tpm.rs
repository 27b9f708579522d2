//! The TPM's own operations. Each opens the TPM, does its work inside guards that flush what they loaded, and closes it.

use crate::ak_file::{self, WrappedKey};
use crate::answer::{self, Next};
use crate::error::TpmError;
use crate::keys::{self, Keys, TssResult, with_password};
use crate::options::{AkKind, EkChoice, EkKind, Options};
use crate::worker::Claim;
use crate::{Bank, Certified, Quote, TpmIdentity};
use sha2::{Digest as _, Sha256, Sha384};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tss_esapi::constants::tss::{TPM2_RH_NULL, TPM2_ST_HASHCHECK};
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Data, Digest, EccParameter, EccPoint, EncryptedSecret, HashcheckTicket, IdObject, PcrSelectionList, PcrSlot,
    Public, Signature, SignatureScheme,
};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::traits::{Marshall, UnMarshall};
use tss_esapi::tss2_esys::TPMT_TK_HASHCHECK;
use tss_esapi::{Context, Error, WrapperErrorKind};
use zeroize::Zeroizing;

/// PCR_Read answers with at most eight digests (Part 2, TPML_DIGEST).
const PCRS_PER_READ: usize = 8;
/// IMA extends PCR 10 whenever something new runs, also between reading and quoting.
const QUOTE_ATTEMPTS: u32 = 8;

/// Index and value of PCRs, ascending.
type PcrValues = Vec<(u32, Vec<u8>)>;

/// The TPM as one thread works with it.
pub(crate) struct Tpm {
    options: Options,
    tcti: TctiNameConf,
    claim: Claim,
    /// Known once the EK is chosen.
    keys: Option<Keys>,
    /// Until when a TPM in lockout is left alone.
    resting: Option<Instant>,
}

impl Tpm {
    pub(crate) fn new(options: Options, tcti: TctiNameConf, claim: Claim) -> Tpm {
        Tpm { options, tcti, claim, keys: None, resting: None }
    }

    pub(crate) fn identity(&mut self, due: Instant) -> Result<TpmIdentity, TpmError> {
        let ak = self.saved_ak(due)?;
        self.run("read its identity", due, |keys, ctx| {
            let ek_certificate = keys::certificate(ctx, keys.ek())?;
            let ek_public = keys.with_ek(ctx, |_, ctx, ek| ctx.read_public(ek)?.0.marshall())?;
            Ok(TpmIdentity { ek_certificate, ek_public, ak_public: ak.public.clone() })
        })
    }

    pub(crate) fn activate(
        &mut self,
        blob: &[u8],
        secret: &[u8],
        due: Instant,
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let blob = IdObject::try_from(tpm2b(blob, "credential blob")?.to_vec())
            .map_err(|_| TpmError::Malformed { what: "credential blob" })?;
        let secret = EncryptedSecret::try_from(tpm2b(secret, "encrypted secret")?.to_vec())
            .map_err(|_| TpmError::Malformed { what: "encrypted secret" })?;
        self.with_ak("activate the credential", due, |keys, ctx, ak| {
            keys.with_ek(ctx, |keys, ctx, ek| {
                keys.with_ek_policy(ctx, |ctx, policy| {
                    ctx.execute_with_sessions((Some(AuthSession::Password), Some(policy), None), |ctx| {
                        let opened = ctx.activate_credential(ak, ek, blob.clone(), secret.clone())?;
                        Ok(Zeroizing::new(opened.value().to_vec()))
                    })
                })
            })
        })
    }

    pub(crate) fn quote(
        &mut self,
        bank: Bank,
        mask: u32,
        qualifying: [u8; 32],
        due: Instant,
    ) -> Result<Quote, TpmError> {
        let slots: Vec<(u32, PcrSlot)> = (0..24u32)
            .filter(|n| mask & (1 << n) != 0)
            .filter_map(|n| PcrSlot::try_from(1u32 << n).ok().map(|slot| (n, slot)))
            .collect();
        if slots.is_empty() || mask >> 24 != 0 {
            return Err(TpmError::Selection { mask });
        }
        let kind = self.options.ak;
        self.with_ak("quote", due, |_, ctx, ak| {
            for _ in 0..QUOTE_ATTEMPTS {
                let Some(pcrs) = read_pcrs(ctx, bank, &slots)? else { return Ok(Err(TpmError::Selection { mask })) };
                let selection = selection(bank, slots.iter().map(|(_, slot)| *slot))?;
                let data = Data::try_from(qualifying.to_vec())?;
                let (attest, signature) =
                    with_password(ctx, |ctx| ctx.quote(ak, data, SignatureScheme::Null, selection))?;
                let attest = attest.marshall()?;
                // TPMS_ATTEST of a quote ends with the digest over the PCR values.
                if attest.ends_with(&pcr_digest(kind, &pcrs)) {
                    return Ok(Ok(Quote { attest, signature: signature.marshall()?, pcrs }));
                }
            }
            Ok(Err(TpmError::PcrsMoving { attempts: QUOTE_ATTEMPTS }))
        })?
    }

    /// A new key for an SVID. Its wrapped half leaves with the answer and is nowhere else.
    pub(crate) fn create_key(&mut self, due: Instant) -> Result<WrappedKey, TpmError> {
        self.run("create a key", due, |keys, ctx| keys.create(ctx, &keys::svid_public()?))
    }

    /// TPM2_Certify of `key` by the AK.
    pub(crate) fn certify(
        &mut self,
        key: &WrappedKey,
        qualifying: [u8; 32],
        due: Instant,
    ) -> Result<Certified, TpmError> {
        self.with_ak("certify the key", due, |keys, ctx, ak| {
            keys.with_key(ctx, key, |_, ctx, handle| {
                let data = Data::try_from(qualifying.to_vec())?;
                // The key answers for ADMIN with its empty authorisation, since it has no policy (Part 1, 19.2).
                let both = (Some(AuthSession::Password), Some(AuthSession::Password), None);
                let (attest, signature) =
                    ctx.execute_with_sessions(both, |ctx| ctx.certify(handle.into(), ak, data, SignatureScheme::Null))?;
                Ok(Certified {
                    public: key.public.clone(),
                    attest: attest.marshall()?,
                    signature: signature.marshall()?,
                })
            })
        })
    }

    /// r and s of the ECDSA signature of `key` over `digest`.
    pub(crate) fn sign(
        &mut self,
        key: &WrappedKey,
        digest: [u8; 32],
        due: Instant,
    ) -> Result<(Vec<u8>, Vec<u8>), TpmError> {
        self.run("sign", due, |keys, ctx| {
            keys.with_key(ctx, key, |_, ctx, handle| {
                // The ticket says that the TPM hashed the message itself; only restricted keys ask for one.
                let none =
                    TPMT_TK_HASHCHECK { tag: TPM2_ST_HASHCHECK, hierarchy: TPM2_RH_NULL, digest: Default::default() };
                let (digest, none) = (Digest::try_from(digest.to_vec())?, HashcheckTicket::try_from(none)?);
                match with_password(ctx, |ctx| ctx.sign(handle, digest, SignatureScheme::Null, none))? {
                    Signature::EcDsa(pair) => {
                        Ok((pair.signature_r().value().to_vec(), pair.signature_s().value().to_vec()))
                    }
                    _ => Err(Error::WrapperError(WrapperErrorKind::WrongValueFromTpm)),
                }
            })
        })
    }

    /// A new key to which others wrap.
    pub(crate) fn create_wrap_key(&mut self, due: Instant) -> Result<WrappedKey, TpmError> {
        self.run("create a wrap key", due, |keys, ctx| keys.create(ctx, &keys::wrap_public()?))
    }

    /// The x coordinate, 32 bytes, of what `key` and the point agree on (TPM2_ECDH_ZGen). The TPM refuses what is no point of
    /// the curve.
    pub(crate) fn agree(
        &mut self,
        key: &WrappedKey,
        point: &[u8; 65],
        due: Instant,
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        self.run("agree on a key", due, |keys, ctx| {
            let (x, y) = point.get(1..).unwrap_or_default().split_at(32);
            let point = EccPoint::new(EccParameter::try_from(x)?, EccParameter::try_from(y)?);
            keys.with_key(ctx, key, |_, ctx, handle| {
                let agreed = with_password(ctx, |ctx| ctx.ecdh_z_gen(handle, point))?;
                let x = agreed.x().value();
                // TPMs may strip leading zeros.
                let mut out = Zeroizing::new(vec![0; 32usize.saturating_sub(x.len())]);
                out.extend_from_slice(x);
                Ok(out)
            })
        })
    }

    /// Chooses the EK; from then on it stays.
    fn choose_ek(&mut self, due: Instant) -> Result<EkKind, TpmError> {
        if let Some(keys) = &self.keys {
            return Ok(keys.ek());
        }
        let chosen = match self.options.ek {
            EkChoice::Fixed(kind) => kind,
            EkChoice::Auto => match EkKind::ALL.into_iter().find(|ek| self.ak_path(*ek).exists()) {
                Some(kind) => kind,
                None => self.attempt("look for EK certificates", due, &mut |ctx| {
                    for kind in EkKind::ALL {
                        if keys::has_certificate(ctx, kind)? {
                            return Ok(kind);
                        }
                    }
                    Ok(EkKind::Rsa2048)
                })?,
            },
        };
        self.keys = Some(Keys::of(chosen));
        Ok(chosen)
    }

    fn ak_path(&self, ek: EkKind) -> PathBuf {
        ak_file::path(&self.options.state_dir, ek, self.options.ak)
    }

    /// The saved AK; at the very first time, a new one.
    fn saved_ak(&mut self, due: Instant) -> Result<WrappedKey, TpmError> {
        let ek = self.choose_ek(due)?;
        let path = self.ak_path(ek);
        if let Some(saved) = ak_file::load(&path)? {
            return Ok(saved);
        }
        let kind = self.options.ak;
        let made = self.run("create the AK", due, |keys, ctx| keys.create(ctx, &keys::ak_public(kind)?))?;
        // A thread that was given up meanwhile must not replace the AK of its successor.
        self.claim.hold(|| ak_file::save(&path, &made))?;
        tracing::info!(path = %path.display(), ek = ek.as_str(), ak = kind.as_str(), "AK created");
        Ok(made)
    }

    /// Runs `work` with the AK loaded, and unloads it whatever comes of it.
    fn with_ak<T>(
        &mut self,
        operation: &'static str,
        due: Instant,
        mut work: impl FnMut(&mut Keys, &mut Context, KeyHandle) -> TssResult<T>,
    ) -> Result<T, TpmError> {
        let saved = self.saved_ak(due)?;
        let ek = self.choose_ek(due)?;
        let path = self.ak_path(ek);
        if Public::unmarshall(&saved.public).is_err() {
            return Err(TpmError::StateDamaged { path });
        }
        match self.run(operation, due, |keys, ctx| keys.with_key(ctx, &saved, &mut work)) {
            // The innermost key loaded is the last one asked about; another key below this EK cannot be foreign.
            Err(TpmError::Command { source, .. }) if self.keys.as_ref().is_some_and(|keys| keys.foreign) => {
                Err(TpmError::OtherTpm { path, source })
            }
            other => other,
        }
    }

    /// Runs `work` with the keys of the chosen EK.
    fn run<T>(
        &mut self,
        operation: &'static str,
        due: Instant,
        mut work: impl FnMut(&mut Keys, &mut Context) -> TssResult<T>,
    ) -> Result<T, TpmError> {
        let ek = self.choose_ek(due)?;
        let mut keys = self.keys.take().unwrap_or_else(|| Keys::of(ek));
        let outcome = self.attempt(operation, due, &mut |ctx| work(&mut keys, ctx));
        self.keys = Some(keys);
        outcome
    }

    /// Opens the TPM for one operation, as often as its answers ask for. Where its slots are full of what killed
    /// processes left behind, they are emptied, once: with a resource manager or a TPM of one client at a time nobody
    /// else's objects are there.
    fn attempt<T>(
        &mut self,
        operation: &'static str,
        due: Instant,
        work: &mut dyn FnMut(&mut Context) -> TssResult<T>,
    ) -> Result<T, TpmError> {
        let began = Instant::now();
        if let Some(rest) = self.resting.and_then(|until| until.checked_duration_since(began)) {
            return Err(TpmError::Lockout { operation, rest });
        }
        let (mut attempts, mut flushed) = (0u32, false);
        loop {
            attempts = attempts.saturating_add(1);
            let mut ctx = Context::new(self.tcti.clone())
                .map_err(|source| TpmError::Unreachable { tcti: self.options.tcti.clone(), source })?;
            let outcome = work(&mut ctx);
            let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            tracing::debug!(operation, took_us, attempts, ok = outcome.is_ok(), "TPM operation");
            let source = match outcome {
                Ok(done) => return Ok(done),
                Err(source) => source,
            };
            match answer::next(&source) {
                Next::Again if Instant::now() + answer::pause(attempts) < due => {
                    drop(ctx);
                    std::thread::sleep(answer::pause(attempts));
                }
                Next::Flush if !flushed => {
                    tracing::warn!(operation, "TPM slots full of left objects: flushing them");
                    flushed = true;
                    keys::flush_left(&mut ctx);
                }
                Next::Rest => {
                    let rest = self.options.lockout_rest;
                    self.resting = Some(Instant::now() + rest);
                    tracing::error!(operation, rest_ms = millis(rest), "TPM in dictionary-attack lockout");
                    return Err(TpmError::Lockout { operation, rest });
                }
                Next::Again | Next::Flush | Next::Fail => return Err(TpmError::Command { operation, source }),
            }
        }
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// The digest in a quote: over the values, with the hash of the AK's scheme whatever the bank is (Part 3, 18.4).
fn pcr_digest(kind: AkKind, pcrs: &PcrValues) -> Vec<u8> {
    let values = pcrs.iter().map(|(_, value)| value.as_slice()).collect::<Vec<_>>().concat();
    match kind {
        AkKind::EccP256 | AkKind::Rsa2048Ssa | AkKind::Rsa2048Pss => Sha256::digest(values).to_vec(),
        AkKind::EccP384 => Sha384::digest(values).to_vec(),
    }
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

/// The content of a TPM2B that fills all of `bytes`.
fn tpm2b<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a [u8], TpmError> {
    match bytes.split_first_chunk::<2>() {
        Some((size, content)) if usize::from(u16::from_be_bytes(*size)) == content.len() => Ok(content),
        _ => Err(TpmError::Malformed { what }),
    }
}
