// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parameters of a StorageClass.

use std::collections::BTreeMap;

use loopengine::instance::spec::BackendKind;
use serde::{Deserialize, Serialize};

/// Keys of the orchestrator, which say nothing about the volume.
const FOREIGN: &str = "csi.storage.k8s.io/";
/// Of an ephemeral volume: its size.
pub const SIZE: &str = "size";

/// Logical block size of a volume, unless its class says another. Once the blocks of an image are
/// shared, XFS needs direct I/O in blocks of this size. A file system must not get another one later.
pub const BLOCK: u32 = 4096;

/// How a volume is made and attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Parameters {
    /// Empty: ext4, or what the volume's user asks for.
    pub fs_type: String,
    /// Allocate the whole image when the volume is made.
    pub preallocate: bool,
    /// Logical block size; 0: [`BLOCK`].
    pub block_size: u32,
    /// How its disk is made; none: as the engine does.
    pub backend: Option<BackendKind>,
    /// Requests per second; 0: no limit.
    pub iops: u64,
    /// Bytes per second; 0: no limit.
    pub bandwidth: u64,
    /// Mount with the option "discard".
    pub discard: bool,
}

impl Parameters {
    /// The logical block size.
    pub fn block(&self) -> u32 {
        if self.block_size == 0 { BLOCK } else { self.block_size }
    }

    /// Parses the parameters of `field`. The error names field and key.
    pub fn parse(field: &str, given: &BTreeMap<String, String>) -> Result<Parameters, String> {
        let mut parsed = Parameters::default();
        for (key, value) in given {
            let refused = |expected: &str| format!("{field}: {key} is {value:?}, but must be {expected}");
            match key.as_str() {
                "fsType" => parsed.fs_type = fs_type(value).ok_or_else(|| refused("ext4 or xfs"))?,
                "preallocate" => parsed.preallocate = flag(value).ok_or_else(|| refused("true or false"))?,
                "discard" => parsed.discard = flag(value).ok_or_else(|| refused("true or false"))?,
                "blockSize" => {
                    let size = size(value).and_then(|size| u32::try_from(size).ok());
                    let size = size.filter(|size| [512, 1024, 2048, 4096].contains(size));
                    parsed.block_size = size.ok_or_else(|| refused("512, 1024, 2048 or 4096"))?;
                }
                "backend" => {
                    parsed.backend = Some(match value.as_str() {
                        "ublk" => BackendKind::Ublk,
                        "loop" => BackendKind::Loop,
                        _ => return Err(refused("ublk or loop: a volume is a block device")),
                    });
                }
                "iops" => parsed.iops = value.parse().map_err(|_| refused("a number"))?,
                "bandwidth" => parsed.bandwidth = size(value).ok_or_else(|| refused("a size, as 100Mi"))?,
                key if key.starts_with(FOREIGN) => {}
                _ => return Err(format!("{field}: there is no parameter {key:?}")),
            }
        }
        if parsed.preallocate && parsed.discard {
            return Err(format!("{field}: discard gives back what preallocate has allocated; choose one"));
        }
        Ok(parsed)
    }
}

/// The given parameters that are the driver's.
pub fn own(given: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    given.iter().filter(|(key, _)| !key.starts_with(FOREIGN)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn fs_type(value: &str) -> Option<String> {
    ["ext4", "xfs"].contains(&value).then(|| value.to_owned())
}

fn flag(value: &str) -> Option<bool> {
    value.parse().ok()
}

/// A size as Kubernetes writes it: 4096, 64Ki, 10Gi, 1G.
pub fn size(value: &str) -> Option<u64> {
    let digits = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (number, unit) = value.split_at(digits);
    let factor = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1000u64.pow(2),
        "G" => 1000u64.pow(3),
        "T" => 1000u64.pow(4),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Parameters, String> {
        let given = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Parameters::parse("parameters", &given)
    }

    #[test]
    fn parses_every_parameter() {
        let parsed = parse(&[
            ("fsType", "xfs"),
            ("preallocate", "true"),
            ("blockSize", "4Ki"),
            ("backend", "loop"),
            ("iops", "100"),
            ("bandwidth", "10Mi"),
            ("csi.storage.k8s.io/pvc/name", "x"),
        ]);
        let expected = Parameters {
            fs_type: "xfs".into(),
            preallocate: true,
            block_size: 4096,
            backend: Some(BackendKind::Loop),
            iops: 100,
            bandwidth: 10 << 20,
            discard: false,
        };
        assert_eq!(parsed, Ok(expected));
    }

    #[test]
    fn names_what_it_refuses() {
        for (key, value) in [
            ("fsType", "btrfs"),
            ("preallocate", "yes"),
            ("blockSize", "1000"),
            ("backend", "fuse"),
            ("iops", "-1"),
            ("bandwidth", "fast"),
            ("bandwidth", "99999999999Ti"),
            ("discard", ""),
            ("fstype", "ext4"),
        ] {
            let error = parse(&[(key, value)]).unwrap_err();
            assert!(error.starts_with("parameters: ") && error.contains(key), "{error}");
        }
        assert!(parse(&[("preallocate", "true"), ("discard", "true")]).is_err());
    }
}
