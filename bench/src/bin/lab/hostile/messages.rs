// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile kinds that misuse messages and connections. Each runs until it is killed.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::kinds::Scene;
use super::wire::{Peer, call};

const LIST: &str = "io.loopengine.Private.List";
/// Connections that a user tries to hold: more than its limit.
const CONNECTIONS: usize = 24;

/// Holds connections and sends nothing.
pub(super) fn silent(scene: &mut Scene) -> Result<()> {
    loop {
        let held: Vec<Peer> = (0..scene.random.usize(1..=CONNECTIONS)).map(|_| scene.connect()).collect();
        scene.say(format!("holds {} silent connections", held.len()));
        scene.rest(4000);
    }
}

/// Sends a byte at a time, never the end of the message.
pub(super) fn slow(scene: &mut Scene) -> Result<()> {
    let count = scene.random.usize(1..=CONNECTIONS);
    trickle(scene, count)
}

/// The same by many users at once, each with as many connections as it can get.
pub(super) fn crowd(scene: &mut Scene) -> Result<()> {
    trickle(scene, CONNECTIONS)
}

fn trickle(scene: &mut Scene, count: usize) -> Result<()> {
    let text = call(LIST, &json!({}));
    let mut held: Vec<Peer> = (0..count).map(|_| scene.connect()).collect();
    scene.say(format!("sends byte by byte on {count} connections"));
    for turn in 0.. {
        let byte = [text[turn % (text.len() - 1)]];
        for peer in &mut held {
            if peer.send(&byte, &[]).is_err() {
                *peer = scene.connect();
            }
        }
        scene.rest(1000);
    }
    Ok(())
}

/// Sends endless messages of up to 64 MiB.
pub(super) fn huge(scene: &mut Scene) -> Result<()> {
    let piece = vec![b'a'; 1 << 16];
    loop {
        let pieces = scene.random.usize(1..=1024);
        scene.say(format!("sends a message of {pieces} times 64 KiB"));
        let peer = scene.connect();
        let _ = peer.send(br#"{"method":""#, &[]);
        let sent = (0..pieces).take_while(|_| peer.send(&piece, &[]).is_ok()).count();
        if sent == pieces {
            let _ = peer.send(b"\"}\0", &[]);
        }
    }
}

/// Sends invalid calls: random bytes, deep nesting, wrong types, many keys.
pub(super) fn garbage(scene: &mut Scene) -> Result<()> {
    loop {
        let size = 1 << scene.random.u32(0..=17);
        let (what, mut bytes) = match scene.random.u8(..7) {
            0 => ("random bytes", (0..size).map(|_| scene.random.u8(..)).collect()),
            1 => ("open brackets", vec![b'['; size]),
            2 => ("open objects", br#"{"a":"#.repeat(size / 5 + 1)),
            3 => ("zero bytes", vec![0; size]),
            4 => ("many keys", {
                let keys: Vec<String> = (0..size / 8).map(|key| format!("\"{key}\":{key}")).collect();
                format!("{{{}}}", keys.join(",")).into_bytes()
            }),
            5 => ("a call with wrong types", call(LIST, &json!(vec![-1e308; size / 32 + 1]))),
            _ => ("a call with a long name", call(&format!("{LIST}{}", "é".repeat(size / 2)), &json!({}))),
        };
        bytes.push(0);
        scene.say(format!("sends {what}, {} bytes", bytes.len()));
        let peer = scene.connect();
        let _ = peer.send(&bytes, &[]);
        if scene.random.bool() {
            let _ = peer.reply();
        }
    }
}

/// Sends thousands of calls and reads no answer.
pub(super) fn pipelined(scene: &mut Scene) -> Result<()> {
    loop {
        let calls = scene.random.usize(1..=20_000);
        let method = ["ListLimits", "List", "Nonsense"][scene.random.usize(..3)];
        let text = call(&format!("io.loopengine.Private.{method}"), &json!({})).repeat(100);
        let peer = scene.connect();
        scene.say(format!("makes {calls} calls of {method} and reads no answer"));
        let sent = (0..calls / 100).take_while(|_| peer.send(&text, &[]).is_ok()).count();
        scene.say(format!("the daemon accepted {} of them", sent * 100));
        scene.rest(1000);
    }
}

/// Connects and disconnects as fast as possible, by many users.
pub(super) fn storm(scene: &mut Scene) -> Result<()> {
    let text = call(LIST, &json!({}));
    let mut count = 0_u64;
    loop {
        if count.is_multiple_of(200) {
            scene.say(format!("connected and left {count} times"));
        }
        count += 1;
        // To the control socket too, which refuses it.
        if let Ok(peer) = Peer::new(&scene.control, Duration::from_secs(1)) {
            let _ = peer.send(&text, &[]);
        }
        let peer = scene.connect();
        let part = scene.random.usize(..=text.len());
        let _ = peer.send(&text[..part], &[]);
    }
}
