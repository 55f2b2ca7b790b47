// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Debian kernels that the lab boots: fetches and unpacks them.
//!
//! Kernels go to the lab's own directory; this machine's package manager is not involved, and root
//! is not needed. Knows apt and dpkg, not how a kernel is booted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use loopbench::sh;

/// A kernel series, as a user names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Line {
    /// The newest 7.x of Debian's backports: all I/O modes
    #[value(name = "7")]
    Seven,
    /// The kernel of Debian 13: I/O mode copy only
    #[value(name = "6.12")]
    SixTwelve,
    /// The kernel of Debian 12: no ublk, so devices of the kernel's loop driver and FUSE files only
    #[value(name = "6.1")]
    SixOne,
}

impl Line {
    /// All series, the main one first.
    pub(crate) const ALL: [Line; 3] = [Line::Seven, Line::SixTwelve, Line::SixOne];

    /// Name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Line::Seven => "7",
            Line::SixTwelve => "6.12",
            Line::SixOne => "6.1",
        }
    }

    /// Debian suite that has it, independent of this machine's release.
    fn suite(self) -> &'static str {
        match self {
            Line::Seven => "trixie-backports",
            Line::SixTwelve => "trixie",
            Line::SixOne => "bookworm",
        }
    }

    /// Whether it has the driver of ublk devices.
    pub(crate) fn has_ublk(self) -> bool {
        self != Line::SixOne
    }

    /// Prefix of the version of the meta package.
    fn prefix(self) -> String {
        format!("{}.", self.name())
    }
}

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// Its series.
    pub(crate) line: Line,
    /// Its release, as in `uname -r`.
    pub(crate) release: String,
    /// Its bootable image; the modules are in the same directory.
    pub(crate) image: PathBuf,
}

/// Meta package whose dependency is the newest kernel.
const META: &str = "linux-image-amd64";
/// Keys of Debian's archive.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Modules that a VM of the lab loads.
const MODULES: [&str; 9] =
    ["9p", "9pnet_virtio", "overlay", "virtio_blk", "null_blk", "loop", "xfs", "ext4", "btrfs"];
const UBLK: &str = "ublk_drv";
/// Directory of the kernels. The number changes with the way they are unpacked, so that two
/// revisions of the lab can share the cache.
pub(crate) const HOME: &str = "kernels-2";
/// File with the release of the kernel that is ready.
const MARK: &str = "unpacked";
/// A kernel is about 110 MB.
const FETCH_LIMIT: Duration = Duration::from_secs(900);

/// The kernel of `line` if it has been unpacked under `cache`.
pub(crate) fn find(cache: &Path, line: Line) -> Option<Kernel> {
    let modules = cache.join(HOME).join(line.name()).join("lib/modules");
    let release = std::fs::read_to_string(modules.join(MARK)).ok()?.trim().to_owned();
    let image = modules.join(&release).join("vmlinuz");
    (!release.is_empty() && image.exists()).then_some(Kernel { line, release, image })
}

/// Fetches and unpacks the newest kernel of `line` under `cache`.
pub(crate) fn fetch(cache: &Path, line: Line) -> Result<Kernel> {
    let work = tempfile::Builder::new()
        .prefix("fetch-")
        .tempdir_in(cache)
        .with_context(|| format!("cannot write to {}", cache.display()))?;
    let apt = Apt::new(work.path(), line.suite())?;
    apt.get(&["update"])?;
    let known = apt.cache(&["show", META])?;
    let image = newest_image(&known, &line.prefix())
        .with_context(|| format!("suite {} has no kernel {}x", line.suite(), line.prefix()))?;
    let packages = parts(&apt.cache(&["show", &image])?, &image);
    let release = image.trim_start_matches("linux-image-").to_owned();

    let debs = work.path().join("debs");
    std::fs::create_dir(&debs)?;
    let mut download = vec!["download"];
    download.extend(packages.iter().map(String::as_str));
    sh::capture(apt.command("apt-get", &download).current_dir(&debs), FETCH_LIMIT)?;
    let root = work.path().join("root");
    for deb in std::fs::read_dir(&debs)? {
        sh::capture(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&root), FETCH_LIMIT)?;
    }
    install(&root, &release, &cache.join(HOME).join(line.name()), line)?;
    find(cache, line).with_context(|| format!("kernel {release} was unpacked but is not there"))
}

