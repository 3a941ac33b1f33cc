//! Which controller an RPC means: its transport and address.

use serde_json::{Map, Value};

/// The limits of SPDK's fields, in bytes.
const TRADDR_MAX: usize = 256;
const TRSVCID_MAX: usize = 32;
const NQN_MAX: usize = 223;

/// The transports that the kernel's driver is used with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Pcie,
    Tcp,
}

/// A path to a controller, as SPDK's transport id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) transport: Transport,
    /// SPDK's name of the address family, for TCP.
    pub(crate) family: Option<&'static str>,
    /// A PCI address such as `0000:04:00.0`, or an IP address.
    pub(crate) address: String,
    /// The TCP port.
    pub(crate) service: String,
    /// The subsystem's NQN.
    pub(crate) subnqn: String,
}

/// What a client says of a target.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Given<'a> {
    pub(crate) trtype: &'a str,
    pub(crate) adrfam: Option<&'a str>,
    pub(crate) traddr: &'a str,
    pub(crate) trsvcid: Option<&'a str>,
    pub(crate) subnqn: Option<&'a str>,
}

impl Transport {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let all = [("pcie", Self::Pcie), ("tcp", Self::Tcp)];
        all.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, this)| this)
    }

    /// SPDK's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pcie => "PCIe",
            Self::Tcp => "TCP",
        }
    }
}

impl Target {
    /// Checks what a client says of a target.
    ///
    /// # Errors
    /// SPDK's text.
    pub(crate) fn parse(given: Given<'_>) -> Result<Self, String> {
        let Given { trtype, adrfam, traddr, trsvcid, subnqn } = given;
        let transport =
            Transport::parse(trtype).ok_or_else(|| format!("Failed to parse trtype: {trtype}"))?;
        checked("traddr", traddr, TRADDR_MAX)?;
        let family = adrfam
            .map(|text| family(text).ok_or_else(|| format!("Failed to parse adrfam: {text}")));
        let family = family.transpose()?;
        let service = checked("trsvcid", trsvcid.unwrap_or_default(), TRSVCID_MAX)?;
        let subnqn = checked("subnqn", subnqn.unwrap_or_default(), NQN_MAX)?;
        let address = match transport {
            Transport::Pcie => pci_address(traddr).unwrap_or_else(|| traddr.to_owned()),
            Transport::Tcp => traddr.to_owned(),
        };
        let family = match transport {
            Transport::Pcie => None,
            Transport::Tcp => Some(family.unwrap_or("IPv4")),
        };
        Ok(Self { transport, family, address, service: service.into(), subnqn: subnqn.into() })
    }

    /// Returns what two targets have in common if the kernel has one controller for them.
    pub(crate) fn place(&self) -> [String; 4] {
        let subnqn = if self.transport == Transport::Pcie { "" } else { &self.subnqn };
        [self.transport.name(), &self.address, &self.service, subnqn].map(str::to_owned)
    }

    /// SPDK's object `trid`.
    pub(crate) fn show(&self) -> Value {
        let mut shown = Map::from_iter([("trtype".to_owned(), self.transport.name().into())]);
        let texts = [
            ("adrfam", self.family.unwrap_or_default()),
            ("traddr", &self.address),
            ("trsvcid", &self.service),
            ("subnqn", &self.subnqn),
        ];
        let given = texts.into_iter().filter(|(_, text)| !text.is_empty());
        shown.extend(given.map(|(name, text)| (name.to_owned(), text.into())));
        shown.into()
    }
}

/// Checks the length of a field, and that it has no character that ends an option of
/// `/dev/nvme-fabrics`.
///
/// # Errors
/// SPDK's text for a field that is too long.
pub(crate) fn checked<'a>(name: &str, text: &'a str, max: usize) -> Result<&'a str, String> {
    if text.len() > max {
        return Err(format!("{name} too long: {text}"));
    }
    match text.bytes().any(|byte| byte == b',' || byte.is_ascii_control()) {
        true => Err(format!("Invalid {name}: {}", text.escape_debug())),
        false => Ok(text),
    }
}

/// The same for an NQN.
pub(crate) fn checked_nqn<'a>(name: &str, text: &'a str) -> Result<&'a str, String> {
    checked(name, text, NQN_MAX)
}

/// The same for an address.
pub(crate) fn checked_address<'a>(name: &str, text: &'a str) -> Result<&'a str, String> {
    checked(name, text, TRADDR_MAX)
}

/// SPDK's name of an address family.
fn family(text: &str) -> Option<&'static str> {
    ["IPv4", "IPv6", "IB", "FC"].into_iter().find(|name| name.eq_ignore_ascii_case(text))
}

/// Returns a PCI address in the kernel's form, from one in that form, without the domain, or with
/// dots.
fn pci_address(text: &str) -> Option<String> {
    let numbers: Vec<u32> = text
        .split([':', '.'])
        .map(|part| u32::from_str_radix(part, 16))
        .collect::<Result<_, _>>()
        .ok()?;
    let (domain, bus, device, function) = match numbers[..] {
        [bus, device, function] => (0, bus, device, function),
        [domain, bus, device, function] => (domain, bus, device, function),
        _ => return None,
    };
    let fits = bus <= 0xff && device <= 0x1f && function <= 7;
    fits.then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pcie(traddr: &str) -> Given<'_> {
        Given { trtype: "PCIe", traddr, ..Given::default() }
    }

    #[test]
    fn pci_addresses_have_one_form() {
        for text in ["0000:04:00.0", "04:00.0", "0000.04.00.0", "0:4:0.0"] {
            assert_eq!(Target::parse(pcie(text)).unwrap().address, "0000:04:00.0");
        }
        assert_eq!(pci_address("04:20.0"), None);
        assert_eq!(pci_address("04:00"), None);
        assert_eq!(pci_address("../../x"), None);
    }

    #[test]
    fn a_transport_id_is_shown_as_spdk_does() {
        assert_eq!(
            Target::parse(pcie("04:00.0")).unwrap().show(),
            json!({"trtype": "PCIe", "traddr": "0000:04:00.0"})
        );
        let tcp = Given {
            trtype: "tcp",
            adrfam: Some("ipv4"),
            traddr: "10.0.0.1",
            trsvcid: Some("4420"),
            subnqn: Some("nqn.x"),
        };
        assert_eq!(
            Target::parse(tcp).unwrap().show(),
            json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "10.0.0.1", "trsvcid": "4420",
                "subnqn": "nqn.x"})
        );
    }

    #[test]
    fn invalid_fields_have_spdks_texts() {
        let text = |given| Target::parse(given).unwrap_err();
        let x = Given { trtype: "x", ..Given::default() };
        assert_eq!(text(x), "Failed to parse trtype: x");
        assert_eq!(text(Given { adrfam: Some("y"), ..pcie("") }), "Failed to parse adrfam: y");
        let long = "7".repeat(33);
        let trsvcid = Given { trsvcid: Some(&long), ..pcie("") };
        assert_eq!(text(trsvcid), format!("trsvcid too long: {long}"));
        let injected = Given { subnqn: Some("nqn,hostid=1"), ..pcie("") };
        assert_eq!(text(injected), "Invalid subnqn: nqn,hostid=1");
    }
}
