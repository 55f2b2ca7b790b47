// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Instructions per I/O by layer and by function, targets side by side: Markdown and CSV.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use anyhow::{Result, bail};

use loopbench::render;

use super::layers;
use super::symbols::{Block, NO_SYMBOL, Names, Owner, Symbol};

/// What a function cost in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Spent {
    instructions: u64,
    calls: u64,
}

/// A target's window.
#[derive(Debug)]
pub(super) struct Profile {
    pub(super) target: String,
    ios: u64,
    /// Instructions per I/O by fio's IOPS, where an instruction takes 1 ns.
    measured: f64,
    /// The same in the gate's baseline.
    baseline: Option<u64>,
    spent: BTreeMap<Symbol, Spent>,
}

/// Functions that the kernel calls once per I/O of fio, for each kind of file. The first kind that
/// was called is fio's: a daemon and the loop driver use a file below it.
const IO_FUNCTIONS: [[&str; 2]; 3] = [
    ["blkdev_read_iter", "blkdev_write_iter"],
    ["fuse_file_read_iter", "fuse_file_write_iter"],
    ["xfs_file_read_iter", "xfs_file_write_iter"],
];

impl Profile {
    /// Names the lines of the plugin, and counts I/Os.
    pub(super) fn new(
        target: &str,
        lines: &str,
        names: &Names,
        measured: f64,
        baseline: Option<u64>,
    ) -> Result<Profile> {
        let mut spent: BTreeMap<Symbol, Spent> = BTreeMap::new();
        for block in lines.lines().filter_map(Block::parse) {
            let (symbol, is_start) = names.of(&block);
            let spent = spent.entry(symbol).or_default();
            spent.instructions += block.instructions * block.count;
            spent.calls += if is_start { block.count } else { 0 };
        }
        let calls = |functions: [&str; 2]| -> u64 {
            let in_kernel = |symbol: &Symbol| matches!(symbol.owner, Owner::Kernel | Owner::Module(_));
            let wanted = |symbol: &Symbol| in_kernel(symbol) && functions.contains(&&*symbol.name);
            spent.iter().filter(|(symbol, _)| wanted(symbol)).map(|(_, spent)| spent.calls).sum()
        };
        let Some(ios) = IO_FUNCTIONS.into_iter().map(calls).find(|calls| *calls > 0) else {
            bail!("{target}: the profile contains no I/O");
        };
        Ok(Profile { target: target.into(), ios, measured, baseline, spent })
    }

    fn per_io(&self, count: u64) -> f64 {
        count as f64 / self.ios as f64
    }

    /// Instructions per I/O of the functions for which `wanted` holds.
    fn sum(&self, wanted: impl Fn(&Symbol) -> bool) -> f64 {
        self.per_io(self.spent.iter().filter(|(symbol, _)| wanted(symbol)).map(|(_, s)| s.instructions).sum())
    }

    fn total(&self) -> f64 {
        self.sum(|_| true)
    }

    fn of(&self, symbol: &Symbol) -> Spent {
        self.spent.get(symbol).copied().unwrap_or_default()
    }

    /// Difference of what fio measured for the whole job, as a share.
    pub(super) fn difference(&self) -> f64 {
        self.measured / self.total() - 1.0
    }
}

