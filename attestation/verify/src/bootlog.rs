//! The boot log: TCG2 crypto-agile format (TCG PC Client Platform Firmware Profile, PFP, section 10), its replay to
//! PCR values, and what of it is authenticated.
//!
//! A replay that leads to the quoted PCRs proves order and digests only. Event types, and the data of many events, are
//! covered by nothing: so each event in a policed PCR must be of a type that belongs there, and wherever the
//! specification says what its digest is taken over, it must be ([`rules`]).

mod facts;
mod order;
mod rules;
mod signatures;

pub use facts::{BootFacts, Fact, Measured, SecureBootVariable};
pub use signatures::{SignatureEntry, SignatureKind};

use crate::chain::Denial;
use crate::hash::HashAlg;
use crate::wire::{Malformed, Reader};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;

/// Digests in one event; more banks than any TPM has active.
const DIGESTS_MAX: u32 = 8;
/// Events in one log. Real boots have 30-300.
const EVENTS_MAX: usize = 8192;
/// PCRs of the PC Client profile.
const PCR_COUNT: u32 = 24;
/// PCRs whose content the boot log explains: firmware and boot loader (0-9) and shim (14). PCR 10 is IMA's.
pub use ambit_model::appraisal::POLICED_PCRS;

const EV_NO_ACTION: u32 = 0x0000_0003;
const EV_SEPARATOR: u32 = 0x0000_0004;
const SPEC_ID: &[u8] = b"Spec ID Event03\0";
const STARTUP_LOCALITY: &[u8] = b"StartupLocality\0";

/// One event.
#[derive(Clone, Debug)]
pub struct Event<'a> {
    /// Position in the log; the header is 0.
    pub number: usize,
    /// The PCR.
    pub pcr: u32,
    /// The event type (PFP 10.4.1).
    pub kind: u32,
    /// The event data.
    pub data: &'a [u8],
    digests: Vec<(u16, &'a [u8])>,
}

impl Event<'_> {
    /// The digest in the bank of `hash`.
    pub fn digest(&self, hash: HashAlg) -> Option<&[u8]> {
        self.digests.iter().find(|(alg, _)| *alg == hash.id()).map(|(_, d)| *d)
    }

    /// Whether it extends its PCR: all but remarks do.
    pub fn extends(&self) -> bool {
        self.kind != EV_NO_ACTION
    }

    /// Where the event stands, without its content: what a node may be told.
    pub fn place(&self) -> String {
        facts::place(self.number, &rules::name(self.kind), self.pcr)
    }
}

/// A parsed log.
#[derive(Clone, Debug)]
pub struct BootLog<'a> {
    events: Vec<Event<'a>>,
    startup_locality: u8,
}

