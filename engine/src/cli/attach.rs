//! `loopengine attach`: serves an image, prints the path of its device.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::instance::spec::{AttachSpec, DEFAULT_INSTANCE, IoMode};
use crate::instance::{NUMBER_MAX, Selector};

use super::{complete, daemon, image, number, out, partitions, run, size};

/// Serve an image file or block device as a block device.
///
/// Prints the path of the device, alone, on standard output, once the device can be used. With
/// '--run', gives the device to a command instead, detaches it when the command ends, and exits
/// with its status.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Image file or block device.
    image: PathBuf,

    /// Instance that gets the device.
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_INSTANCE, add = complete::instances())]
    instance: String,

    /// Refuse writes. The image need not be writable.
    #[arg(short, long)]
    read_only: bool,

    /// Attach the image although somebody else uses it: another device, a pool, a mount, swap, a loop
    /// device of the kernel. Two who write an image, or one file system that is mounted twice, destroy
    /// its contents; the log says who shares it.
    #[arg(short, long)]
    force: bool,

    /// First byte of the image that the device shows, with a unit as in 1M or 1MiB.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Bytes that the device shows at the most; 0: up to the end of the image.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    size_limit: u64,

    /// Logical block size: 512, 1024, 2048 or 4096 [default: the smallest that the image allows].
    #[arg(long, value_name = "SIZE", value_parser = size::parse_block)]
    block_size: Option<u32>,

    /// Go through the page cache. For file systems that have no direct I/O.
    #[arg(long)]
    buffered: bool,

    /// Queues of the device [default: one for each worker of the instance].
    #[arg(long, value_name = "N", value_parser = number::within(1..=4096_u32))]
    queues: Option<u32>,

    /// Requests in flight in each queue [default: 128].
    #[arg(long, value_name = "N", value_parser = number::within(1..=4096_u32))]
    depth: Option<u32>,

    /// Force one way of moving data [default: the best that the kernel grants].
    #[arg(long, value_name = "MODE", value_parser = io_mode_parser())]
    io_mode: Option<IoMode>,

    /// Have the kernel look for partitions, as with losetup -P: they are beside the device, as loop0p1 beside
    /// loop0, here and whenever the table is read again. The host's kernel parses the image's table.
    #[arg(short = 'P', long)]
    partscan: bool,

    /// Number of the device in its instance [default: the lowest that is free].
    #[arg(long, value_name = "N", value_parser = number::within(0..=NUMBER_MAX))]
    number: Option<u32>,

    /// Print the device as JSON; loopengine-json(7) describes it.
    #[arg(long, conflicts_with = "run")]
    json: bool,

    /// Run a command with the device. Takes the rest of the line: '{}' in it is replaced by the
    /// path of the device, which is the last argument if there is no '{}'. The path is also in the
    /// environment variable LOOPENGINE_DEVICE.
    #[arg(
        long,
        value_name = "CMD",
        num_args = 1..,
        allow_hyphen_values = true
    )]
    run: Vec<OsString>,
}

fn io_mode_parser() -> impl clap::builder::TypedValueParser<Value = IoMode> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    let modes = [IoMode::Copy, IoMode::Auto, IoMode::Batch, IoMode::Fuse];
    PossibleValuesParser::new(modes.map(IoMode::as_str)).try_map(move |word| {
        let mode = modes.into_iter().find(|mode| mode.as_str() == word);
        mode.ok_or("unknown I/O mode")
    })
}

/// A specification with nothing special in it.
pub(crate) fn plain(instance: &str) -> AttachSpec {
    AttachSpec {
        instance: instance.to_owned(),
        path: String::new(),
        number: None,
        read_only: false,
        offset: 0,
        size_limit: 0,
        block_size: 0,
        buffered: false,
        queues: 0,
        depth: 0,
        io_mode: None,
        partscan: false,
    }
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
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
            ..plain(&self.instance)
        };
        if !rustix::process::geteuid().is_root() {
            // Who is refused need not hear first what is wrong with his image.
            daemon::ask(run_dir, async |_| Ok(()))?;
        }
        let image = image::open(&self.image, &mut spec)?;
        if !self.run.is_empty() {
            return run::with_device(run_dir, &spec, self.force, image, &self.run);
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
                // Nobody learnt its name, so nobody would detach it.
                let _ = client.detach(&Selector::Device(device.path), false).await;
                return Err(error);
            }
            Ok(0)
        })
    }
}
