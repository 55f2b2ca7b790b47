// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The requests of a queue that wait for the limits of its device.
//!
//! They wait in the order of their arrival, so a flush follows the writes before it. The driver
//! counts them as in flight: a stop must lift the limits first.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{DeviceQueue, Transport};
use crate::error::Result;
use crate::request::Request;
use crate::ring::Ring;
use crate::worker::{RoundClock, Throttle};

/// The limits, and the requests that wait.
#[derive(Debug)]
pub(super) struct Held {
    throttle: Arc<Throttle>,
    requests: VecDeque<Request>,
    /// Until the first may be admitted, at the last attempt.
    wait_ns: u64,
}

impl Held {
    pub(super) fn new(throttle: Arc<Throttle>) -> Held {
        Held { throttle, requests: VecDeque::new(), wait_ns: 0 }
    }

    pub(super) fn count(&self) -> usize {
        self.requests.len()
    }
}

impl<T: Transport> DeviceQueue<T> {
    /// Accepts the requests that arrived in this event, within the limits.
    pub(super) fn accept_all(
        &mut self,
        arrived: &[Request],
        ring: &mut Ring,
        clock: &RoundClock,
    ) -> Result<()> {
        if self.held.throttle.is_limited() || !self.held.requests.is_empty() {
            // Allocates once; the depth bounds it.
            self.held.requests.extend(arrived);
            let outcome = self.release_held(ring, clock);
            self.stats.held += arrived.len().min(self.held.count()) as u64;
            return outcome;
        }
        // A chain answers an isolated request on an idle queue fastest. Batched commits are cheaper
        // for several at once.
        let isolated = arrived.len() == 1 && self.busy() == 0;
        arrived.iter().try_for_each(|request| self.accept(*request, isolated, ring, clock))
    }

    /// Accepts the held requests that the limits admit now.
    pub fn release_held(&mut self, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        while let Some(request) = self.held.requests.front().copied() {
            if let Err(wait_ns) = self.held.throttle.admit(&request, clock.now_ns()) {
                self.held.wait_ns = wait_ns;
                return Ok(());
            }
            self.held.requests.pop_front();
            self.accept(request, false, ring, clock)?;
        }
        Ok(())
    }

    /// Nanoseconds until a held request may be admitted; none: there is none.
    pub fn held_for_ns(&self) -> Option<u64> {
        (!self.held.requests.is_empty()).then_some(self.held.wait_ns)
    }
}
