//! The program on stores that SPDK has written: texts, exit codes, exported and imported content.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

fn images() -> PathBuf {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/reference/images");
    let path = PathBuf::from(std::env::var("VHOST_IMAGES").unwrap_or_else(|_| path.to_owned()));
    assert!(path.is_dir(), "no images of SPDK's in {path:?}: set VHOST_IMAGES to their directory");
    path
}

fn image(dir: &TempDir, name: &str) -> PathBuf {
    let packed = fs::File::open(images().join(format!("{name}.img.zst"))).unwrap();
    let mut reader = ruzstd::decoding::StreamingDecoder::new(packed).unwrap();
    let path = dir.path().join(name);
    std::io::copy(&mut reader, &mut fs::File::create(&path).unwrap()).unwrap();
    path
}

fn run(args: &[&str], paths: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-lvs"));
    command.arg(args[0]).args(paths).args(&args[1..]).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn inspect_and_check_print_what_they_always_did_and_change_nothing() {
    let dir = TempDir::new().unwrap();
    for (name, code) in [("lvs-tree", 0), ("lvs-snaprm-kept", 1)] {
        let file = image(&dir, name);
        let before = fs::read(&file).unwrap();
        let inspected = run(&["inspect"], &[&file]);
        let checked = run(&["check"], &[&file]);
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
        let shown = format!("{}--\n{}", text(&inspected), text(&checked));
        assert_eq!(shown, fs::read_to_string(golden).unwrap());
        assert_eq!((inspected.status.code(), checked.status.code()), (Some(0), Some(code)));
        assert!(fs::read(&file).unwrap() == before);
    }
    let missing = dir.path().join("missing");
    for command in ["inspect", "check"] {
        assert_eq!(run(&[command], &[&missing]).status.code(), Some(2), "{command}");
    }
    fs::write(&missing, vec![0; 1 << 20]).unwrap();
    assert_eq!(run(&["inspect"], &[&missing]).status.code(), Some(2));
    assert_eq!(run(&["check"], &[&missing]).status.code(), Some(1));
}

#[test]
fn a_volume_is_exported_and_imported_again() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, "lvs-tree");
    let [out, again] = ["out", "again"].map(|name| dir.path().join(name));
    let exported = run(&["export", "tree/live"], &[&file]);
    assert_eq!(exported.status.code(), Some(2), "an argument is missing");
    let export = |volume: &str, out: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-lvs"));
        command.arg("export").arg(&file).arg(volume).arg(out).output().unwrap()
    };
    assert!(export("tree/live", &out).status.success());
    assert_eq!(export("tree/live", &out).status.code(), Some(1), "it exists");
    let mut content = fs::read(&out).unwrap();
    assert_eq!(content.len(), 4 << 20);
    // Not whole clusters, and one that is all zeroes.
    content.truncate((3 << 20) + 100);
    content[1 << 20..(1 << 20) + (512 << 10)].fill(0);
    fs::write(&out, &content).unwrap();
    for (name, args) in
        [("thick-copy", &["import", "thick-copy"][..]), ("thin", &["import", "thin", "--thin"])]
    {
        let imported = run(args, &[&file, &out]);
        assert!(imported.status.success(), "{imported:?}");
        assert_eq!(run(args, &[&file, &out]).status.code(), Some(1), "the name is taken");
        assert_eq!(text(&run(&["check"], &[&file])), "clean\n");
        assert!(export(name, &again).status.success());
        let mut wanted = content.clone();
        wanted.resize(wanted.len().next_multiple_of(256 << 10), 0);
        assert!(fs::read(&again).unwrap() == wanted, "{name}");
        fs::remove_file(&again).unwrap();
    }
    let shown = text(&run(&["inspect"], &[&file]));
    let rows: Vec<&str> = shown.lines().filter(|line| line.contains("13/13")).collect();
    assert!(rows.len() == 1 && rows[0].starts_with("thick-copy"), "{shown}");
}

#[test]
fn a_store_that_needs_recovery_is_changed_only_on_demand() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, "lvs-snaptmp-of-clone");
    let input = dir.path().join("in");
    fs::write(&input, b"hello").unwrap();
    let before = fs::read(&file).unwrap();
    let refused = run(&["import", "new"], &[&file, &input]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("--recover"));
    assert!(fs::read(&file).unwrap() == before);
    assert!(run(&["import", "new", "--recover"], &[&file, &input]).status.success());
    assert_eq!(text(&run(&["check"], &[&file])), "clean\n");
}

