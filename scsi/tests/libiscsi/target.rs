//! An iSCSI target (RFC 7143) with one logical unit, as much of it as libiscsi uses: no digests, no
//! authentication, error recovery level 0, and immediate data for everything.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use scsi::sense::SENSE_BYTES_MAX;
use scsi::{Facts, Nexus, Port, Status};

use crate::disk::{Answer, Disk};

/// Commands that an initiator may send ahead.
const COMMANDS_AHEAD: u32 = 64;
/// The longest data segment that is taken: all data-out is immediate.
const SEGMENT_BYTES_MAX: u32 = (1 << 24) - 512;
/// The longest data segment that is sent: what libiscsi takes.
const DATA_IN_BYTES: usize = 256 << 10;

/// The answers to negotiated keys of a login.
const KEYS: [(&str, &str); 15] = [
    ("AuthMethod", "None"),
    ("HeaderDigest", "None"),
    ("DataDigest", "None"),
    ("MaxConnections", "1"),
    ("InitialR2T", "Yes"),
    ("ImmediateData", "Yes"),
    ("MaxBurstLength", "16776704"),
    ("FirstBurstLength", "16776704"),
    ("DefaultTime2Wait", "2"),
    ("DefaultTime2Retain", "0"),
    ("MaxOutstandingR2T", "1"),
    ("DataPDUInOrder", "Yes"),
    ("DataSequenceInOrder", "Yes"),
    ("ErrorRecoveryLevel", "0"),
    ("IFMarker", "No"),
];

/// A target that serves its disk until it is dropped.
pub(crate) struct Target {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What all sessions share.
struct Shared {
    disk: Mutex<Disk>,
    /// The initiator ports and targets that have been seen: the place of one is its nexus.
    nexuses: Mutex<Vec<(String, Vec<u8>)>>,
}

impl Target {
    pub(crate) fn new(facts: Facts) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let shared = Shared { disk: Mutex::new(Disk::new(facts)), nexuses: Mutex::default() };
        let shared = Arc::new(shared);
        let thread = thread::spawn(move || {
            let mut sessions = Vec::new();
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                let stream = stream.expect("a connection");
                let shared = Arc::clone(&shared);
                sessions.push(thread::spawn(move || Session::new(stream, shared).serve()));
            }
            sessions.into_iter().for_each(|session| session.join().expect("no panic"));
        });
        Self { address, stop, thread: Some(thread) }
    }

    /// The URL of the logical unit by target `number`.
    pub(crate) fn url(&self, number: u8) -> String {
        format!("iscsi://{}/iqn.2026-01.target:{number}/0", self.address)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || thread::panicking(), "the target panicked");
    }
}

/// A protocol data unit.
struct Pdu {
    header: [u8; 48],
    data: Vec<u8>,
}

impl Pdu {
    /// A unit to send: the operation code and the flags.
    fn new(code: u8, flags: u8) -> Self {
        let mut header = [0; 48];
        (header[0], header[1]) = (code, flags);
        Self { header, data: Vec::new() }
    }

