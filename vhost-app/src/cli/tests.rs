//! The command line, read as `getopt_long` reads it.

use std::path::Path;

use super::*;

fn parse(line: &str) -> Result<Options, Exit> {
    Options::parse(std::iter::once("vhost").chain(line.split_ascii_whitespace()))
}

fn ok(line: &str) -> Options {
    parse(line).unwrap_or_else(|exit| panic!("{line}: {exit:?}"))
}

fn code(line: &str) -> u8 {
    parse(line).map_or_else(|exit| exit.code, |options| panic!("{line}: {options:?}"))
}

#[test]
fn the_definition_of_the_arguments_is_valid() {
    use clap::CommandFactory;
    Args::command().debug_assert();
}

#[test]
fn defaults() {
    let options = ok("");
    let expected = Options {
        pid_file: None,
        socket_dir: None,
        check: None,
        metrics: None,
        socket_mode: None,
        socket_owner: None,
        socket_group: None,
        config: None,
        ignore_config_errors: false,
        rpc_socket: Some("/var/tmp/spdk.sock".into()),
        wait_for_rpc: false,
        rpcs_allowed: None,
        cores: vec![0],
        lcores: None,

        cpumask_locks: true,
        reactor_mode: Mode::Poll,
        mem_size_mib: None,

        no_huge: false,
        core_dump: true,
        log_flags: vec![],
        silence_noticelog: false,
        drain_limit: Duration::from_secs(30),
        share: false,
        sandbox: SandboxMode::Available,
        disk_dirs: vec![],
        network: None,
        ceph_dirs: vec![],
        without_effect: vec![],
        positional: vec![],
    };
    assert_eq!(options, expected);
}

#[test]
fn what_tools_use() {
    // SPDK's tests.
    let options =
        ok("-r /t/rpc.sock -S /t --wait-for-rpc -m 0x3 -p 1 -s 512 -u -g --disable-cpumask-locks \
         --logflag=all");
    assert_eq!(options.rpc_socket.unwrap().to_str(), Some("/t/rpc.sock"));
    assert_eq!(options.cores, [0, 1]);
    assert_eq!((options.mem_size_mib, options.wait_for_rpc), (Some(512), true));
    assert!(!options.cpumask_locks);
    assert_eq!(options.log_flags, ["all"]);
    assert_eq!(options.without_effect, ["--main-core", "--single-file-segments"]);
    // A systemd unit.
    let options =
        ok("-S /var/vhost --huge-dir /mnt/h --iova-mode va --rpc-socket /r.sock --cpumask [0,1] \
         --disable-cpumask-locks --config /etc/c.json");
    assert_eq!(options.cores, [0, 1]);
    assert_eq!(options.config.unwrap().to_str(), Some("/etc/c.json"));
    assert_eq!(options.without_effect, ["--huge-dir (hugepages need no mount)"]);
}

#[test]
fn as_getopt_reads_it() {
    // Later wins; flags may be repeated and joined; values may be attached.
    let options = ok("-s 1 -s2048 -uuRd -m0x2 --cpumask=0x4 --json a -c b -f p -f q");
    assert_eq!((options.mem_size_mib, options.cores), (Some(2048), vec![2]));
    assert_eq!(options.config, Some("b".into()));
    assert_eq!(options.pid_file, Some("q".into()));
    assert!(!options.core_dump);
    // Long names may be cut short as long as one is left.
    let options = ok("--rpc-s x --silence --wait --no-p --mem-s 5 --json-ig");
    assert!(options.silence_noticelog && options.wait_for_rpc);
    assert_eq!(options.mem_size_mib, Some(5));
    assert_eq!(code("--huge /x"), 2);
    assert_eq!(code("--mem 5"), 2);
    // Positional arguments are ignored wherever they stand.
    let options = ok("one -d two -s 7 three -- -x --nonsense");
    assert_eq!(options.mem_size_mib, Some(7));
    assert_eq!(options.positional, ["one", "two", "three", "-x", "--nonsense"]);
    // A value may start with a dash, and even be an option's name.
    assert_eq!(ok("-S -d").socket_dir, Some("-d".into()));
    assert!(ok("-S -d").core_dump);
    assert_eq!(Options::parse(["vhost", "-S", ""]).unwrap().socket_dir, None);
    // Repeatable ones add up.
    assert_eq!(ok("-L vhost -L vhost_blk --logflag bdev").log_flags.len(), 3);
    // --sandbox and --no-sandbox override each other.
    assert_eq!(ok("--sandbox").sandbox, SandboxMode::Required);
    assert_eq!(ok("--sandbox --no-sandbox").sandbox, SandboxMode::Off);
    assert_eq!(ok("--no-sandbox --sandbox").sandbox, SandboxMode::Required);
    assert_eq!(ok("--disk-dir /a --disk-dir b").disk_dirs, [Path::new("/a"), Path::new("b")]);
    assert!(ok("--share").share);
    // -r and --no-rpc-server override each other.
    assert_eq!(ok("-r x --no-rpc-server").rpc_socket, None);
    assert_eq!(ok("--no-rpc-server -r x").rpc_socket, Some("x".into()));
}

