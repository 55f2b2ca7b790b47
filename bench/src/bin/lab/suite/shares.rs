// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which kernel cases run in which VM, and the command line that runs them.
//!
//! Knows names of cases. Boots no VM.

use loopbench::sh;

use super::SuiteOptions;
use crate::kernel::Line;
use crate::vm::Mode;

/// The work of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) line: Line,
    pub(super) cases: Cases,
}

/// A subset of the kernel cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cases {
    /// All that match the user's filter.
    All,
    /// Cases that depend on the kernel.
    Kernel,
    /// Cases of devices of the kernel's loop driver: all that a kernel without ublk can run.
    KernelLoop,
    /// Cases of private loop devices.
    Private,
    /// Cases of other tools on private loop devices.
    Tools,
    /// All other cases, but not of the I/O mode copy.
    Others,
    /// Cases that count instructions, or measure a time that other work must not change, in
    /// `icount`.
    Counted,
}

/// The test programs of the kernel cases: of ublk devices, and of the kernel's loop devices. The
/// second also runs on this machine.
pub(super) const VM: &str = "vm";
pub(super) const KERNEL_LOOP: &str = "kernel_loop";
/// Cases of the second that depend on the kernel; of `private_lifetime::`, too.
const LIFETIME: &str = "lifetime::";
/// Cases of the second about private loop devices that depend on the kernel.
const POOLS: [&str; 6] = [
    "pools::",
    "private::detach",
    "private::rebind",
    "private::mount",
    "private_containers::runc",
    "private_containers::restart",
];
/// Prefix of the names of cases of private loop devices.
const PRIVATE: &str = "private";
/// Those of them that run in a VM of their own, so that no VM takes much longer than others.
const TOOLS: [&str; 3] = ["private::mapped", "private::builders", "private::partitions"];
/// Cases that a default run skips on the older kernel: names, claims and the command line do not
/// depend on the kernel, nor does the arithmetic of ranges, and private loop devices over ublk need a
/// newer one.
const NOT_OF_THE_KERNEL: [&str; 11] = [
    PRIVATE,
    "discard::",
    "geometry::",
    "commands::",
    "claims::",
    "many::",
    "errors::",
    "recovery_state::",
    "resize::",
    "verify::one_queue",
    "shutdown::",
];

/// Cases of the I/O mode that only older kernels choose.
const COPY: &str = "::copy";

impl Cases {
    /// Command lines of the kernel cases.
    fn commands(self, filter: Option<&str>) -> Vec<Vec<&str>> {
        let skipping = |names: &[&'static str]| names.iter().flat_map(|name| ["--skip", *name]).collect();
        let lifetime = (KERNEL_LOOP, vec![LIFETIME]);
        let all: Vec<(&str, Vec<&str>)> = match self {
            Cases::All => [VM, KERNEL_LOOP].map(|program| (program, filter.into_iter().collect())).into(),
            Cases::Kernel => [(VM, skipping(&NOT_OF_THE_KERNEL)), lifetime]
                .into_iter()
                .chain(POOLS.iter().map(|name| (KERNEL_LOOP, vec![*name])))
                .collect(),
            Cases::KernelLoop => vec![lifetime],
            // Counted cases are meaningless on emulated CPUs that share a core.
            Cases::Private => {
                let counted = ["private::figures::calls", "private::figures::last_close"];
                vec![(VM, [vec![PRIVATE], skipping(&counted), skipping(&TOOLS)].concat())]
            }
            // libtest-mimic takes one filter.
            Cases::Tools => TOOLS.iter().map(|name| (VM, vec![*name])).collect(),
            Cases::Others => vec![(VM, skipping(&[PRIVATE, COPY]))],
            Cases::Counted => vec![(VM, vec!["private::figures", "--skip", "private::figures::set_up"])],
        };
        let command = |(program, words)| [vec![program, "--test-threads=1"], words].concat();
        all.into_iter().map(command).collect()
    }

    /// One shell command for all of them, with the highest exit status: a crash must not go unseen.
    pub(super) fn shell_command(self, filter: Option<&str>) -> String {
        let commands = self.commands(filter);
        let each =
            commands.iter().map(|words| format!("{}; s=$?; [ $s -le $max ] || max=$s", sh::quote(words)));
        format!("max=0; {}; (exit $max)", each.collect::<Vec<_>>().join("; "))
    }

    pub(super) fn mode(self) -> Mode {
        if self == Cases::Counted { Mode::Icount } else { Mode::Smp }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Cases::All | Cases::Kernel => "",
            Cases::KernelLoop => ", kernel loop devices",
            Cases::Private => ", private loop devices",
            Cases::Tools => ", tools on private loop devices",
            Cases::Others => ", all others",
            Cases::Counted => ", instructions counted",
        }
    }
}

