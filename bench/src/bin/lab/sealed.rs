// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sealed machine, whose measurements repeat exactly: one emulated CPU on which an instruction
//! takes 1 ns, files in memory, and two serial lines for output.
//!
//! It has no disk, no network, and no clock, randomness or file of this machine. So two runs are
//! the same to the instruction, even on a busy machine. The first line carries text, the second
//! files (`handover`). Knows QEMU and the programs that `loopbench` calls.

use std::fs::File;
use std::io::{BufWriter, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use loopbench::handover::{self, Inbox};
use loopbench::sh;

use crate::initrd::Tree;
use crate::kernel::Kernel;
use crate::programs::{self, Program};
use crate::setup::Lab;
use crate::vm;

/// Programs that `loopbench` and `init` call.
const PROGRAMS: [&str; 13] = [
    "sh",
    "cat",
    "date",
    "dd",
    "fallocate",
    "fio",
    "losetup",
    "mkfs.ext4",
    "mkfs.xfs",
    "modprobe",
    "mount",
    "stty",
    "umount",
];
/// Other servers, if they are installed.
const PEERS: [&str; 4] = ["qemu-nbd", "qemu-storage-daemon", "fuse2fs", "rublk"];
const MODULES: [&str; 7] = ["ublk_drv", "null_blk", "loop", "nbd", "fuse", "xfs", "ext4"];
const ETC: [&str; 1] = ["etc/mke2fs.conf"];
/// Names of the two serial lines.
const TEXT: &str = "text";
const FILES: &str = "files";
/// The last file, which contains the exit status.
const STATUS: &str = "status";

/// A machine to start.
pub(crate) struct Sealed {
    pub(crate) kernel: Kernel,
    /// In QEMU's format: "3G".
    pub(crate) memory: String,
    /// Time limit from start to end.
    pub(crate) limit: Duration,
    /// The CPU spins instead of sleeping.
    pub(crate) idle_poll: bool,
    /// Plugin in QEMU's format: a file and its arguments.
    pub(crate) plugin: Option<String>,
}

/// Receives the output of a machine.
pub(crate) struct Out<'a> {
    pub(crate) text: &'a mut dyn FnMut(&[u8]),
    /// Receives name and contents of a file.
    pub(crate) file: &'a mut dyn FnMut(&str, &[u8]) -> Result<()>,
}

/// The files of a machine that can run `programs`; the caller can add more.
pub(crate) fn tree(lab: &Lab, kernel: &Kernel, programs: &[Program]) -> Result<Tree> {
    let mut tree = Tree::default();
    let staged = tempfile::Builder::new().prefix("staged-").tempdir_in(&lab.cache)?;
    programs::stage(programs, staged.path())?;
    for program in programs {
        tree.program(&program.name, &staged.path().join(&program.name))?;
    }
    for name in PROGRAMS {
        tree.program(name, &sh::which(name)?)?;
    }
    for (name, path) in PEERS.iter().filter_map(|name| Some((name, sh::which(name).ok()?))) {
        tree.program(name, &path)?;
    }
    for path in ETC {
        let from = Path::new("/").join(path);
        tree.file(path, std::fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?);
    }
    tree.modules(kernel, &MODULES)?;
    ["dev", "proc", "sys", "run", "tmp", "root", "var/lock"].iter().for_each(|path| tree.directory(path));
    ["sbin", "usr/bin", "usr/sbin"].iter().for_each(|path| tree.link(path, "/bin"));
    tree.link("etc/mtab", "/proc/self/mounts");
    tree.file("etc/passwd", "root:x:0:0::/root:/bin/sh\n");
    tree.file("etc/group", "root:x:0:\n");
    Ok(tree)
}

