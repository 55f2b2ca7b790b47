// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of losetup(8), and the actions that they select.
//!
//! Knows the command line only: valid combinations of options, and messages for others.

use std::ffi::{OsStr, OsString};

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::table::{Column, Format};
use crate::cli::complete;
use crate::loops::flag;

/// Manage the loop devices of a private pool, with the options of losetup(8).
///
/// Accepts the options of losetup(8) in util-linux 2.41 and prints the same output. Use it where
/// losetup itself cannot work because no seccomp filter can be installed.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(args_override_self = true, infer_long_args = true, disable_version_flag = true)]
pub struct LosetupArgs {
    /// List all bound devices.
    #[arg(short, long)]
    all: bool,
    /// Unbind devices.
    #[arg(short, long)]
    detach: bool,
    /// Unbind all devices.
    #[arg(short = 'D', long)]
    detach_all: bool,
    /// Find the first free device.
    #[arg(short, long)]
    find: bool,
    /// Set the size of the device to the current size of its file.
    #[arg(short = 'c', long)]
    set_capacity: bool,
    /// List the devices that are bound to FILE.
    #[arg(short = 'j', long, value_name = "FILE")]
    associated: Option<OsString>,
    /// Reuse a device with the same range; refuse an overlapping one.
    #[arg(short = 'L', long)]
    nooverlap: bool,
    /// Remove devices.
    #[arg(long)]
    remove: bool,

    /// Start at byte NUM of the file.
    #[arg(short, long, value_name = "NUM")]
    offset: Option<String>,
    /// Limit the device to NUM bytes.
    #[arg(long, value_name = "NUM")]
    sizelimit: Option<String>,
    /// Set the logical block size.
    #[arg(short = 'b', long, value_name = "NUM")]
    sector_size: Option<String>,
    /// Scan the partition table.
    #[arg(short = 'P', long)]
    partscan: bool,
    /// Make the device read-only.
    #[arg(short, long)]
    read_only: bool,
    /// Use direct I/O on the file.
    #[arg(
        long,
        value_name = "on|off",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on"
    )]
    direct_io: Option<String>,
    /// Name of the device in column REF.
    #[arg(long, value_name = "STRING")]
    loop_ref: Option<OsString>,
    /// Print the name of the new device (with -f).
    #[arg(long)]
    show: bool,
    /// No effect.
    #[arg(short, long, hide = true)]
    verbose: bool,

    /// Print the list as JSON.
    #[arg(short = 'J', long)]
    json: bool,
    /// List all devices, or the given one, as a table.
    #[arg(short, long)]
    list: bool,
    /// Print no headings.
    #[arg(short, long)]
    noheadings: bool,
    /// Columns to print.
    #[arg(short = 'O', long, value_name = "COLS")]
    output: Option<String>,
    /// Print all columns.
    #[arg(long)]
    output_all: bool,
    /// Print the list in a raw format.
    #[arg(long)]
    raw: bool,

    /// Pool [default: the pool mounted here, or the only pool of the user].
    #[arg(long, value_name = "NAME", env = "LOOPENGINE_POOL", hide_env_values = true, add = complete::pools())]
    pool: Option<String>,

    /// Device, file, or both in this order.
    #[arg(value_name = "LOOPDEV|FILE")]
    words: Vec<OsString>,
}

/// The selected action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Show { file: Option<OsString> },
    ShowOne(OsString),
    FindFree,
    Create { device: Option<OsString>, file: OsString },
    Detach(Vec<OsString>),
    DetachAll,
    Remove(Vec<OsString>),
    SetCapacity(OsString),
    SetDirectIo(OsString, bool),
    SetBlockSize(OsString, u64),
}

/// An action and its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LosetupRequest {
    pub(super) action: Action,
    pub(super) offset: Option<u64>,
    pub(super) size_limit: u64,
    pub(super) block_size: u64,
    /// See [`flag`].
    pub(super) flags: u32,
    pub(super) no_overlap: bool,
    pub(super) reference: Option<OsString>,
    pub(super) show: bool,
    /// Columns and format of a table.
    pub(super) table: Option<(Vec<Column>, Format)>,
}

/// Groups of mutually exclusive options.
const EXCLUSIVE: [&[&str]; 4] = [
    &["detach-all", "all", "set-capacity", "detach", "find", "associated", "remove"],
    &["detach-all", "set-capacity", "detach", "find", "list", "remove"],
    &["detach-all", "output", "set-capacity", "detach", "find", "remove"],
    &["json", "raw"],
];