/// What `options` select, the longest first.
pub(super) fn shares(options: &SuiteOptions) -> Vec<Share> {
    let share = |line, cases| Share { line, cases };
    // Several filters of libtest are alternatives, so no second one can narrow the user's.
    let of_seven: &[Cases] = match options.filter {
        Some(_) => &[Cases::All],
        None => &[Cases::Private, Cases::Others, Cases::Tools, Cases::Counted],
    };
    let mut shares: Vec<_> = of_seven.iter().map(|cases| share(Line::Seven, *cases)).collect();
    match options.kernel {
        Some(Line::Seven) => shares,
        Some(line) => vec![share(line, Cases::All)],
        None if options.quick => shares,
        None => {
            let everyday = options.filter.is_none() && !options.full;
            let cases = if everyday { Cases::Kernel } else { Cases::All };
            shares.insert(shares.len().min(2), share(Line::SixTwelve, cases));
            if options.filter.is_none() {
                shares.push(share(Line::SixOne, Cases::KernelLoop));
            }
            shares
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn every_case_is_in_one_share() {
        let private = &Cases::Private.commands(None)[0];
        assert_eq!(private[2], PRIVATE);
        let others = ["vm", "--test-threads=1", "--skip", PRIVATE, "--skip", COPY];
        assert_eq!(Cases::Others.commands(None), [others]);
        let older = Cases::Kernel.commands(None);
        assert!(older[0].iter().all(|word| !COPY.contains(word)), "the older kernel runs the rest");
        assert_eq!(older[1], [KERNEL_LOOP, "--test-threads=1", LIFETIME]);
        let tools = Cases::Tools.commands(None);
        for (command, name) in std::iter::zip(&tools, TOOLS) {
            assert_eq!(command, &["vm", "--test-threads=1", name]);
        }
        assert_eq!(tools.len(), TOOLS.len());
        assert_eq!(Cases::KernelLoop.commands(None), [&older[1][..]]);
        let skipped = |name| private.windows(2).any(|pair| pair == ["--skip", name]);
        assert!(TOOLS.into_iter().all(skipped), "{private:?}");
        let of = |program| [program, "--test-threads=1", "x"];
        assert_eq!(Cases::All.commands(Some("x")), [of(VM), of(KERNEL_LOOP)]);
    }

    #[test]
    fn a_default_run_has_all_kernels() {
        let options =
            |kernel, filter| SuiteOptions { kernel, filter, host: false, quick: false, full: false };
        let names = |options| {
            let name = |share: &Share| format!("{}{}", share.line.name(), share.cases.name());
            shares(&options).iter().map(name).collect::<Vec<_>>()
        };
        let of_seven = [
            "7, private loop devices",
            "7, all others",
            "7, tools on private loop devices",
            "7, instructions counted",
        ];
        let mut all = of_seven.to_vec();
        all.insert(2, "6.12");
        all.push("6.1, kernel loop devices");
        assert_eq!(names(options(None, None)), all);
        assert_eq!(names(options(Some(Line::Seven), None)), of_seven);
        assert_eq!(names(options(Some(Line::SixTwelve), None)), ["6.12"]);
        assert_eq!(names(options(Some(Line::SixOne), Some("x".into()))), ["6.1"]);
        assert_eq!(names(options(None, Some("x".into()))), ["7", "6.12"]);
        let quick = SuiteOptions { quick: true, ..SuiteOptions::default() };
        assert_eq!(names(quick), of_seven);
    }

    #[test]
    fn the_worst_exit_status_counts() {
        let command = Cases::Tools.shell_command(None);
        for (first, others) in [(134, 0), (0, 101), (0, 0)] {
            let vm = format!("vm() {{ case $2 in {}) return {first} ;; esac; return {others}; }}", TOOLS[0]);
            let script = format!("{vm}; kernel_loop() {{ vm; }}; {command}");
            let status = Command::new("sh").args(["-c", &script]).status().unwrap();
            assert_eq!(status.code(), Some(std::cmp::max(first, others)));
        }
    }
}
