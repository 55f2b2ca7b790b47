// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels whose ublk driver crashes: the one list behind `serve`, `doctor`, `features` and
//! doc/kernels.md.
//!
//! By release, because the driver cannot be asked: the first ADD_DEV already crashes it. Knows no
//! more of this machine than the release that the caller gives.

use crate::error::{Error, Kind};

/// Releases with the same fault.
#[derive(Debug, PartialEq, Eq)]
pub struct BrokenKernels {
    /// As documents call them.
    pub name: &'static str,
    /// What happens on them.
    pub fault: &'static str,
    /// The first release after them.
    pub good_from: &'static str,
    releases: Releases,
}

#[derive(Debug, PartialEq, Eq)]
enum Releases {
    /// Of kernel.org, with or without the suffix of a distribution: these patch levels of a series.
    Stable { series: (u32, u32), patches: (u32, u32) },
    /// Of Ubuntu, for one cloud: these ABI numbers. Ubuntu numbers its flavours independently.
    Ubuntu { series: (u32, u32), abis: (u32, u32), flavours: &'static [&'static str] },
}

/// The fault of both: the stable series took 529d4d632788 ("ublk: implement NUMA-aware memory
/// allocation") without 011af85ccd87 ("ublk: reorder tag_set initialization before queue
/// allocation"), so ublk_init_queues() dereferences a null pointer. ADD_DEV never returns, and
/// neither do later commands: only a reboot helps.
const ADD_DEV: &str = "creating a ublk device crashes the kernel";

/// All that are known.
///
/// Sources: <https://github.com/kvcache-ai/AgentENV/issues/20> (both commits, the releases of
/// kernel.org, the fix in 6.18.6), <https://github.com/zabbly/linux/issues/52> (the order of the
/// calls), <https://github.com/actions/runner-images/issues/14175> and
/// <https://bugs.launchpad.net/ubuntu/+source/linux-azure/+bug/2154635> (azure, 1015 to 1018),
/// <https://github.com/longhorn/longhorn/issues/13509> (aws, 1017). No report names a later one.
pub const ALL: [BrokenKernels; 2] = [
    BrokenKernels {
        name: "Linux 6.18.4 and 6.18.5",
        fault: ADD_DEV,
        good_from: "6.18.6",
        releases: Releases::Stable { series: (6, 18), patches: (4, 5) },
    },
    BrokenKernels {
        name: "Ubuntu 6.17.0-1015 to 6.17.0-1018, flavours azure and aws",
        fault: ADD_DEV,
        good_from: "6.17.0-1019",
        releases: Releases::Ubuntu { series: (6, 17), abis: (1015, 1018), flavours: &["azure", "aws"] },
    },
];

/// The entry for a kernel of this release, e.g. `6.18.5-200.fc43.x86_64`.
pub fn find(release: &str) -> Option<&'static BrokenKernels> {
    let release = Release::parse(release)?;
    ALL.iter().find(|broken| broken.releases.contain(&release))
}

impl BrokenKernels {
    /// "kernel 6.18.5: creating a ublk device crashes the kernel".
    pub fn sentence(&self, release: &str) -> String {
        format!("kernel {release}: {}", self.fault)
    }

    /// The kernel to boot instead.
    pub fn next_kernel(&self) -> String {
        format!("boot a newer kernel ({} or later)", self.good_from)
    }
}

/// Refuses ublk on a broken kernel, unless the administrator insists (`force`).
pub fn check(release: &str, force: bool) -> Result<(), Error> {
    match find(release).filter(|_| !force) {
        None => Ok(()),
        Some(broken) => Err(Error::new(Kind::Unsupported, broken.sentence(release))
            .hint(format!("{}, serve files with '--backend fuse', or give --force", broken.next_kernel()))),
    }
}

/// The list as doc/kernels.md has it.
pub fn markdown() -> String {
    let mut text = "| kernel | fault | good from |\n|---|---|---|\n".to_owned();
    for BrokenKernels { name, fault, good_from, .. } in &ALL {
        text.push_str(&format!("| {name} | {fault} | {good_from} |\n"));
    }
    text
}

/// The parts of a release that the list needs.
#[derive(Debug, PartialEq, Eq)]
struct Release<'a> {
    series: (u32, u32),
    /// 0 in "6.18" and "6.18-rc5".
    patch: u32,
    /// What follows the version, e.g. `1016-azure`.
    suffix: &'a str,
}

