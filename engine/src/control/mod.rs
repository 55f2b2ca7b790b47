// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control sockets in the run directory, each with a varlink service, and their clients:
//! `control` for the administrator, `private` for everybody who needs loop devices.
//!
//! ```text
//!  client ── call, image fd ──► server ── one task per connection ──► service ──► EngineApi
//!         ◄── reply or fault ──        slots, link, guard: who,        on a blocking thread
//!                                      how long, how much, what fds
//! ```
//! Knows the engine's interface (through [`EngineApi`]), credentials of callers, and the encoding
//! of errors. Knows nothing of ublk, rings or images.

mod blocking;
mod calls;
pub mod client;
pub mod codec;
mod engine_api;
mod fault;
mod guard;
mod link;
pub mod oci;
mod private;
mod refusal;
pub mod reply;
pub mod rundir;
pub mod runtime;
pub mod server;
mod service;
mod session;
mod slots;

pub use blocking::run_blocking;
pub use client::Client;
pub use engine_api::EngineApi;
pub use fault::Fault;
pub use guard::Inbox;
pub use private::{PrivateClient, PrivateService};
pub use service::ControlService;

/// Name of the varlink interface; a file of this name with the ending `.varlink` describes it.
pub const INTERFACE: &str = "io.loopengine";

/// Name of the socket in the run directory.
pub const SOCKET: &str = "control";

/// Name of the socket for private pools.
pub const PRIVATE_SOCKET: &str = "private";

/// Name of the socket for seccomp listeners of container runtimes.
pub const OCI_SOCKET: &str = "oci";

/// The text of an operating system error, without the number that Rust appends.
pub fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_lowercase(),
        None => text,
    }
}
