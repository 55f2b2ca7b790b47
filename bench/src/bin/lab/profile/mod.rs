// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab profile`: which function of which layer executes the instructions of an I/O.
//!
//! ```text
//!  bench: sealed machine, QEMU with plugin.c ── symbols ── layers ── table
//! ```
//! The machine is the one of `lab gate`. The plugin counts in windows that `loopbench` marks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use loopbench::job::{self, Job, Needs};
use loopbench::raw::{self, Round};
use loopbench::window;
use loopbench::{gate, sh};

use crate::bench::{self, Stage};
use crate::kernel::Line;
use crate::programs::{self, Program};
use crate::setup;
use crate::vm::Mode;

mod layers;
mod symbols;
mod table;

use symbols::Names;
use table::Profile;

/// What to profile.
#[derive(clap::Args)]
pub(crate) struct ProfileOptions {
    /// Jobs: names of files in fio-jobs/ without .fio
    #[arg(value_name = "JOB,…")]
    jobs: String,
    /// Targets beside kernel loop, such as "loopengine auto"
    #[arg(required = true, value_name = "TARGET")]
    targets: Vec<String>,
    /// Kernel of the machine
    #[arg(long, value_enum, default_value = "7")]
    kernel: Line,
    /// Functions to list, of programs and of the kernel
    #[arg(long, value_name = "N", default_value_t = 40)]
    symbols: usize,
    /// Profile the release build, as `bench` does; its functions are inlined into each other
    #[arg(long)]
    release: bool,
    /// Write JOB.md and JOB.csv to DIR as well
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Time limit of the machine
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    timeout: u64,
}

const PLUGIN: &str = include_str!("plugin.c");
/// A profile that differs by more from the IOPS of the whole job is not of that job.
const DIFFERENCE_MAX: f64 = 0.02;
const LIMIT: Duration = Duration::from_secs(60);

/// Profiles and prints the table; returns the exit code.
pub(crate) fn run(options: &ProfileOptions) -> Result<u8> {
    let jobs = options.jobs.split(',').map(find).collect::<Result<Vec<_>>>()?;
    setup::ensure_all()?;
    let programs = if options.release { programs::build_release()? } else { programs::build()? };
    let home = tempfile::tempdir()?;
    let counts = home.path().join("counts");
    let mut stage = Stage::new(Mode::Icount, options.kernel, &programs);
    stage.plugin = Some(plugin(home.path(), &counts)?);
    stage.limit = Duration::from_secs(options.timeout);
    let ours = options.targets.iter().map(String::as_str).filter(|target| *target != job::LOOP);
    let targets: Vec<&str> = ours.chain([job::LOOP]).collect();
    let words = ["--windows", "--jobs", &options.jobs, "--targets", &targets.join(",")];
    let outcome = bench::measure(&stage, &[&words, &bench::GATE_WORDS[..]].concat(), home.path(), false)?;

    let raw = home.path().join(raw::DIRECTORY);
    let kallsyms =
        fs::read_to_string(raw.join(window::SYMBOLS)).context("the kernel's symbols are missing")?;
    let build = if options.release { "release build" } else { "build of the lab" };
    let machine = format!("{}, {}, {build}.", outcome.manifest.kernel, outcome.manifest.fio);
    let is_gate = !options.release && options.kernel == Line::Seven;
    let baseline = programs::workspace().join(gate::BASELINE);
    let (mut windows, mut differ) = (0, false);
    for job in jobs {
        let round: Round = raw::read(&raw, &raw::round_file(0, job.name))?.context("the job did not run")?;
        if let Some((target, why)) = round.failed.first_key_value() {
            bail!("{}: {target}: {why}", job.name);
        }
        let mappings = round.windows.into_iter().flat_map(|window| window.mappings).collect();
        let names = Names::new(layers::OURS, &kallsyms, mappings, |file| locate(file, &programs))?;
        let mut profiles = Vec::new();
        for sample in outcome.samples.iter().filter(|sample| sample.job == job.name) {
            // The plugin counts windows, and the job runs on one target after another.
            let lines = fs::read_to_string(counts.with_extension(windows.to_string()))
                .with_context(|| format!("{}: the plugin saw no marks", sample.target))?;
            windows += 1;
            let baseline = gate::baseline(&baseline, job.name, &sample.target).filter(|_| is_gate);
            profiles.push(Profile::new(&sample.target, &lines, &names, 1e9 / sample.iops, baseline)?);
        }
        if profiles.len() != targets.len() {
            bail!("{}: {} of {} targets are available", job.name, profiles.len(), targets.len());
        }
        // Kernel loop is the last.
        profiles.sort_by_key(|profile| targets.iter().position(|target| *target == profile.target));
        let text = table::markdown(job.title, &machine, &profiles, options.symbols);
        println!("\n{text}");
        if let Some(out) = &options.out {
            write(out, job.name, &text, &table::csv(&profiles))?;
        }
        differ |= profiles.iter().any(|profile| profile.difference().abs() > DIFFERENCE_MAX);
    }
    if differ {
        println!("profile: a window differs by over {:.0} % from its job", 100.0 * DIFFERENCE_MAX);
    }
    Ok(u8::from(differ))
}

