// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine top`: a real daemon with files, in tables and in a terminal of script(1).
//!
//! Needs root, /dev/fuse and util-linux.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_loopengine");
const SOON: Duration = Duration::from_secs(60);

/// A daemon with one device.
struct Bed {
    daemon: Child,
    device: String,
    dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Option<Bed> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            println!("skipped: needs root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut bed = Bed { daemon: serve(dir.path()), device: String::new(), dir };
        std::fs::File::create(bed.path("image")).unwrap().set_len(64 << 20).unwrap();
        let attached = bed.command(&["attach", "image"]).output().unwrap();
        assert!(attached.status.success(), "{attached:?}");
        bed.device = String::from_utf8(attached.stdout).unwrap().trim().to_owned();
        Some(bed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default().trim().to_owned()
    }

    fn command(&self, words: &[&str]) -> Command {
        command(self.dir.path(), words)
    }

    fn end_daemon(&mut self) {
        signal(&self.daemon.id().to_string(), Signal::TERM);
        self.daemon.wait().unwrap();
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.end_daemon();
    }
}

fn command(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(words).env("LOOPENGINE_RUN_DIR", dir.join("run")).current_dir(dir);
    command
}

fn serve(dir: &Path) -> Child {
    let daemon = command(dir, &["serve", "--backend", "fuse"]).stderr(Stdio::null()).spawn().unwrap();
    wait("the daemon", || dir.join("run/control").exists());
    daemon
}

fn wait(what: &str, ready: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !ready() {
        assert!(Instant::now() < until, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The process may be gone already.
fn signal(pid: &str, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), signal);
}

/// What a writer writes durably in the meantime is what the tables show, within a factor of 1.5.
#[test]
fn shows_the_rate_of_a_writer() {
    let Some(bed) = Bed::new() else { return };
    let (written, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let file = std::fs::File::options().write(true).open(&bed.device).unwrap();
    let (printed, rate) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Relaxed) {
                let at = written.fetch_add(1, Relaxed) % 16000 * 4096;
                file.write_all_at(&[7; 4096], at).unwrap();
                file.sync_data().unwrap();
                std::thread::sleep(Duration::from_millis(4));
            }
        });
        std::thread::sleep(Duration::from_millis(300));
        let (before, started) = (written.load(Relaxed), Instant::now());
        let printed = bed.command(&["top", "-b", "-n", "2", "-d", "2"]).output().unwrap();
        let rate = (written.load(Relaxed) - before) as f64 / started.elapsed().as_secs_f64();
        ended.store(true, Relaxed);
        (String::from_utf8(printed.stdout).unwrap(), rate)
    });
    let rows: Vec<Vec<&str>> = printed
        .lines()
        .filter(|line| line.starts_with("default/loop0 "))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows.len(), 2, "{printed}");
    for row in rows {
        let cell = |column: usize| row[column].parse::<f64>().unwrap();
        let (writes, kib, flushes) = (cell(4), cell(6), cell(14));
        for (what, found, want) in
            [("W/S", writes, rate), ("WKIB/S", kib, rate * 4.0), ("F/S", flushes, rate)]
        {
            let range = want / 1.5..want * 1.5;
            assert!(range.contains(&found), "{what}: {found}, and the writer's is {want:.1}:\n{printed}");
        }
        assert!((cell(2) - cell(3) - writes - flushes - cell(15)).abs() < 0.5, "IO/S is the sum: {printed}");
        assert!(cell(7) > 0.0 && cell(8) >= cell(7) / 2.0, "AVG_MS and P99_MS: {printed}");
        assert_eq!((row[9], row[12], row[13]), ("-", "live", "-"), "{printed}");
    }
}

