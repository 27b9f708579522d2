//! The TPM gate: lets many clients take turns at an swtpm, which serves one connection at a time.
//!
//! It stands where `/dev/tpmrm0` would: one command at a time goes through, whoever sent it. It keeps no objects apart
//! (libtss2's swtpm TCTI opens a connection per command, so a connection is no context). The control port answers
//! what the TCTI asks and nothing else, so that no client can reset the TPM.

use crate::tpm_wire::read_message;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Port of the gate; the TCTI takes the next one as its control port.
pub const PORT: u16 = 2321;
/// Port of the swtpm behind it.
pub const SWTPM_PORT: u16 = 2331;
/// Clients at once, waiting ones included; further ones are closed at once.
const CLIENTS_MAX: usize = 64;
/// A client that sends nothing for this long is closed.
const CLIENT_IDLE: Duration = Duration::from_secs(60);
/// The longest command: creating an RSA key takes seconds.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// Control command that sets the locality; user space has locality 0 and no other.
const CMD_SET_LOCALITY: u32 = 5;
/// What a refused control command is answered: TPM_FAIL.
const CONTROL_REFUSED: [u8; 4] = [0, 0, 0, 9];

/// Serves for ever on `address` and the port above it; ends only with an error.
pub fn serve(address: SocketAddrV4, swtpm: SocketAddrV4) -> std::io::Result<()> {
    let commands = TcpListener::bind(address)?;
    let control = TcpListener::bind((*address.ip(), address.port() + 1))?;
    let clients = Arc::new(AtomicUsize::new(0));
    // Held from sending a command to having its response: the turn.
    let turn = Arc::new(Mutex::new(()));
    let control_clients = Arc::clone(&clients);
    std::thread::spawn(move || accept(&control, &control_clients, |mut client| drop(answer_control(&mut client))));
    accept(&commands, &clients, move |mut client| drop(forward(&mut client, swtpm, &turn)));
    Ok(())
}

/// The gate's usual addresses, inside a member's namespace.
pub fn loopback(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

fn accept<F>(listener: &TcpListener, clients: &Arc<AtomicUsize>, serve: F)
where
    F: Fn(TcpStream) + Clone + Send + 'static,
{
    for client in listener.incoming() {
        let Ok(client) = client else {
            // Out of descriptors: pause, so that those in use can be closed.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
            clients.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (serve, clients) = (serve.clone(), Arc::clone(clients));
        std::thread::spawn(move || {
            serve(client);
            clients.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

fn forward(client: &mut TcpStream, swtpm: SocketAddrV4, turn: &Mutex<()>) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    client.set_read_timeout(Some(CLIENT_IDLE))?;
    client.set_write_timeout(Some(CLIENT_IDLE))?;
    loop {
        let command = read_message(client)?;
        let response = {
            // The lock guards no value: a holder that panicked left nothing half-made.
            let _turn = turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            exchange(swtpm, &command)?
        };
        client.write_all(&response)?;
    }
}

fn exchange(swtpm: SocketAddrV4, command: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut tpm = TcpStream::connect_timeout(&swtpm.into(), COMMAND_MAX)?;
    tpm.set_nodelay(true)?;
    tpm.set_read_timeout(Some(COMMAND_MAX))?;
    tpm.write_all(command)?;
    read_message(&mut tpm)
}

fn answer_control(client: &mut TcpStream) -> std::io::Result<()> {
    client.set_read_timeout(Some(CLIENT_IDLE))?;
    let mut command = [0; 5];
    client.read_exact(&mut command)?;
    let [a, b, c, d, locality] = command;
    let fits = u32::from_be_bytes([a, b, c, d]) == CMD_SET_LOCALITY && locality == 0;
    client.write_all(if fits { &[0; 4] } else { &CONTROL_REFUSED })
}
