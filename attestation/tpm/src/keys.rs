//! The keys inside the TPM: templates, the EK's authorisation policy, and loading with guards that flush.
//!
//! Deriving an RSA EK takes a hardware TPM seconds, so what was loaded once is kept as a saved context (TPM 2.0 Part 3,
//! 28.2): encrypted by the TPM, worthless after its next reset, and never written down.

use crate::ak_file::WrappedKey;
use crate::answer;
use crate::options::{AkKind, EkKind};
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, ek, nv};
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::constants::{CapabilityType, SessionType};
use tss_esapi::handles::{AuthHandle, KeyHandle, NvIndexTpmHandle, ObjectHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm, RsaSchemeAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::{Hierarchy, NvAuth};
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    CapabilityData, Digest, DigestList, EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, Private, Public,
    PublicBuilder, PublicEccParametersBuilder, PublicKeyRsa, PublicRsaParametersBuilder, RsaExponent, RsaScheme,
    SymmetricDefinition, SymmetricDefinitionObject,
};
use tss_esapi::traits::{Marshall, UnMarshall};
use tss_esapi::utils::TpmsContext;
use tss_esapi::{Context, Error, WrapperErrorKind};

pub(crate) type TssResult<T> = Result<T, Error>;

/// Saved contexts: the EK, the AK and the SVID keys in use. More would be a leak.
const CONTEXTS_MAX: usize = 8;

/// The branches of PolicyB, the policy of high-range EKs with SHA-384 (EK Credential Profile 2.5, B.6.2): PolicyA is
/// TPM2_PolicySecret(TPM_RH_ENDORSEMENT), PolicyC is what an owner may have written to NV.
const POLICY_A_SHA384: [u8; 48] = [
    0x8b, 0xbf, 0x22, 0x66, 0x53, 0x7c, 0x17, 0x1c, 0xb5, 0x6e, 0x40, 0x3c, 0x4d, 0xc1, 0xd4, 0xb6, 0x4f, 0x43, 0x26,
    0x11, 0xdc, 0x38, 0x6e, 0x6f, 0x53, 0x20, 0x50, 0xc3, 0x27, 0x8c, 0x93, 0x0e, 0x14, 0x3e, 0x8b, 0xb1, 0x13, 0x38,
    0x24, 0xcc, 0xb4, 0x31, 0x05, 0x38, 0x71, 0xc6, 0xdb, 0x53,
];
const POLICY_C_SHA384: [u8; 48] = [
    0xd6, 0x03, 0x2c, 0xe6, 0x1f, 0x2f, 0xb3, 0xc2, 0x40, 0xeb, 0x3c, 0xf6, 0xa3, 0x32, 0x37, 0xef, 0x2b, 0x6a, 0x16,
    0xf4, 0x29, 0x3c, 0x22, 0xb4, 0x55, 0xe2, 0x61, 0xcf, 0xfd, 0x21, 0x7a, 0xd5, 0xb4, 0x94, 0x7c, 0x2d, 0x73, 0xe6,
    0x30, 0x05, 0xee, 0xd2, 0xdc, 0x2b, 0x35, 0x93, 0xd1, 0x65,
];

/// What the profile fixes for a kind of EK.
struct Template {
    algorithm: AsymmetricAlgorithmSelection,
    /// NV index of its certificate.
    certificate: u32,
    /// Where provisioned machines keep it loaded (TPM v2.0 Provisioning Guidance 7.8, EK Credential Profile 2.2.1).
    persistent: &'static [u32],
    name_hash: HashingAlgorithm,
}

fn template(kind: EkKind) -> Template {
    let (rsa, ecc) = (AsymmetricAlgorithmSelection::Rsa, AsymmetricAlgorithmSelection::Ecc);
    let (algorithm, certificate, persistent, name_hash): (_, _, &[u32], _) = match kind {
        EkKind::Rsa2048 => (rsa(RsaKeyBits::Rsa2048), 0x01c0_0002, &[0x8101_0001], HashingAlgorithm::Sha256),
        EkKind::EccP256 => {
            (ecc(EccCurve::NistP256), 0x01c0_000a, &[0x8101_0002, 0x8101_000a], HashingAlgorithm::Sha256)
        }
        EkKind::EccP384 => (ecc(EccCurve::NistP384), 0x01c0_0016, &[0x8101_0016], HashingAlgorithm::Sha384),
        EkKind::Rsa3072 => (rsa(RsaKeyBits::Rsa3072), 0x01c0_001c, &[0x8101_001c], HashingAlgorithm::Sha384),
    };
    Template { algorithm, certificate, persistent, name_hash }
}