/// Moves modules and image from an unpacked `root` to `base`/lib/modules/`release`.
fn install(root: &Path, release: &str, base: &Path, line: Line) -> Result<()> {
    let found = ["usr/lib/modules", "lib/modules"]
        .iter()
        .map(|directory| root.join(directory).join(release))
        .find(|directory| directory.is_dir())
        .with_context(|| format!("the packages of kernel {release} hold no modules"))?;
    let modules = base.join("lib/modules");
    if modules.exists() {
        std::fs::remove_dir_all(&modules).with_context(|| format!("cannot replace {}", modules.display()))?;
    }
    std::fs::create_dir_all(&modules)?;
    let home = modules.join(release);
    std::fs::rename(&found, &home)?;
    if !home.join("vmlinuz").exists() {
        std::fs::rename(root.join(format!("boot/vmlinuz-{release}")), home.join("vmlinuz"))
            .with_context(|| format!("the packages of kernel {release} hold no image"))?;
    }
    depmod(base, release)?;
    decompress(base, release, line)?;
    depmod(base, release)?;
    // Last: a kernel without this file is fetched again.
    std::fs::write(modules.join(MARK), release)?;
    Ok(())
}

/// Decompresses the modules that the lab loads: an emulated CPU needs seconds for a large one.
fn decompress(base: &Path, release: &str, line: Line) -> Result<()> {
    let mut query = Command::new(sh::which("modprobe")?);
    query.arg("-d").arg(base).args(["-S", release, "--show-depends", "-a"]).args(MODULES);
    query.args(line.has_ublk().then_some(UBLK));
    let said = sh::capture(&mut query, Duration::from_secs(60))?;
    for file in said.lines().filter_map(|line| line.strip_prefix("insmod ")).map(str::trim) {
        // Modules share dependencies.
        if file.ends_with(".xz") && Path::new(file).exists() {
            sh::capture(Command::new("xz").args(["-d", file]), Duration::from_secs(60))?;
        }
    }
    Ok(())
}

fn depmod(base: &Path, release: &str) -> Result<()> {
    let mut depmod = Command::new(sh::which("depmod")?);
    sh::capture(depmod.arg("-b").arg(base).arg(release), Duration::from_secs(120)).map(drop)
}

/// apt with its own lists and sources; those of this machine do not change.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(work: &Path, suite: &str) -> Result<Apt> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: the lab needs Debian, or its package debian-archive-keyring");
        }
        let mirror = debian_mirror()?;
        for directory in ["lists/partial", "archives/partial"] {
            std::fs::create_dir_all(work.join(directory))?;
        }
        let sources = work.join("sources.list");
        std::fs::write(&sources, format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))?;
        let options = [
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=/dev/null".into(),
            format!("Dir::State::Lists={}", work.join("lists").display()),
            format!("Dir::Cache={}", work.display()),
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
        ];
        Ok(Apt { options: options.into_iter().flat_map(|option| ["-o".into(), option]).collect() })
    }

    fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("-qq").args(&self.options).args(words).env("LC_ALL", "C");
        command
    }

    fn get(&self, words: &[&str]) -> Result<String> {
        sh::capture(&mut self.command("apt-get", words), FETCH_LIMIT)
    }

    fn cache(&self, words: &[&str]) -> Result<String> {
        sh::capture(&mut self.command("apt-cache", words), Duration::from_secs(60))
    }
}

