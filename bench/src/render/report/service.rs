// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cost of devices besides I/O: attaching, detaching, and being idle.

use super::{heading, kind};
use crate::outcome::{Idle, Outcome};
use crate::render::doc::{Block, Table};
use crate::stats::median_and_p99;
use crate::units::{kib, known, plain, time};

pub(super) fn attach(outcome: &Outcome) -> Vec<Block> {
    if outcome.attach.is_empty() {
        return Vec::new();
    }
    let titles = ["<target", "<how", "devices present", "times", "attach p50", "p99", "detach p50", "p99"];
    let mut table = Table::new("Attaching and detaching", &titles);
    for entry in &outcome.attach {
        let attach = median_and_p99(&entry.attach_ns);
        let detach = median_and_p99(&entry.detach_ns);
        let cells = vec![
            plain(&entry.target),
            plain(&entry.how),
            entry.present.to_string(),
            entry.attach_ns.len().to_string(),
            known(attach.map(|(median, _)| median), time),
            known(attach.map(|(_, p99)| p99), time),
            known(detach.map(|(median, _)| median), time),
            known(detach.map(|(_, p99)| p99), time),
        ];
        table.line(kind(&entry.target, crate::job::LOOP), cells);
    }
    vec![
        heading(2, "attach", "Attaching and detaching"),
        Block::Text(
            "One device at a time. Attach: from the call until the first block is read. Detach: until the call \
             returns. With fewer than a hundred times, p99 is the maximum."
                .into(),
        ),
        Block::Table(table.condensed()),
    ]
}

pub(super) fn idle(outcome: &Outcome) -> Vec<Block> {
    if outcome.idle.is_empty() {
        return Vec::new();
    }
    let titles = [
        "<target",
        "devices",
        "memory per device",
        "memory without devices",
        "CPU time per second",
        "per device",
    ];
    let mut table = Table::new("Idle devices", &titles);
    for entry in &outcome.idle {
        let cpu = per(entry.cpu_ns as f64 * 1e9, entry.over_ns as f64);
        let cells = vec![
            plain(&entry.target),
            entry.devices.to_string(),
            known(memory(entry), kib),
            kib(entry.pss_kib_before as f64),
            known(cpu, time),
            known(cpu.and_then(|cpu| per(cpu, f64::from(entry.devices))), time),
        ];
        table.line(kind(&entry.target, crate::job::LOOP), cells);
    }
    vec![
        heading(2, "idle", "Idle devices"),
        Block::Text(
            "The process that serves idle devices: its memory (proportional set size, without the kernel's memory \
             per device) and its CPU time per second."
                .into(),
        ),
        Block::Table(table.condensed()),
    ]
}

fn memory(idle: &Idle) -> Option<f64> {
    per(idle.pss_kib as f64 - idle.pss_kib_before as f64, f64::from(idle.devices))
}

fn per(value: f64, number: f64) -> Option<f64> {
    (number > 0.0).then(|| value / number)
}
