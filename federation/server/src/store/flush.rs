//! What must wait for the disk, as a type: only the store's receipt opens it.

/// Proof that a batch and all before it are on disk. Only [`super::log::LogStore`] makes one, after its sync returned.
#[derive(Debug)]
pub struct FlushReceipt {
    batch: u64,
}

impl FlushReceipt {
    pub(in crate::store) fn of(batch: u64) -> Self {
        Self { batch }
    }
    /// For tests of the core over a storage in memory.
    #[cfg(test)]
    pub(crate) fn simulated(batch: u64) -> Self {
        Self { batch }
    }
    /// The number of the batch.
    pub fn batch(&self) -> u64 {
        self.batch
    }
}

/// A value, such as a vote or an acknowledgement, that would be a lie before its batch is on disk.
///
/// ```compile_fail,E0616
/// fn early(message: ambitd::store::AfterFlush<u8>) -> u8 { message.value }
/// ```
/// ```compile_fail,E0451
/// let forged = ambitd::store::FlushReceipt { batch: 7 };
/// ```
#[derive(Debug)]
#[must_use = "unsent acknowledgements stall the cell"]
pub struct AfterFlush<T> {
    value: T,
    batch: u64,
}

impl<T> AfterFlush<T> {
    /// `value` may leave once `batch` is on disk.
    pub fn new(value: T, batch: u64) -> Self {
        Self { value, batch }
    }
    /// A planted fault: the value, too early.
    #[cfg(ambit_mutant)]
    pub(crate) fn leaked(self) -> T {
        self.value
    }
    /// The value, if the receipt covers its batch; else it is given back closed.
    pub fn open(self, receipt: &FlushReceipt) -> Result<T, Self> {
        if receipt.batch >= self.batch { Ok(self.value) } else { Err(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_receipt_opens_nothing() {
        let closed = AfterFlush::new("vote", 7).open(&FlushReceipt::of(6)).unwrap_err();
        assert_eq!(closed.open(&FlushReceipt::of(7)).unwrap(), "vote");
    }
}
