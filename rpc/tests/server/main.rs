//! The server over real sockets: framing, clients, files.

mod clients;
mod fixture;
mod framing;
mod socket;
mod yields;
