//! TPMs that hang, are busy, are locked, or go away: the caller gets an error in time, and the TPM is used again once it
//! answers.

use crate::common::Swtpm;
use crate::common::proxy::{Mood, Proxy};
use crate::nothing_is_loaded;
use ambit_tpm::{Attester, Bank, Options, TpmError};
use std::time::{Duration, Instant};

const TPM_RC_RETRY: u32 = 0x922;
const TPM_RC_YIELDED: u32 = 0x908;
const TPM_RC_CANCELED: u32 = 0x909;
const TPM_RC_TESTING: u32 = 0x90a;
const TPM_RC_FAILURE: u32 = 0x101;
const TPM_CC_QUOTE: u32 = 0x158;
const TPM_CC_CREATE: u32 = 0x153;
const TPM_CC_FLUSH_CONTEXT: u32 = 0x165;
const LIMIT: Duration = Duration::from_millis(500);
/// As many operations as may hang before further ones are refused.
const UNANSWERED_MAX: usize = 3;

fn attester(proxy: &Proxy, tpm: &Swtpm) -> Attester {
    let usual = Options::new(&proxy.tcti(), &tpm.state());
    let (operation_max, creation_max) = (LIMIT, Duration::from_secs(20));
    Attester::start(Options { operation_max, creation_max, lockout_rest: LIMIT, ..usual }).unwrap()
}