/// Markdown: the layers, then the `count` most expensive functions of the program and of the
/// kernel.
pub(super) fn markdown(title: &str, machine: &str, profiles: &[Profile], count: usize) -> String {
    let mut text = format!("# Instructions per I/O: {title}\n\n{machine}\n\n");
    let head: String = profiles.iter().map(|profile| format!(" {} |", profile.target)).collect();
    let rule = "---:|".repeat(profiles.len());
    let _ = write!(text, "| layer |{head}\n|---|{rule}\n");
    let mut row = |name: &str, value: &dyn Fn(&Profile) -> String| {
        let values: String = profiles.iter().map(|profile| format!(" {} |", value(profile))).collect();
        let _ = writeln!(text, "| {name} |{values}");
    };
    for layer in layers::all() {
        let of_layer = |profile: &Profile| profile.sum(|symbol| layers::of(symbol) == layer);
        if profiles.iter().any(|profile| of_layer(profile) >= 0.5) {
            row(layer, &|profile| format!("{:.0}", of_layer(profile)));
        }
    }
    row("**total**", &|profile| format!("**{:.0}**", profile.total()));
    row("by the IOPS of the whole job", &|profile| {
        format!("{:.0} ({:+.1} %)", profile.measured, 100.0 * profile.difference())
    });
    if profiles.iter().any(|profile| profile.baseline.is_some()) {
        row("in the gate's baseline", &|profile| {
            profile.baseline.map_or("–".into(), |cost| cost.to_string())
        });
    }
    row("without a symbol, apart from fio", &|profile| {
        let is_known = |symbol: &Symbol| [layers::FIO, layers::VDSO].contains(&layers::of(symbol));
        let unnamed = profile.sum(|symbol| symbol.name == NO_SYMBOL && !is_known(symbol));
        format!("{:.1} %", 100.0 * unnamed / profile.total())
    });
    row("I/Os in the window", &|profile| profile.ios.to_string());
    let (ours, kernel): (Vec<_>, Vec<_>) = by_cost(profiles)
        .into_iter()
        .filter(|symbol| layers::of(symbol) != layers::FIO)
        .partition(|symbol| matches!(symbol.owner, Owner::Program { .. }));
    for (heading, symbols) in [("programs", ours), ("the kernel", kernel)] {
        let _ = write!(
            text,
            "\n## Functions of {heading}\n\nInstructions per I/O, × calls per I/O.\n\n\
             | function | layer |{head}\n|---|---|{rule}\n"
        );
        for symbol in symbols.into_iter().filter(|symbol| cost(profiles, symbol) >= 0.5).take(count) {
            let values: String = profiles
                .iter()
                .map(|profile| {
                    let Spent { instructions, calls } = profile.of(symbol);
                    let calls =
                        if calls == 0 { String::new() } else { format!(" × {:.2}", profile.per_io(calls)) };
                    format!(" {:.1}{calls} |", profile.per_io(instructions))
                })
                .collect();
            let _ = writeln!(text, "| `{}` | {} |{values}", full_name(symbol), layers::of(symbol));
        }
    }
    text
}

/// CSV: a line per function that costs at least an instruction per I/O on a target, and one for the
/// rest of each layer.
pub(super) fn csv(profiles: &[Profile]) -> String {
    let mut text = "layer,function".to_owned();
    for profile in profiles {
        let target = render::quoted(&profile.target);
        let _ = write!(text, ",{target} instructions,{target} calls");
    }
    text.push('\n');
    let mut line = |layer: &str, name: &str, value: &dyn Fn(&Profile) -> (f64, f64)| {
        let _ = write!(text, "{},{}", render::quoted(layer), render::quoted(name));
        for (instructions, calls) in profiles.iter().map(value) {
            let _ = write!(text, ",{instructions:.2},{calls:.3}");
        }
        text.push('\n');
    };
    let is_large = |symbol: &Symbol| cost(profiles, symbol) >= 1.0;
    for layer in layers::all() {
        let of_layer = |symbol: &Symbol| layers::of(symbol) == layer;
        for symbol in by_cost(profiles).into_iter().filter(|symbol| of_layer(symbol) && is_large(symbol)) {
            line(layer, &full_name(symbol), &|profile| {
                let spent = profile.of(symbol);
                (profile.per_io(spent.instructions), profile.per_io(spent.calls))
            });
        }
        line(layer, "(smaller ones)", &|profile| {
            (profile.sum(|symbol| of_layer(symbol) && !is_large(symbol)), 0.0)
        });
    }
    text
}

