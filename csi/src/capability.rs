// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a volume is going to be used.

use tonic::Status;

use crate::messages::{Mode, VolumeCapability};
use crate::parameters::Parameters;

/// Total bytes of mount options, by the specification.
const FLAGS_MAX: usize = 4096;
/// Mount options that would mount something else.
const REFUSED: [&str; 9] =
    ["bind", "rbind", "move", "remount", "loop", "offset", "sizelimit", "shared", "rshared"];

/// A checked capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    pub kind: Kind,
    /// Nobody writes.
    pub reader: bool,
    /// One pod only.
    pub single: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Block,
    Filesystem { fs_type: Option<String>, flags: Vec<String>, group: Option<u32> },
}

impl Use {
    /// Checks the capability of a field, for a volume with these parameters.
    pub fn parse(
        field: &str,
        capability: Option<&VolumeCapability>,
        parameters: &Parameters,
    ) -> Result<Use, Status> {
        let refused = |why: String| Status::invalid_argument(format!("{field}{why}"));
        let capability = capability.ok_or_else(|| refused(" is missing".into()))?;
        let mode =
            capability.access_mode.as_ref().ok_or_else(|| refused(".access_mode is missing".into()))?;
        let mode = Mode::try_from(mode.mode).unwrap_or(Mode::Unknown);
        let (reader, single) = match mode {
            Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => (false, false),
            Mode::SingleNodeSingleWriter => (false, true),
            Mode::SingleNodeReaderOnly => (true, false),
            Mode::Unknown => return Err(refused(".access_mode.mode is missing or unknown".into())),
            Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
                return Err(refused(".access_mode.mode: a volume is on one node".into()));
            }
        };
        let kind = match (&capability.block, &capability.mount) {
            (Some(_), None) => Kind::Block,
            (None, Some(mount)) => {
                let fs_type = match (mount.fs_type.as_str(), parameters.fs_type.as_str()) {
                    ("", "") => None,
                    ("", own) => Some(own),
                    (asked, own) if own.is_empty() || own == asked => Some(asked),
                    (asked, own) => {
                        return Err(refused(format!(".mount.fs_type is {asked}, but the class has {own}")));
                    }
                };
                if let Some(fs_type) = fs_type.filter(|fs_type| !["ext4", "xfs"].contains(fs_type)) {
                    return Err(refused(format!(".mount.fs_type: {fs_type:?} is not ext4 or xfs")));
                }
                let flags = check_flags(&mount.mount_flags)
                    .map_err(|why| refused(format!(".mount.mount_flags: {why}")))?;
                let group = match mount.volume_mount_group.as_str() {
                    "" => None,
                    text => Some(text.parse().map_err(|_| {
                        refused(format!(".mount.volume_mount_group: {text:?} is no group number"))
                    })?),
                };
                Kind::Filesystem { fs_type: fs_type.map(str::to_owned), flags, group }
            }
            _ => return Err(refused(": one of block and mount must be set".into())),
        };
        Ok(Use { kind, reader, single })
    }

    /// Checks a list of them, which must not be empty.
    pub fn parse_all(all: &[VolumeCapability], parameters: &Parameters) -> Result<Vec<Use>, Status> {
        if all.is_empty() {
            return Err(Status::invalid_argument("volume_capabilities is missing"));
        }
        let each = all.iter().enumerate();
        each.map(|(n, one)| Use::parse(&format!("volume_capabilities[{n}]"), Some(one), parameters)).collect()
    }
}

fn check_flags(flags: &[String]) -> Result<Vec<String>, String> {
    if flags.iter().map(String::len).sum::<usize>() > FLAGS_MAX {
        return Err(format!("longer than {FLAGS_MAX} bytes"));
    }
    for flag in flags.iter().flat_map(|flag| flag.split(',')) {
        let name = flag.split('=').next().unwrap_or_default();
        if flag.contains(|c: char| c.is_control()) || REFUSED.contains(&name) || name.starts_with("X-") {
            return Err(format!("{name:?} is refused"));
        }
    }
    Ok(flags.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{AccessMode, Empty, MountVolume};

    fn capability(mode: Mode, flags: &[&str]) -> VolumeCapability {
        let mount_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        VolumeCapability {
            block: None,
            mount: Some(MountVolume { mount_flags, ..MountVolume::default() }),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    fn refused(capability: Option<&VolumeCapability>) -> String {
        let status = Use::parse("volume_capability", capability, &Parameters::default()).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        status.message().to_owned()
    }

    #[test]
    fn names_the_field_that_it_refuses() {
        assert_eq!(refused(None), "volume_capability is missing");
        let good = capability(Mode::SingleNodeWriter, &["noatime", "commit=5"]);
        let parameters = Parameters::default();
        assert!(Use::parse("x", Some(&good), &parameters).is_ok());
        for mode in [Mode::Unknown, Mode::MultiNodeMultiWriter, Mode::MultiNodeReaderOnly] {
            assert!(refused(Some(&capability(mode, &[]))).contains("access_mode.mode"), "{mode:?}");
        }
        for flag in ["bind", "ro,remount", "loop=/dev/loop0", "X-mount.mkdir", "a\nb"] {
            let message = refused(Some(&capability(Mode::SingleNodeWriter, &[flag])));
            assert!(message.contains("mount_flags"), "{message}");
        }
        let both = VolumeCapability { block: Some(Empty {}), ..good.clone() };
        assert!(refused(Some(&both)).contains("one of block and mount"));
        let none = VolumeCapability { access_mode: None, ..good.clone() };
        assert!(refused(Some(&none)).contains("access_mode"));
        let xfs = Parameters { fs_type: "xfs".into(), ..Parameters::default() };
        let ext4 = MountVolume { fs_type: "ext4".into(), ..MountVolume::default() };
        let ext4 = VolumeCapability { mount: Some(ext4), ..good };
        assert!(Use::parse("x", Some(&ext4), &xfs).is_err());
    }
}
