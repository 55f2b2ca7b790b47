// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Debian machine with its own kernel and systemd, in which packages are tried out.
//!
//! ```text
//!  DebianRoot ── image: kernel, initrd, root file system; made once, never written
//!  payload: packages, script ── tar ── second disk
//!  QEMU ── first serial line: kernel and systemd; second: output of the script
//! ```
//! Knows Debian, QEMU and the files that it passes in; the script `machine.sh` knows the packages.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use loopbench::sh;

use crate::debian_root::DebianRoot;
use crate::{cache, setup, vm};

/// The system of the machine. A new list or set-up needs a new name.
const SYSTEM: &str = "trixie-machine-1";
const SUITE: &str = "trixie";
/// What a user of Debian has, and what the pages ask for.
const PACKAGES: [&str; 23] = [
    "linux-image-amd64",
    "initramfs-tools",
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "kmod",
    "apparmor",
    "e2fsprogs",
    "fdisk",
    "mount",
    "procps",
    "bsdutils",
    "sudo",
    "fuse3",
    "fuse2fs",
    "squashfuse",
    "podman",
    "netavark",
    "nftables",
    "crun",
    "runc",
    "skopeo",
];
/// Starts the script when the machine is up. It is no part of a session, as a service of the user
/// is not.
const UNIT: &str = "[Unit]\n\
    Description=Script of the lab\n\
    After=basic.target\n\
    [Service]\n\
    ExecStartPre=stty raw -F /dev/ttyS1\n\
    ExecStart=/bin/sh -c 'mkdir /run/lab && tar -xf /dev/vdb -C /run/lab && cd /run/lab && \
    exec bash ./script >/dev/ttyS1 2>&1'\n";
