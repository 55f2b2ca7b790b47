// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tries packages out: lintian; install, use, upgrade, remove in small Debian systems.
//!
//! Systems are copies that are thrown away. No systemd runs in them, so services do not start, and
//! ublk is not used; `machine` has both. Knows package managers and the program's public commands
//! only.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use loopbench::sh;

use crate::debian_root::{DebianRoot, OLDEST, SUITES};
use crate::steps::Steps;

use super::{Built, CheckKind, PackageKind, Release, build, machine, oci, stage};

const LIMIT: Duration = Duration::from_secs(1200);
/// Directory of packages inside a system.
const PACKAGES: &str = "/root/packages";
/// Where package managers keep files of their own.
const OF_PACKAGE_MANAGERS: [&str; 7] =
    ["/proc", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg", "/var/lib/rpm", "/root/.rpmdb"];

/// The README's quick start, with a file of FUSE in the place of a block device.
const USE: &str = "\
    mknod -m 666 /dev/fuse c 10 229
    loopengine serve --backend fuse 2>/root/log & daemon=$!
    for try in $(seq 300); do [ -S /run/loopengine/control ] && break; sleep 0.1; done
    loopengine create /root/disk.img --size 10G
    device=$(loopengine attach /root/disk.img)
    printf 'written through the device' | dd of=$device conv=notrunc,fsync status=none
    loopengine list
    loopengine detach $device
    grep -q 'written through the device' /root/disk.img
    kill $daemon; wait $daemon || cat /root/log
    rm -rf /root/disk.img /root/log /run/loopengine /dev/fuse";

/// Tries all of `built` out; the first failure is an error.
pub(super) fn run(release: &Release, steps: &Steps, built: &Built, kind: CheckKind) -> Result<()> {
    let later = tempfile::tempdir()?;
    if kind != CheckKind::Machine {
        in_systems(release, steps, built, later.path())?;
    }
    if kind != CheckKind::Systems
        && let Some(package) = built.get(&PackageKind::Deb)
    {
        steps.begin("deb on a machine with its own kernel and systemd");
        let (newer, newest) = (newer_deb(release, later.path(), 2)?, newer_deb(release, later.path(), 3)?);
        let mut files = vec![package.as_path(), &newer, &newest];
        files.extend(built.get(&PackageKind::Oci).map(PathBuf::as_path));
        machine::run(&files)?;
    }
    Ok(())
}

fn in_systems(release: &Release, steps: &Steps, built: &Built, later: &Path) -> Result<()> {
    for (kind, package) in built {
        match kind {
            PackageKind::Deb => {
                steps.begin("lintian");
                lintian(package)?;
                let newer = newer_deb(release, later, 2)?;
                for suite in SUITES {
                    steps.begin(&format!("deb on Debian {suite}"));
                    deb(release, suite, package, &newer)?;
                }
            }
            PackageKind::Rpm => {
                steps.begin("rpm");
                rpm(release, package)?;
            }
            PackageKind::Tarball => {
                steps.begin("tarball");
                tarball(release, package)?;
            }
            PackageKind::Oci => {
                steps.begin("container image");
                image(release, package)?;
            }
        }
    }
    Ok(())
}

fn lintian(deb: &Path) -> Result<()> {
    let system = DebianRoot::ensure(build::SYSTEM, OLDEST, &build::SYSTEM_PACKAGES)?;
    let (directory, name) = split(deb)?;
    let line = format!(
        "cd {PACKAGES} && exec lintian --allow-root --fail-on error --tag-display-limit 0 {}",
        sh::quote(&[name])
    );
    let (status, _) = sh::tee(&mut system.shell(&[(directory, PACKAGES)], &line), LIMIT)?;
    ensure!(status.success(), "lintian finds errors in {}: see above", deb.display());
    println!("no errors");
    Ok(())
}

/// The same program with a higher version, in `directory`.
fn newer_deb(release: &Release, directory: &Path, revision: u32) -> Result<PathBuf> {
    let later = Release { out: directory.to_owned(), ..release.clone() };
    stage::deb(&later, &build::built_for_debian(release), &format!("{}-{revision}", release.version))
}

fn deb(release: &Release, suite: &str, package: &Path, newer: &Path) -> Result<()> {
    let system = DebianRoot::ensure(suite, suite, &[])?.copy()?;
    // No service of a test starts, whatever runs on this machine.
    let policy = system.at("/usr/sbin/policy-rc.d");
    fs::write(&policy, "#!/bin/sh\nexit 101\n")?;
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
    fs::create_dir_all(system.at(PACKAGES))?;
    for deb in [package, newer] {
        fs::copy(deb, system.at(PACKAGES).join(deb.file_name().unwrap_or_default()))?;
    }
    let install = |deb: &Path| {
        let (_, name) = split(deb)?;
        // Without package lists: what it depends on is in every Debian.
        system.run(&format!("apt-get install --yes {PACKAGES}/{}", sh::quote(&[name])))
    };

    let before = files(&system)?;
    install(package)?;
    println!("installed: {} files", files(&system)?.difference(&before).count());
    let altered = system.run("dpkg --verify loopengine")?;
    ensure!(altered.is_empty(), "installed files differ from the package: {altered}");
    let socket = "/etc/systemd/system/sockets.target.wants/loopengine.socket";
    ensure!(system.at(socket).is_symlink(), "postinst did not enable loopengine.socket");
    use_program(release, &system)?;
    let page = "/usr/share/man/man1/loopengine.1.gz";
    system.run(&format!("gzip --test {page}")).context("the manual page is missing")?;

    install(newer)?;
    let version = system.run("dpkg-query --show --showformat='${Version} ${db:Status-Status}' loopengine")?;
    ensure!(version == format!("{}-2 installed", release.version), "after the upgrade: {version}");
    use_program(release, &system)?;
    println!("upgraded to {version}");

    for verb in ["remove", "purge"] {
        system.run(&format!("apt-get {verb} --yes loopengine"))?;
        same(&before, &files(&system)?).with_context(|| format!("after apt {verb} on Debian {suite}"))?;
        println!("{verb}: no file is left");
    }
    no_trace(&system)
}

/// In a Debian system, whose package manager is not asked: checks scripts, files and the program.
fn rpm(release: &Release, package: &Path) -> Result<()> {
    let tools = DebianRoot::ensure(build::SYSTEM, OLDEST, &build::SYSTEM_PACKAGES)?;
    let system = DebianRoot::ensure(OLDEST, OLDEST, &[])?.copy()?;
    let (directory, name) = split(package)?;
    let root = system.at("/");
    let binds = [(directory, PACKAGES), (root.as_path(), "/mnt/system")];
    let tools = |line: &str| sh::capture(&mut tools.shell(&binds, line), LIMIT);
    let name = sh::quote(&[name]);
    tools(&format!("rpm --checksig --nosignature {PACKAGES}/{name}"))?;
    // The first use makes rpm's database.
    tools("rpm --root /mnt/system --initdb")?;
    let before = files(&system)?;
    tools(&format!("rpm --root /mnt/system --install --nodeps {PACKAGES}/{name}"))?;
    println!("installed: {} files", files(&system)?.difference(&before).count());
    let altered = tools("rpm --root /mnt/system --verify --nodeps loopengine")?;
    ensure!(altered.is_empty(), "installed files differ from the package: {altered}");
    ensure!(system.at("/usr/sbin/mount.loop").is_symlink(), "the package's script made no mount.loop");
    use_program(release, &system)?;
    tools("rpm --root /mnt/system --erase loopengine")?;
    // Shared directories belong to packages that this system lacks.
    let shared = |path: &String| !path.contains("loopengine") && system.at(path).is_dir();
    let mut after = files(&system)?;
    after.retain(|path| before.contains(path) || !shared(path));
    same(&before, &after).context("after rpm --erase")?;
    println!("erase: no file is left");
    Ok(())
}

fn tarball(release: &Release, package: &Path) -> Result<()> {
    let system = DebianRoot::ensure(OLDEST, OLDEST, &[])?.copy()?;
    fs::create_dir_all(system.at(PACKAGES))?;
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(package).arg("--directory").arg(system.at(PACKAGES));
    sh::capture(tar.arg("--strip-components=1"), LIMIT)?;
    let before = files(&system)?;
    system.run(&format!("{PACKAGES}/usr/bin/loopengine install"))?;
    println!("installed: {} files", files(&system)?.difference(&before).count());
    use_program(release, &system)?;
    system.run("loopengine install --uninstall")?;
    same(&before, &files(&system)?).context("after loopengine install --uninstall")?;
    println!("uninstall: no file is left");
    Ok(())
}

fn image(release: &Release, layout: &Path) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let root = directory.path().join("root");
    let command = oci::unpack(layout, &root)?;
    let program = command.first().context("the image has no command")?;
    let mut version = Command::new(sh::which("chroot")?);
    let said = sh::capture(version.arg(&root).arg(program).arg("--version"), LIMIT)?;
    is_version(release, &said)?;
    println!("runs {}: {}", command.join(" "), said.trim());
    Ok(())
}

