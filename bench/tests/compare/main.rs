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
    let cells = ["--disks", "null,malloc,aio,uring", "--depths", "1,4", "--rw", "read"];
    let place = ["--file-dir", file_dir.to_str().unwrap()];
    let output = compare(dir.path(), &[&args[..], &cells, &place].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let rows = text.lines().filter(|line| line.contains("|   qemu |")).count();
    assert_eq!(rows, 8 + 4, "each cell, and what each of the files' costs:\n{text}");
    let json: Value =
        serde_json::from_slice(&fs::read(dir.path().join("compare.json")).unwrap()).unwrap();
    let cells = json["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 8);
    let notes = json["notes"].as_array().unwrap();
    let told = |words: &str| notes.iter().any(|note| note.as_str().unwrap().contains(words));
    assert!(
        told("aio disk: driver=file,aio=native") && told("uring disk: driver=file,aio=io_uring")
    );
    let uncounted = told("no system calls per I/O");
    for cell in cells {
        let on_file = ["aio", "uring"].contains(&cell["disk"].as_str().unwrap());
        let syscalls = &cell["syscalls_per_io"][0];
        assert_eq!(syscalls.is_null(), !on_file || uncounted, "{cell}");
        assert!(syscalls.as_f64().is_none_or(|calls| calls > 0.0), "{cell}");
        let alternations = cell["alternations"].as_array().unwrap();
        assert_eq!(alternations.len(), 2);
        for alternation in alternations {
            assert!(alternation["round_trip_ns"].as_f64().unwrap() > 0.0);
            let perf = &alternation["servers"][0]["perf"];
            assert!(perf["completed"].as_u64().unwrap() > 0, "{perf}");
            let cpu = &alternation["servers"][0]["cpu_s"];
            assert_eq!(cpu.is_null(), !on_file, "{cell}");
        }
    }
    let svg = fs::read_to_string(dir.path().join("compare.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("malloc disk"));
    assert_eq!(fs::read_dir(&file_dir).unwrap().count(), 0, "the files are removed");
}

/// What takes fio's place: it prints one run, whatever it is asked for.
const FIO: &str = r#"#!/bin/sh
cat <<END
{"jobs": [{"error": 0, "job_runtime": 20, "usr_cpu": 10.0, "sys_cpu": 40.0,
"read": {"total_ios": 1000, "iops": 50000.0,
"lat_ns": {"percentile": {"50.000000": 20000, "99.900000": 40000}}},
"write": {"total_ios": 0, "iops": 0.0}}]}
END
"#;

#[test]
fn fio_is_a_contender_on_files_alone() {
    let dir = tempfile::tempdir().unwrap();
    let fio = program(&dir.path().join("fio"), FIO);
    let args = ["--runs", "1", "--runtime", "0.02", "--ramp-time", "0", "--file-mib", "4"];
    let cells = ["--disks", "null,aio", "--depths", "4", "--fio", &fio];
    let place = ["--file-dir", dir.path().to_str().unwrap()];
    let output = compare(dir.path(), &[&args[..], &cells, &place].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for engine in ["fio libaio", "fio io_uring"] {
        let rows: Vec<&str> = text.lines().filter(|line| line.contains(engine)).collect();
        let [figures, costs] = rows[..] else { panic!("not two rows of {engine}:\n{text}") };
        assert!(figures.contains("aio randread 4k d4 q1") && figures.contains("20.0 µs"), "{text}");
        assert!(costs.contains("10.0 k"), "ns of half of 20 ms, by 1,000:\n{text}");
    }
}

/// Writes an executable script and returns its path.
fn program(path: &Path, text: &str) -> String {
    fs::write(path, text).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(path, executable).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_server_that_does_not_start_is_shown_with_its_words_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let program =
        program(&dir.path().join("vhost"), "#!/bin/sh\necho no such option >&2\nexit 2\n");
    let spdk = ["--spdk", &program, "--disks", "null"];
    let output = compare(dir.path(), &spdk);
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("SPDK ended at its start") && words.contains("no such option"));
    assert_eq!(processes(&program), 0);
}
