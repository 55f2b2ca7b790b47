//! Two sockets in the run directory, each with a varlink service, and their clients: `control` for the
//! administrator, `private` for everybody who wants loop devices of its own.
//!
//! ```text
//!  client ── call, image fd ──► server ── one task a connection ──► service ──► Backend (the engine)
//!         ◄── reply or fault ──        slots, link, guard: who,        on a blocking thread
//!                                      how long, how much, what fds
//! ```
//! Knows the interface of the engine (through [`EngineApi`]), credentials of callers, and how errors
//! travel. Knows nothing of ublk, rings or images.

mod apart;
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

pub(crate) use apart::apart;
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

/// Name of the socket on which container runtimes bring listeners.
pub const OCI_SOCKET: &str = "oci";

/// What the operating system says, without the number that Rust appends.
pub fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_lowercase(),
        None => text,
    }
}
