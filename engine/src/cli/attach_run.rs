// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `attach --run`: keep a device attached while a command runs.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};
use tokio::time::sleep;

use crate::control::Client;
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::AttachSpec;
use crate::sys::watch::watch;

use super::{cannot_run, daemon, out, partitions};

/// The environment variable that holds the device path.
const DEVICE_ENV: &str = "LOOPENGINE_DEVICE";

/// Time for the command to end after a signal, before SIGKILL.
const TERM_MAX: Duration = Duration::from_secs(10);

/// Time for the device to become idle after the command (udev may still probe it).
const BUSY_MAX: Duration = Duration::from_secs(5);

/// Attaches the image, runs `words` and detaches the device. Returns the command's exit status.
pub(super) fn with_device(
    run_dir: &Path,
    spec: &AttachSpec,
    force: bool,
    image: OwnedFd,
    words: &[OsString],
) -> Result<u8> {
    daemon::runtime()?.block_on(async {
        // First, so that no signal leaves the device attached.
        let mut signals = Signals::new().map_err(|error| Error::os(error, "cannot handle signals"))?;
        let device = Client::connect(run_dir).await?.attach(spec, force, image).await?;
        if spec.partscan {
            partitions::wait(&device);
        }
        let device = device.path;
        let ran = run(&device, words, &mut signals).await;
        let detached = detach(run_dir, &device).await;
        match (ran, detached) {
            (Ok(0), Err(error)) | (Err(error), Ok(())) => Err(error),
            (Ok(code), Ok(())) => Ok(code),
            (Ok(code), Err(error)) => {
                out::message(error);
                Ok(code)
            }
            (Err(error), Err(left)) => {
                out::message(left);
                Err(error)
            }
        }
    })
}

async fn run(device: &str, words: &[OsString], signals: &mut Signals) -> Result<u8> {
    let words = insert(words, device);
    let Some((program, arguments)) = words.split_first() else {
        return Err(Error::new(Kind::Invalid, "no command to run").hint("give a command after --run"));
    };
    let mut child = match Command::new(program).args(arguments).env(DEVICE_ENV, device).spawn() {
        Ok(child) => child,
        Err(error) => return Ok(cannot_run(program, error)),
    };
    let waited = wait(&mut child, signals).await;
    let status = waited.map_err(|error| {
        let _ = child.kill();
        Error::os(error, format!("cannot wait for {}", program.display()))
    })?;
    Ok(code(status))
}

/// Waits until `child` ends and forwards signals to it. Kills it if it outlives a signal by
/// `TERM_MAX`.
async fn wait(child: &mut Child, signals: &mut Signals) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("the command has no process"))?;
    let ended = watch(pidfd_open(pid, PidfdFlags::NONBLOCK)?, Interest::READABLE)?;
    // The terminal sends Ctrl-C to the command itself.
    let at_terminal = io::stdin().is_terminal();
    let mut kill_at: Option<tokio::time::Instant> = None;
    loop {
        let overdue = async {
            match kill_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            readable = ended.readable() => {
                readable?.retain_ready();
                return child.wait();
            }
            signal = signals.next() => {
                if signal != Signal::INT || !at_terminal {
                    let _ = pidfd_send_signal(ended.get_ref(), signal);
                }
                kill_at.get_or_insert(tokio::time::Instant::now() + TERM_MAX);
            }
            () = overdue => {
                let _ = pidfd_send_signal(ended.get_ref(), Signal::KILL);
                kill_at = None;
            }
        }
    }
}

async fn detach(run_dir: &Path, device: &str) -> Result<()> {
    let which = Selector::Device(device.to_owned());
    let until = Instant::now() + BUSY_MAX;
    loop {
        let detached = match Client::connect(run_dir).await {
            Ok(mut client) => client.detach(&which, false).await,
            Err(error) => Err(error),
        };
        match detached {
            // The command may have detached the device itself.
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) if error.kind() == Kind::Busy && Instant::now() < until => {
                sleep(Duration::from_millis(50)).await;
            }
            Err(error) => {
                let message = format!("{device} is still attached: {}", error.message());
                return Err(Error::new(error.kind(), message)
                    .hint(format!("detach it with 'loopengine detach {device}'")));
            }
        }
    }
}

/// Replaces `{}` in every word with the device; appends the device if no word contains it.
fn insert(words: &[OsString], device: &str) -> Vec<OsString> {
    let mut found = false;
    let mut out: Vec<OsString> = words.iter().map(|word| replace(word, device, &mut found)).collect();
    if !found {
        out.push(device.into());
    }
    out
}

fn replace(word: &OsStr, device: &str, found: &mut bool) -> OsString {
    let mut rest = word.as_bytes();
    let mut out = Vec::with_capacity(rest.len());
    while let Some(at) = rest.windows(2).position(|pair| pair == b"{}") {
        *found = true;
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(device.as_bytes());
        rest = &rest[at + 2..];
    }
    out.extend_from_slice(rest);
    OsString::from_vec(out)
}

/// The exit status as a shell reports it.
fn code(status: ExitStatus) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    u8::try_from(code).unwrap_or(1)
}

struct Signals {
    interrupt: Stream,
    terminate: Stream,
    hangup: Stream,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hangup.recv() => Signal::HUP,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inserted(words: &[&str]) -> Vec<String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let words = insert(&words, "/dev/x").into_iter();
        words.map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn inserts_the_device_path() {
        assert_eq!(inserted(&["fsck", "-n"]), ["fsck", "-n", "/dev/x"]);
        assert_eq!(inserted(&["dd", "if={}", "of=y"]), ["dd", "if=/dev/x", "of=y"]);
        assert_eq!(inserted(&["echo", "{}{}", "{", "}"]), ["echo", "/dev/x/dev/x", "{", "}"]);
    }
}
