// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine metrics`: a real daemon with files, scraped by a real Prometheus and by strangers.
//!
//! Needs root and /dev/fuse; what needs promtool and prometheus also needs these, on PATH or in
//! $LOOPENGINE_LAB_TOOLS.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_loopengine");
const SHARE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/share/monitoring");
const SOON: Duration = Duration::from_secs(60);
const WRITTEN: usize = 40 * 4096;

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let until = Instant::now() + SOON;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon with one device, whose image has a name to escape.
struct Bed {
    daemon: Option<Running>,
    dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Option<Bed> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            println!("skipped: needs root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut serve = Command::new(PROGRAM);
        serve.args(["serve", "--backend", "fuse"]).env("LOOPENGINE_RUN_DIR", dir.path().join("run"));
        let daemon = Running(serve.stderr(Stdio::null()).spawn().unwrap());
        let bed = Bed { daemon: Some(daemon), dir };
        wait("the daemon", || bed.path("run/control").exists());
        let image = bed.path("a \"quoted\"\\\nimage");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let device = bed.program(&["attach", image.to_str().unwrap()]);
        let file = std::fs::File::options().write(true).open(device.trim()).unwrap();
        file.write_all_at(&[7; WRITTEN], 0).unwrap();
        file.sync_all().unwrap();
        Some(bed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(words).env("LOOPENGINE_RUN_DIR", self.path("run"));
        command
    }

    fn program(&self, words: &[&str]) -> String {
        let done = self.command(words).output().unwrap();
        assert!(done.status.success(), "{words:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// Metrics on a loopback port.
    fn listening(&self) -> (Running, u16) {
        let port = free_port();
        let server = self.command(&["metrics", "--listen", &format!("127.0.0.1:{port}")]).spawn().unwrap();
        let server = Running(server);
        wait("the metrics", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        (server, port)
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn wait(what: &str, ready: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !ready() {
        assert!(Instant::now() < until, "{what}: not ready in time");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Head and body of an answer.
fn get(mut stream: impl Read + Write, path: &str, accept: &str) -> (String, String) {
    let asked = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
    stream.write_all(asked.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_owned(), body.to_owned())
}

fn scrape(port: u16) -> String {
    let (head, body) = get(TcpStream::connect(("127.0.0.1", port)).unwrap(), "/metrics", "*/*");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    body
}

/// A program of the lab's tools.
fn tool(name: &str) -> Option<Command> {
    let lab = std::env::var_os("LOOPENGINE_LAB_TOOLS").unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).chain([PathBuf::from(lab)]).map(|dir| dir.join(name));
    let found = found.filter(|file| file.is_file()).map(Command::new).next();
    if found.is_none() {
        println!("skipped: {name} is missing");
    }
    found
}

/// What promtool says of a file, with the file on standard input.
fn promtool(words: &[&str], input: &str) {
    let Some(mut promtool) = tool("promtool") else { return };
    let child = promtool.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "promtool {words:?}: {done:?}\n{input}");
}

#[test]
fn prints_what_promtool_accepts() {
    let Some(bed) = Bed::new() else { return };
    let text = bed.program(&["metrics"]);
    promtool(&["check", "metrics"], &text);
    let device = "{instance_name=\"default\",device=\"loop0\"}";
    for line in [
        "loopengine_up 1".to_owned(),
        format!("loopengine_device_written_bytes_total{device} {WRITTEN}"),
        format!("loopengine_device_size_bytes{device} 1048576"),
        "loopengine_device_state{instance_name=\"default\",device=\"loop0\",state=\"live\"} 1".to_owned(),
        "loopengine_instance_devices{instance_name=\"default\"} 1".to_owned(),
        "loopengine_intercepted_calls_total 0".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    assert!(text.contains("/a \\\"quoted\\\"\\\\\\nimage\""), "{text}");
    // One bucket for each bound, and the last.
    let buckets =
        text.lines().filter(|line| line.starts_with("loopengine_device_sampled_latency_seconds_bucket"));
    let buckets: Vec<&str> = buckets.collect();
    assert!(buckets.len() == 17 && buckets[16].contains("le=\"+Inf\""), "{buckets:?}");
}

/// Every metric in alerts and dashboard exists.
#[test]
fn alerts_and_dashboard_name_what_is_measured() {
    let alerts = std::fs::read_to_string(format!("{SHARE}/alerts.yml")).unwrap();
    promtool(&["check", "rules", &format!("{SHARE}/alerts.yml")], "");
    let dashboard = std::fs::read_to_string(format!("{SHARE}/dashboard.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&dashboard).unwrap();
    let source = include_str!("../src/cli/metrics/text.rs");
    let mut checked = 0;
    for text in [alerts, dashboard] {
        for (at, _) in text.match_indices("loopengine_") {
            let name = text[at..].split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap();
            let mut name = name.trim_start_matches("loopengine_");
            for ending in ["_bucket", "_total", "_bytes", "_seconds"] {
                name = name.strip_suffix(ending).unwrap_or(name);
            }
            assert!(source.contains(&format!("\"{name}\"")), "no metric {name}");
            checked += 1;
        }
    }
    assert!(checked > 20, "{checked}");
}

/// A real scrape shows the bytes of the device, and an alert fires when the daemon is gone.
#[test]
fn prometheus_scrapes() {
    let Some(mut bed) = Bed::new() else { return };
    let Some(mut prometheus) = tool("prometheus") else { return };
    let (_server, port) = bed.listening();
    let alerts = std::fs::read_to_string(format!("{SHARE}/alerts.yml")).unwrap();
    std::fs::write(bed.path("alerts.yml"), alerts.replace("for: 2m", "for: 0s")).unwrap();
    let config = format!(
        "global:\n  scrape_interval: 1s\n  evaluation_interval: 1s\nrule_files: [alerts.yml]\nscrape_configs:\n\
         - job_name: x\n  static_configs:\n  - targets: ['127.0.0.1:{port}']\n"
    );
    std::fs::write(bed.path("prometheus.yml"), config).unwrap();
    let web = free_port();
    prometheus
        .arg(format!("--config.file={}", bed.path("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", bed.path("tsdb").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{web}"));
    let _prometheus = Running(prometheus.stderr(Stdio::null()).spawn().unwrap());
    let query = |what: &str| {
        let Ok(stream) = TcpStream::connect(("127.0.0.1", web)) else { return String::new() };
        get(stream, &format!("/api/v1/query?query={what}"), "*/*").1
    };
    let bytes = format!("\"{WRITTEN}\"");
    wait("the device's bytes", || query("loopengine_device_written_bytes_total").contains(&bytes));
    bed.daemon = None;
    wait("an alert", || query("ALERTS").contains("LoopengineDown"));
}

/// Strangers wait, talk nonsense or too much; others still get an answer.
#[test]
fn serves_strangers() {
    let Some(mut bed) = Bed::new() else { return };
    let (server, port) = bed.listening();
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let silent: Vec<TcpStream> = (0..40).map(|_| connect()).collect();
    for nonsense in [&[0xff; 64][..], b"GET\r\n\r\n", &[b'a'; 100_000]] {
        let mut stream = connect();
        let _ = stream.write_all(nonsense);
    }
    let openmetrics = "application/openmetrics-text";
    let (head, body) = get(connect(), "/metrics", openmetrics);
    assert!(head.contains("version=1.0.0") && body.ends_with("# EOF\n"), "{head}\n{body}");
    drop(silent);
    assert!(get(connect(), "/", "*/*").0.starts_with("HTTP/1.1 404"));
    let mut post = connect();
    post.write_all(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    post.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    bed.daemon = None;
    let down = scrape(port);
    assert!(down.contains("loopengine_up 0\n") && !down.contains("loopengine_device"), "{down}");
    drop(server);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "it goes on");
}

/// The Unix socket is for root only, and is replaced only if nobody serves it.
#[test]
fn listens_on_a_unix_socket() {
    let Some(bed) = Bed::new() else { return };
    let socket = bed.path("metrics");
    let address = format!("unix:{}", socket.display());
    let start = || {
        let server = Running(bed.command(&["metrics", "--listen", &address]).spawn().unwrap());
        wait("the metrics", || UnixStream::connect(&socket).is_ok());
        server
    };
    let mut server = start();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let (head, body) = get(UnixStream::connect(&socket).unwrap(), "/metrics", "*/*");
    assert!(head.contains("version=0.0.4") && body.contains("loopengine_up 1\n"), "{head}\n{body}");
    let second = bed.command(&["metrics", "--listen", &address]).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(4) && said.contains("another process listens"), "{said}");
    server.0.kill().unwrap();
    drop(server);
    assert!(socket.exists());
    drop(start());
    assert!(!socket.exists(), "an ended server leaves its socket");
    std::fs::write(&socket, "a file").unwrap();
    let refused = bed.command(&["metrics", "--listen", &address]).output().unwrap();
    assert!(!refused.status.success() && std::fs::read(&socket).unwrap() == b"a file", "{refused:?}");
    for address in ["0.0.0.0:1", "x", "unix:x"] {
        let done = bed.command(&["metrics", "--listen", address]).output().unwrap();
        assert_eq!(done.status.code(), Some(2), "{address}");
    }
}