/// What an emulated CPU would take minutes for: unpacking modules that the boot does not need, and
/// compiling AppArmor's hundred profiles of other programs.
const SET_UP: &str = "\
    ln -s ../lab.service /etc/systemd/system/multi-user.target.wants/
    echo 0123456789abcdef0123456789abcdef > /etc/machine-id
    useradd --create-home --shell /bin/bash user
    rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
    apt-get clean; rm -rf /var/lib/apt/lists/*
    find /etc/apparmor.d -maxdepth 1 -type f -delete
    echo MODULES=list > /etc/initramfs-tools/conf.d/lab
    printf 'virtio_pci\\nvirtio_blk\\next4\\n' >> /etc/initramfs-tools/modules
    update-initramfs -u";
const SCRIPT: &str = include_str!("machine.sh");
/// Files of the image.
const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd.img";
const DISK: &str = "root.img";
/// Names of the two serial lines.
const CONSOLE: &str = "console";
const OUTPUT: &str = "output";
/// The last line of the script's output, with its exit status.
const STATUS: &str = "lab-status ";
/// In all; most of it is the emulation.
const LIMIT: Duration = Duration::from_secs(2400);
const PACK_LIMIT: Duration = Duration::from_secs(600);

/// Boots the machine with `files` in its directory /run/lab, and runs the script there.
pub(super) fn run(files: &[&Path]) -> Result<()> {
    setup::require(&[("qemu-system-x86", "the machine"), ("e2fsprogs", "its root file system")])?;
    let image = Image::ensure()?;
    let work = tempfile::Builder::new().prefix("machine-").tempdir_in(cache::directory()?)?;
    let payload = payload(work.path(), files)?;
    let mut machine = Machine::start(&image, &payload, work.path())?;
    match machine.wait()? {
        0 => Ok(()),
        status => Err(machine.error(&format!("the script in the machine fails with status {status}"))),
    }
}

/// The files of the machine that no run changes.
struct Image(PathBuf);

impl Image {
    fn ensure() -> Result<Image> {
        let system = DebianRoot::ensure(SYSTEM, SUITE, &PACKAGES)?;
        let cache = cache::directory()?;
        let home = cache.join(format!("{SYSTEM}.image"));
        let _turn = cache::lock(&cache)?;
        if home.exists() {
            return Ok(Image(home));
        }
        eprintln!("setup: making the disk of a machine with Debian {SUITE} in {}", home.display());
        let system = system.copy()?;
        fs::write(system.at("/etc/systemd/system/lab.service"), UNIT)?;
        fs::write(system.at("/etc/hostname"), "lab\n")?;
        system.run(SET_UP)?;
        let fresh = tempfile::Builder::new().prefix("image-").tempdir_in(&cache)?;
        for name in [KERNEL, INITRD] {
            let from = newest(&system.at("/boot"), name)?;
            fs::copy(&from, fresh.path().join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        let disk = fresh.path().join(DISK);
        let mut mkfs = Command::new(sh::which("mkfs.ext4")?);
        mkfs.args(["-q", "-F", "-E", "lazy_itable_init=1,nodiscard", "-d"]).arg(system.at("/"));
        sh::capture(mkfs.arg(&disk).arg("4G"), PACK_LIMIT)?;
        // Last and atomically: this directory marks a complete image.
        fs::rename(fresh.keep(), &home)?;
        Ok(Image(home))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// The file in `boot` that begins with `name`; the system has one kernel.
fn newest(boot: &Path, name: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(boot)?.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)));
    found.sort();
    found.pop().with_context(|| format!("the system has no {name}: its kernel was not installed"))
}

/// Packs `files` and the script into a disk.
fn payload(work: &Path, files: &[&Path]) -> Result<PathBuf> {
    let (disk, script) = (work.join("payload"), work.join("script"));
    fs::write(&script, SCRIPT)?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--owner=0", "--group=0", "--file"]).arg(&disk);
    for file in files.iter().copied().chain([script.as_path()]) {
        let name = file.file_name().with_context(|| format!("{} has no name", file.display()))?;
        tar.arg("--directory").arg(file.parent().unwrap_or(Path::new("/"))).arg(name);
    }
    sh::capture(&mut tar, PACK_LIMIT)?;
    Ok(disk)
}

/// A running machine; dropping it kills it.
struct Machine {
    child: Child,
    output: File,
    console: PathBuf,
    start: Instant,
}

impl Machine {
    fn start(image: &Image, payload: &Path, work: &Path) -> Result<Machine> {
        // `timeout` kills it even if this program is killed.
        let mut boot = Command::new("timeout");
        boot.arg("--signal=KILL").arg((LIMIT.as_secs() + 10).to_string()).arg("qemu-system-x86_64");
        boot.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
        boot.args(["-cpu", "max", "-smp", "2", "-m", "2G", "-device", "virtio-rng-pci"]);
        boot.args(["-accel", if vm::takes_turns()? { "tcg,thread=single" } else { "tcg" }]);
        // QEMU's syntax doubles a comma in a value.
        let quoted = |path: &Path| path.to_string_lossy().replace(',', ",,");
        // Writes to the first disk go to a temporary file.
        let disks = [(image.at(DISK), "snapshot=on"), (payload.to_owned(), "readonly=on")];
        for (index, (disk, how)) in disks.iter().enumerate() {
            boot.arg("-drive").arg(format!("file={},format=raw,{how},if=none,id=disk{index}", quoted(disk)));
            boot.arg("-device").arg(format!("virtio-blk-pci,drive=disk{index}"));
        }
        for line in [CONSOLE, OUTPUT] {
            File::create(work.join(line))?;
            boot.arg("-chardev").arg(format!("file,id={line},path={}", quoted(&work.join(line))));
            boot.arg("-serial").arg(format!("chardev:{line}"));
        }
        boot.arg("-kernel").arg(image.at(KERNEL)).arg("-initrd").arg(image.at(INITRD));
        // As in `vm`, for speed.
        boot.args(["-append", "root=/dev/vda rw console=ttyS0 panic=-1 norandmaps no5lvl cryptomgr.notests"]);
        let said = File::create(work.join("qemu"))?;
        boot.env("TMPDIR", work).process_group(0).stdin(Stdio::null());
        let child = boot.stdout(said.try_clone()?).stderr(said).spawn();
        Ok(Machine {
            child: child.context("cannot start QEMU: run `cargo lab setup`")?,
            output: File::open(work.join(OUTPUT))?,
            console: work.join(CONSOLE),
            start: Instant::now(),
        })
    }

    /// Prints the output of the script, waits until the machine is off, and returns the status.
    fn wait(&mut self) -> Result<i32> {
        let mut said = Vec::new();
        loop {
            std::thread::sleep(sh::TICK);
            // Before reading the line, so that the last output is not lost.
            let gone = self.child.try_wait()?;
            let shown = said.len();
            self.output.read_to_end(&mut said)?;
            vm::to_stdout(&said[shown..]);
            if gone.is_some() {
                let said = String::from_utf8_lossy(&said);
                return status(&said)
                    .ok_or_else(|| self.error("the machine ended before the script in it did"));
            }
            sh::interrupted()?;
            if self.start.elapsed() > LIMIT {
                return Err(self.error(&format!("the machine is not off after {} s", LIMIT.as_secs())));
            }
        }
    }

    /// An error with the last lines of the console.
    fn error(&self, what: &str) -> anyhow::Error {
        let said = fs::read(&self.console).unwrap_or_default();
        anyhow!("{what}; its console said:\n  {}", vm::tail(&String::from_utf8_lossy(&said)))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        vm::kill(&mut self.child);
    }
}

/// The exit status in the output of the script.
fn status(said: &str) -> Option<i32> {
    said.lines().next_back()?.strip_prefix(STATUS)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_line_has_the_status() {
        assert_eq!(status("installed\nlab-status 0\n"), Some(0));
        assert_eq!(status("lab-status 3\r\n"), Some(3));
        assert_eq!(status("lab-status 0\nand more\n"), None);
        assert_eq!(status(""), None);
    }

    #[test]
    fn bash_accepts_the_script() {
        let mut bash = Command::new("bash");
        sh::capture(bash.args(["-n", "-c", SCRIPT]), PACK_LIMIT).unwrap();
        assert!(SCRIPT.contains(STATUS));
    }
}
