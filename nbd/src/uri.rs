//! The address of an export: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, as the
//! NBD project defines them.

use std::fmt;
use std::path::PathBuf;

use bdev::Error;
use percent_encoding::percent_decode_str;
use url::{Host, Url};

use crate::protocol::{PORT, STRING_MAX};

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    text: String,
    pub(crate) address: Address,
    /// The export's name; empty for the server's default export.
    pub(crate) export: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A host name or an IP address, and a port.
    Tcp(String, u16),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl NbdUri {
    /// Parses an address.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the reason, also for a form that is not supported, such as TLS.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let invalid = |reason: &str| Error::Invalid(format!("invalid NBD URI {text:?}: {reason}"));
        let url = Url::parse(text).map_err(|e| invalid(&e.to_string()))?;
        let address = match url.scheme() {
            "nbd" => tcp(&url),
            "nbd+unix" => unix(&url),
            "nbds" | "nbds+unix" => Err("TLS is not supported"),
            _ => Err("expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"),
        };
        let address = address.map_err(invalid)?;
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err(invalid("user names, passwords and fragments are not supported"));
        }
        let path = url.path().strip_prefix('/').unwrap_or(url.path());
        let export = percent_decode_str(path).decode_utf8();
        let export = export.map_err(|_| invalid("the export's name is not UTF-8"))?;
        if export.len() > STRING_MAX || export.contains('\0') {
            return Err(invalid("the export's name is too long or contains a zero byte"));
        }
        Ok(Self { text: text.to_owned(), address, export: export.into_owned() })
    }

    /// Whether connecting needs a network.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self.address, Address::Tcp(..))
    }
}

fn tcp(url: &Url) -> Result<Address, &'static str> {
    if url.query().is_some() {
        return Err("parameters are not supported with nbd://");
    }
    let host = match url.host() {
        Some(Host::Domain(name)) => {
            let name = percent_decode_str(name).decode_utf8();
            name.map_err(|_| "the host name is not UTF-8")?.into_owned()
        }
        Some(Host::Ipv4(address)) => address.to_string(),
        Some(Host::Ipv6(address)) => address.to_string(),
        None => return Err("the host is missing"),
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    Ok(Address::Tcp(host, url.port().unwrap_or(PORT)))
}

fn unix(url: &Url) -> Result<Address, &'static str> {
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err("a host is not supported with nbd+unix://; expected three slashes");
    }
    let mut socket = None;
    for (key, value) in url.query_pairs() {
        match &*key {
            "socket" if socket.is_none() => socket = Some(PathBuf::from(value.into_owned())),
            _ => return Err("expected one parameter, socket"),
        }
    }
    match socket {
        Some(socket) if socket.is_absolute() => Ok(Address::Unix(socket)),
        Some(_) => Err("the socket's path is not absolute"),
        None => Err("the parameter socket is missing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_parsed() {
        let tcp = |host: &str, port| Address::Tcp(host.into(), port);
        let unix = |path: &str| Address::Unix(path.into());
        for (text, address, export) in [
            ("nbd://localhost", tcp("localhost", 10809), ""),
            ("nbd://10.0.0.1:123/disk", tcp("10.0.0.1", 123), "disk"),
            ("nbd://[::1]/a/b%20c", tcp("::1", 10809), "a/b c"),
            ("nbd+unix:///?socket=/run/nbd.sock", unix("/run/nbd.sock"), ""),
            ("nbd+unix:///%C3%A4?socket=/run/a%20b", unix("/run/a b"), "ä"),
            ("nbd+unix:////x?socket=/s", unix("/s"), "/x"),
        ] {
            let uri = NbdUri::parse(text).unwrap();
            assert_eq!((&uri.address, &*uri.export), (&address, export), "{text}");
            assert_eq!(uri.to_string(), text);
            assert_eq!(uri.needs_network(), matches!(address, Address::Tcp(..)));
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "disk",
            "nbd:localhost:10809",
            "nbd://",
            "nbd:///disk",
            "nbd://host:70000/disk",
            "nbd://user@host/disk",
            "nbd://host/disk?socket=/x",
            "nbd://host/disk#1",
            "nbd://host/%ff",
            "nbd://host/%00",
            "nbds://host/disk",
            "nbds+unix:///?socket=/x",
            "nbd+unix:///disk",
            "nbd+unix:///disk?socket=x",
            "nbd+unix:///disk?socket=/x&socket=/y",
            "nbd+unix:///disk?socket=/x&tls=1",
            "nbd+unix://host/disk?socket=/x",
            "http://host/disk",
        ] {
            let e = NbdUri::parse(text).unwrap_err();
            assert_eq!(e.errno(), libc::EINVAL, "{text}");
        }
        let long = format!("nbd://host/{}", "x".repeat(4097));
        assert!(NbdUri::parse(&long).is_err());
    }
}
