// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which feature needs which Linux: the one table behind doc/kernels.md, manual pages, `doctor` and hints.
//!
//! By release, for people: the daemon itself asks the driver what it grants (`frontend/ublk/features.rs`).

/// What a user may want of loopengine.
#[derive(Debug, PartialEq, Eq)]
pub struct Feature {
    /// As it is called in all documents.
    pub name: &'static str,
    /// The first Linux with what it needs.
    pub since: (u32, u32),
    /// The commands, options or settings that have it.
    pub by: &'static str,
}

/// Files of FUSE.
pub const FILES: Feature =
    Feature { name: "files instead of block devices", since: (6, 1), by: "serve --backend fuse" };
/// Disks of the kernel's loop driver.
pub const LOOP_DEVICES: Feature =
    Feature { name: "kernel loop devices", since: (6, 1), by: "serve --backend loop" };
/// Disks of ublk, in I/O mode copy.
pub const BLOCK_DEVICES: Feature =
    Feature { name: "ublk devices", since: (6, 5), by: "serve --backend ublk, attach --io-mode copy" };
/// I/O mode auto.
pub const NO_COPYING: Feature =
    Feature { name: "I/O without copying", since: (6, 16), by: "attach --io-mode auto" };
/// A new size for a disk in use.
pub const RESIZE: Feature = Feature { name: "resize of ublk devices", since: (6, 16), by: "resize" };
/// I/O mode batch.
pub const BATCHES: Feature =
    Feature { name: "commands in batches", since: (7, 0), by: "attach --io-mode batch" };
/// Pools of private loop devices.
pub const PRIVATE: Feature = Feature {
    name: "private devices",
    since: (6, 9),
    by: "run, mount, losetup, instance mount, instance open, oci",
};
/// The same on disks of ublk; older kernels serve them on disks of the kernel's loop driver.
pub const PRIVATE_UBLK: Feature =
    Feature { name: "private devices over ublk", since: (7, 0), by: "serve --backend ublk" };

/// All, oldest first.
pub const ALL: [Feature; 8] =
    [FILES, LOOP_DEVICES, BLOCK_DEVICES, PRIVATE, NO_COPYING, RESIZE, BATCHES, PRIVATE_UBLK];

/// This kernel's release, e.g. `7.3.4+deb13-amd64`.
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

impl Feature {
    /// "7.0".
    pub fn version(&self) -> String {
        format!("{}.{}", self.since.0, self.since.1)
    }

    /// What this machine's kernel lacks, as a sentence: "private devices need Linux 6.9: this is 6.1".
    pub fn missing(&self) -> Option<String> {
        let release = release();
        (!self.is_in(&release))
            .then(|| format!("{} need Linux {}: this is {release}", self.name, self.version()))
    }

    /// Whether a kernel of this release is new enough. One that is called otherwise is taken to be.
    pub fn is_in(&self, release: &str) -> bool {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= self.since,
            _ => true,
        }
    }
}

/// The next step for who is not root and wants what only root may do.
pub fn without_root() -> String {
    match PRIVATE.missing() {
        None => "run this as root; as this user, 'loopengine mount IMAGE DIR' mounts an image, and \
                 'loopengine run -- CMD' gives a command loop devices of its own"
            .to_owned(),
        Some(missing) => {
            format!("run this as root; plain users can have only private devices, and {missing}")
        }
    }
}

/// The table as doc/kernels.md has it: features by kernels.
pub fn markdown() -> String {
    let mut kernels: Vec<_> = ALL.iter().map(|feature| feature.since).collect();
    kernels.dedup();
    let heads: String = kernels.iter().map(|(major, minor)| format!(" {major}.{minor} |")).collect();
    let mut text = format!("| Linux |{heads} by |\n|---|{}---|\n", ":-:|".repeat(kernels.len()));
    for feature in &ALL {
        let cells: String =
            kernels.iter().map(|kernel| if *kernel >= feature.since { " yes |" } else { " |" }).collect();
        text.push_str(&format!("| {} |{cells} `{}` |\n", feature.name, feature.by));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        for (release, has) in [
            ("7.0.0", true),
            ("7.3.4+deb13-amd64", true),
            ("10.0", true),
            ("7.0-rc1", true),
            ("6.18.44-fc-v657", false),
            ("6.9", false),
            ("odd", true),
        ] {
            assert_eq!(PRIVATE_UBLK.is_in(release), has, "{release}");
        }
        assert!(PRIVATE.is_in("6.9") && PRIVATE.is_in("6.12.117+deb13-amd64") && !PRIVATE.is_in("6.8.0-31"));
        assert!(NO_COPYING.is_in("6.16.0") && !NO_COPYING.is_in("6.9.12") && BLOCK_DEVICES.is_in("6.12"));
        assert!(ALL.is_sorted_by_key(|feature| feature.since));
    }

    /// No document has a table of its own, and no text of the program or of its documents names another version.
    #[test]
    fn documents_say_the_same() {
        let file = |name: &str| {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        assert!(
            file("doc/kernels.md").contains(&markdown()),
            "doc/kernels.md lacks this table:\n{}",
            markdown()
        );
        for page in ["loopengine.1", "loopengine-doctor.1"] {
            let page = file(&format!("share/man/{page}"));
            for feature in &ALL {
                let row = format!("\\fB{}\\fR\nLinux {}", feature.name, feature.version());
                assert!(page.contains(&row), "{row}");
            }
        }
        let hint = without_root();
        assert_eq!(hint.contains("need Linux 6.9"), !PRIVATE.is_in(&release()), "{hint}");
    }
}