/// Functions by their cost on the target where they cost most.
fn by_cost(profiles: &[Profile]) -> Vec<&Symbol> {
    let all: BTreeSet<&Symbol> = profiles.iter().flat_map(|profile| profile.spent.keys()).collect();
    let mut all: Vec<(f64, &Symbol)> =
        all.into_iter().map(|symbol| (cost(profiles, symbol), symbol)).collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    all.into_iter().map(|(_, symbol)| symbol).collect()
}

/// Instructions per I/O of a function on the target where it costs most.
fn cost(profiles: &[Profile], symbol: &Symbol) -> f64 {
    profiles.iter().map(|profile| profile.per_io(profile.of(symbol).instructions)).fold(0.0, f64::max)
}

/// A name with its module or file, unless that is the program itself.
fn full_name(symbol: &Symbol) -> String {
    match &symbol.owner {
        Owner::Module(module) => format!("{} [{module}]", symbol.name),
        Owner::Program { program, file } if file == layers::OURS && file == program => symbol.name.clone(),
        Owner::Program { file, .. } if file.starts_with('[') => file.clone(),
        Owner::Program { program, file } if file == program => format!("{program}: {}", symbol.name),
        Owner::Program { program, file } => format!("{program}: {} [{file}]", symbol.name),
        Owner::Kernel | Owner::Unknown => symbol.name.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KALLSYMS: &str = "ffffffff81000000 T blkdev_read_iter\nffffffff81000100 T io_read\n\
        ffffffff81000200 T rare\nffffffffc0000000 t xfs_file_read_iter\t[xfs]\n";
    /// Ten I/Os; the file below is read as often. Code without a symbol at the end.
    const LINES: &str = "ffffffff81000000 5 10 \nffffffff81000010 5 10 \nffffffff81000100 100 20 \n\
        ffffffff81000200 1 1 \nffffffffc0000000 9 10 \nfffffffff0000000 11 1 \n";

    fn profile(target: &str, lines: &str) -> Result<Profile> {
        let names = Names::new("", KALLSYMS, BTreeSet::new(), |_| None)?;
        Profile::new(target, lines, &names, 220.0, Some(219))
    }

    #[test]
    fn costs_are_per_io_of_fio() {
        let profile = profile("t", LINES).unwrap();
        assert_eq!((profile.ios, profile.total()), (10, 220.2));
        assert!((profile.difference() + 0.0009).abs() < 0.0001);
        let lower = LINES.lines().filter(|line| !line.starts_with("ffffffff81000000")).collect::<Vec<_>>();
        assert_eq!(self::profile("raw", &lower.join("\n")).unwrap().ios, 10);
        assert!(self::profile("t", "").unwrap_err().to_string().contains("no I/O"));
    }

    #[test]
    fn tables_have_every_instruction() {
        let profiles = [profile("a", LINES).unwrap(), profile("b", LINES).unwrap()];
        let text = markdown("title", "machine", &profiles, 2);
        assert!(text.contains("\n| io_uring | 200 | 200 |\n"), "{text}");
        assert!(text.contains("\n| **total** | **220** | **220** |\n"), "{text}");
        assert!(text.contains("\n| by the IOPS of the whole job | 220 (-0.1 %) |"), "{text}");
        assert!(text.contains("\n| without a symbol, apart from fio | 0.5 % |"), "{text}");
        assert!(text.contains("\n| `io_read` | io_uring | 200.0 × 2.00 | 200.0 × 2.00 |\n"), "{text}");
        assert!(!text.contains("xfs_file_read_iter"), "only the first two: {text}");
        let csv = csv(&profiles);
        let lines = csv.lines().skip(1).map(|line| line.rsplit(',').nth(1).unwrap().parse::<f64>().unwrap());
        assert!((lines.sum::<f64>() - 220.2).abs() < 0.01, "{csv}");
        assert!(
            csv.contains("\nio_uring,io_read,200.00,2.000,200.00,2.000\n") && !csv.contains("rare"),
            "{csv}"
        );
    }
}
