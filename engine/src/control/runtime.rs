// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The runtime of the daemon's control plane.
//!
//! Its io_uring is idle: sockets are tokio's, and blocking work has threads. No seccomp filter sees
//! what a ring does, so this one is restricted to nothing.

use crate::error::{Error, Kind, Result};
use crate::sys;

/// Creates it for the calling thread. No other thread may create a ring at the same time.
pub fn make() -> Result<tokio_uring::Runtime> {
    let mut builder = tokio_uring::builder();
    builder.entries(8).uring_builder(tokio_uring::uring_builder().setup_r_disabled());
    let cannot = |error| Error::os(error, "cannot start io_uring").hint("run 'loopengine doctor'");
    let runtime = tokio_uring::Runtime::new(&builder).map_err(cannot)?;
    match sys::uring::seal_disabled().map_err(cannot)? {
        0 => Err(Error::new(Kind::Internal, "the ring of the control plane cannot be restricted")),
        _ => Ok(runtime),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_ring_of_the_control_plane_does_nothing() {
        let runtime = super::make().unwrap();
        runtime.block_on(async {
            let opened = tokio_uring::fs::File::open("/dev/null").await;
            assert_eq!(opened.err().and_then(|error| error.raw_os_error()), Some(libc::EACCES));
            let connected = tokio_uring::net::TcpStream::connect("127.0.0.1:9".parse().unwrap()).await;
            assert_eq!(connected.err().and_then(|error| error.raw_os_error()), Some(libc::EACCES));
            // What the control plane does with it.
            tokio::task::spawn_local(tokio::time::sleep(std::time::Duration::from_millis(1))).await.unwrap();
            tokio::task::spawn_blocking(|| ()).await.unwrap();
        });
    }
}
