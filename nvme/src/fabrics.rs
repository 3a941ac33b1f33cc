//! Connections over TCP, which the kernel makes and keeps: `/dev/nvme-fabrics`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bdev::{Access, Error, OpenFile};
use uuid::Uuid;

use crate::sysfs::{Controller, Namespace, Sysfs};
use crate::target::Target;
use crate::users::user_of;

const FABRICS: &str = "/dev/nvme-fabrics";

/// The longest answer of the device.
const ANSWER_MAX: usize = 4096;

/// How long the namespaces of a new connection may take to appear.
const SCAN_LIMIT: Duration = Duration::from_secs(5);
/// The pause between two looks, and how many equal ones count as the end of the scan.
const SCAN_PAUSE: Duration = Duration::from_millis(50);
const SCAN_EQUAL: u32 = 4;

/// Namespace of the host ids that are derived from host NQNs.
const HOST_IDS: Uuid = Uuid::from_u128(0x5e0a_7c3b_91d4_4f0e_8a52_6d1c_b7f3_2e90);

/// The options of a connection, with SPDK's meanings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) hostnqn: Option<String>,
    /// The address to connect from.
    pub(crate) hostaddr: Option<String>,
    pub(crate) queues: Option<u32>,
    pub(crate) header_digest: bool,
    pub(crate) data_digest: bool,
    pub(crate) no_flow_control: bool,
    pub(crate) timeouts: Timeouts,
    pub(crate) keep_alive_ms: Option<u64>,
}

/// What happens to a controller whose target is away, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// It is removed after this time; -1: never; 0: the kernel's default.
    pub(crate) loss: i64,
    /// The time between attempts to reconnect.
    pub(crate) reconnect: u64,
    /// I/O fails after this time; 0: when the controller is removed.
    pub(crate) fast_fail: u64,
}

impl Timeouts {
    /// Returns whether SPDK accepts them together.
    pub(crate) fn fit(self) -> bool {
        let Self { loss, reconnect, fast_fail } = self;
        let within = |limit: u64| fast_fail == 0 || (reconnect..=limit).contains(&fast_fail);
        match u64::try_from(loss) {
            Ok(0) => reconnect == 0 && fast_fail == 0,
            Ok(loss) => (1..=loss).contains(&reconnect) && within(loss),
            Err(_) => loss == -1 && reconnect > 0 && within(u64::MAX),
        }
    }
}

/// Returns what is written to the device for a connection.
fn option_text(target: &Target, options: &Options) -> String {
    let mut text = format!(
        "transport=tcp,traddr={},trsvcid={},nqn={}",
        target.address, target.service, target.subnqn
    );
    let mut add = |name: &str, value: String| text.push_str(&format!(",{name}={value}"));
    if let Some(nqn) = &options.hostnqn {
        // The kernel refuses a host id that it knows with another NQN.
        let given = nqn.rsplit_once(":uuid:").and_then(|(_, id)| Uuid::try_parse(id).ok());
        let id = given.unwrap_or_else(|| Uuid::new_v5(&HOST_IDS, nqn.as_bytes()));
        add("hostnqn", nqn.clone());
        add("hostid", id.to_string());
    }
    if let Some(address) = &options.hostaddr {
        add("host_traddr", address.clone());
    }
    if let Some(queues) = options.queues {
        add("nr_io_queues", queues.to_string());
    }
    let Timeouts { loss, reconnect, fast_fail } = options.timeouts;
    if loss != 0 {
        add("ctrl_loss_tmo", loss.to_string());
        add("reconnect_delay", reconnect.to_string());
    }
    if fast_fail != 0 {
        add("fast_io_fail_tmo", fast_fail.to_string());
    }
    if let Some(ms) = options.keep_alive_ms.filter(|ms| *ms > 0) {
        add("keep_alive_tmo", ms.div_ceil(1000).to_string());
    }
    for (wanted, name) in [
        (options.header_digest, "hdr_digest"),
        (options.data_digest, "data_digest"),
        (options.no_flow_control, "disable_sqflow"),
    ] {
        if wanted {
            text.push(',');
            text.push_str(name);
        }
    }
    text
}

