// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A throw-away VM: a kernel with ublk, and this machine's files read-only.
//!
//! Debian's kernel has virtio_console as a module, so virtme-ng returns neither output nor status:
//! both go through a shared directory, the session. CPUs are emulated, because a nested or
//! restricted /dev/kvm often cannot run a stock kernel, and because only emulation counts
//! instructions.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process_group};

use loopbench::sh;

use crate::kernel::Kernel;
use crate::programs::{self, Program};
use crate::setup::Lab;

use crate::cache;

/// Receives output piece by piece.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]);

/// Kind of CPUs of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Two CPUs: for tests, and for ratios within interleaved rounds
    Smp,
    /// One CPU on which an instruction takes 1 ns: repeats exactly in `bench` and `gate`
    Icount,
}

impl Mode {
    /// Name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Smp => "smp",
            Mode::Icount => "icount",
        }
    }
}

/// A VM to boot.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    pub(crate) kernel: Kernel,
    pub(crate) mode: Mode,
    /// In QEMU's format: "3G".
    pub(crate) memory: String,
    /// Raw images that the guest sees as virtio disks, /dev/vda first, with cache mode
    /// writethrough.
    pub(crate) disks: Vec<PathBuf>,
    /// Directories that the guest can write to, at the same paths.
    pub(crate) shares: Vec<PathBuf>,
    /// Time limit from start to end.
    pub(crate) limit: Duration,
    /// CPUs run in parallel, for measurements, even if the emulator is unsafe then
    /// ([`takes_turns`]).
    pub(crate) at_once: bool,
    /// CPUs spin instead of sleeping, so that wake-ups cost about as much as on hardware.
    pub(crate) idle_poll: bool,
}

/// Default time limit of a VM.
pub(crate) const LIMIT: Duration = Duration::from_secs(580);

/// Time limit of a boot, which takes 15 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(150);
const BOOTS_MAX: u32 = 3;

/// A running VM; dropping it kills it.
pub(crate) struct Running {
    child: Child,
    session: tempfile::TempDir,
    output: File,
    start: Instant,
    limit: Duration,
}

impl Vm {
    /// A VM with default settings.
    pub(crate) fn new(kernel: Kernel, mode: Mode) -> Vm {
        Vm {
            kernel,
            mode,
            memory: "3G".into(),
            disks: Vec::new(),
            shares: Vec::new(),
            limit: LIMIT,
            at_once: false,
            idle_poll: false,
        }
    }

    /// Boots the VM, runs the shell line `command` with `programs` on PATH, and passes its output
    /// to `sink`. Returns the exit status of the command.
    pub(crate) fn run(&self, lab: &Lab, programs: &[Program], command: &str, sink: Sink<'_>) -> Result<i32> {
        let mut running = self.start(lab, programs, command)?;
        loop {
            if let Some(status) = running.turn(sink)? {
                return Ok(status);
            }
        }
    }

    /// Boots the VM and returns once `command` has started.
    pub(crate) fn start(&self, lab: &Lab, programs: &[Program], command: &str) -> Result<Running> {
        for _ in 1..BOOTS_MAX {
            // Parallel CPUs may crash while the kernel patches itself during the boot
            // (`takes_turns`). After the boot, a VM that dies is a failure.
            match self.boot(lab, programs, command)?.wait_until_booted() {
                Ok(running) => return Ok(running),
                Err(error) => eprintln!("lab: {error:#}\nlab: booting the VM again"),
            }
            sh::interrupted()?;
        }
        self.boot(lab, programs, command)?.wait_until_booted()
    }

    fn boot(&self, lab: &Lab, programs: &[Program], command: &str) -> Result<Running> {
        let session = tempfile::Builder::new()
            .prefix("session-")
            .tempdir_in(&lab.cache)
            .context("cannot make a session")?;
        programs::stage(programs, &session.path().join("bin"))?;
        std::fs::copy(sh::which("fio")?, session.path().join("bin/fio")).context("cannot copy fio")?;
        std::fs::write(session.path().join("command"), command)?;
        let script = session.path().join("guest");
        std::fs::write(&script, self.guest_script(session.path(), lab))?;
        let console = File::create(session.path().join("console"))?;
        let output =
            File::options().create(true).append(true).read(true).open(session.path().join("output"))?;

        // `timeout` kills the VM even if this program is killed. It leads a process group, so that
        // all processes of the VM can be killed together.
        let mut boot = Command::new("timeout");
        boot.arg("--signal=KILL").arg((self.limit.as_secs() + 10).to_string()).arg(lab.vng());
        self.arguments(session.path(), &mut boot)?;
        boot.arg("--").arg(format!("sh {}", sh::quote(&[script.to_string_lossy()])));
        boot.process_group(0).stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        // virtme-ng finds its helpers, depmod and others on PATH.
        let path = std::env::var("PATH").unwrap_or_default();
        boot.env("PATH", format!("{}/venv/bin:{path}:/usr/sbin:/sbin", lab.cache.display()));
        let child = boot.spawn().context("cannot start virtme-ng: run `cargo lab setup`")?;
        Ok(Running { child, session, output, start: Instant::now(), limit: self.limit })
    }

