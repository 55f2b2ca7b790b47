// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A CSI driver: volumes of Kubernetes as images that loopengine serves.
//!
//! One process a node, with the services Identity, Controller and Node. It makes volumes in a directory of
//! its node and has the engine of the node attach them. It keeps nothing in memory that matters: records
//! beside the images, the engine's devices and the mounts of the machine say what is, so that a restart
//! changes nothing.
//!
//! ```text
//!  server                         a thread per call
//!  identity, controller, node …   the calls
//!  image, engine, filesystem …    files, devices, programs
//! ```

mod capability;
mod condition;
mod controller;
mod copy;
mod engine;
mod expand;
mod filesystem;
mod group;
mod identity;
mod image;
mod list;
mod locks;
pub mod messages;
mod mounts;
mod node;
mod parameters;
mod publish;
mod record;
pub mod server;
mod snapshot;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;

use rustix::fs::{FlockOperation, flock};
use tonic::Status;

use engine::Engine;
use locks::Locks;
use record::{Found, Record, State, Store};

/// The name of the driver.
pub const NAME: &str = "csi.loopengine.io";
/// The key of a node in topologies.
pub const TOPOLOGY: &str = "csi.loopengine.io/node";

/// How a driver is started.
#[derive(Debug)]
pub struct Settings {
    pub node: String,
    pub directory: PathBuf,
    pub run_dir: PathBuf,
    pub max_volumes: u32,
    /// The node alone expands volumes: no call of the Controller is needed.
    pub node_expansion: bool,
}

/// The driver of a node.
#[derive(Debug)]
pub struct Driver {
    node: String,
    node_expansion: bool,
    volumes: Store,
    snapshots: Store,
    locks: Locks,
    /// Held while free space is compared with a size, until a record reserves it.
    space: Mutex<()>,
    engine: Engine,
    _lock: File,
}

impl Driver {
    /// Takes the directory, which one driver at a time may have.
    pub fn new(settings: Settings) -> Result<Driver, String> {
        let Settings { node, directory, run_dir, max_volumes, node_expansion } = settings;
        let shown = directory.display().to_string();
        let cannot = |error: std::io::Error| format!("cannot use {shown}: {error}");
        let volumes = Store::open(directory).map_err(cannot)?;
        let mut options = File::options();
        options.create(true).write(true).truncate(false);
        let lock = options.open(volumes.directory().join(".lock")).map_err(cannot)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| format!("another loopengine-csi uses {shown}; give each its own directory"))?;
        let snapshots = Store::open(volumes.directory().join("snapshots")).map_err(cannot)?;
        let (locks, space) = (Locks::default(), Mutex::new(()));
        let engine = Engine { run_dir, max_devices: max_volumes };
        Ok(Driver { node, node_expansion, volumes, snapshots, locks, space, engine, _lock: lock })
    }
}

/// The value of a required field.
fn required<'a>(field: &str, value: &'a str) -> Result<&'a str, Status> {
    match value {
        "" => Err(Status::invalid_argument(format!("{field} is missing"))),
        value => Ok(value),
    }
}

/// An absolute path of a required field.
fn path(field: &str, value: &str) -> Result<PathBuf, Status> {
    let path = PathBuf::from(required(field, value)?);
    match path.is_absolute() && !path.components().any(|part| part.as_os_str() == "..") {
        true => Ok(path),
        false => Err(Status::invalid_argument(format!("{field}: {value:?} is no absolute path"))),
    }
}

/// The usable record of volume `id`.
fn ready(store: &Store, what: &str, id: &str) -> Result<Record, Status> {
    match store.load(id) {
        Found::Record(record) if record.state == State::Ready => Ok(*record),
        Found::Damaged(why) => Err(damaged(&why)),
        _ => Err(Status::not_found(format!("there is no {what} {id:?} on this node"))),
    }
}

fn damaged(why: &str) -> Status {
    Status::internal(format!("{why}; nothing was changed, an administrator must repair it"))
}

/// The status for an error of a file.
fn failed(what: impl std::fmt::Display, error: &std::io::Error) -> Status {
    let text = format!("{what}: {error}");
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Status::resource_exhausted(text)
        }
        _ => Status::internal(text),
    }
}
