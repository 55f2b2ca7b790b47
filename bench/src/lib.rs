// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares loopengine with the kernel's loop driver, FUSE and others, with fio.
//!
//! ```text
//!   job ─┐                          ┌─ render: terminal, Markdown, CSV, SVG, HTML
//!        ├─ run ── raw ─── outcome ─┼─ compare: what became slower
//!  target┘    └ check               └─ gate: what CI refuses
//! ```
//! Uses the public program, its socket and fio, never internals of the engine. `loopbench` is the
//! command line; `lab` boots a VM for it.

#![forbid(unsafe_code)]

pub mod check;
pub mod collect;
pub mod compare;
pub mod cost;
pub mod daemon;
pub mod fio;
pub mod gate;
pub mod handover;
pub mod job;
mod kernel_module;
pub mod measure;
pub mod outcome;
pub mod passthrough;
pub mod plan;
pub mod progress;
pub mod raw;
pub mod render;
pub mod run;
pub mod sh;
pub mod site;
pub mod stats;
pub mod store;
pub mod summary;
pub mod target;
mod units;
pub mod varlink;
pub mod window;