impl LosetupArgs {
    /// The pool given with --pool.
    pub fn pool(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    fn given(&self, option: &str) -> bool {
        match option {
            "detach-all" => self.detach_all,
            "all" => self.all,
            "set-capacity" => self.set_capacity,
            "detach" => self.detach,
            "find" => self.find,
            "associated" => self.associated.is_some(),
            "remove" => self.remove,
            "list" => self.list,
            "output" => self.output.is_some(),
            "json" => self.json,
            "raw" => self.raw,
            _ => false,
        }
    }

    /// Interprets the options. The error is the message that losetup prints after its name.
    pub(super) fn request(self) -> Result<LosetupRequest, String> {
        for row in EXCLUSIVE {
            if row.iter().filter(|option| self.given(option)).count() > 1 {
                return Err(format!("mutually exclusive arguments: --{}", row.join(" --")));
            }
        }
        let number = |what: &str, text: &Option<String>| {
            let text = text.as_deref();
            text.map(|text| size(text).map_err(|why| format!("failed to parse {what}: '{text}': {why}")))
                .transpose()
        };
        let block_size = number("logical block size", &self.sector_size)?;
        let offset = number("offset", &self.offset)?;
        let size_limit = number("size", &self.sizelimit)?.unwrap_or(0);
        let direct_io = match self.direct_io.as_deref() {
            None => None,
            Some("on") => Some(true),
            Some("off") => Some(false),
            Some(other) => return Err(format!("argument error: '{other}'")),
        };
        let wanted = [
            (self.read_only, flag::READ_ONLY),
            (self.partscan, flag::PARTSCAN),
            (direct_io == Some(true), flag::DIRECT_IO),
        ];
        let mut flags = wanted.iter().filter(|(wanted, _)| *wanted).fold(0, |flags, (_, flag)| flags | flag);
        let action = self.action(direct_io, block_size)?;
        if matches!(action, Action::SetDirectIo(..)) {
            flags &= !flag::DIRECT_IO;
        }
        let creates = matches!(action, Action::Create { .. });
        if !creates && (size_limit > 0 || flags != 0 || self.show) {
            let options = "--{sizelimit,partscan,read-only,show}";
            return Err(format!("the options {options} are allowed during loop device setup only"));
        }
        if offset.is_some() && !creates && !matches!(action, Action::Show { file: Some(_) }) {
            return Err("the option --offset is not allowed in this context".to_owned());
        }
        Ok(LosetupRequest {
            table: self.table(&action)?,
            action,
            offset,
            size_limit,
            block_size: block_size.unwrap_or(0),
            flags,
            no_overlap: self.nooverlap,
            reference: self.loop_ref,
            show: self.show,
        })
    }

    fn action(&self, direct_io: Option<bool>, block_size: Option<u64>) -> Result<Action, String> {
        let word = |index: usize| self.words.get(index).cloned();
        let device = || word(0).ok_or("no loop device specified");
        let sets_up =
            self.partscan || self.read_only || self.show || self.nooverlap || self.loop_ref.is_some();
        let lists = self.list || self.output.is_some() || self.output_all;
        if self.all || self.associated.is_some() {
            return Ok(Action::Show { file: self.associated.clone() });
        } else if self.detach_all {
            return Ok(Action::DetachAll);
        } else if self.find {
            return match (word(0), self.words.len()) {
                (None, _) => Ok(Action::FindFree),
                (Some(file), 1) => Ok(Action::Create { device: None, file }),
                _ => Err("unexpected arguments".to_owned()),
            };
        } else if self.set_capacity {
            return Ok(Action::SetCapacity(device()?));
        } else if self.detach || self.remove {
            device()?;
            let words = self.words.clone();
            return Ok(if self.detach { Action::Detach(words) } else { Action::Remove(words) });
        }
        match (self.words.len(), direct_io, block_size) {
            (0, ..) if lists => Ok(Action::Show { file: None }),
            // Options that only format a list imply one.
            (0, None, None) if !sets_up && self.offset.is_none() && self.sizelimit.is_none() => {
                Ok(Action::Show { file: None })
            }
            (1, Some(on), _) => Ok(Action::SetDirectIo(device()?, on)),
            (1, None, Some(bytes)) => Ok(Action::SetBlockSize(device()?, bytes)),
            (1, None, None) => Ok(Action::ShowOne(device()?)),
            _ => {
                let file = word(1);
                Ok(Action::Create { device: Some(device()?), file: file.ok_or("no file specified")? })
            }
        }
    }

    /// Columns and format, if the list is a table.
    fn table(&self, action: &Action) -> Result<Option<(Vec<Column>, Format)>, String> {
        let asked = self.list || self.output.is_some() || self.output_all;
        let implied = !self.all && matches!(action, Action::Show { file: None });
        let shows = matches!(action, Action::Show { .. } | Action::ShowOne(_));
        if !shows || !(asked || implied) {
            return Ok(None);
        }
        let defaults = if self.output_all { Column::ALL } else { Column::DEFAULT };
        let mut columns = defaults.to_vec();
        if let Some(list) = self.output.as_deref() {
            let names = list.strip_prefix('+').unwrap_or_else(|| {
                columns.clear();
                list
            });
            for name in names.split(',') {
                let known = Column::ALL.iter().find(|column| column.name().eq_ignore_ascii_case(name));
                columns.push(*known.ok_or_else(|| format!("unknown column: {name}"))?);
            }
        }
        let format = match (self.json, self.raw) {
            (true, _) => Format::Json,
            (_, true) => Format::Raw { headings: !self.noheadings },
            _ => Format::Aligned { headings: !self.noheadings },
        };
        Ok(Some((columns, format)))
    }
}

/// Parses a size as util-linux does: `0x` and `0` as in C, K and KiB for 1024, KB for 1000, `1.5G`.
fn size(text: &str) -> Result<u64, &'static str> {
    const INVALID: &str = "Invalid argument";
    const RANGE: &str = "Numerical result out of range";
    let trimmed = text.trim_start().trim_start_matches('+');
    let (radix, digits) = match trimmed.strip_prefix("0x").or_else(|| trimmed.strip_prefix("0X")) {
        Some(rest) => (16, rest),
        None if trimmed.len() > 1 && trimmed.starts_with('0') => (8, trimmed),
        None => (10, trimmed),
    };
    let count = digits.chars().take_while(|c| c.is_digit(radix)).count();
    let (whole, rest) = digits.split_at(count);
    if whole.is_empty() {
        return Err(INVALID);
    }
    let whole = u64::from_str_radix(whole, radix).map_err(|_| RANGE)?;
    let (fraction, unit) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.chars().take_while(char::is_ascii_digit).count()),
        None => ("", rest),
    };
    let mut letters = unit.chars();
    let power = match letters.next().map(|letter| letter.to_ascii_uppercase()) {
        None if fraction.is_empty() && rest.is_empty() => return Ok(whole),
        Some(letter) => 1 + "KMGTPEZY".find(letter).ok_or(INVALID)? as u32,
        None => return Err(INVALID),
    };
    let base: u128 = match letters.as_str() {
        "" | "iB" | "ib" | "IB" => 1024,
        "B" | "b" => 1000,
        _ => return Err(INVALID),
    };
    let unit = base.pow(power);
    let fraction = fraction.get(..fraction.len().min(9)).unwrap_or_default();
    let parts = fraction.parse::<u128>().unwrap_or(0) * unit / 10u128.pow(fraction.len() as u32);
    let bytes = u128::from(whole).checked_mul(unit).and_then(|bytes| bytes.checked_add(parts));
    bytes.and_then(|bytes| u64::try_from(bytes).ok()).ok_or(RANGE)
}

