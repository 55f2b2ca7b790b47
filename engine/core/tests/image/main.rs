//! The room `image`: its pure parts against models that are too simple to be wrong, the rest on
//! real files: everything that this machine can offer as an image, and everything that must not
//! become one. What needs root or a tool that is missing is skipped, and says so.

mod create;
mod fs;
mod geometry;
mod hostile;
mod partitions;
mod queues;
mod restart;
mod support;
mod take;
