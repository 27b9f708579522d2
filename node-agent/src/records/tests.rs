use super::*;
use rustls::crypto::cipher::{AeadKey, Iv};

/// Keys by number: both ends have the same.
struct Counted(u8, u8);

fn secrets(n: u8) -> (u64, ConnectionTrafficSecrets) {
    (0, ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([n; 32]), iv: Iv::new([n; NONCE_LEN]) })
}

impl Rekey for Counted {
    fn next_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.0 += 1;
        Ok(secrets(self.0))
    }
    fn next_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.1 += 1;
        Ok(secrets(self.1))
    }
}

/// One direction: who seals, and who opens. The other direction's keys have other numbers.
fn pair(early: Vec<Vec<u8>>, unread: &[u8]) -> (Sealer, Opener) {
    let near = Keys::new(Box::new(Counted(1, 101)));
    let far = Keys::new(Box::new(Counted(101, 1)));
    (Sealer::new(secrets(1), near).unwrap(), Opener::new(secrets(1), far, unread, early).unwrap())
}

fn feed(opener: &mut Opener, bytes: &[u8]) {
    opener.room()[..bytes.len()].copy_from_slice(bytes);
    opener.filled(bytes.len());
}

/// What is here, to the end of it.
fn all(opener: &mut Opener) -> Vec<Result<Vec<u8>, String>> {
    let mut all = Vec::new();
    loop {
        match opener.next_record() {
            Ok(Some(at)) => all.push(Ok(opener.bytes()[at].to_vec())),
            Ok(None) => return all,
            Err(error) => {
                all.push(Err(error.to_string()));
                return all;
            }
        }
    }
}

#[test]
fn records_come_out_as_they_went_in_however_they_are_cut() {
    let (mut sealer, mut opener) = pair(vec![], &[]);
    let long = vec![7; CONTENT_MAX];
    sealer.push(&[b"one", b" record"]).unwrap();
    sealer.push(&[&long]).unwrap();
    let sealed = sealer.take();
    assert_eq!(sealed.len(), 10 + CONTENT_MAX + 2 * (HEADER_BYTES + TRAILER_BYTES));
    let mut found = Vec::new();
    for piece in sealed.chunks(1000) {
        assert!(found.len() < 2);
        feed(&mut opener, piece);
        found.extend(all(&mut opener));
    }
    assert_eq!(found, [Ok(b"one record".to_vec()), Ok(long.clone())]);
    assert!(opener.is_empty());
    opener.rest();
    assert_eq!(opener.bytes().len(), 0, "an idle one holds no buffer");
    assert!(sealer.push(&[&long, b"x"]).is_err() && !sealer.is_pending());
    // The same twice is not the same.
    sealer.push(&[b"same"]).unwrap();
    let first = sealer.take();
    sealer.push(&[b"same"]).unwrap();
    assert_ne!(first, sealer.take());
}

#[test]
fn nothing_is_taken_behind_a_record_that_was_not() {
    let mut sealed = [vec![], vec![], vec![]];
    let (mut sealer, mut opener) = pair(vec![], &[]);
    for (record, says) in sealed.iter_mut().zip([b"first", b"other", b"third"]) {
        sealer.push(&[says]).unwrap();
        *record = sealer.take();
    }
    *sealed[1].last_mut().unwrap() ^= 1;
    feed(&mut opener, &sealed.concat());
    let forged = Err(RecordError::Forged.to_string());
    assert_eq!(all(&mut opener), [Ok(b"first".to_vec()), forged]);
    assert!(!opener.is_empty());
    for _ in 0..2 {
        assert!(matches!(opener.next_record(), Err(RecordError::Over)));
    }
    assert_eq!((opener.alert(), opener.alert()), (Some(alert::BAD_RECORD_MAC), None), "told once");
}

#[test]
fn what_is_no_record_at_this_place_is_refused() {
    for bytes in [
        [22, 3, 3, 0, 20],
        [APPLICATION_DATA, 3, 1, 0, 20],
        [APPLICATION_DATA, 3, 3, 0, TRAILER_BYTES as u8 - 1],
        [APPLICATION_DATA, 3, 3, 0x41, 1],
    ] {
        let (_, mut opener) = pair(vec![], &[]);
        feed(&mut opener, &bytes);
        assert!(matches!(opener.next_record(), Err(RecordError::Malformed(_))), "{bytes:?}");
        assert_eq!(opener.alert(), Some(alert::UNEXPECTED_MESSAGE));
    }
}

#[test]
fn padding_is_taken_off_and_padding_alone_is_refused() {
    let (mut sealer, mut opener) = pair(vec![], &[]);
    sealer.push_as(0, &[b"abc", &[APPLICATION_DATA, 0, 0]]).unwrap();
    sealer.push_as(0, &[&[0; 10]]).unwrap();
    feed(&mut opener, &sealer.take());
    let nothing = RecordError::Malformed("padding only").to_string();
    assert_eq!(all(&mut opener), [Ok(b"abc".to_vec()), Err(nothing)]);
}