/// Whether NV holds a certificate of this kind of EK.
pub(crate) fn has_certificate(ctx: &mut Context, kind: EkKind) -> TssResult<bool> {
    handle_exists(ctx, template(kind).certificate)
}

/// The certificate of this kind of EK, as it is in NV.
pub(crate) fn certificate(ctx: &mut Context, kind: EkKind) -> TssResult<Option<Vec<u8>>> {
    let index = template(kind).certificate;
    if !handle_exists(ctx, index)? {
        return Ok(None);
    }
    let index = NvIndexTpmHandle::new(index)?;
    let object = ctx.tr_from_tpm_public(TpmHandle::NvIndex(index))?;
    with_password(ctx, |ctx| nv::read_full(ctx, NvAuth::NvIndex(object.into()), index)).map(Some)
}

/// The keys of one EK.
pub(crate) struct Keys {
    ek: EkKind,
    /// By the wrapped private part; the EK's own is empty.
    contexts: Vec<(Vec<u8>, TpmsContext)>,
    /// Whether the TPM said of the last key that it is none of its own.
    pub(crate) foreign: bool,
}

impl Keys {
    pub(crate) fn of(ek: EkKind) -> Keys {
        Keys { ek, contexts: Vec::new(), foreign: false }
    }

    pub(crate) fn ek(&self) -> EkKind {
        self.ek
    }

    /// Makes a key below the EK.
    pub(crate) fn create(&mut self, ctx: &mut Context, public: &Public) -> TssResult<WrappedKey> {
        self.with_ek(ctx, |keys, ctx, ek| {
            let made = keys.with_ek_policy(ctx, |ctx, policy| {
                ctx.execute_with_session(Some(policy), |ctx| ctx.create(ek, public.clone(), None, None, None, None))
            })?;
            Ok(WrappedKey { public: made.out_public.marshall()?, private: made.out_private.value().to_vec() })
        })
    }

    /// Runs `work` with a key that was made below the EK, and unloads it whatever comes of it.
    pub(crate) fn with_key<T>(
        &mut self,
        ctx: &mut Context,
        key: &WrappedKey,
        work: impl FnOnce(&mut Keys, &mut Context, KeyHandle) -> TssResult<T>,
    ) -> TssResult<T> {
        self.foreign = false;
        if let Some(handle) = self.saved(ctx, &key.private)? {
            return ctx.execute_with_temporary_object(handle.into(), |ctx, _| work(self, ctx, handle));
        }
        let (public, private) = (Public::unmarshall(&key.public)?, Private::try_from(key.private.clone())?);
        let handle = self.with_ek(ctx, |keys, ctx, ek| {
            let loaded = keys.with_ek_policy(ctx, |ctx, policy| {
                ctx.execute_with_session(Some(policy), |ctx| ctx.load(ek, private, public))
            });
            keys.foreign = loaded.as_ref().is_err_and(answer::is_foreign);
            loaded
        })?;
        ctx.execute_with_temporary_object(handle.into(), |ctx, _| {
            self.save(ctx, &key.private, handle);
            work(self, ctx, handle)
        })
    }

    /// Runs `work` with the EK: the provisioned one if it is the template's, else one derived for this operation.
    pub(crate) fn with_ek<T>(
        &mut self,
        ctx: &mut Context,
        work: impl FnOnce(&mut Keys, &mut Context, KeyHandle) -> TssResult<T>,
    ) -> TssResult<T> {
        if let Some(handle) = self.saved(ctx, &[])? {
            return ctx.execute_with_temporary_object(handle.into(), |ctx, _| work(self, ctx, handle));
        }
        let Template { algorithm, persistent, .. } = template(self.ek);
        let public = ek::create_ek_public_from_default_template_2(algorithm, None)?;
        for handle in persistent {
            if handle_exists(ctx, *handle)? {
                let handle = KeyHandle::from(ctx.tr_from_tpm_public(TpmHandle::try_from(*handle)?)?);
                if same_but_key(&ctx.read_public(handle)?.0, &public) {
                    return work(self, ctx, handle);
                }
            }
        }
        let made =
            with_password(ctx, |ctx| ctx.create_primary(Hierarchy::Endorsement, public, None, None, None, None))?;
        let handle = made.key_handle;
        ctx.execute_with_temporary_object(handle.into(), |ctx, _| {
            self.save(ctx, &[], handle);
            work(self, ctx, handle)
        })
    }

