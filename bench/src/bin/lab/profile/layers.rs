// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Groups functions by layer.
//!
//! Functions of programs belong to the program, those of the kernel to a layer of `layers.txt`.

use std::sync::LazyLock;

use super::symbols::{Owner, Symbol};

/// The program under test.
pub(super) const OURS: &str = "loopengine";
/// The load generator.
pub(super) const FIO: &str = "fio";
const OTHER_PROGRAMS: &str = "other programs";
pub(super) const VDSO: &str = "clock, read by programs";
const OTHER: &str = "other";

/// Layers of the kernel and prefixes of their functions, in the order of a table.
static KERNEL: LazyLock<Vec<(&str, &str)>> = LazyLock::new(|| parse(include_str!("layers.txt")));

/// A line is a comment, the name of a layer or, if it is indented, prefixes.
fn parse(text: &str) -> Vec<(&str, &str)> {
    let (mut layer, mut found) = ("", Vec::new());
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        if line.starts_with(' ') {
            found.extend(line.split_whitespace().map(|prefix| (layer, prefix)));
        } else {
            layer = line;
        }
    }
    found
}

/// All layers in the order of a table.
pub(super) fn all() -> impl Iterator<Item = &'static str> {
    let programs = [OURS, FIO, OTHER_PROGRAMS, VDSO];
    let mut kernel: Vec<&str> = KERNEL.iter().map(|(layer, _)| *layer).collect();
    kernel.dedup();
    programs.into_iter().chain(kernel).chain([OTHER])
}

/// The layer of a function.
pub(super) fn of(symbol: &Symbol) -> &'static str {
    let name = match &symbol.owner {
        Owner::Program { file, .. } if file == "[vdso]" => return VDSO,
        Owner::Program { program, .. } => {
            return [OURS, FIO].into_iter().find(|known| known == program).unwrap_or(OTHER_PROGRAMS);
        }
        Owner::Unknown => return OTHER,
        Owner::Module(module) => &format!("[{module}]"),
        Owner::Kernel => &symbol.name,
    };
    let matching = KERNEL.iter().filter(|(_, prefix)| name.starts_with(prefix));
    matching.max_by_key(|(_, prefix)| prefix.len()).map_or(OTHER, |(layer, _)| layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(owner: Owner, name: &str) -> &'static str {
        of(&Symbol { owner, name: name.into() })
    }

    #[test]
    fn the_longest_prefix_decides() {
        assert_eq!(layer(Owner::Kernel, "io_submit_sqes"), "io_uring");
        assert_eq!(layer(Owner::Kernel, "io_schedule"), "scheduler");
        assert_eq!(layer(Owner::Kernel, "io_wq_enqueue"), "work queues");
        assert_eq!(layer(Owner::Kernel, "strange"), OTHER);
        assert_eq!(layer(Owner::Unknown, "io_submit_sqes"), OTHER);
    }

    #[test]
    fn modules_and_programs_are_layers_whatever_the_function() {
        assert_eq!(layer(Owner::Module("xfs".into()), "io_x"), "file system");
        assert_eq!(layer(Owner::Module("strange".into()), "io_x"), OTHER);
        let program =
            |program: &str, file: &str| Owner::Program { program: program.into(), file: file.into() };
        assert_eq!(layer(program("loopengine", "libc.so.6"), "read"), OURS);
        assert_eq!(layer(program("fio", "fio"), "read"), FIO);
        assert_eq!(layer(program("sh", "sh"), "read"), OTHER_PROGRAMS);
        assert_eq!(layer(program("fio", "[vdso]"), "x"), VDSO);
    }

    #[test]
    fn no_prefix_is_in_two_layers() {
        let mut all: Vec<&str> = KERNEL.iter().map(|(_, prefix)| *prefix).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn layers_have_names_and_an_order() {
        let all: Vec<&str> = all().collect();
        assert_eq!((all[0], all.last()), (OURS, Some(&OTHER)));
        assert!(all.contains(&"block layer") && all.iter().all(|layer| !layer.is_empty()));
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
    }
}