    fn arguments(&self, session: &Path, boot: &mut Command) -> Result<()> {
        boot.arg("--run").arg(&self.kernel.image).args([
            "--disable-kvm",
            "--force-9p",
            "--verbose",
            "--user",
            "root",
        ]);
        boot.args(["--memory", &self.memory]).arg("--rwdir").arg(session);
        match self.mode {
            Mode::Smp => boot.args(["--cpus", "2"]),
            Mode::Icount => boot.args(["--cpus", "1", "--qemu-opts=-icount shift=0,sleep=off"]),
        };
        if self.mode == Mode::Smp && !self.at_once {
            if takes_turns()? {
                boot.arg("--qemu-opts=-accel tcg,thread=single");
            }
            // The emulator caches translated code by virtual address: without ASLR a program starts
            // in a third of the time.
            boot.args(["--append", "norandmaps no5lvl"]);
        }
        // Self-tests of the kernel's ciphers take more than a second of the boot.
        boot.args(["--append", "cryptomgr.notests"]);
        if self.idle_poll {
            boot.args(["--append", "idle=poll"]);
        }
        for share in &self.shares {
            let share = share.canonicalize().with_context(|| format!("cannot share {}", share.display()))?;
            if cache::hidden_in_guest(&share) {
                bail!("cannot share {}: a VM has its own files there", share.display());
            }
            boot.arg("--rwdir").arg(share);
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let disk =
                disk.canonicalize().with_context(|| format!("cannot use {} as a disk", disk.display()))?;
            let path = disk.to_string_lossy().replace(',', ",,");
            boot.arg(format!(
                "--qemu-opts=-drive file={path},format=raw,cache=writethrough,if=none,id=lab{index} \
                 -device virtio-blk-pci,drive=lab{index},serial=lab{index}"
            ));
        }
        Ok(())
    }

    /// The guest's script: copies programs to memory, since the shared root is slow, and runs the
    /// command.
    fn guest_script(&self, session: &Path, lab: &Lab) -> String {
        let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
        let (session, here) = (sh::quote(&[session.to_string_lossy()]), sh::quote(&[here.to_string_lossy()]));
        let tools = sh::quote(&[lab.tools().to_string_lossy()]);
        let (kernel, mode) = (self.kernel.line.name(), self.mode.name());
        format!(
            "echo >{session}/booted\n\
             exec >>{session}/output 2>&1 </dev/null\n\
             mkdir -p /run/lab && cp {session}/bin/* {tools}/* /run/lab/\n\
             export PATH=/run/lab:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
             export HOME=/root LAB_VM=1 LAB_KERNEL={kernel} LAB_MODE={mode} LAB_CPUS=$(nproc)\n\
             ulimit -n 1048576\n\
             modprobe -q -a ublk_drv virtio_blk\n\
             cd {here} 2>/dev/null || cd /\n\
             bash {session}/command\n\
             echo $? >{session}/status.new && mv {session}/status.new {session}/status\n"
        )
    }
}

/// Whether QEMU must run CPUs in turns: before 8.1 one CPU may translate code while another writes
/// it, and then runs stale code. The kernel patches itself whenever a static key changes, so any
/// program can crash it; toggling sched_schedstats does within seconds (`Oops: int3`). QEMU's
/// commit deba78709ae8, "Always lock pages before translation", fixed it.
pub(crate) fn takes_turns() -> Result<bool> {
    let said = sh::capture(Command::new("qemu-system-x86_64").arg("--version"), VERSION_LIMIT)?;
    Ok(version(&said).is_none_or(|version| version < (8, 1)))
}

const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// Parses "QEMU emulator version 7.2.22 (Debian …)".
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split("version ").nth(1)?.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

impl Running {
    /// Waits briefly and passes new output of the guest on. Returns the exit status once the
    /// command has ended.
    pub(crate) fn turn(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<Option<i32>> {
        std::thread::sleep(sh::TICK);
        let status = std::fs::read_to_string(self.session.path().join("status")).ok();
        let gone = self.child.try_wait()?.is_some();
        self.pass_on(sink)?;
        if let Some(status) = status {
            let status = status.trim().parse().context("the VM returned no exit status")?;
            return Ok(Some(status));
        }
        if gone {
            return Err(self.console("the VM ended before its command did"));
        }
        sh::interrupted()?;
        if self.start.elapsed() > self.limit {
            return Err(self.console(&format!(
                "the VM exceeded its time limit of {} s and was killed (see --timeout)",
                self.limit.as_secs()
            )));
        }
        Ok(None)
    }

    /// Kills the VM like a power cut: no process of the guest is notified.
    pub(crate) fn kill(&mut self) {
        kill(&mut self.child);
    }

    fn wait_until_booted(mut self) -> Result<Running> {
        while !self.session.path().join("booted").exists() {
            if self.child.try_wait()?.is_some() {
                return Err(self.console("the VM ended while it booted"));
            }
            if self.start.elapsed() > BOOT_LIMIT {
                return Err(self.console(&format!("the VM did not boot within {} s", BOOT_LIMIT.as_secs())));
            }
            sh::interrupted()?;
            std::thread::sleep(sh::TICK);
        }
        Ok(self)
    }

    /// Passes new output of the guest on.
    pub(crate) fn pass_on(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut buffer = Vec::new();
        self.output.read_to_end(&mut buffer)?;
        if !buffer.is_empty() {
            sink(&buffer);
        }
        Ok(())
    }

    /// An error with the last lines of the console.
    fn console(&self, what: &str) -> anyhow::Error {
        let said = std::fs::read(self.session.path().join("console")).unwrap_or_default();
        anyhow!("{what}; its console said:\n  {}", tail(&String::from_utf8_lossy(&said)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Kills `child` and its process group.
pub(crate) fn kill(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

/// The last non-empty lines, for an error.
pub(crate) fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(30)..].join("\n  ")
}

/// Writes output to standard output.
pub(crate) fn to_stdout(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_emulators_are_safe() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003";
        assert_eq!(version(debian), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.8"), Some((10, 0)));
        assert_eq!(version("no such thing"), None);
    }
}
