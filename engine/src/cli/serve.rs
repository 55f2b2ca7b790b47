// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine serve`: the daemon, from its first checks to its shutdown.

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::accounts;
use crate::broken_kernels;
use crate::config::{BackendChoice, Config};
use crate::control::{self, EngineApi, rundir::RunDir, server};
use crate::error::{Error, Kind, Result};
use crate::frontend::{fuse, kernel_loop, ublk};
use crate::instance::spec::BackendKind;
use crate::instance::{Engine, Tuning};
use crate::kernel_mounts::KernelMounts;
use crate::kernels;
use crate::loops::Pools;
use crate::private::{PoolBackend, Registry};
use crate::received;
use crate::sandbox;
use crate::sys::{self, mntns};

use super::configured_devices::ConfiguredDevices;
use super::reload::ReloadTargets;
use super::{backend_choice, reload, watchers};

/// Run the daemon in the foreground.
///
/// The daemon serves devices until SIGTERM or SIGINT; a second signal ends it at once. Block
/// devices of instances outlive the daemon, even after a crash. Mounted or not, they keep names and
/// contents. Their I/O waits until the next daemon with the same run directory recovers them. So a
/// restart upgrades the program under mounted file systems. To detach devices before a stop, run
/// 'loopengine detach --all', or give '--detach-all'. Private pools end with the daemon.
///
/// SIGHUP reloads the configuration: the daemon creates new instances, changes limits and attaches
/// missing devices of '[[device]]'. It logs other changes, which take effect at the next start. The
/// log goes to standard error; RUST_LOG sets its level. The daemon needs root.
///
/// Instances and private pools can have a backend other than '--backend': 'loopengine instance
/// create --backend' and 'loopengine run --backend'. A daemon for block devices can use ublk and the
/// kernel's loop driver. A daemon for files can use FUSE, and the kernel's loop driver.
///
/// With the backend fuse, devices are files in a FUSE file system, with the same names. Users can
/// copy or partition them, give them to a virtual machine, or mount them with 'mount -o loop'.
/// Their size is fixed. Opening one with O_TRUNC (cp, dd without conv=notrunc) overwrites it with
/// zeroes. A write beyond the end fails with ENOSPC: at once with direct I/O, otherwise at fsync,
/// close or a later write. 'qemu-img convert' needs '-n' unless the new image has the size of the
/// file. These files end with the daemon and cannot be recovered. The hardening of the unit hides
/// them from other processes; the drop-in PREFIX/share/loopengine/fuse.conf in
/// /etc/systemd/system/loopengine.service.d makes them visible.
///
/// If the unit loopengine.socket is enabled, systemd creates the sockets and starts the daemon at
/// the first connection. The sockets outlive a restart; clients wait meanwhile. Any service manager
/// can pass sockets in LISTEN_FDS. They must be in the run directory and have the usual names.
///
/// '[[device]]' in the configuration lists images to attach at start. The daemon reports readiness
/// when they are attached. It does not wait long for a file system that does not answer. If it
/// cannot attach an image, it logs an error and continues with the others.
#[allow(rustdoc::broken_intra_doc_links, reason = "clap prints the text")]
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// Configuration file [default: /etc/loopengine.toml, if it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Default backend of instances: block devices that the daemon serves (ublk), block devices of the
    /// kernel's loop driver (loop), files (fuse), or the first of these that the kernel has (auto).
    /// auto avoids ublk drivers that are known to crash [default: auto].
    #[arg(long, value_name = "auto|ublk|loop|fuse", hide_possible_values = true)]
    backend: Option<BackendChoice>,

    /// Link each read or write with its commit in one chain, where possible.
    #[arg(long, value_name = "on|off", value_parser = parse_switch)]
    linked_commit: Option<bool>,

    /// Create links in /dev/loopengine too, for example /dev/loopengine/default/loop0, for programs
    /// that search only /dev.
    #[arg(long)]
    dev_links: bool,

    /// Detach all devices when the daemon stops, even devices in use. Their users get I/O errors.
    #[arg(long)]
    detach_all: bool,

    /// Serve block devices even on a kernel whose ublk driver is known to crash, for example one with
    /// a backported fix. 'loopengine doctor' names the fault.
    #[arg(long)]
    force: bool,

    /// Keep all privileges, for debugging. By default the daemon drops capabilities and system
    /// calls that it does not need.
    #[arg(long)]
    no_sandbox: bool,
}

/// The listeners (`control`, `private`, `oci`) and the objects that serve them.
struct Services {
    listeners: [StdListener; 3],
    backend: Arc<dyn EngineApi>,
    registry: Arc<Registry>,
    engine: Weak<Engine>,
}

/// How signals end the daemon.
enum Shutdown {
    /// After one signal: calls may end.
    Graceful,
    /// After a second signal: at once.
    Immediate,
}

fn parse_switch(word: &str) -> std::result::Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{word}' is neither 'on' nor 'off'")),
    }
}

