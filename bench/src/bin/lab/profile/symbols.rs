// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Names what an emulated CPU executed: functions of the kernel, of its modules, and of programs.
//!
//! Knows /proc/kallsyms, ELF files, and the output of the plugin. Programs have the same addresses
//! in a sealed machine, so the code itself tells whose it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use object::{Object, ObjectSegment, ObjectSymbol, SymbolKind};

use loopbench::window::Mapping;

/// Code that was translated as a whole and always executes from its start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) address: u64,
    pub(super) instructions: u64,
    pub(super) count: u64,
    /// The first bytes, of user code only.
    code: Vec<u8>,
}

impl Block {
    /// Parses a line of the plugin.
    pub(super) fn parse(line: &str) -> Option<Block> {
        let mut words = line.split(' ');
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let (instructions, count) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let code = words.next()?;
        let byte = |at| u8::from_str_radix(code.get(at..at + 2)?, 16).ok();
        let code = (0..code.len()).step_by(2).map(byte).collect::<Option<_>>()?;
        Some(Block { address, instructions, count, code })
    }
}

/// Whose code it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Kernel,
    Module(String),
    /// A program that executes a file: itself or a library.
    Program {
        program: String,
        file: String,
    },
    Unknown,
}

/// A function, or the rest of a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Symbol {
    pub(super) owner: Owner,
    pub(super) name: String,
}

/// Name of code of a file that no symbol covers.
pub(super) const NO_SYMBOL: &str = "(no symbol)";

/// Kernel functions are shorter: code farther from a symbol is not its function's.
const FUNCTION_MAX: u64 = 1 << 16;

/// Names of all code of a machine.
pub(super) struct Names {
    kernel: Vec<(u64, Symbol)>,
    mappings: Vec<Mapping>,
    files: BTreeMap<String, Elf>,
}

impl Names {
    /// Names for the kernel's symbols and for the files of `mappings`; `locate` returns the path of
    /// such a file on this machine. Library code that several programs have at the same address is
    /// counted for `first`.
    pub(super) fn new(
        first: &str,
        kallsyms: &str,
        mappings: BTreeSet<Mapping>,
        locate: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<Names> {
        let mut files = BTreeMap::new();
        for file in mappings.iter().map(|mapping| &mapping.file) {
            if !files.contains_key(file)
                && let Some(path) = locate(file)
            {
                files.insert(file.clone(), Elf::read(&path)?);
            }
        }
        let mut kernel: Vec<(u64, Symbol)> = kallsyms.lines().filter_map(kernel_symbol).collect();
        kernel.sort();
        let mut mappings: Vec<Mapping> = mappings.into_iter().collect();
        mappings.sort_by_key(|mapping| mapping.program != first);
        Ok(Names { kernel, mappings, files })
    }

    /// The symbol of a block, and whether the block is its start.
    pub(super) fn of(&self, block: &Block) -> (Symbol, bool) {
        let found = if block.address >> 63 == 1 { self.in_kernel(block) } else { self.in_program(block) };
        found.unwrap_or((Symbol { owner: Owner::Unknown, name: NO_SYMBOL.into() }, false))
    }

    fn in_kernel(&self, block: &Block) -> Option<(Symbol, bool)> {
        let after = self.kernel.partition_point(|(address, _)| *address <= block.address);
        let (address, symbol) = self.kernel[..after].last()?;
        let offset = block.address - address;
        (offset < FUNCTION_MAX).then(|| (symbol.clone(), offset == 0))
    }

    fn in_program(&self, block: &Block) -> Option<(Symbol, bool)> {
        let around = |mapping: &&Mapping| (mapping.start..mapping.end).contains(&block.address);
        let named = |mapping: &Mapping| {
            let (name, start) = self.files.get(&mapping.file)?.function(mapping, block)?;
            Some((symbol(mapping, name), start))
        };
        // The kernel's page for reading the clock has no file.
        let without_file = |mapping: &Mapping| {
            mapping.file.starts_with('[').then(|| (symbol(mapping, NO_SYMBOL.into()), false))
        };
        let mut candidates = self.mappings.iter().filter(around);
        candidates.clone().find_map(named).or_else(|| candidates.find_map(without_file))
    }
}

fn symbol(mapping: &Mapping, name: String) -> Symbol {
    let file = mapping.file.rsplit('/').next().unwrap_or_default().to_owned();
    Symbol { owner: Owner::Program { program: mapping.program.clone(), file }, name }
}

/// Parses a line of /proc/kallsyms: "ADDRESS TYPE NAME" and, for modules, "\t\[MODULE\]".
fn kernel_symbol(line: &str) -> Option<(u64, Symbol)> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    let name = words.nth(1)?.to_owned();
    let module = words.next().map(|word| word.trim_matches(['[', ']']).to_owned());
    Some((address, Symbol { owner: module.map_or(Owner::Kernel, Owner::Module), name }))
}

/// A program or library.
struct Elf {
    bytes: Vec<u8>,
    /// Offset in the file, length, address.
    segments: Vec<(u64, u64, u64)>,
    /// Address, length, name.
    functions: Vec<(u64, u64, String)>,
}