    /// Runs `work` with a session that satisfies the EK's policy: PolicySecret of the endorsement hierarchy, and for the
    /// high range the PolicyOR above it. The session's hash must be the EK's, or its digest is another one.
    pub(crate) fn with_ek_policy<T>(
        &self,
        ctx: &mut Context,
        work: impl FnOnce(&mut Context, AuthSession) -> TssResult<T>,
    ) -> TssResult<T> {
        let hash = template(self.ek).name_hash;
        with_session(ctx, SessionType::Policy, hash, |ctx, session| {
            let policy = PolicySession::try_from(session)?;
            with_password(ctx, |ctx| {
                let none = Default::default();
                ctx.policy_secret(policy, AuthHandle::Endorsement, none, Default::default(), Default::default(), None)
            })?;
            if hash == HashingAlgorithm::Sha384 {
                let mut branches = DigestList::new();
                branches.add(Digest::try_from(POLICY_A_SHA384.to_vec())?)?;
                branches.add(Digest::try_from(POLICY_C_SHA384.to_vec())?)?;
                ctx.policy_or(policy, branches)?;
            }
            work(ctx, session)
        })
    }

    /// Loads a key from its saved context, if there is one and the TPM still takes it.
    fn saved(&mut self, ctx: &mut Context, label: &[u8]) -> TssResult<Option<KeyHandle>> {
        let Some(at) = self.contexts.iter().position(|(of, _)| of == label) else { return Ok(None) };
        let (_, context) = self.contexts.swap_remove(at);
        match ctx.context_load(context.clone()) {
            Ok(handle) => {
                self.contexts.push((label.to_vec(), context));
                Ok(Some(handle.into()))
            }
            // The TPM was reset since: the key itself is still there to be loaded.
            Err(error) if answer::next(&error) == answer::Next::Fail => Ok(None),
            Err(error) => {
                self.contexts.push((label.to_vec(), context));
                Err(error)
            }
        }
    }

    /// Keeps the context of a loaded key for the next time. Where the TPM will not give it, the key is loaded again.
    fn save(&mut self, ctx: &mut Context, label: &[u8], handle: KeyHandle) {
        match ctx.context_save(handle.into()) {
            Ok(context) => {
                if self.contexts.len() >= CONTEXTS_MAX {
                    self.contexts.remove(0);
                }
                self.contexts.push((label.to_vec(), context));
            }
            Err(error) => tracing::debug!(%error, "TPM context not saved"),
        }
    }
}

/// Runs `work` with the empty password, which authorises the hierarchies and keys of this crate.
pub(crate) fn with_password<T>(ctx: &mut Context, work: impl FnOnce(&mut Context) -> TssResult<T>) -> TssResult<T> {
    ctx.execute_with_session(Some(AuthSession::Password), work)
}

/// The public area of an AK: exactly what the verifier demands of one.
pub(crate) fn ak_public(kind: AkKind) -> TssResult<Public> {
    match kind {
        AkKind::EccP256 => ecc_signing(EccCurve::NistP256, HashingAlgorithm::Sha256, true),
        AkKind::EccP384 => ecc_signing(EccCurve::NistP384, HashingAlgorithm::Sha384, true),
        AkKind::Rsa2048Ssa => rsa_ak(RsaSchemeAlgorithm::RsaSsa),
        AkKind::Rsa2048Pss => rsa_ak(RsaSchemeAlgorithm::RsaPss),
    }
}

/// The public area of a key for an SVID: it signs what it is given, and never leaves its TPM.
pub(crate) fn svid_public() -> TssResult<Public> {
    ecc_signing(EccCurve::NistP256, HashingAlgorithm::Sha256, false)
}