impl<'a> Release<'a> {
    fn parse(release: &'a str) -> Option<Release<'a>> {
        let release = release.trim();
        let end = release.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(release.len());
        let (version, suffix) = release.split_at(end);
        let mut numbers = version.split('.').filter(|word| !word.is_empty());
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        // A number that does not fit is none of ours.
        let patch = numbers.next().map_or(Some(0), |word| word.parse().ok())?;
        Some(Release { series: (major, minor), patch, suffix: suffix.trim_start_matches(['-', '+']) })
    }
}

impl Releases {
    fn contain(&self, release: &Release<'_>) -> bool {
        match self {
            Releases::Stable { series, patches: (first, last) } => {
                *series == release.series && (*first..=*last).contains(&release.patch)
            }
            Releases::Ubuntu { series, abis: (first, last), flavours } => {
                // `1016-azure`, `1016-azure-fde`.
                let mut words = release.suffix.split('-');
                let abi = words.next().and_then(|word| word.parse::<u32>().ok());
                let flavour = words.next().unwrap_or_default();
                (*series, 0) == (release.series, release.patch)
                    && abi.is_some_and(|abi| (*first..=*last).contains(&abi))
                    && flavours.contains(&flavour)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_broken_kernels() {
        for release in [
            "6.18.4",
            "6.18.5",
            "6.18.4-arch1-1",
            "6.18.5-200.fc43.x86_64",
            "6.18.5+deb14-amd64",
            "6.18.5+",
            "6.18.5\n",
        ] {
            assert_eq!(find(release), Some(&ALL[0]), "{release}");
        }
        for release in [
            "6.17.0-1015-azure",
            "6.17.0-1016-azure",
            "6.17.0-1018-aws",
            "6.17.0-1017-azure-fde",
            "6.17.0-1017-aws-64k",
        ] {
            assert_eq!(find(release), Some(&ALL[1]), "{release}");
        }
    }

    #[test]
    fn passes_their_neighbours_and_other_kernels() {
        for release in [
            "6.12.117+deb13-amd64",
            "6.18",
            "6.18-rc5",
            "6.18.0-5-generic",
            "6.18.3",
            "6.18.6",
            "6.18.6-200.fc43.x86_64",
            "6.18.44-fc-v657",
            "6.18.50",
            "6.180.4",
            "7.0.4",
            "7.3.4+deb13-amd64",
            "6.17.0-14-generic",
            "6.17.0-1014-azure",
            "6.17.0-1019-aws",
            "6.17.0-1016-gcp",
            "6.17.0-1016",
            "6.17.1-1016-azure",
            "6.17.0-1016azure",
            "6.8.0-1052-azure",
            "6.6.87.2-microsoft-standard-WSL2",
            "6.18.99999999999",
            "odd",
            "",
            "6",
            "6.",
            "...",
            "-",
        ] {
            assert_eq!(find(release), None, "{release:?}");
        }
    }

    #[test]
    fn the_refusal_is_one_line_with_kernel_reason_and_next_step() {
        let release = "6.18.5-200.fc43.x86_64";
        let refused = check(release, false).unwrap_err();
        let line = refused.to_string();
        for part in [release, ADD_DEV, "newer kernel", "6.18.6", "--backend fuse", "--force"] {
            assert!(line.contains(part), "{part:?} in {line:?}");
        }
        assert!(refused.kind() == Kind::Unsupported && !line.contains('\n'), "{line:?}");
        assert!(check(release, true).is_ok(), "--force");
        assert!(check("6.18.6", false).is_ok());
    }

    /// No document has a list of its own.
    #[test]
    fn documents_say_the_same() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../doc/kernels.md");
        let page = std::fs::read_to_string(page).unwrap();
        assert!(page.contains(&markdown()), "doc/kernels.md lacks this table:\n{}", markdown());
        let manual = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../share/man/loopengine.1");
        let manual = std::fs::read_to_string(manual).unwrap();
        for broken in &ALL {
            // Manual pages write a hyphen as \-.
            let name = broken.name.replace('-', "\\-");
            assert!(manual.contains(&name), "{name:?} in loopengine.1");
        }
    }
}
