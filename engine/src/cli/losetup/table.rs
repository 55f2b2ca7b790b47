// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The output of losetup: lines of text, and tables in the format of libsmartcols.
//!
//! Knows formats only. Tables are never truncated to the terminal width, as with losetup in a pipe.

use rustix::fs::{major, minor};

use crate::loops::{DeviceEntry, LoopStatus, flag};

/// A device, and its status if known.
#[derive(Clone, Debug)]
pub struct Row {
    /// Path.
    pub name: String,
    /// The device.
    pub entry: DeviceEntry,
    /// The result of LOOP_GET_STATUS64.
    pub status: Option<LoopStatus>,
}

impl Row {
    /// Device and inode of the backing file, if known.
    pub(super) fn backing(&self) -> Option<(u64, u64)> {
        let known = |status: &LoopStatus| (status.device, status.inode);
        self.status.as_ref().map(known).filter(|known| *known != (0, 0))
    }

    /// The line of `losetup -a`. None if not bound.
    pub(super) fn line(&self) -> Option<String> {
        let bound = self.entry.bound.as_ref()?;
        let name = &self.name;
        let file = bound.backing_file.display();
        let mut line = match self.backing() {
            Some((device, inode)) => format!("{name}: [{device:04}]:{inode} ({file})"),
            None => format!("{name}: []: ({file})"),
        };
        for (what, value) in [("offset", bound.offset), ("sizelimit", bound.size_limit)] {
            if value > 0 {
                line.push_str(&format!(", {what} {value}"));
            }
        }
        Some(line)
    }
}

/// Format of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Aligned { headings: bool },
    Raw { headings: bool },
    Json,
}

/// A column of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Name,
    Autoclear,
    BackFile,
    BackIno,
    BackMajMin,
    BackMaj,
    BackMin,
    MajMin,
    Maj,
    Min,
    Offset,
    Partscan,
    Ref,
    Ro,
    SizeLimit,
    Dio,
    LogSec,
}

/// JSON type of a column.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Text,
    Number,
    Boolean,
}

use Column::*;

impl Column {
    /// All columns, in the order of `--output-all`.
    pub(super) const ALL: &'static [Column] = &[
        Name, Autoclear, BackFile, BackIno, BackMajMin, BackMaj, BackMin, MajMin, Maj, Min, Offset, Partscan,
        Ref, Ro, SizeLimit, Dio, LogSec,
    ];
    /// Default columns.
    pub(super) const DEFAULT: &'static [Column] =
        &[Name, SizeLimit, Offset, Autoclear, Ro, BackFile, Dio, LogSec];

    pub(super) fn name(self) -> &'static str {
        match self {
            Name => "NAME",
            Autoclear => "AUTOCLEAR",
            BackFile => "BACK-FILE",
            BackIno => "BACK-INO",
            BackMajMin => "BACK-MAJ:MIN",
            BackMaj => "BACK-MAJ",
            BackMin => "BACK-MIN",
            MajMin => "MAJ:MIN",
            Maj => "MAJ",
            Min => "MIN",
            Offset => "OFFSET",
            Partscan => "PARTSCAN",
            Ref => "REF",
            Ro => "RO",
            SizeLimit => "SIZELIMIT",
            Dio => "DIO",
            LogSec => "LOG-SEC",
        }
    }

    fn kind(self) -> Type {
        match self {
            Autoclear | Partscan | Ro | Dio => Type::Boolean,
            BackIno | Maj | Min | Offset | SizeLimit | LogSec => Type::Number,
            _ => Type::Text,
        }
    }

    fn is_right(self) -> bool {
        self.kind() != Type::Text
    }

    /// The cell; None if empty. Only aligned tables pad device numbers.
    fn cell(self, row: &Row, format: Format) -> Option<String> {
        let entry = &row.entry;
        let bound = entry.bound.as_ref();
        let is_set = |flag: u32| {
            let set = bound.is_some_and(|bound| bound.flags & flag != 0);
            Some(u8::from(set).to_string())
        };
        let pads = matches!(format, Format::Aligned { .. });
        let status = row.status.as_ref();
        let back = status.map(|status| status.device).filter(|&device| device > 0);
        match self {
            Name => Some(row.name.clone()),
            Autoclear => is_set(flag::AUTOCLEAR),
            Partscan => is_set(flag::PARTSCAN),
            Ro => is_set(flag::READ_ONLY),
            Dio => is_set(flag::DIRECT_IO),
            BackFile => bound.map(|bound| bound.backing_file.display().to_string()),
            Offset => bound.map(|bound| bound.offset.to_string()),
            SizeLimit => bound.map(|bound| bound.size_limit.to_string()),
            BackIno => status.map(|status| status.inode).filter(|&ino| ino > 0).map(|ino| ino.to_string()),
            BackMajMin if pads => back.map(|device| format!("{:8}:{:<3}", major(device), minor(device))),
            BackMajMin => back.map(|device| format!("{}:{}", major(device), minor(device))),
            BackMaj => back.map(|device| major(device).to_string()),
            BackMin => back.map(|device| minor(device).to_string()),
            MajMin if pads => Some(format!("{:3}:{:<3}", major(entry.rdev), minor(entry.rdev))),
            MajMin => Some(format!("{}:{}", major(entry.rdev), minor(entry.rdev))),
            Maj => Some(major(entry.rdev).to_string()),
            Min => Some(minor(entry.rdev).to_string()),
            Ref => status.map(|status| text(&status.info.file_name)).filter(|text| !text.is_empty()),
            LogSec => Some(entry.block_size.to_string()),
        }
    }
}