/// The option cases of SPDK's test/vhost/other/negative.sh, and their like.
#[test]
fn help_version_and_mistakes() {
    assert_eq!(code("-c /no/such -S /t -e 0x0 -s 1024 -d -h --silence-noticelog"), 0);
    assert_eq!(code("-x -h"), 2);
    assert_eq!(code("-h -x"), 0);
    assert_eq!(code("-s nonsense -h"), 2);
    assert_eq!(code("-L nonsense -h"), 2);
    assert_eq!(code("-L vhost_scsi -h"), 0);
    assert_eq!(code("-t vhost_scsi -h"), 2);
    assert_eq!(code("--help"), 0);
    assert_eq!(code("--version"), 0);
    assert_eq!(parse("-v").unwrap_err().text.trim_end(), VERSION);
    assert!(VERSION.starts_with(&format!("SPDK {SPDK_VERSION} ")));
    let help = parse("-h").unwrap_err().text;
    assert!(help.contains("--rpc-socket") && help.contains("-S"), "{help}");
    for line in ["-W 0000:01:00.0", "-s", "-m", "--nope", "--wait-for-rpc=1", "-c"] {
        assert_eq!(code(line), 2, "{line}");
    }
}

#[test]
fn what_parses_but_cannot_be_done_exits_with_1() {
    for line in [
        "--no-rpc-server --wait-for-rpc",
        "-m 0x0",
        "-m 0",
        "-m xyz",
        "-m [1",
        "-m []",
        "-m [1-]",
        "-m [,]",
        "-m -1",
        "--lcores (0",
        "--lcores 0@",
        "--lcores 1,1",
        "-m 0x3 -p 2",
        "--no-huge",
        "--no-huge -s 64 -g",
        "--no-huge -s 64 -R",
        "--no-huge -s 64 --huge-dir /x",
        "--no-huge -s 64 --iova-mode pa",
        "--iova-mode zz",
        "--no-sandbox --disk-dir /x",
    ] {
        assert_eq!(code(line), 1, "{line}");
    }
    assert_eq!(code("-m 0x1 --lcores 0"), 2);
    assert_eq!(code("-A 0000:01:00.0 -B 0000:02:00.0"), 2);
    assert!(ok("--no-huge -s 64 --iova-mode va").no_huge);
}

#[test]
fn lcores_map_to_cpus() {
    let lcore = |id, cpus: &[usize]| Lcore { id, cpus: cpus.into() };
    let options = ok("--lcores 5@2,(1-2)@(4,6-7),0");
    assert_eq!(options.cores, [0, 1, 2, 5]);
    assert_eq!(
        options.lcores.unwrap(),
        [lcore(0, &[0]), lcore(1, &[4, 6, 7]), lcore(2, &[4, 6, 7]), lcore(5, &[2])]
    );
}

#[test]
fn sizes_and_numbers() {
    for (text, mib) in
        [("0", 0), ("512", 512), ("2048K", 2), ("1k", 0), ("64M", 64), ("2G", 2048), ("2GB", 2048)]
    {
        assert_eq!(mem_size(text), Ok(mib), "{text}");
    }
    for text in ["", "x", "-5", "5T", "2147483648", "99999999999999999999", "4194304G"] {
        assert!(mem_size(text).is_err(), "{text}");
        assert_eq!(Options::parse(["vhost", "-s", text]).unwrap_err().code, 2, "{text}");
    }
    for line in [
        "-n -1",
        "-n x",
        "-p -1",
        "-p 0x",
        "-i x",
        "-i --1",
        "--num-trace-entries 3",
        "--num-trace-entries -1",
        "--base-virtaddr 0",
        "--msg-mempool-size 0",
        "--msg-mempool-size 0x10",
        "-A nonsense",
        "-B 1:2:3:4:5",
    ] {
        assert_eq!(code(line), 2, "{line}");
    }
    let options =
        ok("-n 0 -i 0x10 --num-trace-entries 0 --base-virtaddr 0x200000000000 --enforce-numa \
         --msg-mempool-size 1 -A 0000:01:00.0 -A 02:00.1 --vfio-vf-token x -e bdev:A,sock \
         --env-context --foo --iova-mode pa -p 00");
    assert_eq!(options.without_effect.len(), 12, "{:?}", options.without_effect);
    assert!(ok("-i -1 -u -R --iova-mode va").without_effect.is_empty());
}

#[test]
fn allowed_methods() {
    assert_eq!(ok("--rpcs-allowed a,b,,c").rpcs_allowed.unwrap(), ["a", "b", "c"]);
}

#[test]
fn permissions_and_owners_of_sockets() {
    let options = ok("--socket-mode 0660 --socket-owner qemu --socket-group 107");
    assert_eq!(options.socket_mode, Some(0o660));
    assert_eq!(options.socket_owner.as_deref(), Some("qemu"));
    assert_eq!(options.socket_group.as_deref(), Some("107"));
    assert_eq!(ok("--socket-mode 7").socket_mode, Some(7));
    for mode in ["rw", "1777", "8", "+7", "-7", "0o7", "66666666666"] {
        assert_eq!(code(&format!("--socket-mode {mode}")), 2, "{mode}");
    }
}
