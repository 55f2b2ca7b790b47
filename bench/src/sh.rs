// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs other programs: each has a deadline and ends on Ctrl-C. An error is one line with the
//! program's name and the last line of its output.
//!
//! Knows nothing of the programs.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// Polling interval of a wait.
pub const TICK: Duration = Duration::from_millis(50);

/// Error text of `interrupted`; `main` returns exit code 130 for it.
pub const INTERRUPTED: &str = "interrupted";

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT, SIGTERM and SIGHUP set a flag instead of ending the program, so that no VM
/// and no mounted file system is left behind.
pub fn watch_signals() -> Result<()> {
    let flag = Arc::clone(STOP.get_or_init(Arc::default));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&flag)).context("cannot watch signals")?;
    }
    Ok(())
}

thread_local! {
    static CLEANING: Cell<bool> = const { Cell::new(false) };
}

/// Runs a clean-up, which signals do not interrupt.
pub fn uninterrupted<T>(clean: impl FnOnce() -> T) -> T {
    let before = CLEANING.replace(true);
    let outcome = clean();
    CLEANING.set(before);
    outcome
}

/// Fails once a signal has arrived.
pub fn interrupted() -> Result<()> {
    if CLEANING.get() {
        return Ok(());
    }
    if STOP.get().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
        bail!(INTERRUPTED);
    }
    Ok(())
}

/// Sleeps for `time`; fails if a signal arrives.
pub fn pause(time: Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        interrupted()?;
        std::thread::sleep(TICK.min(time));
    }
    Ok(())
}

/// Polls `done` until it returns a value; fails after `limit` with an error that names `what`.
pub fn wait_for<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = done()? {
            return Ok(value);
        }
        interrupted()?;
        if start.elapsed() > limit {
            bail!("{what}: timeout after {} s", limit.as_secs());
        }
        std::thread::sleep(TICK);
    }
}

/// Runs `command` and returns its standard output; a non-zero exit status is an error.
pub fn capture(command: &mut Command, limit: Duration) -> Result<String> {
    let name = describe(command);
    let output = output(command, limit)?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, last_words(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` and returns its output, whatever its exit status.
///
/// The command has its own process group: Ctrl-C on a terminal reaches only this program, and a
/// timeout kills all processes of the command.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let name = describe(command);
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let readers = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = match wait_for(&name, limit, || Ok(child.try_wait()?)) {
        Ok(status) => status,
        Err(error) => {
            if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = child.wait();
            return Err(error);
        }
    };
    let collect = |reader: JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    Ok(Output { status, stdout: collect(readers.0), stderr: collect(readers.1) })
}

/// Runs `command`, prints its output as it arrives, and returns its exit status and output.
pub fn tee(command: &mut Command, limit: Duration) -> Result<(ExitStatus, String)> {
    let name = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let said = Arc::new(Mutex::new(Vec::new()));
    let out = hand_on(child.stdout.take(), std::io::stdout(), &said);
    let err = hand_on(child.stderr.take(), std::io::stderr(), &said);
    let status = wait_for(&name, limit, || Ok(child.try_wait()?)).inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })?;
    let _ = (out.join(), err.join());
    let said = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((status, String::from_utf8_lossy(&said).into_owned()))
}

/// `command` for a message: the program and its first arguments.
pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().take(4).map(|word| word.to_string_lossy().into_owned()));
    if command.get_args().len() > 4 {
        words.push("…".into());
    }
    words.join(" ")
}

/// Waits until `child` has ended, whatever its exit status.
pub fn ended(child: &mut Child, name: &str, limit: Duration) -> Result<()> {
    wait_for(name, limit, || Ok(child.try_wait()?.map(drop)))
}

/// The last non-empty line of a log.
pub fn last_line(log: &Path) -> String {
    let said = std::fs::read_to_string(log).unwrap_or_default();
    said.trim_end().lines().next_back().unwrap_or("no output").to_owned()
}

/// Finds `program` on PATH or in /usr/sbin and /sbin.
pub fn which(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
        .with_context(|| format!("{program} is not installed: run `cargo lab setup`"))
}

/// Quotes `words` as one line for a shell.
pub fn quote<S: AsRef<str>>(words: &[S]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| quote_word(word.as_ref())).collect();
    quoted.join(" ")
}

fn quote_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn drain<R: Read + Send + 'static>(pipe: Option<R>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn hand_on<R: Read + Send + 'static, W: Write + Send + 'static>(
    pipe: Option<R>,
    mut to: W,
    said: &Arc<Mutex<Vec<u8>>>,
) -> JoinHandle<()> {
    let said = Arc::clone(said);
    std::thread::spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = [0; 8192];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            let _ = to.write_all(&buffer[..length]).and_then(|()| to.flush());
            said.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..length]);
        }
    })
}

/// The last non-empty line of standard error, else of standard output.
fn last_words(output: &Output) -> String {
    [&output.stderr, &output.stdout]
        .iter()
        .find_map(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
        })
        .unwrap_or_else(|| "no output".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        let words = ["printf", "%s|", "plain", "two words", "it's", "", "$HOME;`x`\"\\"];
        let line = quote(&words);
        let said = capture(Command::new("sh").args(["-c", &line]), Duration::from_secs(10)).unwrap();
        assert_eq!(said, "plain|two words|it's||$HOME;`x`\"\\|");
    }

    #[test]
    fn a_failure_is_one_line_with_the_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo the reason >&2; exit 3"]);
        let error = capture(&mut command, Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.ends_with("the reason") && error.contains('3') && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_program_that_takes_too_long_ends_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 60 & echo $! > {}; wait", pid.display());
        assert!(output(Command::new("sh").args(["-c", &script]), Duration::from_millis(500)).is_err());
        let child = std::fs::read_to_string(pid).unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        // It may be a zombie.
        let gone = || state().split(") ").nth(1).is_none_or(|state| state.starts_with('Z'));
        wait_for("the child to end", Duration::from_secs(10), || Ok(gone().then_some(()))).unwrap();
    }

    #[test]
    fn a_wait_has_a_deadline() {
        let start = Instant::now();
        assert!(output(Command::new("sleep").arg("20"), Duration::from_millis(200)).is_err());
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
