// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `[[device]]`: a device that the daemon attaches when it starts.
//!
//! Parses the options of 'loopengine attach' in a file, and matches devices to entries. Does not
//! open images.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::{number, size};
use crate::instance::NUMBER_MAX;
use crate::instance::spec::{AttachSpec, DEFAULT_INSTANCE, DeviceInfo, IoMode};

/// `[[device]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceTable {
    /// Its image: an absolute path.
    #[serde(deserialize_with = "absolute")]
    pub image: String,
    /// Instance that gets the device.
    #[serde(default = "default_instance")]
    pub instance: String,
    /// N of loopN; none: the lowest that is free.
    #[serde(default, deserialize_with = "device_number")]
    pub number: Option<u32>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Attach even if the image is in use.
    #[serde(default)]
    pub force: bool,
    /// First byte of the image that the device maps.
    #[serde(default, deserialize_with = "bytes")]
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the image.
    #[serde(default, deserialize_with = "bytes")]
    pub size_limit: u64,
    /// Logical block size; 0: the smallest that the image allows.
    #[serde(default, deserialize_with = "block_size")]
    pub block_size: u32,
    /// Go through the page cache.
    #[serde(default)]
    pub buffered: bool,
    /// Queues; 0: one for each worker of the instance.
    #[serde(default, deserialize_with = "count")]
    pub queues: u32,
    /// Requests in flight in each queue; 0: as many as usual.
    #[serde(default, deserialize_with = "count")]
    pub depth: u32,
    /// I/O mode; none: the best that the kernel supports.
    pub io_mode: Option<IoMode>,
    /// Have the kernel scan for partitions.
    #[serde(default)]
    pub partscan: bool,
    /// Make every write durable before it completes.
    #[serde(default)]
    pub durable: bool,
    /// Maximum number of requests per second; 0: no limit.
    #[serde(default)]
    pub iops: u64,
    /// Maximum number of bytes read and written per second; 0: no limit.
    #[serde(default, deserialize_with = "bytes")]
    pub bandwidth: u64,
    /// File and line of this entry, for messages.
    #[serde(skip)]
    pub location: String,
}

impl DeviceTable {
    /// The specification of its attach.
    pub fn spec(&self) -> AttachSpec {
        AttachSpec {
            instance: self.instance.clone(),
            path: self.image.clone(),
            number: self.number,
            read_only: self.read_only,
            offset: self.offset,
            size_limit: self.size_limit,
            block_size: self.block_size,
            buffered: self.buffered,
            queues: self.queues,
            depth: self.depth,
            io_mode: self.io_mode,
            partscan: self.partscan,
            durable: self.durable,
            iops: self.iops,
            bytes_per_second: self.bandwidth,
        }
    }

    /// Whether both describe the same device, even with different options. No two entries of a file
    /// do.
    pub fn same_device(&self, other: &DeviceTable) -> bool {
        let of = |table: &DeviceTable| (table.instance.clone(), table.image.clone(), table.offset);
        of(self) == of(other)
    }

    /// Whether `device` is the one that this describes, also if an earlier daemon attached it.
    pub fn is(&self, device: &DeviceInfo) -> bool {
        let same = (&self.instance, &self.image, self.offset);
        same == (&device.instance, &device.image, device.offset)
            && self.number.is_none_or(|number| number == device.number)
    }
}

fn default_instance() -> String {
    DEFAULT_INSTANCE.to_owned()
}

/// A number or a string.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a number that is not negative, or a string")]
enum NumberOrText {
    Number(u64),
    Text(String),
}

/// The value as a command line argument.
pub(super) fn number_or_text<'de, D: Deserializer<'de>>(value: D) -> Result<String, D::Error> {
    NumberOrText::deserialize(value).map(|number_or_text| match number_or_text {
        NumberOrText::Number(number) => number.to_string(),
        NumberOrText::Text(text) => text,
    })
}

fn absolute<'de, D: Deserializer<'de>>(value: D) -> Result<String, D::Error> {
    let image = String::deserialize(value)?;
    if !image.starts_with('/') || image.contains('\0') {
        return Err(D::Error::custom(format!("the image {image:?} is not an absolute path")));
    }
    // As devices show it: normalized.
    let path = std::path::absolute(&image).map_err(D::Error::custom)?;
    path.into_os_string().into_string().map_err(|_| D::Error::custom("the image is not UTF-8"))
}

