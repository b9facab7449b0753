//! The shim's program, and the server that its `start` leaves behind.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixListener},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::shim_async::create_task;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tracing_subscriber::filter::LevelFilter;
use ttrpc::asynchronous::{Server, transport::Listener};

use super::{
    bootstrap::{Action, Invocation, MAX_STDIN_LEN, UsageError},
    delete::{self, delete},
    info::runtime_info,
    log,
    pod::Pod,
    publish::Publisher,
    socket,
    start::{self, TTRPC_ADDRESS},
    status::chain,
    task::TaskService,
};

/// The names of the task service. containerd 1.7 and CRI-O know the first, containerd 2 the second; they differ in
/// nothing else, and which one a daemon calls is not settled by the version it was answered.
const TASK_SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How long the end waits for answers that are on their way.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the server could not serve.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error(transparent)]
    Start(#[from] start::StartError),
    #[error("{what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the runtime's options on stdin are not as containerd writes them")]
    Options(#[source] protobuf::Error),
    #[error("cannot serve: {0}")]
    Server(#[from] ttrpc::Error),
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Host { what, source }
}

/// `containerd-shim-husk-v2`, from its arguments to its exit code.
pub fn main(args: Vec<OsString>) -> ExitCode {
    match act(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows all that a failed call has printed.
            let _ = writeln!(io::stderr(), "containerd-shim-husk-v2: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn act(args: &[OsString]) -> Result<(), ServeError> {
    let invocation = Invocation::parse(args)?;
    let answer = match invocation.action {
        Action::Version => format!(
            "containerd-shim-husk-v2:\n  Version:  {}\n  Revision: {}\n",
            env!("CARGO_PKG_VERSION"),
            super::cli::REVISION.unwrap_or_default(),
        )
        .into_bytes(),
        Action::Info => runtime_info(&read_stdin()?).map_err(ServeError::Options)?,
        // No log goes to stderr here: containerd takes it for part of the answer.
        Action::Start => start::start(&invocation, &read_stdin()?)?,
        Action::Delete if !delete::is_apart() => {
            delete::apart(&invocation, args).map_err(host("cannot clean up"))?
        }
        Action::Delete => {
            log::of_shim(stderr()?, level(invocation.debug), identity(&invocation));
            runtime(1)?.block_on(delete(&invocation))
        }
        Action::Serve => return serve(&invocation),
    };
    let mut stdout = io::stdout();
    stdout
        .write_all(&answer)
        .and_then(|()| stdout.flush())
        .map_err(host("cannot print the answer"))
}

fn identity(invocation: &Invocation) -> log::Identity {
    log::Identity {
        program: "containerd-shim-husk-v2",
        namespace: invocation.namespace.clone(),
        sandbox: invocation.id.clone(),
    }
}

fn level(debug: bool) -> LevelFilter {
    if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    }
}

fn read_stdin() -> Result<Vec<u8>, ServeError> {
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    // A person's terminal would never end.
    if !io::IsTerminal::is_terminal(&stdin) {
        stdin
            .lock()
            .take(MAX_STDIN_LEN)
            .read_to_end(&mut bytes)
            .map_err(host("cannot read stdin"))?;
    }
    Ok(bytes)
}

fn stderr() -> Result<File, ServeError> {
    let fd = io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .map_err(host("cannot use stderr"))?;
    Ok(File::from(fd))
}

fn runtime(workers: usize) -> Result<Runtime, ServeError> {
    Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .map_err(host("cannot start the runtime"))
}

/// The server: its listening socket is its stdin, its log its stderr.
fn serve(invocation: &Invocation) -> Result<(), ServeError> {
    log::of_shim(stderr()?, level(invocation.debug), identity(invocation));
    // It was started by a link that has no name of its own. Only `ps` and people look at it.
    let _ = nix::sys::prctl::set_name(c"containerd-shim-husk-v2");
    // Away from the daemon's session and process group. It fails only for one that leads a group already.
    let _ = nix::unistd::setsid();
    let listener = take_listener().map_err(host(
        "stdin is not a listening socket; this is containerd's to start",
    ))?;
    let publish_to = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    runtime(2)?.block_on(run(invocation, listener, &publish_to))
}

fn take_listener() -> io::Result<UnixListener> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    if !nix::sys::socket::getsockopt(&stdin, nix::sys::socket::sockopt::AcceptConn)? {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(UnixListener::from(stdin))
}

async fn run(invocation: &Invocation, listener: UnixListener, publish_to: &str) -> Result<(), ServeError> {
    let publisher = Publisher::start(publish_to, &invocation.namespace);
    let pod = Pod::new(invocation.namespace.clone(), invocation.id.clone(), publisher);
    listener
        .set_nonblocking(true)
        .map_err(host("cannot use the socket"))?;
    let mut server = server(
        &pod,
        Listener::try_from(listener).map_err(host("cannot use the socket"))?,
    );
    server.start().await?;

    let mut terminate = signal(SignalKind::terminate()).map_err(host("cannot catch signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(host("cannot catch signals"))?;
    tokio::select! {
        () = pod.finished() => {}
        _ = terminate.recv() => pod.end().await,
        _ = interrupt.recv() => pod.end().await,
    }
    // Only now: while it is there, `delete` can tell that somebody sees to the end.
    if let Err(error) = socket::remove(Path::new(&invocation.socket)) {
        tracing::warn!(%error, "the socket is left behind");
    }
    if timeout(DISCONNECT_TIMEOUT, server.shutdown()).await.is_err() {
        tracing::debug!("a caller was left without an answer");
    }
    Ok(())
}

fn server(pod: &Arc<Pod>, listener: Listener) -> Server {
    let mut server = Server::new().add_listener(listener);
    for name in TASK_SERVICES {
        // Built anew for each name: what it is made of cannot be copied.
        let services = create_task(Arc::new(TaskService::new(pod.clone())));
        server = server.register_service(
            services
                .into_values()
                .map(|service| (name.to_owned(), service))
                .collect(),
        );
    }
    server
}

#[cfg(test)]
#[path = "serve_test.rs"]
mod tests;