impl Sealed {
    /// Starts the machine with the files of `tree`, runs the shell line `command`, and passes its
    /// output on. Returns the exit status of the command.
    pub(crate) fn run(&self, lab: &Lab, mut tree: Tree, command: &str, out: Out<'_>) -> Result<i32> {
        tree.script("init", &init(command));
        let session = tempfile::Builder::new().prefix("session-").tempdir_in(&lab.cache)?;
        let initrd = session.path().join("initrd");
        let written = File::create(&initrd).and_then(|file| tree.write(&mut BufWriter::new(file)));
        written.with_context(|| format!("cannot write {}: is the disk full?", initrd.display()))?;
        drop(tree);
        let open =
            |name| File::options().create(true).append(true).read(true).open(session.path().join(name));
        let (mut text, mut files) = (open(TEXT)?, open(FILES)?);
        let mut machine = self.start(session.path())?;
        let (start, mut inbox, mut status) = (Instant::now(), Inbox::default(), None);
        let outcome = loop {
            std::thread::sleep(sh::TICK);
            // Before reading the lines, so that the last output is not lost.
            let gone = machine.0.try_wait()?;
            let mut said = Vec::new();
            text.read_to_end(&mut said)?;
            (out.text)(&said);
            files.read_to_end(&mut inbox.0)?;
            while let Some((name, bytes)) = inbox.take() {
                if name == STATUS {
                    status = String::from_utf8_lossy(&bytes).trim().parse().ok();
                } else {
                    (out.file)(&name, &bytes)?;
                }
            }
            if let Some(status) = status {
                return Ok(status);
            }
            sh::interrupted()?;
            if let Some(status) = gone {
                break format!("the sealed machine ended ({status}) before its command did");
            }
            if start.elapsed() > self.limit {
                break format!(
                    "the sealed machine exceeded its time limit of {} s and was killed (see --timeout)",
                    self.limit.as_secs()
                );
            }
        };
        Err(last_words(&outcome, session.path()))
    }

    fn start(&self, session: &Path) -> Result<Machine> {
        // `timeout` kills it even if this program is killed.
        let mut boot = Command::new("timeout");
        boot.arg("--signal=KILL").arg((self.limit.as_secs() + 10).to_string()).arg("qemu-system-x86_64");
        boot.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
        boot.args(["-cpu", "max", "-smp", "1", "-m", &self.memory]);
        boot.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        // A clock and randomness that do not depend on the host.
        boot.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm", "-seed", "1"]);
        boot.args(self.plugin.iter().flat_map(|plugin| ["-plugin", plugin]));
        for line in [TEXT, FILES] {
            // QEMU's syntax doubles a comma in a value.
            let path = session.join(line).to_string_lossy().replace(',', ",,");
            boot.arg("-chardev").arg(format!("file,id={line},path={path}"));
            boot.arg("-serial").arg(format!("chardev:{line}"));
        }
        boot.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(session.join("initrd"));
        // Fixed addresses do not differ between revisions.
        let parameters =
            "console=ttyS0 quiet panic=-1 nokaslr norandmaps tsc=reliable audit=off cryptomgr.notests";
        boot.arg("-append").arg(format!("{parameters}{}", if self.idle_poll { " idle=poll" } else { "" }));
        let said = File::create(session.join("qemu"))?;
        boot.process_group(0).stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said);
        Ok(Machine(boot.spawn().context("cannot start QEMU: run `cargo lab setup`")?))
    }
}

/// The init script. It never ends: once the status is known, QEMU is killed.
fn init(command: &str) -> String {
    format!(
        "#!/bin/sh\n\
         export PATH=/bin HOME=/root LAB_VM=1 {variable}=/dev/ttyS1\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         mount -t tmpfs run /run; mount -t tmpfs tmp /tmp\n\
         stty raw </dev/ttyS0; stty raw </dev/ttyS1\n\
         ulimit -n 1048576\n\
         modprobe -q ublk_drv\n\
         {{ {command}; echo $? >/run/status; }} 2>&1 </dev/null | cat >/dev/ttyS0\n\
         read status </run/status\n\
         printf '{STATUS} %s\\n%s' ${{#status}} $status >/dev/ttyS1\n\
         cat /dev/ttyS0\n",
        variable = handover::VARIABLE,
    )
}

/// An error with the last output of the machine and of QEMU.
fn last_words(what: &str, session: &Path) -> anyhow::Error {
    let read = |name: &str| std::fs::read(session.join(name)).unwrap_or_default();
    let said = [read(TEXT), read("qemu")].concat();
    anyhow!("{what}; it said:\n  {}", vm::tail(&String::from_utf8_lossy(&said)))
}

/// QEMU; dropping it kills it.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        vm::kill(&mut self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sh_accepts_the_init_script() {
        let script = init("loopbench run --out '/a b'");
        let mut sh = Command::new("sh");
        sh::capture(sh.args(["-n", "-c", &script]), Duration::from_secs(10)).unwrap();
        assert!(script.contains("{ loopbench run --out '/a b'; echo $? >/run/status; }"));
        assert!(script.contains("'status %s\\n%s' ${#status} $status"));
    }
}