/// A job that can be profiled: its I/Os are system calls of one process.
fn find(name: &str) -> Result<&'static Job> {
    match job::by_name(name) {
        Some(job) if job.needs == Needs::Data && !job.two_cpus => Ok(job),
        Some(_) => bail!("job {name} cannot be profiled: it needs more than one file or device, or two CPUs"),
        None => bail!("there is no job {name:?}: see fio-jobs/"),
    }
}

fn write(out: &Path, job: &str, markdown: &str, csv: &str) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    for (kind, text) in [("md", markdown), ("csv", csv)] {
        let path = out.join(format!("{job}.{kind}"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    Ok(())
}

/// Compiles the plugin into `home`, and returns QEMU's argument that loads it.
fn plugin(home: &Path, counts: &Path) -> Result<String> {
    let (source, library) = (home.join("plugin.c"), home.join("plugin.so"));
    fs::write(&source, PLUGIN)?;
    let said = sh::capture(Command::new(sh::which("qemu-system-x86_64")?).arg("--version"), LIMIT)?;
    let api = api(&said).with_context(|| format!("unknown version of QEMU: {said}"))?;
    // Rust needs cc, too, as its linker.
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-shared", "-fPIC"]).arg(format!("-DAPI={api}")).arg("-o").arg(&library).arg(&source);
    sh::capture(&mut cc, LIMIT)?;
    let arguments = format!("start={:x},stop={:x}", window::START, window::STOP);
    Ok(format!("file={},out={},{arguments}", library.display(), counts.display()))
}

/// Version of the plugin interface for the output of `qemu --version`.
fn api(said: &str) -> Option<u32> {
    let major: u32 = said.split("version ").nth(1)?.split('.').next()?.parse().ok()?;
    Some(if major < 9 { 1 } else { 3 })
}

/// Path on this machine of a file of the sealed machine.
fn locate(file: &str, programs: &[Program]) -> Option<PathBuf> {
    let built = |name: &str| programs.iter().find(|program| program.name == name);
    let path = match file.strip_prefix("/bin/") {
        Some(name) => built(name).map(|program| program.path.clone()).or_else(|| sh::which(name).ok())?,
        None => file.into(),
    };
    path.is_file().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_depends_on_the_version() {
        assert_eq!(api("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"), Some(1));
        assert_eq!(api("QEMU emulator version 10.0.2\n"), Some(3));
        assert_eq!(api("strange"), None);
    }

    #[test]
    fn the_plugin_compiles_for_both_interfaces() {
        let home = tempfile::tempdir().unwrap();
        let source = home.path().join("plugin.c");
        fs::write(&source, PLUGIN).unwrap();
        for api in ["-DAPI=1", "-DAPI=3"] {
            let mut cc = Command::new("cc");
            let warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"];
            cc.args(warnings).args(["-shared", "-fPIC", api, "-o"]).arg(home.path().join("out")).arg(&source);
            sh::capture(&mut cc, LIMIT).unwrap();
        }
    }

    #[test]
    fn jobs_with_one_process_and_one_device_can_be_profiled() {
        assert_eq!(find("randread-4k-qd1").unwrap().name, "randread-4k-qd1");
        assert!(find("many-16-4k").unwrap_err().to_string().contains("cannot be profiled"));
        assert!(find("randread-4k-qd32x2").is_err());
        assert!(find("strange").unwrap_err().to_string().contains("no job"));
    }

    #[test]
    fn programs_are_found_where_they_were_built() {
        let me = std::env::current_exe().unwrap();
        let programs = [Program { name: "loopengine".into(), path: me.clone() }];
        assert_eq!(locate("/bin/loopengine", &programs), Some(me));
        assert_eq!(locate("/bin/sh", &programs), Some(sh::which("sh").unwrap()));
        assert_eq!(locate("[vdso]", &programs), None);
    }
}
