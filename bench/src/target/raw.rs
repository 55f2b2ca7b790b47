// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The store itself: a file on it, and a block device of the same kind.

use anyhow::Result;

use super::{Environment, Kind, Module, NULL_BLK, Opened, Target, block, kernel};
use crate::store::NullBlk;

pub(super) const FILE: &str = "raw file";

/// The image file on the store.
pub(super) struct RawFile;

impl Target for RawFile {
    fn name(&self) -> String {
        FILE.into()
    }

    fn about(&self) -> String {
        "the image file itself, on the store's file system".into()
    }

    fn version(&self) -> Result<String> {
        Ok(kernel())
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let path = place.image(FILE)?;
        Ok(Opened { kind: Kind::File, path, many: place.many(FILE)?, server: None })
    }

    fn tear_down(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A null_blk device without a file system.
#[derive(Default)]
pub(super) struct RawDevice(Vec<NullBlk>);

impl Target for RawDevice {
    fn name(&self) -> String {
        "raw device".into()
    }

    fn about(&self) -> String {
        "a memory-backed null_blk device, without a file system".into()
    }

    fn version(&self) -> Result<String> {
        Ok(kernel())
    }

    fn module(&self) -> Option<Module> {
        Some(NULL_BLK)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        self.0.push(written(place.image_mb)?);
        let path = self.0[0].node.clone();
        if place.many_mb > 0 {
            for _ in 0..super::MANY {
                self.0.push(written(place.many_mb)?);
            }
        }
        let many = self.0[1..].iter().map(|device| device.node.clone()).collect();
        block(path, many, None)
    }

    fn tear_down(&mut self) -> Result<()> {
        self.0.clear();
        Ok(())
    }
}

/// Writes the whole device: null_blk does not read unwritten blocks from memory.
fn written(size_mb: u32) -> Result<NullBlk> {
    let device = NullBlk::new(size_mb)?;
    let mut dd = std::process::Command::new("dd");
    dd.args(["if=/dev/zero", "bs=1M", "oflag=direct", "conv=fsync", "status=none"]);
    dd.arg(format!("of={}", device.node.display())).arg(format!("count={size_mb}"));
    crate::sh::capture(&mut dd, super::LIMIT)?;
    Ok(device)
}
