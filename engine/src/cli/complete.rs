// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shell completion: words of the command line, and names that the daemon knows.
//!
//! A shell queries this program through an environment variable (see `clap_complete::env`). The
//! shell blocks meanwhile, so the daemon has little time to answer. If it does not answer, there
//! are no names and no error.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap_complete::CompleteEnv;
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};

use crate::config::RUN_DIR;
use crate::control::{Client, PrivateClient};
use crate::error::Result;
use crate::instance::Selector;
use crate::instance::spec::DeviceInfo;

use super::run::user_name;
use super::{daemon, generate, size};

/// Names the shell that queries. The default variable COMPLETE may be set by others.
const VARIABLE: &str = "LOOPENGINE_COMPLETE";
/// Time for the daemon to answer.
const ANSWER_MAX: Duration = Duration::from_millis(500);

/// Answers a completion query and exits, if a shell sent one.
pub(super) fn answer_shell() {
    CompleteEnv::with_factory(generate::completed_command).var(VARIABLE).complete();
}

/// File names and contents of the completion scripts.
pub(super) fn scripts() -> Vec<(String, Vec<u8>)> {
    let shells: [(&str, &dyn EnvCompleter); 3] =
        [("loopengine.bash", &Bash), ("_loopengine", &Zsh), ("loopengine.fish", &Fish)];
    let script = |(name, shell): (&str, &dyn EnvCompleter)| {
        let mut text = Vec::new();
        // Writing to memory does not fail.
        let _ = shell.write_registration(VARIABLE, "loopengine", "loopengine", "loopengine", &mut text);
        if name == "_loopengine" {
            // zsh loads the file at the first completion and expects an answer then.
            text.extend(b"[[ $funcstack[1] = _loopengine ]] && _clap_dynamic_completer_loopengine\n");
        }
        (name.to_owned(), text)
    };
    shells.into_iter().map(script).collect()
}

/// Completes device names; paths if no name has this prefix.
pub(super) fn devices() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        let devices = ask(async |run_dir| Client::connect(&run_dir).await?.devices(&Selector::All).await);
        let names = devices.into_iter().map(|device| {
            let name = format!("{}/loop{}", device.instance, device.number);
            CompletionCandidate::new(name).help(Some(device.image.into()))
        });
        let begins = |name: &CompletionCandidate| {
            name.get_value().as_encoded_bytes().starts_with(word.as_encoded_bytes())
        };
        let names: Vec<_> = names.filter(begins).collect();
        if names.is_empty() { PathCompleter::any().complete(word) } else { names }
    })
}

/// Completes instance names.
pub(super) fn instances() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let instances = ask(async |run_dir| Client::connect(&run_dir).await?.instances().await);
        instances.into_iter().map(|instance| CompletionCandidate::new(instance.name)).collect()
    })
}

/// Completes names of pools that this user can see.
pub(super) fn pools() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let pools = ask(async |run_dir| PrivateClient::connect(&run_dir).await?.list().await);
        pools.into_iter().map(|pool| CompletionCandidate::new(pool.name)).collect()
    })
}

/// Completes users who have limits of their own, or devices.
pub(super) fn users() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let limits = ask(async |run_dir| PrivateClient::connect(&run_dir).await?.limits().await);
        let users = limits.into_iter().filter_map(|limit| limit.uid);
        users.map(|uid| CompletionCandidate::new(user_name(uid).unwrap_or_else(|| uid.to_string()))).collect()
    })
}

/// Completes the present size of the device that the command line names: the one to start from.
pub(super) fn sizes() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let devices = ask(async |run_dir| Client::connect(&run_dir).await?.devices(&Selector::All).await);
        let words: Vec<OsString> = std::env::args_os().collect();
        let is_named = |device: &DeviceInfo| {
            let names = [format!("{}/loop{}", device.instance, device.number), device.path.clone()];
            words.iter().any(|word| names.iter().any(|name| word == name.as_str()))
        };
        let named = devices.into_iter().filter(is_named);
        named
            .map(|device| {
                CompletionCandidate::new(device.size.to_string()).help(Some(size::show(device.size).into()))
            })
            .collect()
    })
}

/// The reply of the daemon; empty if it is late.
fn ask<T>(work: impl AsyncFnOnce(PathBuf) -> Result<Vec<T>>) -> Vec<T> {
    let Ok(runtime) = daemon::runtime() else { return Vec::new() };
    let said = runtime.block_on(async { tokio::time::timeout(ANSWER_MAX, work(run_dir())).await });
    said.ok().and_then(Result::ok).unwrap_or_default()
}

/// The run directory in the unparsed command line.
fn run_dir() -> PathBuf {
    let words: Vec<OsString> = std::env::args_os().collect();
    let named = words.windows(2).find(|pair| pair[0] == "--run-dir").map(|pair| pair[1].clone());
    named.or_else(|| std::env::var_os("LOOPENGINE_RUN_DIR")).unwrap_or_else(|| RUN_DIR.into()).into()
}
