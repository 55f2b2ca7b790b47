//! `lab figures`: the numbers of the README, with the manifest that makes them anew.
//!
//! `guest` measures where ublk is, `varlink` speaks to the daemon for it; this file boots the VM,
//! says what was measured with what, and turns raw files into a report.

pub(crate) mod gate;
mod guest;
mod varlink;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::fio::{self, Job, Sample};
use crate::kernel::Line;
use crate::programs::Program;
use crate::vm::{self, Mode, Vm};
use crate::{engine, programs, report, setup, sh, stats};

/// What to measure, and where.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What the VM's CPUs are like
    #[arg(long, value_enum, default_value = "icount")]
    mode: Mode,
    /// Kernel of the VM
    #[arg(long, value_enum, default_value = "7")]
    kernel: Line,
    /// The VM's CPUs spin instead of sleeping
    #[arg(long)]
    idle_poll: bool,
    /// Measure on this machine instead of in a VM: needs root and ublk
    #[arg(long, conflicts_with_all = ["kernel", "mode", "idle_poll"])]
    host: bool,
    #[command(flatten)]
    plan: guest::Plan,
    /// Seconds after which the VM is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 3400)]
    timeout: u64,
    /// Where results go; results/DATE-lab-MODE-KERNEL unless given
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// This is where to measure, with loopengine on PATH
    #[arg(long, hide = true)]
    inside: bool,
}

/// Everything needed to take the same figures again.
#[derive(Serialize, Deserialize)]
struct Manifest {
    kernel: String,
    mode: String,
    cpus: usize,
    data_paths: Vec<String>,
    revision: String,
    /// The work tree had changes that the revision does not have.
    dirty: bool,
    command: String,
    date: String,
    rounds: u32,
    run_ms: u32,
    qemu: String,
    fio: String,
    virtme_ng: String,
    host_cpu: String,
}

/// Takes the figures; its exit code.
pub(crate) fn run(options: &Options) -> Result<u8> {
    if options.inside {
        let out = options.out.as_deref().context("--inside needs --out")?;
        return guest::run(&options.plan, &jobs(options), out).map(|()| 0);
    }
    let place = if options.host {
        "host".to_owned()
    } else {
        format!("lab-{}-{}", mode(options), options.kernel.name())
    };
    let date = said(Command::new("date").args(["-u", "+%F"]))?;
    let out = options
        .out
        .clone()
        .unwrap_or_else(|| programs::workspace().join("results").join(format!("{date}-{place}")));
    let raw = out.join("raw");
    if raw.exists() {
        fs::remove_dir_all(&raw)?;
    }
    fs::create_dir_all(&raw).with_context(|| format!("cannot make {}", raw.display()))?;
    let (out, raw) = (out.canonicalize()?, raw.canonicalize()?);

    measure(options, &programs::build_release()?, &raw)?;
    let manifest = manifest(options, &raw, date)?;
    fs::write(out.join("manifest.json"), serde_json::to_vec_pretty(&manifest)?)?;
    report(&out)
}

/// Writes the report of `out` from its manifest and raw files; its exit code.
pub(crate) fn report(out: &Path) -> Result<u8> {
    let manifest: Manifest = read(out, "manifest.json")?.with_context(|| {
        format!("{} has no manifest.json: it is not a directory of figures", out.display())
    })?;
    let text = text(&manifest, &out.join("raw"))?;
    fs::write(out.join("report.md"), &text)?;
    println!("\n{text}written to {}", out.display());
    Ok(0)
}

fn mode(options: &Options) -> String {
    let poll = if options.idle_poll { "-poll" } else { "" };
    format!("{}{poll}", options.mode.name())
}

/// Two jobs at a time say nothing on one CPU.
fn jobs(options: &Options) -> Vec<Job> {
    let two = options.host || options.mode == Mode::Smp;
    fio::JOBS.into_iter().filter(|job| two || job.name != fio::QD32X2.name).collect()
}

fn measure(options: &Options, programs: &[Program], raw: &Path) -> Result<()> {
    let plan = &options.plan;
    let words = |program: &str| {
        let numbers = [
            ("--rounds", plan.rounds),
            ("--run-ms", plan.run_ms),
            ("--attaches", plan.attaches),
            ("--idle", plan.idle),
        ];
        let mut words = vec![program.to_owned(), "figures".into(), "--inside".into(), "--out".into()];
        words.push(raw.to_string_lossy().into_owned());
        words.extend([
            "--mode".into(),
            if options.host { "smp".into() } else { options.mode.name().to_owned() },
        ]);
        words.extend(numbers.iter().flat_map(|(name, number)| [(*name).to_owned(), number.to_string()]));
        words
    };
    if options.host {
        if !engine::can_run_here() {
            bail!("this machine has no ublk, or you are not root: leave --host out to use a VM");
        }
        let words = words("lab");
        let mut again = programs::again(programs, &words[1..])?;
        let (status, _) = sh::tee(&mut again, Duration::from_secs(options.timeout))?;
        if !status.success() {
            bail!("measuring failed: {status}");
        }
        return Ok(());
    }
    let lab = setup::ensure()?;
    let machine = Vm {
        shares: vec![raw.to_owned()],
        limit: Duration::from_secs(options.timeout),
        idle_poll: options.idle_poll,
        ..Vm::new(lab.kernel(options.kernel)?, options.mode)
    };
    let line = sh::quote(&words("lab"));
    let status = machine.run(&lab, programs, &line, &mut vm::to_stdout)?;
    if status != 0 {
        bail!("measuring failed in the VM with status {status}");
    }
    Ok(())
}