/// Returns the controller's name from the device's answer, `instance=1,cntlid=1`.
fn instance(answer: &str) -> Option<String> {
    let mut options = answer.trim().split(',');
    let number = options.find_map(|option| option.strip_prefix("instance="))?;
    Some(format!("nvme{}", number.parse::<u32>().ok()?))
}

/// Opens the device through which connections are made.
fn device(open: &OpenFile) -> Result<File, Error> {
    open(Path::new(FABRICS), Access::NvmeControl).map_err(|e| match e.errno() {
        libc::ENOENT => {
            Error::NoDevice(format!("{FABRICS} does not exist; load the driver: modprobe nvme-tcp"))
        }
        _ => e,
    })
}

/// Connects to a target, and returns the kernel's name of the controller. Blocks until the target
/// has answered, which may take minutes.
///
/// # Errors
/// EIO if the target cannot be reached or refuses.
fn connect(mut device: File, target: &Target, options: &Options) -> Result<String, Error> {
    let (address, port) = (&target.address, &target.service);
    let failed = |e: std::io::Error| {
        let what = format!(
            "cannot connect to {} at {address} port {port}: {e}; see the kernel's log",
            target.subnqn
        );
        Error::System { what, source: std::io::Error::from_raw_os_error(libc::EIO) }
    };
    device.write_all(option_text(target, options).as_bytes()).map_err(failed)?;
    let mut answer = [0; ANSWER_MAX];
    let len = device.read(&mut answer).map_err(failed)?;
    let answer = String::from_utf8_lossy(&answer[..len]);
    instance(&answer).ok_or_else(|| failed(std::io::Error::other(answer.into_owned())))
}

/// Waits until the kernel has found the namespaces of a controller, and returns them.
pub(crate) fn wait_for_namespaces(sysfs: &Sysfs, controller: &str) -> Vec<Namespace> {
    let began = Instant::now();
    let (mut last, mut equal) = (vec![], 0);
    while began.elapsed() < SCAN_LIMIT {
        let now = sysfs.namespaces(controller);
        equal = if now == last && !now.is_empty() { equal + 1 } else { 0 };
        last = now;
        if equal == SCAN_EQUAL {
            break;
        }
        sleep(SCAN_PAUSE);
    }
    last
}

/// Ends the connection `controller` to a target, unless something else uses a namespace of it. May
/// block for minutes.
///
/// # Errors
/// ENODEV if it has ended; EBUSY with the user; the system's error.
pub(crate) fn disconnect(
    open: &OpenFile,
    sysfs: &Sysfs,
    controller: &str,
    target: &Target,
) -> Result<(), Error> {
    if !sysfs.is_at(controller, target) {
        return Err(Error::NoDevice(format!("{controller} is disconnected already")));
    }
    for namespace in sysfs.namespaces(controller) {
        if let Some(user) = user_of(sysfs, &namespace.block) {
            return Err(Error::Busy(format!("{controller} stays connected: {user}")));
        }
    }
    control(open, controller, "delete_controller")
}

/// Writes to an attribute that controls a controller. May block for minutes.
///
/// # Errors
/// The system's error.
pub(crate) fn control(open: &OpenFile, controller: &str, attribute: &str) -> Result<(), Error> {
    let path = Sysfs::control(controller, attribute);
    let mut file = open(&path, Access::NvmeControl)?;
    let what = path.display().to_string();
    file.write_all(b"1").map_err(|source| Error::System { what, source })
}