fn bytes<'de, D: Deserializer<'de>>(value: D) -> Result<u64, D::Error> {
    size::parse(&number_or_text(value)?).map_err(D::Error::custom)
}

fn block_size<'de, D: Deserializer<'de>>(value: D) -> Result<u32, D::Error> {
    size::parse_block(&number_or_text(value)?).map_err(D::Error::custom)
}

fn count<'de, D: Deserializer<'de>>(value: D) -> Result<u32, D::Error> {
    number::within(1..=4096_u32)(&number_or_text(value)?).map_err(D::Error::custom)
}

fn device_number<'de, D: Deserializer<'de>>(value: D) -> Result<Option<u32>, D::Error> {
    number::within(0..=NUMBER_MAX)(&number_or_text(value)?).map(Some).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use crate::instance::spec::{AttachSpec, IoMode};

    fn refused(text: &str) -> String {
        Config::parse(text, "x.toml").unwrap_err().message()
    }

    #[test]
    fn an_entry_has_the_options_of_attach() {
        let text = "# a comment\n[[device]]\nimage = '/srv//a.img'\ninstance = 'ci'\nnumber = 3\n\
                    read_only = true\nforce = true\noffset = '1M'\nsize_limit = 4096\nblock_size = '4k'\n\
                    buffered = true\nqueues = 2\ndepth = 64\nio_mode = 'copy'\npartscan = true\ndurable = true\n\
                    iops = 500\nbandwidth = '10M'\n[[device]]\nimage = '/b.img'\n";
        let config = Config::parse(text, "x.toml").unwrap();
        let [first, second] = &config.devices().collect::<Vec<_>>()[..] else { panic!("{config:?}") };
        let spec = AttachSpec {
            instance: "ci".into(),
            path: "/srv/a.img".into(),
            number: Some(3),
            read_only: true,
            offset: 1 << 20,
            size_limit: 4096,
            block_size: 4096,
            buffered: true,
            queues: 2,
            depth: 64,
            io_mode: Some(IoMode::Copy),
            partscan: true,
            durable: true,
            iops: 500,
            bytes_per_second: 10 << 20,
        };
        assert_eq!((first.spec(), first.force, &*first.location), (spec, true, "x.toml, line 2"));
        let usual = AttachSpec { instance: "default".into(), path: "/b.img".into(), ..AttachSpec::default() };
        assert_eq!((second.spec(), second.force, &*second.location), (usual, false, "x.toml, line 19"));
    }

    #[test]
    fn errors_name_their_line() {
        for (entry, line, says) in [
            ("image = 'a.img'", 3, "not an absolute path"),
            ("image = \"/a\\u0000b\"", 3, "not an absolute path"),
            ("image = 7", 3, "string"),
            ("read_only = true", 2, "missing field `image`"),
            ("image = '/a'\noffset = '1x'", 4, "not a size"),
            ("image = '/a'\noffset = -1", 4, "not negative"),
            ("image = '/a'\n\nblock_size = 100", 5, "not a block size"),
            ("image = '/a'\nqueues = 0", 4, "from 1 to 4096"),
            ("image = '/a'\nnumber = 1048576", 4, "from 0 to 1048575"),
            ("image = '/a'\nio_mode = 'fast'", 4, "`fast`"),
            ("image = '/a'\nname = 'x'", 4, "`name`"),
        ] {
            let message = refused(&format!("\n[[device]]\n{entry}\n"));
            let location = format!("x.toml, line {line}: ");
            assert!(message.starts_with(&location) && message.contains(says), "{entry}: {message}");
        }
    }

    #[test]
    fn rejects_two_entries_for_the_same_device() {
        let twice = "[[device]]\nimage = '/a'\n[[device]]\nimage = '/./a'\nread_only = true\n";
        let message = refused(twice);
        assert_eq!(message, "x.toml, line 3: the image /a appears twice in the instance 'default'");
        let number = "[[device]]\nimage = '/a'\nnumber = 1\n\n[[device]]\nimage = '/b'\nnumber = 1\n";
        assert_eq!(refused(number), "x.toml, line 5: loop1 of the instance 'default' appears twice");
        for elsewhere in ["offset = 512\n", "instance = 'x'\nnumber = 1\n"] {
            let text = format!("[[device]]\nimage = '/a'\nnumber = 1\n[[device]]\nimage = '/a'\n{elsewhere}");
            Config::parse(&text, "x.toml").unwrap();
        }
    }
}
