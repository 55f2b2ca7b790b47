// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab setup`: installs what the lab needs. If nothing is missing, it returns at once.
//!
//! Knows Debian's packages and the virtual environment; kernels are in `kernel`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use loopbench::sh;

use crate::kernel::{self, Line};

use crate::cache;

/// A Debian package and its purpose.
pub(crate) type DebianPackage = (&'static str, &'static str);

/// Packages for VMs.
const PACKAGES: [DebianPackage; 18] = [
    ("qemu-system-x86", "the VM"),
    ("busybox-static", "the VM's init"),
    ("cpio", "the VM's initramfs"),
    ("file", "the kernel's version"),
    ("kmod", "the kernel's modules"),
    ("xz-utils", "the kernel's modules"),
    ("binutils", "strip, for programs that are copied into the VM"),
    ("fio", "load generator"),
    ("xfsprogs", "XFS"),
    ("e2fsprogs", "ext4"),
    ("gdisk", "partition tables"),
    ("fdisk", "partition tables, sfdisk"),
    ("util-linux", "losetup, blkdiscard, fallocate"),
    ("mount", "mount, losetup"),
    ("libclang-dev", "building libublk"),
    ("python3-venv", "virtme-ng"),
    ("systemd-container", "systemd-nspawn"),
    ("crun", "container runtime"),
];

/// More packages, for tests and measurements; the demo does not need them.
const MORE_PACKAGES: [DebianPackage; 19] = [
    ("fuse3", "FUSE"),
    ("fuse2fs", "FUSE driver for ext4"),
    ("squashfuse", "FUSE driver for squashfs"),
    ("fuseiso", "FUSE driver for iso9660"),
    ("fusefat", "FUSE driver for vfat"),
    ("ntfs-3g", "FUSE driver for ntfs, mkfs.ntfs"),
    ("genisoimage", "images of iso9660"),
    ("squashfs-tools", "images of squashfs"),
    ("erofs-utils", "images of erofs"),
    ("dosfstools", "images of vfat"),
    ("cryptsetup-bin", "encrypted images, cryptsetup and veritysetup"),
    ("python3-jinja2", "vmdb2, a builder of images"),
    ("python3-yaml", "vmdb2, a builder of images"),
    ("parted", "partitions, parted and partprobe"),
    ("cloud-guest-utils", "partitions, growpart"),
    ("runc", "a second container runtime"),
    ("podman", "containers as most users start them"),
    ("qemu-utils", "qemu-nbd and qemu-storage-daemon, for comparison"),
    ("chromium", "tests of reports in a browser"),
];

/// Packages that are unpacked but not installed: udev and packages that depend on it, because VMs share
/// this machine's root, and a service.
const UNPACKED: [&str; 7] =
    ["kpartx", "lvm2", "libdevmapper-event1.02.1", "mdadm", "prometheus", "udev", "vmdb2"];
/// Programs of these packages that VMs have on PATH. Not udevadm: programs that find it wait for a
/// udevd.
const UNPACKED_PROGRAMS: [&str; 11] = [
    "kpartx",
    "lvm",
    "pvcreate",
    "vgcreate",
    "vgchange",
    "lvcreate",
    "mdadm",
    "prometheus",
    "promtool",
    "systemd-udevd",
    "vmdb2",
];
/// Directory of the unpacked packages. The number changes with these lists.
const UNPACKED_HOME: &str = "tools-4";

/// In pip's format.
pub(crate) const VIRTME: &str = "virtme-ng==1.42";
const INSTALL_LIMIT: Duration = Duration::from_secs(1200);

/// A machine on which VMs can be booted.
#[derive(Clone, Debug)]
pub(crate) struct Lab {
    /// Directory of downloads.
    pub(crate) cache: PathBuf,
}

impl Lab {
    /// The program that boots VMs.
    pub(crate) fn vng(&self) -> PathBuf {
        self.cache.join("venv/bin/vng")
    }

    /// Directory of programs that only VMs have on PATH.
    pub(crate) fn tools(&self) -> PathBuf {
        self.cache.join(UNPACKED_HOME).join("on-path")
    }

    /// The kernel of `line`.
    pub(crate) fn kernel(&self, line: Line) -> Result<kernel::Kernel> {
        match kernel::find(&self.cache, line) {
            Some(kernel) => Ok(kernel),
            None => bail!("kernel {} is missing: run `cargo lab setup`", line.name()),
        }
    }
}

/// Installs what a VM needs, and prints each step to standard error.
pub(crate) fn ensure() -> Result<Lab> {
    ensure_with(&PACKAGES)
}

