//! The `husk` command's grammar.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::LazyLock,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::filter::LevelFilter;

use super::{
    facts, log,
    peek::{What, peek},
    ps, report, run, spec,
    status::chain,
};
use crate::config::Source;

/// The commit that this was built from, where the build said so (in the variable HUSK_REVISION).
pub const REVISION: Option<&str> = option_env!("HUSK_REVISION");

/// Exit code of what is husk's own failure and not the container's.
pub const FAILURE: u8 = 125;

/// Runs containers, each in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "husk", version = version())]
pub struct Cli {
    /// Log what happens to stderr
    #[arg(long, global = true)]
    pub debug: bool,
    /// Read the configuration from FILE instead of /etc/husk/husk.toml
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a container in the foreground
    ///
    /// Makes a microVM, runs the bundle's process in it, and removes both when the process has ended. Its streams are
    /// those of this command, and so is its terminal if config.json asks for one. Signals are forwarded.
    ///
    /// The exit code is the process's, or 128 and the number of the signal that ended it; 127 when the command is
    /// not there, 126 when it cannot be executed, 125 for any other failure.
    #[command(verbatim_doc_comment)]
    Run(RunArgs),
    /// Tell whether this machine can run husk, and what to do if not
    ///
    /// Exits with 0 if it can, and with 1 if not. What is advised against ("warn") does not keep husk from running.
    ///
    /// With --sandbox: tell how the processes of a running sandbox are locked in, as the kernel shows it now (Landlock,
    /// which it does not show: as they logged). Exits with 1 if anything that is expected of them does not hold.
    #[command(verbatim_doc_comment)]
    Check(CheckArgs),
    /// List the containers of all engines on this machine
    ///
    /// A container is "dead" whose engine has died before it was removed; "empty" is a sandbox without containers.
    #[command(verbatim_doc_comment)]
    Ps(PsArgs),
    /// Show what the kernel of a container's sandbox has said
    ///
    /// Its last part is kept as long as the sandbox is there; the agent's words are among it. What is kept, and how
    /// urgent it must be, is said by log.console_kept_kib and guest.log_level in husk.toml.
    #[command(verbatim_doc_comment)]
    Console(PeekArgs),
    /// Show what husk has logged about a container's sandbox
    ///
    /// Its last part is kept as long as the sandbox is there (log.kept_kib and log.level in husk.toml). All of it goes to
    /// the engine's log and, with systemd, to the journal.
    #[command(verbatim_doc_comment)]
    Logs(PeekArgs),
    /// Write a config.json to begin with
    Spec(SpecArgs),
}

/// `husk run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The OCI bundle: a directory with config.json in it
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Write the pid that stands for the container on the host into this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// The container's name, not in use: letters, digits and _.+-
    #[arg(value_name = "ID")]
    pub id: String,
}

/// `husk check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print nothing; the exit code tells
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// The same as --format json
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Time for a guest to boot; 0: boot none
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        conflicts_with = "sandbox"
    )]
    pub timeout: u64,
    /// Look at this running sandbox (or that of this container) instead
    #[arg(long, value_name = "ID")]
    pub sandbox: Option<String>,
    /// The sandbox's namespace, where several have one of this name
    #[arg(short, long, value_name = "NAMESPACE", requires = "sandbox")]
    pub namespace: Option<String>,
}

impl CheckArgs {
    /// How to print.
    pub fn form(&self) -> Format {
        if self.json { Format::Json } else { self.format }
    }
}

/// `husk ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// The same as --format json
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Only those of this namespace, e.g. default, k8s.io or moby
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
}

/// How something is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// JSON
    Json,
}

/// `husk console` and `husk logs`.
#[derive(Debug, Args)]
pub struct PeekArgs {
    /// The container, or its sandbox
    #[arg(value_name = "ID")]
    pub id: String,
    /// Its namespace, where several have one of this name
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Go on until the sandbox is removed
    #[arg(short, long)]
    pub follow: bool,
    /// Begin with the last LINES
    #[arg(long, value_name = "LINES")]
    pub tail: Option<usize>,
}

/// `husk spec`.
#[derive(Debug, Args)]
pub struct SpecArgs {
    /// Where to write it; the root file system is expected in DIR/rootfs
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Give the process a terminal
    #[arg(short, long)]
    pub terminal: bool,
    /// The command to run
    #[arg(
        value_name = "COMMAND",
        default_value = "sh",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let commit = REVISION
            .map(|revision| format!("\ncommit: {revision}"))
            .unwrap_or_default();
        format!(
            "{}{commit}\nmachine protocol: {}\nOCI runtime specification: {}",
            env!("CARGO_PKG_VERSION"),
            husk_vmm_protocol::config::CONFIG_VERSION,
            spec::OCI_VERSION,
        )
    });
    &TEXT
}