/// A daemon that goes is reported, and the next one is shown.
#[test]
fn goes_on_with_the_next_daemon() {
    let Some(mut bed) = Bed::new() else { return };
    let mut top = bed.command(&["top", "-d", "0.2", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let mut until = |what: &str, found: &dyn Fn(&serde_json::Value) -> bool| {
        let until = Instant::now() + SOON;
        while !found(&serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap()) {
            assert!(Instant::now() < until, "{what}: not in time");
        }
    };
    until("rates", &|interval| interval["devices"][0]["rates"]["inFlight"] == 0);
    bed.end_daemon();
    let says = |interval: &serde_json::Value| interval["problem"].as_str().unwrap_or_default().to_owned();
    until("a problem", &|interval| says(interval).contains("cannot reach the daemon"));
    bed.daemon = serve(bed.dir.path());
    until("the next daemon", &|interval| interval["problem"].is_null() && interval["seconds"].is_number());
    top.kill().unwrap();
    top.wait().unwrap();
    bed.end_daemon();
    let without = bed.command(&["top", "-n", "1"]).output().unwrap();
    assert_eq!(without.status.code(), Some(8), "{without:?}");
    bed.daemon = serve(bed.dir.path());
}

/// `loopengine top` in a terminal of script(1), whose settings a shell saves before and after.
struct Terminal {
    script: Child,
    keys: Option<ChildStdin>,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    fn new(bed: &Bed) -> Terminal {
        for file in ["pid", "before", "after", "code"] {
            let _ = std::fs::remove_file(bed.path(file));
        }
        let inside = format!(
            "stty rows 24 cols 150; tty >tty; stty -g >before; \
             sh -c 'echo $$ >pid; exec {PROGRAM} top -d 0.2'; echo $? >code; stty -g >after"
        );
        let mut script = Command::new("script");
        script.args(["-q", "-e", "-c", &inside, "/dev/null"]).current_dir(bed.dir.path());
        script.env("LOOPENGINE_RUN_DIR", bed.path("run")).env("TERM", "xterm").env("SHELL", "/bin/sh");
        let mut script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (keys, mut out) = (script.stdin.take(), script.stdout.take().unwrap());
        let shown = Arc::new(Mutex::new(String::new()));
        let sink = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = out.read(&mut bytes) {
                sink.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        });
        let terminal = Terminal { script, keys, shown };
        terminal.shows("default/loop0");
        terminal
    }

    /// Waits until the terminal gets this text, from now on.
    fn shows(&self, text: &str) {
        self.shown.lock().unwrap().clear();
        wait(text, || self.shown.lock().unwrap().contains(text));
    }

    fn press(&mut self, keys: &str, then: &str) {
        self.keys.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
        self.shows(then);
    }

    /// The program has ended like this, and the terminal is as before.
    fn is_restored(&mut self, bed: &Bed, code: &str) {
        wait("the end", || !bed.read("after").is_empty());
        assert_eq!((bed.read("code").as_str(), bed.read("after")), (code, bed.read("before")));
        wait("the screen", || self.shown.lock().unwrap().contains("\u{1b}[?1049l"));
        assert!(self.shown.lock().unwrap().contains("\u{1b}[?25h"), "the cursor stays hidden");
        self.keys = None;
        self.script.wait().unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

/// The settings of a terminal, and the state of the process that uses it.
fn settings(bed: &Bed) -> (String, char) {
    let stty = Command::new("stty").arg("-g").arg("-F").arg(bed.read("tty")).output().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", bed.read("pid"))).unwrap();
    let state = stat.rsplit_once(") ").unwrap().1.chars().next().unwrap();
    (String::from_utf8(stty.stdout).unwrap().trim().to_owned(), state)
}

#[test]
fn obeys_keys_in_a_terminal() {
    let Some(bed) = Bed::new() else { return };
    let mut terminal = Terminal::new(&bed);
    assert_ne!(settings(&bed).0, bed.read("before"), "not raw");
    terminal.press("h", "any other key returns");
    terminal.press("x", "by IO/S");
    terminal.press("<", "by USER");
    terminal.press("r", "by USER reversed");
    terminal.press("T", "by UTIL% reversed");
    terminal.press("i", "1 device, 1 hidden");
    terminal.press("i", "1 device, 0 hidden");
    terminal.press("/Other", "filter: Other_");
    terminal.press("\r", "1 device, 1 hidden, by UTIL% reversed, filter \"Other\"");
    terminal.press("/\u{7f}\u{7f}\u{7f}\u{7f}\u{7f}loop", "filter: loop_");
    terminal.press("\r", "1 device, 0 hidden, by UTIL% reversed, filter \"loop\"");
    terminal.keys.as_mut().unwrap().write_all(b"q").unwrap();
    terminal.is_restored(&bed, "0");
}

#[test]
fn restores_the_terminal_at_signals() {
    let Some(bed) = Bed::new() else { return };
    for end in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut terminal = Terminal::new(&bed);
        signal(&bed.read("pid"), end);
        terminal.is_restored(&bed, "0");
    }
}

#[test]
fn obeys_job_control() {
    let Some(bed) = Bed::new() else { return };
    let mut terminal = Terminal::new(&bed);
    let (raw, _) = settings(&bed);
    signal(&bed.read("pid"), Signal::TSTP);
    wait("the stop", || settings(&bed) == (bed.read("before"), 'T'));
    signal(&bed.read("pid"), Signal::CONT);
    terminal.shows("default/loop0");
    assert_eq!(settings(&bed).0, raw);
    terminal.keys.as_mut().unwrap().write_all(b"\x03").unwrap();
    terminal.is_restored(&bed, "0");
}