/// Installs what VMs, tests and measurements need.
pub(crate) fn ensure_all() -> Result<Lab> {
    ensure_with(&[&PACKAGES[..], &MORE_PACKAGES].concat())
}

fn ensure_with(packages: &[DebianPackage]) -> Result<Lab> {
    if !is_debian() {
        bail!(
            "the lab installs packages on Debian only: run it on Debian 12 or 13, for instance in a container"
        );
    }
    let lab = Lab { cache: cache::directory()? };
    if complete(&lab, packages)? {
        return Ok(lab);
    }
    let _turn = cache::lock(&lab.cache)?;
    install(packages)?;
    virtual_environment(&lab)?;
    unpack(&lab)?;
    for line in Line::ALL {
        if kernel::find(&lab.cache, line).is_none() {
            eprintln!("setup: fetching and unpacking Debian's kernel {} (about 110 MB)", line.name());
            let kernel = kernel::fetch(&lab.cache, line)?;
            eprintln!("setup: kernel {} is ready", kernel.release);
        }
    }
    Ok(lab)
}

/// What `ensure` would install or fetch.
pub(crate) fn missing() -> Result<Vec<String>> {
    // Elsewhere `ensure` fails with advice.
    if !is_debian() {
        return Ok(Vec::new());
    }
    let lab = Lab { cache: cache::directory()? };
    let mut missing = Vec::new();
    let packages: Vec<&str> = missing_packages(&PACKAGES)?.iter().map(|(name, _)| *name).collect();
    if !packages.is_empty() {
        missing.push(format!("installs {}", packages.join(", ")));
    }
    if !has_virtme(&lab) {
        missing.push(format!("installs {VIRTME} below {}", lab.cache.display()));
    }
    if !lab.tools().exists() {
        missing.push(format!("unpacks {}", UNPACKED.join(", ")));
    }
    let kernels: Vec<&str> = Line::ALL
        .into_iter()
        .filter(|line| kernel::find(&lab.cache, *line).is_none())
        .map(Line::name)
        .collect();
    if !kernels.is_empty() {
        missing.push(format!("fetches Debian's kernels {} (110 MB each)", kernels.join(" and ")));
    }
    Ok(missing)
}

/// Installs `packages` unless they are installed.
pub(crate) fn require(packages: &[DebianPackage]) -> Result<()> {
    if !is_debian() {
        bail!("this command needs Debian's tools: run it on Debian 12 or 13, for instance in a container");
    }
    let _turn = cache::lock(&cache::directory()?)?;
    install(packages)
}

fn is_debian() -> bool {
    Path::new("/etc/debian_version").exists() && sh::which("dpkg-query").is_ok()
}

fn complete(lab: &Lab, packages: &[DebianPackage]) -> Result<bool> {
    let kernels = Line::ALL.iter().all(|line| kernel::find(&lab.cache, *line).is_some());
    Ok(kernels && has_virtme(lab) && lab.tools().exists() && missing_packages(packages)?.is_empty())
}

/// Removes the kernels, so that the next set-up fetches the newest ones.
pub(crate) fn forget_kernels() -> Result<()> {
    let cache = cache::directory()?;
    let _turn = cache::lock(&cache)?;
    let kernels = cache.join(kernel::HOME);
    if kernels.exists() {
        std::fs::remove_dir_all(kernels)?;
    }
    Ok(())
}

/// Prints kernels and directories.
pub(crate) fn report(lab: &Lab) -> Result<()> {
    for line in Line::ALL {
        println!("kernel {:<5} {}", line.name(), lab.kernel(line)?.release);
    }
    println!("{:<12} {}", "virtme-ng", lab.vng().display());
    println!("{:<12} {}", "files", lab.cache.display());
    println!("ready: try `cargo lab demo`");
    Ok(())
}

