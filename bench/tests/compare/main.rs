//! `compare` from end to end, with a `qemu-storage-daemon`; nothing is asserted about speed.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn compare(out: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_compare"))
        .args(["--no-ours", "--perf", env!("CARGO_BIN_EXE_vhost-perf")])
        .arg("--out")
        .arg(out)
        .args(args)
        .output()
        .unwrap()
}

/// Processes whose command line names `what`.
fn processes(what: &str) -> usize {
    let named = |entry: &fs::DirEntry| {
        fs::read(entry.path().join("cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(what))
    };
    fs::read_dir("/proc").unwrap().filter(|entry| named(entry.as_ref().unwrap())).count()
}

#[test]
fn cells_are_measured_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let file_dir = dir.path().join("file");
    fs::create_dir(&file_dir).unwrap();
    let args = ["--runs", "2", "--runtime", "0.02", "--ramp-time", "0", "--file-mib", "4"];
    let cells = ["--disks", "null,malloc,file", "--depths", "1,4", "--rw", "randread"];
    let place = ["--file-dir", file_dir.to_str().unwrap()];
    let output = compare(dir.path(), &[&args[..], &cells, &place].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let rows = text.lines().filter(|line| line.contains("|   qemu |")).count();
    assert_eq!(rows, 6 + 2, "each cell, and what each of the file's costs:\n{text}");
    let json: Value =
        serde_json::from_slice(&fs::read(dir.path().join("compare.json")).unwrap()).unwrap();
    let cells = json["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 6);
    for cell in cells {
        let alternations = cell["alternations"].as_array().unwrap();
        assert_eq!(alternations.len(), 2);
        for alternation in alternations {
            assert!(alternation["round_trip_ns"].as_f64().unwrap() > 0.0);
            let perf = &alternation["servers"][0]["perf"];
            assert!(perf["completed"].as_u64().unwrap() > 0, "{perf}");
            let cpu = &alternation["servers"][0]["cpu_s"];
            assert_eq!(cpu.is_null(), cell["disk"] != "file", "{cell}");
        }
    }
    let svg = fs::read_to_string(dir.path().join("compare.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("malloc disk"));
    assert_eq!(fs::read_dir(&file_dir).unwrap().count(), 0, "the file is removed");
}

#[test]
fn a_server_that_does_not_start_is_shown_with_its_words_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("vhost");
    fs::write(&program, "#!/bin/sh\necho no such option >&2\nexit 2\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&program, executable).unwrap();
    let spdk = ["--spdk", program.to_str().unwrap(), "--disks", "null"];
    let output = compare(dir.path(), &spdk);
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("SPDK ended at its start") && words.contains("no such option"));
    assert_eq!(processes(program.to_str().unwrap()), 0);
}