impl ServeArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let config = self.load()?;
        init_log();
        check_root()?;
        let has_ublk = Path::new(ublk::CONTROL_NODE).exists();
        let choice = config.backend.unwrap_or_default();
        let (kind, line) = backend_choice::choose(choice, has_ublk, &kernels::release(), self.force)?;
        config.first_loop_number.map_or(Ok(()), kernel_loop::set_first_number)?;
        let mut run_dir = RunDir::take(run_dir)?;
        let sockets = sys::activation::take_sockets()
            .map_err(|error| Error::os(error, "cannot use the sockets of the service manager"))?;
        run_dir.adopt(sockets)?;
        tracing::info!("{line}");
        if let Some(broken) = broken_kernels::find(&kernels::release())
            && kind == BackendKind::Ublk
        {
            tracing::warn!("{} (--force)", broken.sentence(&kernels::release()));
        }
        for note in fuse::clear_stale(run_dir.path()) {
            tracing::info!("{note}");
        }
        let backends = backend_choice::with_others(kind, has_ublk, self.force);
        // The kernel serves devices of its loop driver: mounts of them cannot hold the daemon up.
        if backends.contains(&BackendKind::Ublk) {
            // Before the first thread starts, so that all threads share the namespace.
            enter_mount_namespace()?;
        } else if kind == BackendKind::Fuse {
            warn_of_mount_namespace();
        }
        // Before the sandbox forbids starting programs. Optional: everything else works without it.
        let kernel = match kind {
            BackendKind::Ublk | BackendKind::Loop => {
                let started = KernelMounts::start().map(Arc::new);
                started
                    .inspect_err(|error| {
                        tracing::warn!("mounts by the kernel are not available to tenants: {error}")
                    })
                    .ok()
            }
            BackendKind::Fuse => None,
        };
        // The sandbox forbids to open these.
        let loop_events = sys::uevent::open()
            .inspect_err(|error| tracing::debug!(%error, "pools poll for last closes"))
            .ok();
        let unmounts = sys::unmounts::open()
            .inspect_err(|error| tracing::debug!(%error, "pools poll often for last closes"))
            .ok();
        if self.no_sandbox {
            tracing::warn!("the daemon keeps all its privileges (--no-sandbox)");
        } else {
            sandbox::enter();
        }
        let engine = Arc::new(Engine::start(config.engine(run_dir.path().to_owned(), backends.clone()))?);
        let served = self.serve(&config, &backends, &run_dir, &engine, (kernel, loop_events, unmounts));
        run_dir.unbind();
        let ended = match served {
            Ok(Shutdown::Immediate) => Err(second_signal()),
            Ok(Shutdown::Graceful) => stop(&engine, self.detach_all),
            Err(error) => stop(&engine, self.detach_all).and(Err(error)),
        };
        // Dropping the engine would stop devices that wait for the next daemon.
        std::mem::forget(engine);
        ended
    }

    fn load(&self) -> Result<Config> {
        let mut config = Config::load(self.config.as_deref())?;
        config.backend = self.backend.or(config.backend);
        config.dev_links |= self.dev_links;
        config.tuning.linked_commit = self.linked_commit.or(config.tuning.linked_commit);
        Ok(config)
    }

    fn serve(
        &self,
        config: &Config,
        backends: &[BackendKind],
        run_dir: &RunDir,
        engine: &Arc<Engine>,
        (kernel, loop_events, unmounts): (Option<Arc<KernelMounts>>, Option<OwnedFd>, Option<OwnedFd>),
    ) -> Result<Shutdown> {
        for note in reload::create_all(config, &**engine)? {
            tracing::info!("{note}");
        }
        let listeners = [run_dir.bind()?, run_dir.bind_private()?, run_dir.bind_oci()?];
        let pools = Pools::new(engine);
        if let Some(events) = loop_events {
            pools.listen(events)?;
        }
        if let Some(unmounts) = unmounts {
            pools.watch_closes(unmounts)?;
        }
        let source =
            PoolBackend { pools, kernel, for_all: config.kernel_mounts(), backend: config.private.backend };
        accounts::refresh();
        let registry = Arc::new(Registry::start(source, config.private())?);
        reload::apply_user_limits(config, &registry);
        let runtime = control::runtime::make()?;
        let backend: Arc<dyn EngineApi> = Arc::clone(engine) as _;
        let Tuning { linked_commit } = config.tuning();
        tracing::info!(linked_commit, "serving {}", run_dir.path().display());
        let services = Services {
            listeners,
            backend,
            registry: Arc::clone(&registry),
            // Weak: the count of strong references tells whether calls still use the engine.
            engine: Arc::downgrade(engine),
        };
        let ended = runtime.block_on(self.until_stopped(services, config.clone(), backends));
        // Pools end with the daemon, unlike devices of instances.
        registry.shutdown();
        drop(registry);
        received::end();
        if Arc::strong_count(engine) > 1 {
            // Calls are still running; dropping the runtime would wait for them.
            std::mem::forget(runtime);
        }
        ended
    }

    /// Serves until a stop signal, then lets running calls end.
    async fn until_stopped(
        &self,
        services: Services,
        mut config: Config,
        backends: &[BackendKind],
    ) -> Result<Shutdown> {
        let cannot = |error: io::Error| Error::os(error, "cannot start the control service");
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(cannot)?;
        let Services { listeners: [control, private, oci], backend, registry, engine } = services;
        let control = UnixListener::from_std(control).map_err(cannot)?;
        let private = UnixListener::from_std(private).map_err(cannot)?;
        let oci = UnixListener::from_std(oci).map_err(cannot)?;
        let (stop, stopping) = watch::channel(false);
        let all = (
            server::serve(control, Arc::clone(&backend), stopping.clone()),
            server::serve_private(private, Arc::clone(&registry), stopping.clone()),
            server::serve_oci(oci, Arc::clone(&registry), stopping),
        );
        let devices = ConfiguredDevices::new(Arc::clone(&backend));
        let targets = ReloadTargets { backend, registry, devices };
        let mut served = tokio::task::spawn_local(async { tokio::join!(all.0, all.1, all.2) });
        let starting = reload::start(config.clone(), targets.clone());
        // One task at a time applies a configuration.
        let mut applying_config = Some(tokio::task::spawn_local(starting));
        let mut watching = Vec::new();
        if backends != [BackendKind::Fuse] {
            watching.push(tokio::task::spawn_local(watchers::follow_dev_nodes(engine)));
        }
        if backends.contains(&BackendKind::Ublk) {
            watching.push(tokio::task::spawn_local(watchers::detach_new_mounts()));
        }
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                ended = &mut served => {
                    let message = format!("the control service ended: {ended:?}");
                    return Err(Error::new(Kind::Internal, message));
                }
                _ = hangup.recv(), if applying_config.is_none() => {
                    let args = self.clone();
                    let load = move || args.load();
                    let reload = reload::reload(load, config.clone(), targets.clone());
                    applying_config = Some(tokio::task::spawn_local(reload));
                }
                Some(now) = async { Some(applying_config.as_mut()?.await) } => {
                    applying_config = None;
                    config = now.unwrap_or(config);
                }
            }
        }
        if let Some(applying_config) = applying_config {
            applying_config.abort();
        }
        tracing::info!("stopping");
        notify(&[NotifyState::Stopping]);
        watching.iter().for_each(tokio::task::JoinHandle::abort);
        let _ = stop.send(true);
        tokio::select! {
            _ = &mut served => Ok(Shutdown::Graceful),
            () = next_signal(&mut terminate, &mut interrupt) => Ok(Shutdown::Immediate),
        }
    }
}

