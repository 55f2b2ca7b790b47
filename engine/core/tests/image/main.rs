// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests of the module `image`: pure functions against simple models, the rest on real files.
//! Covers all kinds of images that this machine has, and files that must be refused. Tests that
//! need root or a missing tool are skipped, with a message.

mod create;
mod fs;
mod geometry;
mod hostile;
mod partitions;
mod queues;
mod restart;
mod support;
mod take;
