//! A line for the terminal of a command whose pool has ended before it: nothing of ours is between the
//! terminal and the command, and what the command sees is "Function not implemented".
//!
//! The terminal is opened only to write the line: a process that keeps it open would keep its session from
//! ending. Knows terminals and one process; does not know why a pool ends.

use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The filter of a process that ends may be gone a moment before the process is.
const ENDS_WITHIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };

/// Whom to tell of what.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Notice {
    /// The pool.
    #[arg(long, value_name = "NAME", default_value = "")]
    pool: String,

    /// The process that is the command.
    #[arg(long, value_name = "PID")]
    command: Option<i32>,

    /// Its terminal, if it has one.
    #[arg(long, value_name = "PATH")]
    terminal: Option<PathBuf>,
}

impl Notice {
    /// For this process, which is about to become the command.
    pub(super) fn to_this_process(pool: &str) -> Notice {
        let stderr = std::io::stderr();
        let terminal = stderr.is_terminal().then(|| fs::read_link("/proc/self/fd/2").ok()).flatten();
        let command = rustix::process::getpid().as_raw_pid();
        Notice { pool: pool.to_owned(), command: Some(command), terminal }
    }

    /// The same as arguments.
    pub(super) fn words(&self) -> Vec<String> {
        let terminal = self.terminal.as_deref().and_then(Path::to_str);
        let command = self.command.map(|pid| format!("--command={pid}"));
        let terminal = terminal.map(|path| format!("--terminal={path}"));
        std::iter::once(format!("--pool={}", self.pool)).chain(command).chain(terminal).collect()
    }

    /// The command, by what stays its own also when its number is another's; none: nobody is to be told.
    pub(super) fn watch(&self) -> Option<OwnedFd> {
        self.terminal.as_ref()?;
        pidfd_open(Pid::from_raw(self.command?)?, PidfdFlags::empty()).ok()
    }

    /// The pool has ended. Tells the command's terminal, if the command has not ended too and this is its
    /// terminal still.
    pub(super) fn tell(&self, command: Option<OwnedFd>) {
        let (Some(command), Some(path)) = (command, &self.terminal) else { return };
        let lives = poll(&mut [PollFd::new(&command, PollFlags::IN)], Some(&ENDS_WITHIN)) == Ok(0);
        let is_its = |number| fs::metadata(path).is_ok_and(|found| found.rdev() == number);
        if !lives || !self.terminal_number().is_some_and(is_its) {
            return;
        }
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
        let terminal: Option<File> = options.open(path).ok();
        // One that cannot be written to, or takes nothing, has nobody who reads it.
        let _ = terminal.map(|mut terminal| terminal.write_all(self.text().as_bytes()));
    }

    fn text(&self) -> String {
        format!(
            "\r\nloopengine: private pool {} has ended: the daemon is gone, or ended it. Its loop devices are \
             gone, and losetup and mount fail here (\"Function not implemented\"): exit, and start \
             'loopengine run' again\r\n",
            self.pool
        )
    }

    /// Device number of the terminal that the command's session has; of proc_pid_stat(5).
    fn terminal_number(&self) -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.command?)).ok()?;
        // The name may have anything in it; behind it are state, parent, group, session, terminal.
        let number: i32 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(4)?.parse().ok()?;
        // 0: it has none.
        let number = (number != 0).then(|| number.cast_unsigned())?;
        let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
        Some(rustix::fs::makedev(major, minor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(terminal: Option<&str>) -> Notice {
        let command = Some(rustix::process::getpid().as_raw_pid());
        Notice { pool: "1000.3".to_owned(), command, terminal: terminal.map(PathBuf::from) }
    }

    #[test]
    fn is_one_line_that_names_the_pool() {
        let text = notice(None).text();
        assert!(text.contains("private pool 1000.3 has ended") && text.trim().lines().count() == 1, "{text}");
    }

    #[test]
    fn tells_nobody_without_a_terminal_of_the_command() {
        assert!(notice(None).watch().is_none());
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = notice(file.path().to_str());
        other.tell(other.watch());
        assert_eq!(fs::read(file.path()).unwrap(), b"");
    }
}