    /// `None` at the end of the connection.
    fn read(stream: &mut TcpStream) -> io::Result<Option<Self>> {
        let mut header = [0; 48];
        match stream.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            result => result?,
        }
        assert_eq!(header[4], 0, "an additional header segment");
        let length = u32::from_be_bytes([0, header[5], header[6], header[7]]);
        let mut data = vec![0; usize::try_from(length.next_multiple_of(4)).expect("24 bits")];
        stream.read_exact(&mut data)?;
        data.truncate(usize::try_from(length).expect("24 bits"));
        Ok(Some(Self { header, data }))
    }

    fn write(mut self, stream: &mut TcpStream) -> io::Result<()> {
        let length = u32::try_from(self.data.len()).expect("a short segment").to_be_bytes();
        self.header[5..8].copy_from_slice(&length[1..]);
        self.data.resize(self.data.len().next_multiple_of(4), 0);
        stream.write_all(&[&self.header[..], &self.data].concat())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.header[at..at + 4].try_into().expect("4 bytes"))
    }

    fn set(&mut self, at: usize, value: u32) {
        self.header[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
}

/// A session of one connection.
struct Session {
    stream: TcpStream,
    shared: Arc<Shared>,
    stat_sn: u32,
    exp_cmd_sn: u32,
    keys: Vec<(String, String)>,
    nexus: Option<Nexus>,
    port: Port,
}

impl Session {
    fn new(stream: TcpStream, shared: Arc<Shared>) -> Self {
        stream.set_nodelay(true).expect("a socket");
        Self {
            stream,
            shared,
            stat_sn: 0,
            exp_cmd_sn: 0,
            keys: Vec::new(),
            nexus: None,
            port: Port { target: 0, relative: 0, group: 0 },
        }
    }

    fn serve(mut self) {
        while let Ok(Some(pdu)) = Pdu::read(&mut self.stream) {
            if pdu.header[0] & 0x40 == 0 {
                self.exp_cmd_sn = pdu.u32(24).wrapping_add(1);
            }
            let served = match pdu.header[0] & 0x3f {
                0x00 => self.reply(&pdu, Pdu::new(0x20, 0x80)),
                0x01 => self.command(&pdu),
                0x02 => self.task_management(&pdu),
                0x03 => self.login(&pdu),
                0x06 => self.reply(&pdu, Pdu::new(0x26, 0x80)),
                code => panic!("operation code {code:#x}"),
            };
            if served.is_err() {
                break;
            }
        }
        if let Some(nexus) = self.nexus {
            self.shared.disk.lock().expect("no panic").nexus_lost(nexus);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Sends the answer to a unit, with its initiator task tag and the sequence numbers.
    fn reply(&mut self, to: &Pdu, mut pdu: Pdu) -> io::Result<()> {
        pdu.set(16, to.u32(16));
        if pdu.header[0] == 0x20 {
            pdu.set(20, u32::MAX);
        }
        pdu.set(24, self.stat_sn);
        self.stat_sn = self.stat_sn.wrapping_add(1);
        pdu.set(28, self.exp_cmd_sn);
        pdu.set(32, self.exp_cmd_sn.wrapping_add(COMMANDS_AHEAD));
        pdu.write(&mut self.stream)
    }

    fn login(&mut self, request: &Pdu) -> io::Result<()> {
        self.exp_cmd_sn = request.u32(24);
        let text = String::from_utf8_lossy(&request.data);
        let mut answers = String::new();
        for (key, value) in text.split('\0').filter_map(|pair| pair.split_once('=')) {
            self.keys.push((key.to_owned(), value.to_owned()));
            if let Some((_, answer)) = KEYS.iter().find(|(known, _)| *known == key) {
                answers += &format!("{key}={answer}\0");
            }
            if key == "MaxRecvDataSegmentLength" {
                answers += &format!("{key}={SEGMENT_BYTES_MAX}\0TargetPortalGroupTag=1\0");
            }
        }
        let mut response = Pdu::new(0x23, request.header[1]);
        response.header[8..16].copy_from_slice(&request.header[8..16]);
        response.data = answers.into_bytes();
        // To the full feature phase.
        if request.header[1] & 0x83 == 0x83 {
            response.header[15] = 1;
            self.attach(&request.header[8..14]);
        }
        self.reply(request, response)
    }

    fn attach(&mut self, isid: &[u8]) {
        let key = |name: &str| {
            self.keys.iter().find(|(key, _)| key == name).expect("a key of the login").1.clone()
        };
        let target = key("TargetName");
        self.port.target = target.rsplit(':').next().expect("a part").parse().expect("a number");
        let name = (key("InitiatorName") + &target, isid.to_vec());
        let mut nexuses = self.shared.nexuses.lock().expect("no panic");
        let place = nexuses.iter().position(|known| *known == name).unwrap_or_else(|| {
            nexuses.push(name);
            nexuses.len() - 1
        });
        let nexus = Nexus(place as u64);
        self.shared.disk.lock().expect("no panic").attach(nexus);
        self.nexus = Some(nexus);
    }

    fn command(&mut self, request: &Pdu) -> io::Result<()> {
        let nexus = self.nexus.expect("after the login");
        let expected = request.u32(20);
        let (reads, writes) = (request.header[1] & 0x40 != 0, request.header[1] & 0x20 != 0);
        assert!(!writes || request.data.len() as u64 == u64::from(expected), "data follows");
        let data_in_bytes = if reads { u64::from(expected) } else { 0 };
        let cdb = &request.header[32..48];
        let answer = {
            let mut disk = self.shared.disk.lock().expect("no panic");
            disk.command(nexus, self.port, cdb, &request.data, data_in_bytes)
        };
        let mut offset = 0;
        for (number, part) in (0..).zip(answer.data_in.chunks(DATA_IN_BYTES)) {
            let mut pdu = Pdu::new(0x25, 0);
            pdu.set(16, request.u32(16));
            pdu.set(20, u32::MAX);
            pdu.set(28, self.exp_cmd_sn);
            pdu.set(32, self.exp_cmd_sn.wrapping_add(COMMANDS_AHEAD));
            pdu.set(36, number);
            pdu.set(40, u32::try_from(offset).expect("32 bits"));
            offset += part.len();
            pdu.header[1] = if offset == answer.data_in.len() { 0x80 } else { 0 };
            pdu.data = part.to_vec();
            pdu.write(&mut self.stream)?;
        }
        self.reply(request, response(&answer))
    }

    fn task_management(&mut self, request: &Pdu) -> io::Result<()> {
        // LOGICAL UNIT RESET and both TARGET RESETs; the others have no task.
        if (5..=7).contains(&(request.header[1] & 0x7f)) {
            self.shared.disk.lock().expect("no panic").reset();
        }
        self.reply(request, Pdu::new(0x22, 0x80))
    }
}

/// The response to a command: status, residual and sense data.
fn response(answer: &Answer) -> Pdu {
    let residual = answer.transferred.residual;
    let mut response = Pdu::new(0x21, if residual > 0 { 0x82 } else { 0x80 });
    response.header[3] = answer.status as u8;
    response.set(44, residual);
    if let (Status::CheckCondition, Some(sense)) = (answer.status, answer.sense) {
        let mut bytes = [0; SENSE_BYTES_MAX];
        let length = sense.encode(answer.format, &mut bytes);
        let counted = u16::try_from(length).expect("short sense data").to_be_bytes();
        response.data = [&counted[..], &bytes[..length]].concat();
    }
    response
}