/// Returns the controller at a target: one that is connected already, or a new connection. Also
/// returns whether it is new.
///
/// # Errors
/// EPERM in the sandbox; ENODEV if the kernel's driver is not loaded; EIO if the target cannot be
/// reached or refuses.
pub(crate) fn find_or_connect(
    open: &OpenFile,
    sysfs: &Sysfs,
    target: &Target,
    options: &Options,
) -> Result<(Controller, bool), Error> {
    // First: who may not connect may not end a connection either, so must not take one over.
    let device = device(open)?;
    // A process that was killed leaves its connections to the kernel.
    if let Some(connected) = sysfs.connected(target, options.hostnqn.as_deref()) {
        return Ok((connected, false));
    }
    let name = connect(device, target, options)?;
    let gone = || Error::NoDevice(format!("{name} has disappeared"));
    Ok((sysfs.controller(&name).ok_or_else(gone)?, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::tree;
    use crate::target::Given;

    fn target() -> Target {
        let given = Given {
            trtype: "TCP",
            traddr: "10.0.0.1",
            trsvcid: Some("4420"),
            subnqn: Some("nqn.tcp"),
            ..Given::default()
        };
        Target::parse(given).unwrap()
    }

    #[test]
    fn options_become_the_kernels() {
        let text = |options: &Options| option_text(&target(), options);
        let plain = "transport=tcp,traddr=10.0.0.1,trsvcid=4420,nqn=nqn.tcp";
        assert_eq!(text(&Options::default()), plain);
        let id = "4b9bce33-9a30-4e2d-a0f9-24f6d7c1d8b1";
        let options = Options {
            hostnqn: Some(format!("nqn.2014-08.org.nvmexpress:uuid:{id}")),
            hostaddr: Some("10.0.0.2".into()),
            queues: Some(4),
            data_digest: true,
            timeouts: Timeouts { loss: -1, reconnect: 2, fast_fail: 5 },
            keep_alive_ms: Some(2500),
            ..Options::default()
        };
        assert_eq!(
            text(&options),
            format!(
                "{plain},hostnqn=nqn.2014-08.org.nvmexpress:uuid:{id},hostid={id},\
                 host_traddr=10.0.0.2,nr_io_queues=4,ctrl_loss_tmo=-1,reconnect_delay=2,\
                 fast_io_fail_tmo=5,keep_alive_tmo=3,data_digest"
            )
        );
    }

    #[test]
    fn a_host_has_the_same_id_each_time() {
        let options = Options { hostnqn: Some("nqn.host".into()), ..Options::default() };
        let text = option_text(&target(), &options);
        assert_eq!(text, option_text(&target(), &options));
        assert!(text.contains(",hostid="));
    }

    #[test]
    fn the_answer_names_the_controller() {
        assert_eq!(instance("instance=12,cntlid=3\n").as_deref(), Some("nvme12"));
        assert_eq!(instance("cntlid=3,instance=1").as_deref(), Some("nvme1"));
        assert_eq!(instance("instance=x"), None);
        assert_eq!(instance(""), None);
    }

    #[test]
    fn time_outs_must_fit_together() {
        let fit = |loss, reconnect, fast_fail| Timeouts { loss, reconnect, fast_fail }.fit();
        assert!(fit(0, 0, 0) && !fit(0, 1, 0) && !fit(0, 0, 1));
        assert!(fit(-1, 1, 0) && fit(-1, 2, 2) && !fit(-1, 0, 0) && !fit(-1, 2, 1));
        assert!(fit(5, 5, 0) && fit(5, 2, 5) && !fit(5, 6, 0) && !fit(5, 2, 1));
        assert!(!fit(5, 2, 6) && !fit(-2, 1, 0));
    }

    #[test]
    fn a_connection_that_exists_is_used_again() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        let open: OpenFile = Box::new(|_, _| Ok(tempfile::tempfile().unwrap()));
        let found = find_or_connect(&open, &sysfs, &target(), &Options::default());
        let (controller, new) = found.unwrap();
        assert_eq!((&*controller.name, new), ("nvme1", false));
        assert_eq!(wait_for_namespaces(&sysfs, "nvme1").len(), 1);
        let options = Options { hostnqn: Some("nqn.other".into()), ..Options::default() };
        let e = find_or_connect(&open, &sysfs, &target(), &options).unwrap_err();
        assert_eq!(e.errno(), libc::EIO, "it would be a new connection");
    }

    #[test]
    fn the_sandbox_adopts_no_connection() {
        let dir = tree();
        let refused = || std::io::Error::from_raw_os_error(libc::EPERM);
        let open: OpenFile =
            Box::new(move |_, _| Err(Error::System { what: FABRICS.into(), source: refused() }));
        let found = find_or_connect(&open, &Sysfs::at(dir.path()), &target(), &Options::default());
        assert_eq!(found.unwrap_err().errno(), libc::EPERM);
    }
}