fn use_program(release: &Release, system: &DebianRoot) -> Result<()> {
    is_version(release, &system.run("loopengine --version")?)?;
    // Says what this machine lacks for block devices; only a crash is a failure.
    let doctor = system.run("loopengine doctor || [ $? -lt 126 ]")?;
    ensure!(!doctor.trim().is_empty(), "loopengine doctor printed nothing");
    if Path::new("/dev/fuse").exists() {
        system.run(USE).context("the quick start fails")?;
        println!("served a file with FUSE");
    } else {
        println!("skipped the quick start: this machine lacks /dev/fuse");
    }
    Ok(())
}

fn is_version(release: &Release, said: &str) -> Result<()> {
    let expected = format!("loopengine {}", release.version);
    ensure!(said.trim() == expected, "the program says {:?} instead of {expected:?}", said.trim());
    Ok(())
}

/// All paths of a system, except those of package managers.
fn files(system: &DebianRoot) -> Result<BTreeSet<String>> {
    let skipped: Vec<String> = OF_PACKAGE_MANAGERS.iter().map(|path| format!("-path {path}")).collect();
    let all = system.run(&format!("find / -xdev \\( {} \\) -prune -o -print", skipped.join(" -o ")))?;
    Ok(all.lines().map(str::to_owned).collect())
}

