//! vireod, the daemon: libvirt drivers over files and vireo-vmm processes.

mod args;
mod capabilities;
mod cgroups;
mod config;
mod control;
mod cpus;
mod drivers;
mod error;
mod events;
mod files;
mod followers;
mod journal;
mod killpoint;
mod link;
mod listeners;
mod logger;
mod node;
mod polkit;
mod roots;
mod server;
mod smbios;
mod sockets;
mod store;
mod vmm_process;

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rpc::server::Server;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::args::{Args, Print};
use crate::config::Config;
use crate::drivers::domain::{Driver, recover};
use crate::drivers::storage;
use crate::roots::Roots;
use crate::server::{Calls, Daemon};

/// Threads that answer clients; what blocks has others.
const WORKERS: usize = 2;
/// How long what an earlier daemon made for guests that did not come may take to be gone.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether anybody still needs the daemon, if it is to end then.
const IDLE_CHECK: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args = match args::parse(env::args_os().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("vireod: {error}\nTry 'vireod --help'.");
            return ExitCode::from(2);
        }
    };
    match args.print {
        Some(Print::Help) => {
            print!("{}", args::HELP);
            return ExitCode::SUCCESS;
        }
        Some(Print::Version) => {
            println!("vireod {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(Print::Procedures) => {
            return match print_procedures() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("vireod: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        None => {}
    }
    match prepare_and_serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            // The log may be in a file only.
            eprintln!("vireod: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what the dispatch table has, from a daemon that is never started.
fn print_procedures() -> io::Result<()> {
    let folder = env::temp_dir().join(format!("vireod-procedures-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let names = (|| {
        let roots = Roots::choose(Some(&folder), true, |_| None).map_err(io::Error::other)?;
        roots.make()?;
        let driver = Driver::new(roots, PathBuf::new())?;
        Ok::<_, io::Error>(Calls::new(Arc::new(Daemon::new(Arc::new(driver)))).names())
    })();
    std::fs::remove_dir_all(&folder)?;
    for (name, served) in names? {
        println!("{name}{}", if served { "" } else { " refused" });
    }
    Ok(())
}

fn prepare_and_serve(args: &Args) -> Result<(), String> {
    let root = args.root.clone().or_else(|| {
        env::var_os("VIREO_ROOT")
            .filter(|r| !r.is_empty())
            .map(PathBuf::from)
    });
    let root = match root {
        Some(root) => {
            // Domains and their VMMs live in another working directory.
            let absolute = std::path::absolute(&root);
            Some(absolute.map_err(|e| format!("{}: {e}", root.display()))?)
        }
        None => None,
    };
    // SAFETY: geteuid(2) takes nothing and returns a number.
    let superuser = unsafe { libc::geteuid() } == 0;
    let roots = Roots::choose(root.as_deref(), superuser, |name| env::var_os(name))
        .map_err(|e| e.to_string())?;
    roots
        .make()
        .map_err(|e| format!("cannot make a folder: {e}"))?;
    let logging = logger::start(args.verbose, &roots.daemon_log());
    if let Err(error) = logging {
        log::warn!("cannot log to {}: {error}", roots.daemon_log().display());
    }
    let file = args.config.clone();
    let file = file.unwrap_or_else(|| roots.config.join("vireod.conf"));
    let mut config = config::read(&file)?;
    config.tcp = args.listen_tcp.clone().or(config.tcp);
    config.tls = args.listen_tls.clone().or(config.tls);
    if let Err(error) = raise_descriptor_limit() {
        log::warn!("cannot raise the limit of open files: {error}");
    }
    let _lock = sockets::lock(&roots.run).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start: {e}"))?;
    let served = runtime.block_on(serve(roots, &config, args.timeout));
    // What still blocks (a disk, a name server) must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// Every client and every domain costs descriptors: as many as the host allows.
fn raise_descriptor_limit() -> io::Result<()> {
    // SAFETY: both calls work on the structure given to them, which lives here.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return Err(io::Error::last_os_error());
        }
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The program that runs domains: named by VIREO_VMM, beside this one, or in PATH.
fn find_vmm() -> PathBuf {
    const NAME: &str = "vireo-vmm";
    if let Some(named) = env::var_os("VIREO_VMM").filter(|v| !v.is_empty()) {
        let named = PathBuf::from(named);
        return std::path::absolute(&named).unwrap_or(named);
    }
    let beside = env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(NAME)))
        .filter(|path| path.is_file());
    let in_path = || {
        let path = env::var_os("PATH")?;
        env::split_paths(&path)
            .map(|folder| folder.join(NAME))
            .find(|path| path.is_file())
    };
    // Not there: each start says so, with this name.
    beside
        .or_else(in_path)
        .unwrap_or_else(|| Path::new("/usr/bin").join(NAME))
}

async fn serve(roots: Roots, config: &Config, timeout: Option<Duration>) -> Result<(), String> {
    let cannot = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("{what}: {error}")
    };
    let mut terminate =
        signal(SignalKind::terminate()).map_err(cannot("cannot wait for signals"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(cannot("cannot wait for signals"))?;
    // The terminal it was started from may go.
    let _hangup = signal(SignalKind::hangup()).map_err(cannot("cannot wait for signals"))?;
    let vmm = find_vmm();
    log::info!(
        "vireod {} with {}",
        env!("CARGO_PKG_VERSION"),
        vmm.display()
    );
    let driver = Driver::new(roots.clone(), vmm).map_err(cannot("cannot open the definitions"))?;
    driver.use_migration_certificates(config.migrate_tls.clone());
    let driver = Arc::new(driver);
    // Before domains, whose cards may be in them.
    let networks = Arc::clone(&driver.networks);
    let loaded = tokio::task::spawn_blocking(move || drivers::network::recover::load(&networks));
    match loaded.await {
        Ok(loaded) => loaded.map_err(cannot("cannot read the networks' definitions"))?,
        Err(error) => return Err(format!("cannot read the networks' definitions: {error}")),
    }
    recover::load(&driver)
        .await
        .map_err(cannot("cannot read the definitions"))?;
    storage::load(&driver.storage).map_err(cannot("cannot read the definitions of pools"))?;
    match tokio::time::timeout(SETTLE_LIMIT, driver.settle_jobs()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::error!("cannot look for what became of migrations: {error}"),
        Err(_) => log::warn!("what became of migrations is not known: a VMM does not end"),
    }
    // Before a guest comes that has them made again.
    match tokio::time::timeout(SETTLE_LIMIT, driver.settle_volumes()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            log::error!("cannot look for volumes of guests that did not come: {error}")
        }
        Err(_) => {
            log::warn!("volumes of guests that did not come are left: a pool does not answer")
        }
    }
    let daemon = Arc::new(Daemon::new(Arc::clone(&driver)));
    let server = Server::new(Calls::new(daemon), config.server);
    let serving = listeners::serve(&server, &roots, config).await?;
    log::info!("serving {}", roots.socket().display());
    let starting = Arc::clone(&driver);
    let autostart = tokio::spawn(async move {
        drivers::network::recover::autostart(&starting.networks).await;
        // Domains may have volumes of theirs.
        storage::autostart(&starting.storage).await;
        recover::autostart(&starting).await;
    });
    let idle = async {
        match timeout {
            Some(timeout) => {
                // Domains that are about to be started keep the daemon.
                if let Err(error) = autostart.await {
                    log::error!("autostart failed inside: {error}");
                }
                until_idle(&server, &driver, timeout).await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = terminate.recv() => log::info!("ending: SIGTERM"),
        _ = interrupt.recv() => log::info!("ending: SIGINT"),
        () = idle => log::info!("ending: nobody needs the daemon"),
    }
    // New clients find no socket, and start a daemon of their own when this one is gone.
    for path in [roots.socket(), roots.read_only_socket()] {
        if let Err(error) = files::remove_if_there(&path) {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }
    server.shutdown();
    for task in serving {
        if let Ok(Err(error)) = task.await {
            log::warn!("a socket failed: {error}");
        }
    }
    Ok(())
}

/// Returns when there were no clients and no running domains for `timeout`.
async fn until_idle(server: &Server, driver: &Driver, timeout: Duration) {
    let mut since = Instant::now();
    loop {
        if server.clients() > 0 || driver.running() > 0 || driver.networks.running() > 0 {
            since = Instant::now();
        }
        let left = timeout.saturating_sub(since.elapsed());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(IDLE_CHECK)).await;
    }
}