/// The public area of a key that others wrap to: TPM2_ECDH_ZGen takes a key that decrypts and is not restricted (Part 3,
/// 14.5). It answers to its empty authorisation, not to a policy over PCRs: what booted is judged by the cell, again at each
/// change of policy, while a key bound to PCRs would be lost with the next update of the kernel.
pub(crate) fn wrap_public() -> TssResult<Public> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_decrypt(true)
        .build()?;
    let parameters = PublicEccParametersBuilder::new()
        .with_symmetric(SymmetricDefinitionObject::Null)
        .with_ecc_scheme(EccScheme::EcDh(HashScheme::new(HashingAlgorithm::Sha256)))
        .with_curve(EccCurve::NistP256)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_decryption_key(true)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

fn signing(restricted: bool, kind: PublicAlgorithm, hash: HashingAlgorithm) -> TssResult<PublicBuilder> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_restricted(restricted)
        .with_sign_encrypt(true)
        .build()?;
    Ok(PublicBuilder::new()
        .with_public_algorithm(kind)
        .with_name_hashing_algorithm(hash)
        .with_object_attributes(attributes))
}

fn ecc_signing(curve: EccCurve, hash: HashingAlgorithm, restricted: bool) -> TssResult<Public> {
    let parameters = PublicEccParametersBuilder::new()
        .with_symmetric(SymmetricDefinitionObject::Null)
        .with_ecc_scheme(EccScheme::EcDsa(HashScheme::new(hash)))
        .with_curve(curve)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .build()?;
    signing(restricted, PublicAlgorithm::Ecc, hash)?
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

fn rsa_ak(scheme: RsaSchemeAlgorithm) -> TssResult<Public> {
    let hash = HashingAlgorithm::Sha256;
    let parameters = PublicRsaParametersBuilder::new()
        .with_scheme(RsaScheme::create(scheme, Some(hash))?)
        .with_key_bits(RsaKeyBits::Rsa2048)
        .with_exponent(RsaExponent::default())
        .with_is_signing_key(true)
        .with_restricted(true)
        .build()?;
    signing(true, PublicAlgorithm::Rsa, hash)?
        .with_rsa_parameters(parameters)
        .with_rsa_unique_identifier(PublicKeyRsa::default())
        .build()
}

/// Whether two public areas differ at most in their key.
fn same_but_key(a: &Public, b: &Public) -> bool {
    let same = a.object_attributes() == b.object_attributes()
        && a.name_hashing_algorithm() == b.name_hashing_algorithm()
        && a.auth_policy() == b.auth_policy();
    match (a, b) {
        (Public::Rsa { parameters: a, .. }, Public::Rsa { parameters: b, .. }) => same && a == b,
        (Public::Ecc { parameters: a, .. }, Public::Ecc { parameters: b, .. }) => same && a == b,
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
    hash: HashingAlgorithm,
    work: impl FnOnce(&mut Context, AuthSession) -> TssResult<T>,
) -> TssResult<T> {
    let symmetric = SymmetricDefinition::AES_128_CFB;
    let Some(session) = ctx.start_auth_session(None, None, None, kind, symmetric, hash)? else {
        return Err(Error::WrapperError(WrapperErrorKind::WrongValueFromTpm));
    };
    ctx.execute_with_temporary_object(SessionHandle::from(session).into(), |ctx, _| work(ctx, session))
}

const TRANSIENT_FIRST: u32 = 0x8000_0000;
const LOADED_SESSION_FIRST: u32 = 0x0200_0000;

/// Flushes every object and session that the TPM lists. What cannot be flushed is left for the next error to name.
pub(crate) fn flush_left(ctx: &mut Context) {
    for first in [TRANSIENT_FIRST, LOADED_SESSION_FIRST] {
        for handle in handles(ctx, first, 64).unwrap_or_default() {
            let flushed = TpmHandle::try_from(handle)
                .and_then(|h| ctx.execute_without_session(|ctx| ctx.tr_from_tpm_public(h)))
                .and_then(|object: ObjectHandle| ctx.flush_context(object));
            if let Err(error) = flushed {
                tracing::warn!(handle = format!("{handle:#010x}"), %error, "left object not flushed");
            }
        }
    }
}
