//! A TPM that misbehaves: stands in front of a real one and passes its commands on, or does not.

use super::two_free_ports;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

/// TPM2_ST_NO_SESSIONS, ten bytes in all, and the response code.
fn refusal(code: u32) -> Vec<u8> {
    [&[0x80, 0x01, 0, 0, 0, 10][..], &code.to_be_bytes()].concat()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Passes commands on.
    Good,
    /// Holds each command back until the mood changes.
    Silent,
    /// Holds each command of this kind (TPM_CC) back until the mood changes.
    Holds(u32),
    /// Closes each connection with a command on it.
    Hangup,
    /// Answers so many commands with this code before it is good again. Counted down.
    Refuses(u32, u32),
    /// Answers every command of this kind (TPM_CC) with the code, and passes on all others.
    RefusesAll(u32, u32),
}

struct State {
    mood: Mood,
    /// Command codes in the order in which they came.
    seen: Vec<u32>,
    waiting: usize,
}

#[derive(Clone)]
pub(crate) struct Proxy {
    port: u16,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Proxy {
    /// Serves until the test's process ends.
    pub(crate) fn before(tpm: u16) -> Proxy {
        let port = two_free_ports();
        let state = Arc::new((Mutex::new(State { mood: Mood::Good, seen: Vec::new(), waiting: 0 }), Condvar::new()));
        let proxy = Proxy { port, state };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let control = TcpListener::bind((Ipv4Addr::LOCALHOST, port + 1)).unwrap();
        let serving = proxy.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let serving = serving.clone();
                std::thread::spawn(move || serving.serve(client, tpm));
            }
        });
        // Control commands (the TCTI sets the locality) all succeed.
        std::thread::spawn(move || {
            for mut client in control.incoming().flatten() {
                std::thread::spawn(move || {
                    while client.read(&mut [0; 64]).is_ok_and(|n| n > 0) && client.write_all(&[0; 4]).is_ok() {}
                });
            }
        });
        proxy
    }

    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    pub(crate) fn set(&self, mood: Mood) {
        self.state.0.lock().unwrap().mood = mood;
        self.state.1.notify_all();
    }

    /// How many commands wait in silence.
    pub(crate) fn waiting(&self) -> usize {
        self.state.0.lock().unwrap().waiting
    }

    /// The command codes since the last time.
    pub(crate) fn take_seen(&self) -> Vec<u32> {
        std::mem::take(&mut self.state.0.lock().unwrap().seen)
    }

    fn serve(&self, mut client: TcpStream, tpm: u16) {
        while let Some(command) = message(&mut client) {
            let code = u32::from_be_bytes(command[6..10].try_into().unwrap());
            match self.decide(code) {
                Some(answer) if answer.is_empty() => break,
                Some(answer) => client.write_all(&answer).unwrap_or_default(),
                None => {
                    let Ok(mut tpm) = TcpStream::connect((Ipv4Addr::LOCALHOST, tpm)) else { break };
                    tpm.write_all(&command).unwrap();
                    let Some(answer) = message(&mut tpm) else { break };
                    // The client may have given up: its TPM does not know.
                    client.write_all(&answer).unwrap_or_default();
                }
            }
        }
        client.shutdown(Shutdown::Both).unwrap_or_default();
    }

    /// What to answer to a command; none where the TPM shall.
    fn decide(&self, code: u32) -> Option<Vec<u8>> {
        let mut state = self.state.0.lock().unwrap();
        state.seen.push(code);
        state.waiting += 1;
        while state.mood == Mood::Silent || state.mood == Mood::Holds(code) {
            state = self.state.1.wait(state).unwrap();
        }
        state.waiting -= 1;
        match state.mood {
            Mood::Good | Mood::Silent | Mood::Holds(_) => None,
            Mood::Hangup => Some(Vec::new()),
            Mood::Refuses(with, 1) => {
                state.mood = Mood::Good;
                Some(refusal(with))
            }
            Mood::Refuses(with, left) => {
                state.mood = Mood::Refuses(with, left - 1);
                Some(refusal(with))
            }
            Mood::RefusesAll(kind, with) => (kind == code).then(|| refusal(with)),
        }
    }
}

/// A whole command or response: tag, size of all, the rest.
fn message(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = [0; 10];
    stream.read_exact(&mut head).ok()?;
    let size = u32::from_be_bytes(head[2..6].try_into().unwrap()) as usize;
    let mut whole = head.to_vec();
    whole.resize(size, 0);
    stream.read_exact(&mut whole[10..]).ok()?;
    Some(whole)
}