/// The bytes before the first zero, as text.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The table of `rows`.
pub(super) fn render(columns: &[Column], rows: &[Row], format: Format) -> String {
    match format {
        Format::Json => json(columns, rows),
        _ if rows.is_empty() => String::new(),
        Format::Raw { headings } => raw(columns, rows, headings),
        Format::Aligned { headings } => aligned(columns, rows, headings),
    }
}

fn aligned(columns: &[Column], rows: &[Row], headings: bool) -> String {
    let format = Format::Aligned { headings };
    let head = columns.iter().map(|column| column.name().to_owned()).collect();
    let cells = |row: &Row| -> Vec<String> {
        columns.iter().map(|column| printable(&column.cell(row, format).unwrap_or_default())).collect()
    };
    let heads: Vec<Vec<String>> = if headings { vec![head] } else { Vec::new() };
    let lines: Vec<Vec<String>> = heads.into_iter().chain(rows.iter().map(cells)).collect();
    // Headings determine the width even if they are not printed.
    let width = |(index, column): (usize, &Column)| {
        let cells = lines.iter().filter_map(|line| line.get(index));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max(column.name().len())
    };
    let widths: Vec<usize> = columns.iter().enumerate().map(width).collect();
    let mut text = String::new();
    for line in &lines {
        for (index, ((cell, column), &width)) in line.iter().zip(columns).zip(&widths).enumerate() {
            let last = index + 1 == columns.len();
            match column.is_right() {
                true => text.push_str(&format!("{cell:>width$}")),
                false if last => text.push_str(cell),
                false => text.push_str(&format!("{cell:<width$}")),
            }
            text.push(if last { '\n' } else { ' ' });
        }
    }
    text
}

/// Escapes control characters as `\x1b`.
fn printable(cell: &str) -> String {
    let escaped = |c: char| match c.is_control() {
        true => hex(c.encode_utf8(&mut [0; 4])),
        false => c.to_string(),
    };
    cell.chars().map(escaped).collect()
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("\\x{byte:02x}")).collect()
}

fn raw(columns: &[Column], rows: &[Row], headings: bool) -> String {
    let format = Format::Raw { headings };
    let safe = |byte: u8| match byte.is_ascii_graphic() && byte != b'\\' {
        true => char::from(byte).to_string(),
        false => format!("\\x{byte:02x}"),
    };
    let cell = |row: &Row, column: &Column| {
        let cell = column.cell(row, format).unwrap_or_default();
        cell.bytes().map(safe).collect::<String>()
    };
    let head = columns.iter().map(|column| column.name().to_owned()).collect();
    let heads: Vec<Vec<String>> = if headings { vec![head] } else { Vec::new() };
    let lines = rows.iter().map(|row| columns.iter().map(|column| cell(row, column)).collect());
    heads.into_iter().chain(lines).map(|line| line.join(" ") + "\n").collect()
}

fn json(columns: &[Column], rows: &[Row]) -> String {
    let value = |row: &Row, column: &Column| match (column.cell(row, Format::Json), column.kind()) {
        (None, _) => "null".to_owned(),
        (Some(cell), Type::Number) => cell,
        (Some(cell), Type::Boolean) => (cell == "1").to_string(),
        (Some(cell), Type::Text) => serde_json::Value::String(cell).to_string(),
    };
    let object = |row: &Row| {
        let member = |column: &Column| {
            format!("         \"{}\": {}", column.name().to_ascii_lowercase(), value(row, column))
        };
        let members: Vec<String> = columns.iter().map(member).collect();
        format!("{{\n{}\n      }}", members.join(",\n"))
    };
    let objects: Vec<String> = rows.iter().map(object).collect();
    let indent = if rows.is_empty() { "" } else { "      " };
    format!("{{\n   \"loopdevices\": [\n{indent}{}\n   ]\n}}\n", objects.join(","))
}