impl<'a> BootLog<'a> {
    /// Parses the whole of `bytes`.
    ///
    /// # Errors
    /// [`Code::BootLogMalformed`] at the event that cannot be read; the header is event 0.
    pub fn parse(bytes: &'a [u8]) -> Result<BootLog<'a>, Denial> {
        let mut number = 0;
        Self::read(bytes, &mut number).map_err(|e| {
            let refusal = e.refuse(Code::BootLogMalformed, "TCG2 crypto-agile boot log");
            Denial::at(refusal, format!("boot log event {number}"))
        })
    }

    /// The events after the header, in order.
    pub fn events(&self) -> &[Event<'a>] {
        &self.events
    }

    /// The PCRs that this log leads to in the bank of `hash`: all 24, those without events at their start value.
    pub fn replay(&self, hash: HashAlg) -> Result<BTreeMap<u32, Vec<u8>>, Refusal> {
        let mut pcrs: BTreeMap<u32, Vec<u8>> = (0..PCR_COUNT).map(|n| (n, start_value(n, hash))).collect();
        if let Some(last) = pcrs.get_mut(&0).and_then(|v| v.last_mut()) {
            *last = self.startup_locality;
        }
        for event in self.events.iter().filter(|e| e.kind != EV_NO_ACTION) {
            let digest = event.digest(hash).ok_or_else(|| no_digest(event, hash))?;
            if let Some(value) = pcrs.get_mut(&event.pcr) {
                *value = hash.digest(&[value, digest]);
            }
        }
        Ok(pcrs)
    }

    /// `number` is of the event being read.
    fn read(bytes: &'a [u8], number: &mut usize) -> Result<BootLog<'a>, Malformed> {
        let mut r = Reader::new(bytes);
        let sizes = header(&mut r)?;
        let mut events = Vec::new();
        let mut startup_locality = None;
        let mut pcr0_extended = false;
        while r.remaining() > 0 {
            let at = r.at();
            if events.len() >= EVENTS_MAX {
                return Err(Malformed::new("more events than any boot has", at));
            }
            *number = events.len().saturating_add(1);
            let event = read_event(&mut r, *number, &sizes)?;
            if event.kind == EV_NO_ACTION {
                // In any other PCR it is a remark, which extends nothing and decides nothing.
                if let Some(rest) = event.data.strip_prefix(STARTUP_LOCALITY).filter(|_| event.pcr == 0) {
                    // PFP 10.4.5.3: once, before PCR 0 is extended, and only localities that can start a TPM.
                    let [locality @ (0 | 3 | 4)] = rest else { return Err(Malformed::new("StartupLocality", at)) };
                    if pcr0_extended || startup_locality.replace(*locality).is_some() {
                        return Err(Malformed::new("StartupLocality: late or twice", at));
                    }
                }
            } else {
                pcr0_extended |= event.pcr == 0;
            }
            events.push(event);
        }
        Ok(BootLog { events, startup_locality: startup_locality.unwrap_or(0) })
    }
}

/// TCG_EfiSpecIDEvent in a TCG_PCClientPCREvent (PFP 10.2.1.1 and 10.4.5.1): which banks follow, and their sizes.
fn header(r: &mut Reader<'_>) -> Result<BTreeMap<u16, usize>, Malformed> {
    let pcr = r.u32_le("header PCR")?;
    let kind = r.u32_le("header type")?;
    r.take(20, "header digest")?;
    let body_at = r.at();
    let body = r.sized_le(1024, "header size")?;
    let mut b = Reader::new(body);
    if pcr != 0 || kind != EV_NO_ACTION || b.take(SPEC_ID.len(), "header signature")? != SPEC_ID {
        return Err(Malformed::new("header: not the crypto-agile format", 0));
    }
    b.take(8, "platform class and version")?;
    let count = b.u32_le("number of algorithms")?;
    if count == 0 || count > DIGESTS_MAX {
        return Err(Malformed::new("number of algorithms", body_at));
    }
    let mut sizes = BTreeMap::new();
    for _ in 0..count {
        let alg = b.u16_le("algorithm")?;
        let size = usize::from(b.u16_le("digest size")?);
        let fits = HashAlg::from_id(alg).is_none_or(|h| h.size() == size);
        if size > 64 || !fits || sizes.insert(alg, size).is_some() {
            return Err(Malformed::new("digest size", body_at));
        }
    }
    let vendor = usize::from(b.u8("vendor info size")?);
    b.take(vendor, "vendor info")?;
    b.end("bytes after the vendor info")?;
    Ok(sizes)
}

/// TCG_PCR_EVENT2 (PFP 10.2.2).
fn read_event<'a>(r: &mut Reader<'a>, number: usize, sizes: &BTreeMap<u16, usize>) -> Result<Event<'a>, Malformed> {
    let at = r.at();
    let pcr = r.u32_le("event PCR")?;
    let kind = r.u32_le("event type")?;
    // Events that extend nothing may stand outside of the PCRs.
    if pcr >= PCR_COUNT && kind != EV_NO_ACTION {
        return Err(Malformed::new("event PCR", at));
    }
    let count = r.u32_le("digest count")?;
    if count > DIGESTS_MAX {
        return Err(Malformed::new("digest count", at));
    }
    let mut digests: Vec<(u16, &[u8])> = Vec::new();
    for _ in 0..count {
        let alg = r.u16_le("digest algorithm")?;
        let size = *sizes.get(&alg).ok_or(Malformed::new("digest algorithm that the header does not name", at))?;
        if digests.iter().any(|(seen, _)| *seen == alg) {
            return Err(Malformed::new("two digests of one algorithm", at));
        }
        digests.push((alg, r.take(size, "digest")?));
    }
    let data = r.sized_le(usize::MAX, "event size")?;
    Ok(Event { number, pcr, kind, data, digests })
}