async fn next_signal(
    terminate: &mut tokio::signal::unix::Signal,
    interrupt: &mut tokio::signal::unix::Signal,
) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn second_signal() -> Error {
    Error::new(Kind::Io, "a second signal ended the daemon at once")
        .hint("start the daemon again to recover its devices")
}

/// Leaves all devices to the next daemon, or detaches them. A signal ends the wait.
fn stop(engine: &Arc<Engine>, detach_all: bool) -> Result<()> {
    if Arc::strong_count(engine) > 1 {
        tracing::warn!("some calls are still running and end with the daemon");
    }
    let engine = Arc::clone(engine);
    let runtime = super::daemon::runtime()?;
    let stopped = runtime.block_on(async {
        let cannot = |error| Error::os(error, "cannot handle signals");
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        tokio::select! {
            done = tokio::task::spawn_blocking(move || engine.shutdown(detach_all)) => {
                done.map_err(|error| Error::new(Kind::Internal, format!("the shutdown failed: {error}")))
            }
            () = next_signal(&mut terminate, &mut interrupt) => Err(second_signal()),
        }
    });
    // Does not wait for a shutdown that a second signal interrupted.
    runtime.shutdown_background();
    if stopped.is_ok() {
        tracing::info!("stopped");
    }
    stopped
}

fn check_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new(Kind::Denied, "only root can serve block devices")
        .hint("run it with sudo, or as the systemd service loopengine"))
}

/// Files are visible only in the mount namespace of the daemon, and where its mounts propagate.
fn warn_of_mount_namespace() {
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    if let (Some(own), Some(first)) = (of("self"), of("1"))
        && own != first
    {
        tracing::warn!(
            "others may not see the files: this process has its own mount namespace; under systemd, \
             {}",
            SYSTEMD_HINT
        );
    }
}

/// Settings that isolate the mounts of a service; share/systemd/fuse.conf changes them.
const SYSTEMD_HINT: &str = "copy PREFIX/share/loopengine/fuse.conf to /etc/systemd/system/loopengine.service.d, \
     or set PrivateMounts=, ProtectHostname=, ProtectKernelModules=, ProtectKernelLogs= and \
     ProtectControlGroups= to no with 'systemctl edit loopengine'";

fn enter_mount_namespace() -> Result<()> {
    mntns::enter_own().map_err(|error| {
        Error::os(error, "cannot enter a mount namespace of its own")
            .hint("run the daemon with CAP_SYS_ADMIN, and not in a chroot")
    })?;
    watchers::detach_mounts();
    Ok(())
}

/// Notifies the service manager, if there is one.
pub(super) fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}

fn init_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,fuser=error"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    // The journal adds timestamps itself.
    let set = if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().try_init()
    } else {
        log.try_init()
    };
    drop(set);
}