#[test]
fn records_without_content_do_not_go_on_for_ever() {
    let (mut sealer, mut opener) = pair(vec![], &[]);
    for _ in 0..3 {
        (0..EMPTY_MAX).for_each(|_| sealer.push(&[]).unwrap());
        sealer.push(&[b"x"]).unwrap();
    }
    feed(&mut opener, &sealer.take());
    assert_eq!(all(&mut opener).iter().filter(|found| found.is_ok()).count(), 3 * (EMPTY_MAX as usize + 1));
    (0..=EMPTY_MAX).for_each(|_| sealer.push(&[]).unwrap());
    feed(&mut opener, &sealer.take());
    let found = all(&mut opener);
    assert!(found.last().unwrap().is_err() && found.len() == EMPTY_MAX as usize + 1, "{found:?}");
}

#[test]
fn keys_change_as_often_as_asked_but_not_without_content_between() {
    let (mut sealer, mut opener) = pair(vec![], &[]);
    for n in 0..20u8 {
        // As the opener of the same connection does that was asked to.
        sealer.keys.asked.store(true, Ordering::Relaxed);
        sealer.turn_key().unwrap();
        sealer.push(&[&[n]]).unwrap();
        feed(&mut opener, &sealer.take());
        assert_eq!(all(&mut opener), [Ok(vec![n])]);
    }
    // An empty record is no content.
    for n in 0..=UPDATES_MAX {
        sealer.keys.asked.store(true, Ordering::Relaxed);
        sealer.turn_key().unwrap();
        sealer.push(&[]).unwrap();
        feed(&mut opener, &sealer.take());
        assert_eq!(all(&mut opener)[0].is_err(), n == UPDATES_MAX, "update {n}");
    }
}

#[test]
fn a_request_for_a_new_key_reaches_who_seals() {
    let (mut sealer, mut opener) = pair(vec![], &[]);
    sealer.push_as(HANDSHAKE, &[&[KEY_UPDATE, 0, 0, 1, 1]]).unwrap();
    feed(&mut opener, &sealer.take());
    assert_eq!(all(&mut opener), []);
    assert!(opener.keys.asked.load(Ordering::Relaxed));
    for wrong in [&[KEY_UPDATE, 0, 0, 1, 2][..], &[KEY_UPDATE, 0, 0, 2, 0, 0], &[KEY_UPDATE, 0, 0], &[1, 0, 0, 0], &[]]
    {
        let (mut sealer, mut opener) = pair(vec![], &[]);
        sealer.push_as(HANDSHAKE, &[wrong]).unwrap();
        feed(&mut opener, &sealer.take());
        assert!(all(&mut opener)[0].is_err(), "{wrong:?}");
    }
}

#[test]
fn what_the_handshake_left_comes_first() {
    let (mut sealer, _) = pair(vec![], &[]);
    sealer.push(&[b"third"]).unwrap();
    let sealed = sealer.take();
    let (cut, rest) = sealed.split_at(9);
    let (_, mut opener) = pair(vec![b"first".to_vec(), b"second".to_vec()], cut);
    assert!(!opener.is_empty());
    assert_eq!(all(&mut opener), [Ok(b"first".to_vec()), Ok(b"second".to_vec())]);
    feed(&mut opener, rest);
    assert_eq!(all(&mut opener), [Ok(b"third".to_vec())]);
}

#[test]
fn what_follows_close_notify_is_nobodys() {
    let (mut sealer, mut opener) = pair(vec![], &[]);
    sealer.push_as(ALERT, &[&[1, alert::USER_CANCELED]]).unwrap();
    sealer.push(&[b"last"]).unwrap();
    sealer.alert(alert::CLOSE_NOTIFY).unwrap();
    sealer.push(&[b"whose?"]).unwrap();
    feed(&mut opener, &sealer.take());
    let closed = Err(RecordError::Alert(alert::CLOSE_NOTIFY).to_string());
    assert_eq!(all(&mut opener), [Ok(b"last".to_vec()), closed.clone()]);
    assert_eq!(all(&mut opener), [closed]);
    assert!(opener.alert().is_none() && !opener.is_empty());
    let (mut sealer, mut opener) = pair(vec![], &[]);
    sealer.alert(alert::ACCESS_DENIED).unwrap();
    feed(&mut opener, &sealer.take());
    assert!(matches!(opener.next_record(), Err(RecordError::Alert(alert::ACCESS_DENIED))));
    assert!(opener.alert().is_none(), "an alert is not answered by one");
}