/// Address of the Debian mirror that this machine's apt uses.
pub(crate) fn debian_mirror() -> Result<String> {
    let targets = sh::capture(
        Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE)",
            "Created-By: Packages",
        ]),
        Duration::from_secs(60),
    )?;
    let mirror = mirror(&targets).context("apt has no Debian mirror: add one to /etc/apt/sources.list.d")?;
    Ok(mirror.to_owned())
}

/// Debian's mirror among lines of "URI release", which is neither the security archive nor a
/// vendor's.
fn mirror(targets: &str) -> Option<&str> {
    let suites = ["bookworm", "trixie", "stable", "oldstable", "testing", "unstable", "sid"];
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(uri, release)| suites.contains(&release.trim()) && !uri.contains("security"))
        .map(|(uri, _)| uri)
}

/// Name of the image package that the newest version of the meta package depends on.
fn newest_image(show: &str, prefix: &str) -> Option<String> {
    let field = |stanza: &str, name: &str| {
        stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned))
    };
    let numbers = |version: &str| -> Vec<u64> {
        version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    show.split("\n\n")
        .filter_map(|stanza| Some((field(stanza, "Version")?, field(stanza, "Depends")?)))
        .filter(|(version, _)| version.starts_with(prefix))
        .max_by_key(|(version, _)| numbers(version))
        .and_then(|(_, depends)| names(&depends).into_iter().find(|name| is_image(name)))
}

/// The packages of the kernel `image`: since 7.0 the image package only depends on a binary and a
/// modules package.
fn parts(show: &str, image: &str) -> Vec<String> {
    let depends = show.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let mut parts = names(depends);
    parts.retain(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"));
    if parts.is_empty() {
        parts.push(image.to_owned());
    }
    parts
}

/// "linux-image-" and a release that begins with a digit.
fn is_image(name: &str) -> bool {
    name.strip_prefix("linux-image-").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Names in a field such as "a (>= 1), b | c".
fn names(depends: &str) -> Vec<String> {
    depends.split([',', '|']).filter_map(|part| part.split_whitespace().next()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOW: &str = "Package: linux-image-amd64\nVersion: 7.3.4-1~bpo13+1\n\
        Depends: linux-base-amd64 (= 7.3.4-1~bpo13+1), linux-image-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1)\n\n\
        Package: linux-image-amd64\nVersion: 7.12.1-1~bpo13+1\nDepends: linux-image-7.12.1+deb13-amd64 (= 7.12.1-1)\n\n\
        Package: linux-image-amd64\nVersion: 6.12.107-1\nDepends: linux-image-6.12.107+deb13-amd64 (= 6.12.107-1)\n";

    #[test]
    fn selects_the_newest_kernel_of_a_series() {
        assert_eq!(newest_image(SHOW, "7.").as_deref(), Some("linux-image-7.12.1+deb13-amd64"));
        assert_eq!(newest_image(SHOW, "6.12.").as_deref(), Some("linux-image-6.12.107+deb13-amd64"));
        // "6.1." is no prefix of 6.12.
        assert_eq!(newest_image(SHOW, &Line::SixOne.prefix()), None);
        assert_eq!(newest_image(SHOW, "5."), None);
        assert_eq!(newest_image("", "7."), None);
    }

    #[test]
    fn a_kernel_is_one_package_or_several() {
        let split = "Depends: dracut | initramfs-tools (>= 0.120), linux-binary-7.3.4 (= 1), linux-modules-7.3.4 (= 1)\n";
        assert_eq!(parts(split, "x"), ["linux-binary-7.3.4", "linux-modules-7.3.4"]);
        assert_eq!(parts("Depends: kmod, initramfs-tools\n", "linux-image-6.12"), ["linux-image-6.12"]);
    }

    #[test]
    fn the_mirror_is_debians_own() {
        let targets = "http://v.example/apt nodistro\nhttp://s.example/debian-security bookworm-security\n\
            http://m.example/debian/ bookworm\n";
        assert_eq!(mirror(targets), Some("http://m.example/debian/"));
        assert_eq!(mirror("http://v.example/apt jammy\n"), None);
    }
}
