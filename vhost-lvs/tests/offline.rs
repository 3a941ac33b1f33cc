//! The program on stores that SPDK has written: texts, exit codes, exported and imported content.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::fs;
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
    rustix::fs::fcntl_lock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let input = dir.path().join("in");
    fs::write(&input, b"hello").unwrap();
    let refused = run(&["import", "new"], &[&file, &input]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    drop(held);
    assert!(run(&["import", "new"], &[&file, &input]).status.success());
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