fn manifest(options: &Options, raw: &Path, date: String) -> Result<Manifest> {
    let facts: guest::Facts = read(raw, "facts.json")?.context("the guest left no facts")?;
    let git = |words: &[&str]| said(Command::new("git").args(words).current_dir(programs::workspace()));
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let tool = |command: &mut Command| said(command).unwrap_or_else(|_| "none".into());
    let qemu = tool(Command::new("qemu-system-x86_64").arg("--version"));
    Ok(Manifest {
        kernel: facts.kernel,
        mode: if options.host { "host".into() } else { mode(options) },
        cpus: facts.cpus,
        data_paths: facts.data_paths,
        revision: git(&["rev-parse", "HEAD"]).unwrap_or_else(|_| "unknown".into()),
        // Results are not what is measured.
        dirty: git(&["status", "--porcelain", "--", ".", ":!results"]).map_or(true, |said| !said.is_empty()),
        command: format!("cargo lab {}", sh::quote(&words)),
        date,
        rounds: options.plan.rounds,
        run_ms: options.plan.run_ms,
        qemu: qemu.lines().next().unwrap_or_default().to_owned(),
        fio: facts.fio,
        virtme_ng: setup::VIRTME.to_owned(),
        host_cpu: cpu_model(&cpu).unwrap_or("unknown").to_owned(),
    })
}

fn cpu_model(cpuinfo: &str) -> Option<&str> {
    cpuinfo.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()))
}

fn text(manifest: &Manifest, raw: &Path) -> Result<String> {
    let mut text = format!(
        "# Figures of {}: Linux {}, {}\n\nRevision {}{}, {} rounds of {} ms, {}. `{}`\n\n",
        manifest.date,
        manifest.kernel,
        manifest.mode,
        manifest.revision,
        if manifest.dirty { " with changes" } else { "" },
        manifest.rounds,
        manifest.run_ms,
        manifest.fio,
        manifest.command,
    );
    text.push_str(match manifest.mode.as_str() {
        "icount" => "One emulated CPU, an instruction takes 1 ns: IOPS = 10⁹ / instructions an I/O, the whole system counted.\n",
        "host" => "On hardware.\n",
        _ => "Emulated CPUs on a shared machine: only ratios within a round mean something.\n",
    });
    text.push_str("XFS on a memory-backed null_blk, image preallocated and written, direct I/O, scheduler `none` everywhere; loopengine built with `cargo build --release`.\n");
    text.push_str("Medians over interleaved rounds; ratios are taken within a round, with the interval in which their median \
         lies with 95 % confidence (bootstrap). ≈: no difference shown.\n\n");
    let rounds = rounds(raw)?;
    for job in fio::JOBS {
        let rows = report::rows(&job, &rounds);
        if !rows.is_empty() {
            text.push_str(&report::markdown(&job, &rows));
        }
    }
    if let Some(attach) = read::<guest::Attach>(raw, "attach.json")? {
        let median = |values: &[u64]| {
            let values: Vec<f64> = values.iter().map(|value| *value as f64).collect();
            stats::median(&values).map_or("–".into(), |ns| format!("{:.1} ms", ns / 1e6))
        };
        text.push_str(&format!(
            "## Attach to usable\n\nFrom the call to the first block read, median of {}: {}. \
             With the start of the command line's program, median of {}: {}.\n\n",
            attach.call_ns.len(),
            median(&attach.call_ns),
            attach.command_ns.len(),
            median(&attach.command_ns),
        ));
    }
    if let Some(idle) = read::<guest::Idle>(raw, "idle.json")? {
        let mb = |kib: u64| format!("{:.1} MB", kib as f64 * 1024.0 / 1e6);
        text.push_str(&format!(
            "## Idle devices\n\nMemory of the daemon with {} idle devices: {} (PSS), {} (RSS); before them {} (PSS).\n\n",
            idle.devices,
            mb(idle.after.pss_kib),
            mb(idle.after.rss_kib),
            mb(idle.before.pss_kib),
        ));
    }
    Ok(text)
}

fn rounds(raw: &Path) -> Result<Vec<Vec<Sample>>> {
    let mut files: Vec<PathBuf> = fs::read_dir(raw)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("round-")));
    files.sort();
    files.iter().map(|file| fio::parse(&fs::read_to_string(file)?)).collect()
}

/// A raw file, if it was left.
fn read<T: serde::de::DeserializeOwned>(raw: &Path, name: &str) -> Result<Option<T>> {
    match fs::read(raw.join(name)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{name} is damaged"))?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {name}")),
    }
}

fn said(command: &mut Command) -> Result<String> {
    Ok(sh::capture(command, Duration::from_secs(60))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_named() {
        assert_eq!(cpu_model("vendor_id\t: X\nmodel name\t: Fast CPU @ 3 GHz\n"), Some("Fast CPU @ 3 GHz"));
        assert_eq!(cpu_model(""), None);
    }

    #[test]
    fn rounds_are_read_in_order_and_a_damaged_file_is_an_error() {
        let raw = tempfile::tempdir().unwrap();
        let json = |iops: u32| {
            format!(
                r#"{{"jobs":[{{"jobname":"j @ t","error":0,"read":{{"iops":{iops},"bw_bytes":1,"clat_ns":{{}}}}}}]}}"#
            )
        };
        fs::write(raw.path().join("round-01.json"), json(2)).unwrap();
        fs::write(raw.path().join("round-00.json"), json(1)).unwrap();
        fs::write(raw.path().join("facts.json"), "{}").unwrap();
        let rounds = rounds(raw.path()).unwrap();
        let iops: Vec<f64> = rounds.iter().flatten().map(|sample| sample.iops).collect();
        assert_eq!(iops, [1.0, 2.0]);
        assert!(read::<guest::Facts>(raw.path(), "facts.json").is_err());
        assert!(read::<guest::Facts>(raw.path(), "none.json").unwrap().is_none());
    }
}