#[test]
fn a_store_that_a_server_has_locked_is_not_changed() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, "lvs-basic");
    let held = fs::File::options().read(true).write(true).open(&file).unwrap();
    // As vhost locks: a byte near the end, for the open file description.
    let byte = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap(),
        l_start: i64::MAX - 2,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&held, nix::fcntl::FcntlArg::F_OFD_SETLK(&byte)).unwrap();
    let input = dir.path().join("in");
    fs::write(&input, b"hello").unwrap();
    let refused = run(&["import", "new"], &[&file, &input]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    drop(held);
    assert!(run(&["import", "new"], &[&file, &input]).status.success());
}

#[test]
fn an_import_is_renamed_when_it_is_complete_and_leaves_nothing_if_it_fails() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, "lvs-tree");
    let input = dir.path().join("in");
    fs::write(&input, b"hello").unwrap();
    let long = "x".repeat(63);
    for name in ["one.importing", &long] {
        assert!(run(&["import", name], &[&file, &input]).status.success());
    }
    let before = text(&run(&["inspect"], &[&file]));
    let refused = run(&["import", "one"], &[&file, &input]);
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && error.contains("one.importing"), "{error}");
    // More than the store can hold.
    let mut big = vec![7; 64 << 20];
    big.extend([7; 100]);
    fs::write(&input, &big).unwrap();
    let failed = run(&["import", "big", "--thin"], &[&file, &input]);
    let error = String::from_utf8(failed.stderr).unwrap();
    assert!(!failed.status.success() && error.contains("no space left"), "{error}");
    assert_eq!(text(&run(&["inspect"], &[&file])), before);
    assert_eq!(text(&run(&["check"], &[&file])), "clean\n");
}

/// As one of them is the store, it must not be written.
#[test]
fn a_volume_is_not_exported_to_the_device_of_its_store() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, "lvs-tree");
    let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
    let device = made.ok().filter(|made| made.status.success()).map(|made| text(&made));
    let Some(device) = device else { return eprintln!("not run: no loop devices") };
    let device = Path::new(device.trim()).to_owned();
    let before = fs::read(&file).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-lvs"));
    let refused = command.arg("export").arg(&device).arg("tree/live").arg(&device).output();
    let held = fs::File::options().write(true).custom_flags(0o200).open(&device).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-lvs"));
    let busy = command.arg("export").arg(&file).arg("tree/live").arg(&device).output();
    drop(held);
    Command::new("losetup").arg("--detach").arg(&device).status().unwrap();
    let error = String::from_utf8(refused.unwrap().stderr).unwrap();
    assert!(error.contains("the store is on this device"), "{error}");
    let error = String::from_utf8(busy.unwrap().stderr).unwrap();
    assert!(error.contains("busy"), "{error}");
    assert!(fs::read(&file).unwrap() == before);
}

#[test]
fn names_that_would_control_the_terminal_are_not_printed() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, "lvs-snaprm-kept");
    let mut bytes = fs::read(&file).unwrap();
    // The root pages of all blobs: the name of each gets an escape character.
    let mut changed = 0;
    for page in bytes.chunks_exact_mut(4096).take(256) {
        let found = page.windows(4).position(|w| w == b"name");
        if let Some(at) = found.filter(|_| &page[..4] != b"SPDK") {
            page[at + 4] = 0x1b;
            let crc = crc32c(&page[..4092]);
            page[4092..].copy_from_slice(&crc.to_le_bytes());
            changed += 1;
        }
    }
    assert!(changed > 1);
    fs::write(&file, &bytes).unwrap();
    let checked = run(&["check"], &[&file]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-lvs"));
    let out = dir.path().join("out");
    let exported = command.arg("export").arg(&file).arg("none").arg(&out).output().unwrap();
    for output in [checked.stdout, exported.stderr] {
        assert!(output.contains(&b'?') && !output.contains(&0x1b), "{output:?}");
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (0..8).fold(crc, |crc, _| (crc >> 1) ^ ((crc & 1) * 0x82f6_3b78));
    !bytes.iter().fold(u32::MAX, |crc, byte| step(crc ^ u32::from(*byte)))
}

#[test]
fn a_clone_of_an_external_snapshot_needs_its_content() {
    let dir = TempDir::new().unwrap();
    let [file, base] = ["lvs-esnap", "lvs-esnap-base"].map(|name| image(&dir, name));
    let out = dir.path().join("out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-lvs"));
    command.arg("export").arg(&file).arg("esn/e3").arg(&out);
    let refused = command.output().unwrap();
    assert!(String::from_utf8(refused.stderr).unwrap().contains("--external"));
    assert!(!out.exists());
    assert!(command.arg("--external").arg(&base).status().unwrap().success());
    // e3 has no clusters of its own.
    assert!(fs::read(&out).unwrap() == fs::read(&base).unwrap()[..2 << 20]);
}