async fn until(what: &str, good: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !good() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_hung_tpm_costs_its_callers_a_deadline_and_comes_back() {
    let tpm = Swtpm::start();
    let proxy = Proxy::before(tpm.port());
    let attester = attester(&proxy, &tpm);
    attester.identity().await.unwrap();
    for round in 0..2 {
        proxy.set(Mood::Silent);
        let began = Instant::now();
        // At once: they share the turn, so they also share the wait.
        let quotes: Vec<_> = (0..5u8)
            .map(|n| {
                let attester = attester.clone();
                tokio::spawn(async move { attester.quote(Bank::Sha256, 1, [n; 32]).await })
            })
            .collect();
        for quote in quotes {
            let error = quote.await.unwrap().unwrap_err();
            assert!(matches!(error, TpmError::TimedOut { operation: "quote", limit: LIMIT }), "{error:?}");
        }
        let waited = began.elapsed();
        assert!(waited >= LIMIT && waited < LIMIT * 2, "round {round}: {waited:?}");
        // Each further one hangs as well, until so many do that no more is begun. A worker whose caller went away before it
        // asked anything counts for a moment too: what lasts is what the TPM was asked.
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < end, "round {round}: {} hang", proxy.waiting());
            match attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err() {
                TpmError::TimedOut { .. } => {}
                TpmError::Hung { unanswered, .. } => {
                    assert_eq!(unanswered, UNANSWERED_MAX);
                    if proxy.waiting() == UNANSWERED_MAX {
                        break;
                    }
                }
                other => panic!("{other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let began = Instant::now();
        attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
        assert!(began.elapsed() < LIMIT / 2, "refused at once");
        assert_eq!(proxy.waiting(), UNANSWERED_MAX);
        // Answers come late, are dropped, and the TPM is of use again.
        proxy.set(Mood::Good);
        until("the TPM is used again", || proxy.waiting() == 0).await;
        let end = Instant::now() + Duration::from_secs(10);
        while let Err(error) = attester.quote(Bank::Sha256, 1, [9; 32]).await {
            assert!(Instant::now() < end, "{error:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    drop(attester);
    nothing_is_loaded(&tpm);
}

/// A thread that was given up while its AK was being made must not put it in the place of its successor's.
#[tokio::test]
async fn a_creation_that_hangs_leaves_no_second_ak() {
    let tpm = Swtpm::start();
    let proxy = Proxy::before(tpm.port());
    let usual = Options::new(&proxy.tcti(), &tpm.state());
    let attester = Attester::start(Options { creation_max: LIMIT, ..usual }).unwrap();
    proxy.set(Mood::Holds(TPM_CC_CREATE));
    let error = attester.identity().await.unwrap_err();
    assert!(matches!(error, TpmError::TimedOut { .. }), "{error:?}");
    until("its creation is held", || proxy.waiting() == 1).await;
    let direct = async || Attester::open(&tpm.tcti(), &tpm.state()).unwrap().identity().await.unwrap();
    let identity = direct().await;
    proxy.take_seen();
    proxy.set(Mood::Good);
    // Its session and its connection are the last of it.
    until("the late thread flushes", || proxy.take_seen().contains(&TPM_CC_FLUSH_CONTEXT)).await;
    tokio::time::sleep(LIMIT).await;
    assert_eq!(direct().await, identity);
    assert_eq!(attester.identity().await.unwrap(), identity);
    nothing_is_loaded(&tpm);
}

#[tokio::test]
async fn a_busy_tpm_is_asked_again() {
    let tpm = Swtpm::start();
    let proxy = Proxy::before(tpm.port());
    let attester = attester(&proxy, &tpm);
    attester.identity().await.unwrap();
    // libtss2 alone gives up after five; 12 takes a pause or two of ours.
    for (code, times) in
        [(TPM_RC_RETRY, 1), (TPM_RC_RETRY, 12), (TPM_RC_YIELDED, 12), (TPM_RC_TESTING, 12), (TPM_RC_CANCELED, 2)]
    {
        proxy.set(Mood::Refuses(code, times));
        attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_or_else(|e| panic!("{code:#x} x {times}: {e:?}"));
    }
    // Busy for longer than there is time: the TPM's own answer, before the deadline.
    proxy.set(Mood::Refuses(TPM_RC_RETRY, u32::MAX));
    let began = Instant::now();
    let error = attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
    assert!(matches!(error, TpmError::Command { operation: "quote", .. }), "{error:?}");
    assert!(began.elapsed() < LIMIT);
    // What is no use repeating is not repeated.
    proxy.set(Mood::RefusesAll(TPM_CC_QUOTE, TPM_RC_FAILURE));
    proxy.take_seen();
    let error = attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
    assert!(matches!(error, TpmError::Command { operation: "quote", .. }), "{error:?}");
    assert_eq!(proxy.take_seen().iter().filter(|code| **code == TPM_CC_QUOTE).count(), 1);
    // An error in the middle leaves nothing loaded.
    nothing_is_loaded(&tpm);
}

#[tokio::test]
async fn a_tpm_that_goes_away_is_an_error_at_once() {
    let tpm = Swtpm::start();
    let proxy = Proxy::before(tpm.port());
    let attester = attester(&proxy, &tpm);
    attester.identity().await.unwrap();
    proxy.set(Mood::Hangup);
    let began = Instant::now();
    attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
    assert!(began.elapsed() < LIMIT);
    proxy.set(Mood::Good);
    attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap();
}

/// A real lockout: someone guesses a password. Every try of ours would be refused, so there is one.
#[tokio::test]
async fn a_tpm_in_lockout_is_left_alone() {
    let tpm = Swtpm::start();
    let proxy = Proxy::before(tpm.port());
    let attester = attester(&proxy, &tpm);
    attester.identity().await.unwrap();
    tpm.tool("tpm2_dictionarylockout", &["-s", "-n", "1", "-t", "1000", "-l", "1000"]);
    tpm.tool("tpm2_createprimary", &["-Q", "-C", "o", "-G", "ecc", "-p", "secret", "-c", "locked.ctx"]);
    tpm.tool("tpm2_flushcontext", &["-t"]);
    let guess = ["-Q", "-C", "locked.ctx", "-P", "guess", "-G", "ecc", "-u", "x.pub", "-r", "x.priv"];
    assert!(!tpm.try_tool("tpm2_create", &guess).status.success());
    tpm.tool("tpm2_flushcontext", &["-t"]);

    let began = Instant::now();
    let error = attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
    assert!(matches!(error, TpmError::Lockout { operation: "quote", rest: LIMIT }), "{error:?}");
    assert_eq!(proxy.take_seen().iter().filter(|code| **code == TPM_CC_QUOTE).count(), 1);
    while began.elapsed() < LIMIT / 2 {
        let error = attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
        assert!(matches!(error, TpmError::Lockout { rest, .. } if rest <= LIMIT), "{error:?}");
    }
    assert!(proxy.take_seen().is_empty(), "not one command");
    tpm.tool("tpm2_dictionarylockout", &["-c"]);
    tokio::time::sleep(LIMIT).await;
    attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap();
    nothing_is_loaded(&tpm);
}