/// `husk`, from its arguments (with its own name) to its exit code.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // Help and the version are asked for; all else is a failure of the call.
            return ExitCode::from(if error.use_stderr() { FAILURE } else { 0 });
        }
    };
    let level = if cli.debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::ERROR
    };
    if let Ok(stderr) = io::stderr().as_fd().try_clone_to_owned() {
        log::of_command(File::from(stderr), level);
    }
    let code = source(cli.config.as_deref()).and_then(|config| match &cli.command {
        Command::Run(args) => with_runtime(run::run(args, config)),
        Command::Check(args) => match &args.sandbox {
            Some(id) => facts::check(args, id),
            None => with_runtime(report::check(args, config)),
        },
        Command::Ps(args) => ps::ps(args),
        Command::Console(args) => peek(args, What::Console),
        Command::Logs(args) => peek(args, What::Log),
        Command::Spec(args) => spec::write(args).map(|()| 0).map_err(|error| run::Failure {
            code: FAILURE,
            message: chain(&error),
        }),
    });
    match code {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            let _ = io::Write::write_all(
                &mut io::stderr(),
                format!("husk: {}\n", failure.message).as_bytes(),
            );
            ExitCode::from(failure.code)
        }
    }
}

fn source(config: Option<&Path>) -> Result<Source, run::Failure> {
    let Some(path) = config else {
        return Ok(Source::Default);
    };
    std::path::absolute(path)
        .map(Source::File)
        .map_err(|error| run::Failure {
            code: FAILURE,
            message: format!("--config {}: {error}", path.display()),
        })
}

fn with_runtime(work: impl Future<Output = Result<u8, run::Failure>>) -> Result<u8, run::Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| run::Failure {
        code: FAILURE,
        message: format!("cannot start the runtime: {error}"),
    })?;
    let code = runtime.block_on(work);
    // A read of a regular file or a terminal that is still under way must not keep the command from ending.
    runtime.shutdown_background();
    code
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_are_understood() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["husk"], args].concat()).unwrap().command;
        let Command::Run(args) = parse(&["run", "--bundle", "/b", "demo"]) else {
            panic!()
        };
        assert_eq!((args.bundle, args.id.as_str()), (PathBuf::from("/b"), "demo"));
        let Command::Run(args) = parse(&["run", ""]) else {
            panic!()
        };
        assert_eq!((args.bundle, args.id.as_str()), (PathBuf::from("."), ""));
        let Command::Spec(args) = parse(&["spec", "--bundle", "b", "--terminal", "--", "sh", "-c", "a b"])
        else {
            panic!()
        };
        assert!(args.terminal);
        assert_eq!(args.command, ["sh", "-c", "a b"]);
        let Command::Spec(args) = parse(&["spec"]) else {
            panic!()
        };
        assert_eq!(args.command, ["sh"]);
        let Command::Check(args) = parse(&["check", "--quiet", "--timeout", "5"]) else {
            panic!()
        };
        assert!(args.quiet && args.timeout == 5);
        let Command::Check(args) = parse(&["check", "--sandbox", "web", "-n", "moby", "--format", "json"])
        else {
            panic!()
        };
        assert_eq!(
            (args.sandbox.as_deref(), args.form()),
            (Some("web"), Format::Json)
        );
        assert!(Cli::try_parse_from(["husk", "check", "--sandbox", "web", "--timeout", "1"]).is_err());
        let cli = Cli::try_parse_from(["husk", "check", "--config", "/c"]).unwrap();
        assert_eq!(cli.config.as_deref(), Some(Path::new("/c")));
        let Command::Ps(args) = parse(&["ps", "-q", "-n", "moby", "-f", "json"]) else {
            panic!()
        };
        assert!(args.quiet && args.format == Format::Json);
        let Command::Console(args) = parse(&["console", "-f", "--tail", "3", "-n", "k8s.io", "web"]) else {
            panic!()
        };
        assert!(args.follow && args.tail == Some(3) && args.namespace.as_deref() == Some("k8s.io"));
        assert!(matches!(parse(&["logs", "web"]), Command::Logs(args) if args.id == "web"));
    }

    #[test]
    fn help_and_version_are_no_errors() {
        for args in [["husk", "--help"], ["husk", "--version"]] {
            assert!(!Cli::try_parse_from(args).unwrap_err().use_stderr());
        }
        assert!(version().starts_with(env!("CARGO_PKG_VERSION")));
    }
}