/// PCRs 17-22 start as ones, all others as zeros (PC Client Platform TPM Profile, 4.6.2).
fn start_value(pcr: u32, hash: HashAlg) -> Vec<u8> {
    vec![if (17..=22).contains(&pcr) { 0xff } else { 0 }; hash.size()]
}

fn no_digest(event: &Event<'_>, hash: HashAlg) -> Refusal {
    Refusal::new(Code::BootLogMalformed, format!("a {hash} digest in each event"), format!("none in {}", event.place()))
}

/// Judges a log against the quoted `pcrs` of the bank of `hash`, and refuses a machine that hands over none.
pub(crate) fn judge(bytes: &[u8], hash: HashAlg, pcrs: &BTreeMap<u32, Vec<u8>>) -> Result<BootFacts, Denial> {
    let facts = judge_any(bytes, hash, pcrs)?;
    if !facts.has_log && POLICED_PCRS.iter().any(|n| pcrs.contains_key(n)) {
        return Err(Refusal::new(Code::BootLogMissing, "a boot log", "none").into());
    }
    Ok(facts)
}

/// The same, but without a log the facts say so: that is an outcome of the appraisal policy. Events are judged before
/// PCRs are compared, so that a changed event is named rather than the PCR it ends up in.
pub fn judge_any(bytes: &[u8], hash: HashAlg, pcrs: &BTreeMap<u32, Vec<u8>>) -> Result<BootFacts, Denial> {
    let policed: Vec<u32> = POLICED_PCRS.into_iter().filter(|n| pcrs.contains_key(n)).collect();
    if policed.is_empty() || bytes.is_empty() {
        return Ok(BootFacts::default());
    }
    let log = BootLog::parse(bytes)?;
    let mut facts = BootFacts { events: log.events.len(), has_log: true, ..BootFacts::default() };
    let mut order = order::Order::default();
    for event in log.events.iter().filter(|e| policed.contains(&e.pcr) && e.kind != EV_NO_ACTION) {
        let digest = event.digest(hash).ok_or_else(|| Denial::at(no_digest(event, hash), event.place()))?;
        let fact = rules::judge(event, hash, digest)?;
        order.judge(event, digest, hash, &fact)?;
        match &fact {
            Fact::SecureBoot(on) => facts.secure_boot = Some(*on),
            Fact::CommandLine(text) => facts.kernel_cmdline = Some(text.clone()),
            _ => {}
        }
        let (number, pcr, kind) = (event.number, event.pcr, rules::name(event.kind));
        facts.measured.push(Measured { number, pcr, kind, digest: digest.to_vec(), fact });
    }
    compare(&log.replay(hash)?, pcrs, &policed, hash)?;
    order.end(&policed)?;
    Ok(facts)
}

fn compare(
    replayed: &BTreeMap<u32, Vec<u8>>,
    quoted: &BTreeMap<u32, Vec<u8>>,
    policed: &[u32],
    hash: HashAlg,
) -> Result<(), Denial> {
    for pcr in policed {
        let (quoted, led_to) = (quoted.get(pcr), replayed.get(pcr));
        if quoted != led_to {
            let text = |v: Option<&Vec<u8>>| format!("PCR {pcr} {hash} {}", v.map(hex::encode).unwrap_or_default());
            let refusal = Refusal::new(Code::BootLogPcrMismatch, text(quoted), format!("replayed {}", text(led_to)));
            return Err(Denial::at(refusal, format!("PCR {pcr}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod made_tests;
#[cfg(test)]
mod tests;