fn install(packages: &[DebianPackage]) -> Result<()> {
    let missing = missing_packages(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let list = names.join(" ");
    if !rustix::process::geteuid().is_root() {
        bail!("packages are missing: run sudo apt-get install {list}");
    }
    for (package, purpose) in &missing {
        eprintln!("setup: installing {package} ({purpose})");
    }
    apt(&["update"])?;
    let mut words = vec!["install", "-y", "--no-install-recommends"];
    words.extend(names);
    apt(&words)
}

fn apt(words: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(["-qq", "-o", "DPkg::Lock::Timeout=120"])
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive");
    sh::capture(&mut command, INSTALL_LIMIT).map(drop)
}

fn unpack(lab: &Lab) -> Result<()> {
    if lab.tools().exists() {
        return Ok(());
    }
    eprintln!("setup: unpacking {}", UNPACKED.join(" "));
    // Container images have no package lists.
    if rustix::process::geteuid().is_root() {
        apt(&["update"])?;
    }
    let home = lab.cache.join(UNPACKED_HOME);
    let root = home.join("root");
    std::fs::create_dir_all(&root)?;
    let debs = tempfile::Builder::new().prefix("debs-").tempdir_in(&home)?;
    let mut download = Command::new("apt-get");
    download.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]).args(UNPACKED);
    sh::capture(download.current_dir(debs.path()), INSTALL_LIMIT)?;
    for deb in std::fs::read_dir(debs.path())? {
        sh::capture(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&root), INSTALL_LIMIT)?;
    }
    // A link to /bin/udevadm on Debian 12, where it leads out of this directory.
    for dir in ["lib/systemd", "usr/lib/systemd"] {
        let link = root.join(dir).join("systemd-udevd");
        if let Ok(target) = std::fs::read_link(&link)
            && let Ok(inside) = target.strip_prefix("/")
        {
            std::fs::remove_file(&link)?;
            std::os::unix::fs::symlink(root.join(inside), &link)?;
        }
    }
    // Last and atomically: this directory marks a complete set-up.
    let fresh = tempfile::Builder::new().prefix("on-path-").tempdir_in(&home)?;
    for name in UNPACKED_PROGRAMS {
        let script = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH=$LD_LIBRARY_PATH:$(echo {root}/lib/*-linux-gnu {root}/usr/lib/*-linux-gnu | tr ' ' :)\n\
             export LD_LIBRARY_PATH PYTHONPATH={root}/usr/lib/python3/dist-packages\n\
             for file in {root}/sbin/{name} {root}/usr/sbin/{name} {root}/usr/bin/{name} \
                 {root}/lib/systemd/{name} {root}/usr/lib/systemd/{name}; do [ -x $file ] && exec $file \"$@\"; done\n",
            root = root.display()
        );
        let path = fresh.path().join(name);
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    }
    std::fs::set_permissions(fresh.path(), std::fs::Permissions::from_mode(0o755))?;
    std::fs::rename(fresh.keep(), lab.tools())?;
    Ok(())
}

fn missing_packages(packages: &[DebianPackage]) -> Result<Vec<DebianPackage>> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Status} ${Package}\n"]).args(packages.iter().map(|(name, _)| name));
    // dpkg-query fails for unknown packages.
    let output = sh::output(&mut query, Duration::from_secs(60))?;
    Ok(not_installed(packages, &String::from_utf8_lossy(&output.stdout)))
}

/// Packages that are not installed according to lines of "status name".
fn not_installed(packages: &[DebianPackage], status: &str) -> Vec<DebianPackage> {
    let installed: Vec<&str> = status.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
    packages.iter().filter(|(name, _)| !installed.contains(name)).copied().collect()
}

fn virtual_environment(lab: &Lab) -> Result<()> {
    let home = lab.cache.join("venv");
    if has_virtme(lab) {
        return Ok(());
    }
    eprintln!("setup: installing {VIRTME} into {}", home.display());
    if home.exists() {
        std::fs::remove_dir_all(&home)?;
    }
    // Debian's Python: another one may be in a directory that a guest does not see.
    let python = if Path::new("/usr/bin/python3").exists() { "/usr/bin/python3" } else { "python3" };
    sh::capture(Command::new(python).args(["-m", "venv"]).arg(&home), INSTALL_LIMIT)?;
    sh::capture(Command::new(home.join("bin/pip")).args(["install", "--quiet", VIRTME]), INSTALL_LIMIT)?;
    // Last: an environment without this file is made again.
    std::fs::write(home.join("installed"), VIRTME)?;
    Ok(())
}

fn has_virtme(lab: &Lab) -> bool {
    let mark = lab.cache.join("venv/installed");
    std::fs::read_to_string(mark).is_ok_and(|what| what == VIRTME) && lab.vng().exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installs_only_missing_packages() {
        let all: String = PACKAGES.iter().map(|(name, _)| format!("installed {name}\n")).collect();
        assert!(not_installed(&PACKAGES, &all).is_empty());
        let without = all.replace("installed fio\n", "config-files fio\n").replace("installed cpio\n", "");
        let missing: Vec<&str> = not_installed(&PACKAGES, &without).iter().map(|(name, _)| *name).collect();
        assert_eq!(missing, ["cpio", "fio"]);
    }
}
