//! What the far end of a tunnel showed in its handshake, and whether that would be accepted now: a tunnel outlives bundles
//! and SVIDs, and begins no connection that a new one could not.

use ambit_identity::{Trust, Usage};
use ambit_model::{Code, Refusal, Stamp};
use rustls_pki_types::CertificateDer;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// By which bundles and at what time a chain is judged.
#[derive(Clone, Debug)]
pub struct Now {
    /// The bundles in force.
    pub trust: Arc<Trust>,
    /// The time.
    pub at: Stamp,
}

/// A chain that a handshake verified.
#[derive(Debug)]
pub struct Shown {
    chain: Vec<CertificateDer<'static>>,
    usage: Usage,
    /// The leaf's last instant.
    not_after: Stamp,
    /// The bundles by which it was last found good.
    good_by: Mutex<Weak<Trust>>,
}

impl Shown {
    /// A chain (leaf first) that was verified by `trust`, or by what replaced it since.
    pub fn new(chain: Vec<CertificateDer<'static>>, usage: Usage, not_after: Stamp, trust: &Arc<Trust>) -> Self {
        Self { chain, usage, not_after, good_by: Mutex::new(Arc::downgrade(trust)) }
    }

    /// A chain that nobody verified yet: whether it is good is found out when that is asked.
    pub fn unverified(chain: Vec<CertificateDer<'static>>, usage: Usage, not_after: Stamp) -> Self {
        Self { chain, usage, not_after, good_by: Mutex::default() }
    }

    /// Whether it still is what it was: verified again only where the bundles changed.
    ///
    /// # Errors
    /// [`Code::SvidUntrusted`] where it ended, else those of [`Trust::verify_for`].
    pub fn still(&self, now: &Now) -> Result<(), Refusal> {
        if self.not_after < now.at {
            let found = format!("ended at {} ms", self.not_after.0);
            return Err(Refusal::new(Code::SvidUntrusted, "an SVID in time", found));
        }
        let mut good_by = self.good_by.lock().unwrap_or_else(PoisonError::into_inner);
        // The address is not used again while this points to it.
        if std::ptr::eq(good_by.as_ptr(), Arc::as_ptr(&now.trust)) {
            return Ok(());
        }
        now.trust.verify_for(self.usage, &self.chain, now.at)?;
        *good_by = Arc::downgrade(&now.trust);
        Ok(())
    }
}
