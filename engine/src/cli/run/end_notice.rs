// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reports on the command's terminal that its pool has ended. Otherwise the command only sees
//! "Function not implemented".
//!
//! Opens the terminal only to write the line: an open terminal would keep its session alive. Knows
//! terminals and one process. Does not know why a pool ends.

use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The filter of an exiting process may end shortly before the process.
const ENDS_WITHIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };

/// The pool, and the command to notify.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct EndNotice {
    /// Name of the pool.
    #[arg(long, value_name = "NAME", default_value = "")]
    pool: String,

    /// Process id of the command.
    #[arg(long, value_name = "PID")]
    command: Option<i32>,

    /// Terminal of the command, if any.
    #[arg(long, value_name = "PATH")]
    terminal: Option<PathBuf>,
}

impl EndNotice {
    /// For this process, which is about to execute the command.
    pub(super) fn for_this_process(pool: &str) -> EndNotice {
        let stderr = std::io::stderr();
        let terminal = stderr.is_terminal().then(|| fs::read_link("/proc/self/fd/2").ok()).flatten();
        let command = rustix::process::getpid().as_raw_pid();
        EndNotice { pool: pool.to_owned(), command: Some(command), terminal }
    }

    /// The notice as command line arguments.
    pub(super) fn words(&self) -> Vec<String> {
        let terminal = self.terminal.as_deref().and_then(Path::to_str);
        let command = self.command.map(|pid| format!("--command={pid}"));
        let terminal = terminal.map(|path| format!("--terminal={path}"));
        std::iter::once(format!("--pool={}", self.pool)).chain(command).chain(terminal).collect()
    }

    /// A pidfd of the command, which stays valid if its id is reused. None if there is no terminal.
    pub(super) fn watch(&self) -> Option<OwnedFd> {
        self.terminal.as_ref()?;
        pidfd_open(Pid::from_raw(self.command?)?, PidfdFlags::empty()).ok()
    }

    /// Writes the line if the command still runs and this is still its terminal.
    pub(super) fn write(&self, command: Option<OwnedFd>) {
        let (Some(command), Some(path)) = (command, &self.terminal) else { return };
        let lives = poll(&mut [PollFd::new(&command, PollFlags::IN)], Some(&ENDS_WITHIN)) == Ok(0);
        let is_its = |number| fs::metadata(path).is_ok_and(|found| found.rdev() == number);
        if !lives || !self.terminal_number().is_some_and(is_its) {
            return;
        }
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
        let terminal: Option<File> = options.open(path).ok();
        // Nobody reads a terminal that cannot be written.
        let _ = terminal.map(|mut terminal| terminal.write_all(self.text().as_bytes()));
    }

    fn text(&self) -> String {
        format!(
            "\r\nloopengine: private pool {} has ended: the daemon stopped or ended it. Its loop devices are \
             lost, and losetup and mount fail (\"Function not implemented\"); exit and start \
             'loopengine run' again\r\n",
            self.pool
        )
    }

    /// Device number of the controlling terminal, from proc_pid_stat(5).
    fn terminal_number(&self) -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.command?)).ok()?;
        // The command name may contain any character; state, parent, group, session and terminal
        // follow it.
        let number: i32 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(4)?.parse().ok()?;
        // 0: no terminal.
        let number = (number != 0).then(|| number.cast_unsigned())?;
        let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
        Some(rustix::fs::makedev(major, minor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(terminal: Option<&str>) -> EndNotice {
        let command = Some(rustix::process::getpid().as_raw_pid());
        EndNotice { pool: "1000.3".to_owned(), command, terminal: terminal.map(PathBuf::from) }
    }

    #[test]
    fn writes_one_line_with_the_pool_name() {
        let text = notice(None).text();
        assert!(text.contains("private pool 1000.3 has ended") && text.trim().lines().count() == 1, "{text}");
    }

    #[test]
    fn writes_only_to_the_terminal_of_the_command() {
        assert!(notice(None).watch().is_none());
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = notice(file.path().to_str());
        other.write(other.watch());
        assert_eq!(fs::read(file.path()).unwrap(), b"");
    }
}
