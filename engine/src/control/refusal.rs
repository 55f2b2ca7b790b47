// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Refuses connections: immediately, without a slot, and so that the client can read the reason.
//!
//! The reply is written before any call is read. A client whose connection is closed when it sends
//! its call would get EPIPE and never read the reply. So the connection stays open for reading a
//! little longer, if few such connections are open. Nothing is read from it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;

use super::link::Link;
use crate::received::Disposal;

/// How long a refused client may take to send its call and read the reply.
const LINGER_MAX: Duration = Duration::from_secs(2);
/// Maximum refused connections that stay open.
const LINGERING_MAX: usize = 64;
/// Maximum per account.
const LINGERING_OF_USER_MAX: usize = 8;

/// The reply to a user without permission.
pub(super) const DENIED: &[u8] = b"{\"error\":\"org.varlink.service.PermissionDenied\"}\0";
/// The reply to a user over the limit.
pub(super) const TOO_MANY: &[u8] = b"{\"error\":\"io.loopengine.TooManyConnections\",\"parameters\":{}}\0";

/// The refused connections of one socket.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<u32, Refused>>);

#[derive(Debug)]
struct Refused {
    lingering: usize,
    /// One per account: refused connections have no slots that would limit threads.
    disposal: Disposal,
}

impl Refusals {
    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Refused>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a connection of `account` with `answer`.
    pub(super) async fn refuse(&self, stream: UnixStream, account: u32, answer: &[u8]) {
        let (link, stays) = {
            let mut table = self.table();
            table.retain(|_, refused| refused.lingering > 0 || refused.disposal.pending() > 0);
            let all: usize = table.values().map(|refused| refused.lingering).sum();
            let fresh = || Refused { lingering: 0, disposal: Disposal::new(account, ()) };
            let refused = table.entry(account).or_insert_with(fresh);
            let stays = all < LINGERING_MAX && refused.lingering < LINGERING_OF_USER_MAX;
            refused.lingering += usize::from(stays);
            (Link::new(stream, refused.disposal.clone(), i32::MAX), stays)
        };
        // It fits into an empty socket, unless the client is gone.
        let _ = link.send(answer, &[]);
        link.end_writing();
        if stays {
            let _ = timeout(LINGER_MAX, link.closed_by_peer()).await;
            if let Some(refused) = self.table().get_mut(&account) {
                refused.lingering -= 1;
            }
        }
    }
}
