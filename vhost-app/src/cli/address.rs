//! The value of `--metrics`.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// The address of the HTTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
            Self::Unix(path) => write!(f, "{} (HTTP on a Unix socket)", path.display()),
        }
    }
}

/// Neither an address, nor a port, nor an absolute path.
#[derive(Debug, thiserror::Error)]
#[error(
    "expected PORT, ADDRESS:PORT with a numeric address, or the absolute path of a Unix socket"
)]
pub(crate) struct NoAddress;

impl FromStr for Address {
    type Err = NoAddress;

    /// A port alone is one of the loopback address.
    fn from_str(text: &str) -> Result<Self, NoAddress> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        let port = text.strip_prefix(':').unwrap_or(text);
        if let Ok(port) = port.parse() {
            return Ok(Self::Tcp((Ipv4Addr::LOCALHOST, port).into()));
        }
        text.parse().map(Self::Tcp).map_err(|_| NoAddress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_loopback_unless_they_say_otherwise() {
        let tcp = |text: &str| Address::Tcp(text.parse().unwrap());
        for (text, address) in [
            ("9100", tcp("127.0.0.1:9100")),
            (":9100", tcp("127.0.0.1:9100")),
            ("0.0.0.0:1", tcp("0.0.0.0:1")),
            ("[::1]:9100", tcp("[::1]:9100")),
            ("/run/m.sock", Address::Unix("/run/m.sock".into())),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address);
        }
        for bad in ["", "host:9100", "1.2.3.4", "65536", "run/m.sock", "::1:x"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