/// Translates a clap error to a getopt message and the hint at the help. `last` is the last word:
/// only an option there can lack its argument.
pub(super) fn usage(error: &clap::Error, last: &OsStr) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    let invalid = text(ContextKind::InvalidArg);
    // "--offset <NUM>", "-x", "--direct-io[=<on|off>]"
    let option = invalid.split([' ', '=', '[']).next().unwrap_or_default();
    let message = match error.kind() {
        ErrorKind::UnknownArgument => match option.strip_prefix("--") {
            Some(_) => format!("unrecognized option '{option}'"),
            None => format!("invalid option -- '{}'", option.trim_start_matches('-')),
        },
        ErrorKind::TooManyValues | ErrorKind::TooFewValues if option.starts_with("--") => {
            format!("option '{option}' doesn't allow an argument")
        }
        ErrorKind::InvalidValue => match last.as_encoded_bytes() {
            [b'-', b'-', ..] => format!("option '{option}' requires an argument"),
            [.., letter] => format!("option requires an argument -- '{}'", char::from(*letter)),
            [] => format!("option '{option}' requires an argument"),
        },
        _ => error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned(),
    };
    format!("{message}\nTry 'losetup --help' for more information.")
}

/// The number of the device `DIR/loopN` or `loopN`.
pub(super) fn number(name: &OsStr, directory: &str) -> Option<u32> {
    let name = name.to_str()?;
    let inside = name.strip_prefix(directory).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name);
    let digits = inside.strip_prefix("loop")?;
    let number: u32 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_sizes_as_util_linux() {
        let sizes = [
            ("0", 0),
            ("512", 512),
            ("0x200", 512),
            ("010", 8),
            ("1K", 1024),
            ("1k", 1024),
            ("1KiB", 1024),
            ("1KB", 1000),
            ("1.5M", 3 << 19),
            ("2G", 2 << 30),
            ("16383P", 16383 << 50),
        ];
        for (text, bytes) in sizes {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "abc", "1x", "-1", "1KiBs", "0x", "1.5", "1.", "K"] {
            assert_eq!(size(text), Err("Invalid argument"), "{text}");
        }
        for text in ["18446744073709551616", "16E", "1Y"] {
            assert_eq!(size(text), Err("Numerical result out of range"), "{text}");
        }
    }

    #[test]
    fn parses_device_names() {
        for name in ["/dev/loop7", "loop7"] {
            assert_eq!(number(OsStr::new(name), "/dev"), Some(7));
        }
        for name in ["/dev/loop07", "/dev/loop7p1", "loop", "/run/loop7", "7", "/dev//loop7", "loop+7"] {
            assert_eq!(number(OsStr::new(name), "/dev"), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".*", digits in "[0-9.xKMGTPEZYiB]{0,40}") {
            let _ = (size(&text), size(&digits), number(OsStr::new(&text), "/dev"));
        }
    }
}