fn same(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Result<()> {
    let left: Vec<&str> = after.difference(before).map(String::as_str).collect();
    let gone: Vec<&str> = before.difference(after).map(String::as_str).collect();
    if !left.is_empty() || !gone.is_empty() {
        bail!("files are left: [{}]; files are gone: [{}]", left.join(", "), gone.join(", "));
    }
    Ok(())
}

/// After a purge even the package manager knows nothing of the package.
fn no_trace(system: &DebianRoot) -> Result<()> {
    let skipped = format!("\\( -path /proc -o -path {PACKAGES} \\) -prune");
    let left = system.run(&format!("find / -xdev {skipped} -o -name '*loopengine*' -print"))?;
    ensure!(left.is_empty(), "files are left after a purge: {}", left.trim().replace('\n', ", "));
    Ok(())
}

fn split(file: &Path) -> Result<(&Path, &str)> {
    let name = file.file_name().and_then(|name| name.to_str());
    file.parent().zip(name).with_context(|| format!("{} is no path of a package", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_leftover_and_missing_files() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>();
        assert!(same(&set(&["/a"]), &set(&["/a"])).is_ok());
        let error = same(&set(&["/a", "/b"]), &set(&["/b", "/c"])).unwrap_err().to_string();
        assert_eq!(error, "files are left: [/c]; files are gone: [/a]");
    }
}