impl Elf {
    fn read(path: &Path) -> Result<Elf> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file = object::File::parse(&*bytes).with_context(|| format!("{} is no ELF", path.display()))?;
        let segment = |segment: object::Segment<'_, '_>| {
            let (offset, length) = segment.file_range();
            (offset, length, segment.address())
        };
        let segments = file.segments().map(segment).collect();
        // A stripped library still has the symbols that others link to.
        let mut functions: Vec<(u64, u64, String)> = file
            .symbols()
            .chain(file.dynamic_symbols())
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition())
            .filter_map(|symbol| Some((symbol.address(), symbol.size(), demangled(symbol.name().ok()?))))
            .collect();
        functions.sort();
        functions.dedup_by_key(|(address, ..)| *address);
        Ok(Elf { bytes, segments, functions })
    }

    /// The function of a block, and whether the block is its start; `None` if the code differs.
    fn function(&self, mapping: &Mapping, block: &Block) -> Option<(String, bool)> {
        let offset = block.address - mapping.start + mapping.offset;
        let at = usize::try_from(offset).ok()?;
        (self.bytes.get(at..at + block.code.len())? == block.code).then_some(())?;
        let in_segment = |(start, length, _): &&(u64, u64, u64)| (*start..start + length).contains(&offset);
        let (start, _, address) = self.segments.iter().find(in_segment)?;
        let address = offset - start + address;
        let after = self.functions.partition_point(|(start, ..)| *start <= address);
        let covers = |(start, length, _): &&(u64, u64, String)| address < start + (*length).max(1);
        let found = self.functions[..after].last().filter(covers);
        Some(found.map_or((NO_SYMBOL.into(), false), |(start, _, name)| (name.clone(), *start == address)))
    }
}

/// A name without the hash of its crate.
fn demangled(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(address: u64, code: &[u8]) -> Block {
        Block { address, instructions: 3, count: 10, code: code.to_vec() }
    }

    #[test]
    fn lines_of_the_plugin_are_parsed() {
        let user = Block { address: 0x1000, instructions: 3, count: 7, code: vec![0x0f, 0x1f] };
        assert_eq!(Block::parse("1000 3 7 0f1f"), Some(user));
        assert!(Block::parse("ffffffff81000000 3 7 ").unwrap().code.is_empty());
        assert_eq!(["", "1000 3", "1000 3 7 0f1", "x 3 7 "].map(Block::parse), [None, None, None, None]);
    }

    #[test]
    fn kernel_addresses_get_the_symbol_before_them() {
        let kallsyms = "ffffffff81000040 t b\nffffffff81000000 T a\nffffffffc0000000 t c\t[xfs]\n";
        let names = Names::new("", kallsyms, BTreeSet::new(), |_| None).unwrap();
        let name = |address| {
            let (symbol, start) = names.of(&block(address, &[]));
            (symbol.owner, symbol.name, start)
        };
        assert_eq!(name(0xffff_ffff_8100_0000), (Owner::Kernel, "a".into(), true));
        assert_eq!(name(0xffff_ffff_8100_003f), (Owner::Kernel, "a".into(), false));
        assert_eq!(name(0xffff_ffff_c000_0001), (Owner::Module("xfs".into()), "c".into(), false));
        assert_eq!(name(0xffff_ffff_d000_0000), (Owner::Unknown, NO_SYMBOL.into(), false));
        assert_eq!(name(0xffff_ffff_8000_0000), (Owner::Unknown, NO_SYMBOL.into(), false));
    }

    /// Two programs at the same addresses; the second is this test.
    #[test]
    fn identifies_a_program_by_its_code() {
        let me = std::env::current_exe().unwrap();
        let elf = Elf::read(&me).unwrap();
        let (address, _, name) =
            elf.functions.iter().find(|(.., name)| name.contains("identifies_a_program")).unwrap();
        let (offset, length, base) =
            elf.segments.iter().find(|(_, length, base)| (*base..base + length).contains(address)).unwrap();
        let mapping = |program: &str, file: &str| Mapping {
            program: program.into(),
            start: 0x5000_0000,
            end: 0x5000_0000 + length,
            offset: *offset,
            file: file.into(),
        };
        let mappings = BTreeSet::from([
            mapping("fio", "/bin/sh"),
            mapping("a", "/me"),
            mapping("me", "/me"),
            mapping("me", "[vdso]"),
        ]);
        let locate = |file: &str| match file {
            "/me" => Some(me.clone()),
            "/bin/sh" => Some(file.into()),
            _ => None,
        };
        let names = Names::new("me", "", mappings, locate).unwrap();
        let at = address - base + 0x5000_0000;
        let start = usize::try_from(address - base + offset).unwrap();
        let (found, is_start) = names.of(&block(at, &elf.bytes[start..start + 16]));
        let owner = |file: &str| Owner::Program { program: "me".into(), file: file.into() };
        assert_eq!((found, is_start), (Symbol { owner: owner("me"), name: name.clone() }, true));
        let (found, _) = names.of(&block(at, b"no program's code"));
        assert_eq!(found, Symbol { owner: owner("[vdso]"), name: NO_SYMBOL.into() });
        assert_eq!(names.of(&block(0x4fff_ffff, &[])).0.owner, Owner::Unknown);
    }
}
