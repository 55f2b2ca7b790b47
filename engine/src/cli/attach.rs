// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine attach`: attach an image and print the path of its device.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::{Kind, Result};
use crate::frontend::BackendKind;
use crate::instance::spec::{AttachSpec, DEFAULT_INSTANCE, IoMode};
use crate::instance::{NUMBER_MAX, Selector};

use super::pool_use::PoolUse;
use super::{attach_run, complete, daemon, image, number, out, partitions, size};

/// Attach an image file or block device.
///
/// Prints the path of the device when the device is ready for use. With '--run', loopengine runs a
/// command with the device, detaches the device when the command ends, and exits with the command's
/// status.
#[derive(Debug, clap::Args)]
pub(super) struct AttachArgs {
    /// Image file or block device.
    image: PathBuf,

    /// Attach the device to this instance.
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_INSTANCE, add = complete::instances())]
    instance: String,

    /// Make the device read-only. The image need not be writable.
    #[arg(short, long)]
    read_only: bool,

    /// Attach the image even if it is in use: by another device, a pool, a mount, swap or a kernel
    /// loop device. Two writers, or two mounts of one file system, destroy the contents. The log
    /// lists who shares the image.
    #[arg(short, long)]
    force: bool,

    /// Start the device at this byte of the image, for example 1M or 1MiB.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Limit the device to this many bytes; 0: up to the end of the image.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    size_limit: u64,

    /// Logical block size: 512, 1024, 2048 or 4096; with the backend loop up to 64K, where the
    /// kernel supports that [default: the smallest that the image supports].
    #[arg(long, value_name = "SIZE", value_parser = size::parse_block)]
    block_size: Option<u32>,

    /// Read and write the image through the page cache. Needed on file systems without direct I/O.
    #[arg(long)]
    buffered: bool,

    /// Make every write durable before it completes, so that the kernel sends no flushes and an fsync
    /// costs less: for databases. The image must be written completely, without holes. The device
    /// offers no discards.
    #[arg(long, conflicts_with_all = ["read_only", "buffered"])]
    durable: bool,

    /// Serve at most this many requests per second, not counting flushes. Further requests wait.
    /// 'loopengine limit --device' changes the limit later.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    iops: Option<u64>,

    /// Read and write at most this many bytes per second together, for example 100M or 100MiB.
    /// Further requests wait.
    #[arg(long, value_name = "SIZE", value_parser = size::parse_rate)]
    bandwidth: Option<u64>,

    /// Number of queues [default: one per worker of the instance].
    #[arg(long, value_name = "N", value_parser = number::within(1..=4096_u32))]
    queues: Option<u32>,

    /// Requests in flight per queue [default: 128].
    #[arg(long, value_name = "N", value_parser = number::within(1..=4096_u32))]
    depth: Option<u32>,

    /// I/O mode: how data crosses between block layer and daemon [default: the best that the kernel
    /// supports].
    #[arg(long, value_name = "MODE", value_parser = io_mode_parser())]
    io_mode: Option<IoMode>,

    /// Scan the partition table, as losetup -P does. Partitions appear next to the device, for
    /// example loop0p1 next to loop0, and follow later changes of the table. The kernel of the host
    /// parses the table.
    #[arg(short = 'P', long)]
    partscan: bool,

    /// Device number in the instance [default: the lowest free number].
    #[arg(long, value_name = "N", value_parser = number::within(0..=NUMBER_MAX))]
    number: Option<u32>,

    /// Print the device as JSON; loopengine-json(7) describes it.
    #[arg(long, conflicts_with = "run")]
    json: bool,

    /// Run a command with the device. Takes the rest of the command line. Replaces '{}' with the
    /// path of the device; without '{}', appends the path. The environment variable
    /// LOOPENGINE_DEVICE holds the path too.
    #[arg(
        long,
        value_name = "CMD",
        num_args = 1..,
        allow_hyphen_values = true
    )]
    run: Vec<OsString>,
}

fn io_mode_parser() -> impl clap::builder::TypedValueParser<Value = IoMode> {
    use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
    let modes = [IoMode::Copy, IoMode::Auto, IoMode::Batch, IoMode::Loop, IoMode::Fuse];
    // The other backends have one mode each, which 'list --json' names: there is nothing to choose.
    let shown = |mode: IoMode| PossibleValue::new(mode.as_str()).hide(mode.backend() != BackendKind::Ublk);
    PossibleValuesParser::new(modes.map(shown)).try_map(move |word| {
        let mode = modes.into_iter().find(|mode| mode.as_str() == word);
        mode.ok_or("unknown I/O mode")
    })
}

impl AttachArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let image = self.image.clone();
        self.attach(run_dir).map_err(|error| match error.kind() {
            // The daemon knows a pool, but not where its device is mounted.
            Kind::Busy => match PoolUse::of_image(&image, run_dir) {
                Ok(Some(user)) => {
                    let next_step = format!("{}, or attach with --read-only or --force", user.next_step);
                    user.error(&image).hint(next_step)
                }
                _ => error,
            },
            _ => error,
        })
    }

    fn attach(self, run_dir: &Path) -> Result<u8> {
        let mut spec = AttachSpec {
            number: self.number,
            read_only: self.read_only,
            offset: self.offset,
            size_limit: self.size_limit,
            block_size: self.block_size.unwrap_or(0),
            buffered: self.buffered,
            queues: self.queues.unwrap_or(0),
            depth: self.depth.unwrap_or(0),
            io_mode: self.io_mode,
            partscan: self.partscan,
            durable: self.durable,
            iops: self.iops.unwrap_or(0),
            bytes_per_second: self.bandwidth.unwrap_or(0),
            instance: self.instance,
            ..AttachSpec::default()
        };
        if !rustix::process::geteuid().is_root() {
            // Refuse the user before reporting errors of the image.
            daemon::ask(run_dir, async |_| Ok(()))?;
        }
        let image = image::open(&self.image, &mut spec)?;
        if !self.run.is_empty() {
            return attach_run::with_device(run_dir, &spec, self.force, image, &self.run);
        }
        daemon::ask(run_dir, async |client| {
            let device = client.attach(&spec, self.force, image).await?;
            if spec.partscan {
                partitions::wait(&device);
            }
            let printed = match self.json {
                true => out::json(&device),
                false => out::print(&format!("{}\n", device.path)),
            };
            if let Err(error) = printed {
                // The caller does not know the path and could not detach the device.
                let _ = client.detach(&Selector::Device(device.path), false).await;
                return Err(error);
            }
            Ok(0)
        })
    }
}
