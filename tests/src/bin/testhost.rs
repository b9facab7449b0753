//! The test host's program: see [`husk_tests::testhost`].

use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Parser, Subcommand};
use husk_tests::testhost::freeze::Boot;
use husk_tests::testhost::instance::{Parts, RunDir};
use husk_tests::testhost::qemu::Clock;
use husk_tests::testhost::wire::Run;
use husk_tests::testhost::{agentd, client};

/// The test host: a Debian machine with emulated hardware virtualization.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a command in the host, starting the host when it does not run.
    Exec {
        #[command(flatten)]
        host: Host,
        /// Kill the command after so many seconds; the exit code is 124 then.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// Run on a terminal.
        #[arg(short, long)]
        tty: bool,
        /// Do not read standard input.
        #[arg(short = 'n', long)]
        no_stdin: bool,
        /// Directory in the host to run in (default: /root).
        #[arg(long, value_name = "DIR")]
        cwd: Option<String>,
        /// A further variable of the command's environment.
        #[arg(long, value_name = "NAME=VALUE")]
        env: Vec<String>,
        /// Program and arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Start the host when it does not run.
    Start {
        #[command(flatten)]
        host: Host,
    },
    /// End the host and forget all that was done in it.
    Stop {
        #[command(flatten)]
        host: Host,
    },
    /// Tell whether the host runs, and where its logs are; the exit code is 3 when it does not.
    Status {
        #[command(flatten)]
        host: Host,
    },
    /// (internal) The runner inside the host.
    #[command(hide = true)]
    Agentd,
    /// (internal) The process that holds QEMU.
    #[command(hide = true)]
    Supervise {
        #[arg(long)]
        run_dir: PathBuf,
        #[arg(long)]
        parts: String,
        #[arg(long)]
        clock: Clock,
        #[arg(long)]
        idle: u64,
    },
    /// (internal) Boot to load the container images.
    #[command(hide = true)]
    Load {
        #[command(flatten)]
        boot: BootArguments,
    },
    /// (internal) Boot, run the warm-up and write the memory to a file.
    #[command(hide = true)]
    Freeze {
        #[command(flatten)]
        boot: BootArguments,
        #[arg(last = true)]
        warm_up: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Host {
    /// Debian release in the host: trixie (containerd 1.7) or forky (containerd 2.1).
    #[arg(long, default_value = "trixie", value_parser = ["trixie", "forky"])]
    suite: String,
    /// What time in the host is tied to.
    #[arg(long, default_value = "wall")]
    clock: Clock,
    /// The scripts' directory; set by the scripts.
    #[arg(long, env = "HUSK_TESTHOST_SCRIPTS", hide = true)]
    scripts: PathBuf,
    /// Seconds without use after which the host ends by itself.
    #[arg(long, env = "HUSK_HOST_IDLE", default_value_t = 7200, hide = true)]
    idle: u64,
}

#[derive(clap::Args)]
struct BootArguments {
    #[arg(long)]
    tools: PathBuf,
    #[arg(long)]
    in_root: PathBuf,
    #[arg(long)]
    cache: PathBuf,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    clock: Clock,
}

impl From<BootArguments> for Boot {
    fn from(
        BootArguments {
            tools,
            in_root,
            cache,
            dir,
            clock,
        }: BootArguments,
    ) -> Self {
        Self {
            tools,
            in_root,
            cache,
            dir,
            clock,
        }
    }
}

impl Host {
    fn run_dir(&self) -> io::Result<RunDir> {
        RunDir::open(PathBuf::from(self.ask(&[
            "run-dir",
            &self.suite,
            self.clock.name(),
        ])?))
    }

    /// Starts the host when it does not run.
    fn start(&self, run_dir: &RunDir) -> io::Result<()> {
        let _mine = run_dir.exclusive()?;
        if run_dir.running()?.is_some() {
            return Ok(());
        }
        let parts: Parts = serde_json::from_str(&self.ask(&["parts", &self.suite, self.clock.name()])?)?;
        run_dir.stop()?;
        run_dir.start(&parts, self.clock, Duration::from_secs(self.idle))
    }

    /// The answer of the script that knows where things are, and makes them.
    fn ask(&self, question: &[&str]) -> io::Result<String> {
        let (script, arguments) = question
            .split_first()
            .ok_or_else(|| io::Error::other("no question"))?;
        let output = Command::new(self.scripts.join(script))
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!("{script} failed ({})", output.status)));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.trim_end().to_owned())
    }
}

fn run(verb: Verb) -> io::Result<i32> {
    match verb {
        Verb::Exec {
            host,
            timeout,
            tty,
            no_stdin,
            cwd,
            env,
            command,
        } => {
            let run_dir = host.run_dir()?;
            let in_use = run_dir.in_use()?;
            let mut address = run_dir.running()?;
            if address.is_none() {
                host.start(&run_dir)?;
                address = run_dir.running()?;
            }
            let address = address.ok_or_else(|| io::Error::other("the host ended while it was started"))?;
            let mut variables = std::collections::BTreeMap::new();
            if let (true, Ok(term)) = (tty, std::env::var("TERM")) {
                variables.insert("TERM".to_owned(), term);
            }
            for variable in env {
                let (name, value) = variable
                    .split_once('=')
                    .ok_or_else(|| io::Error::other(format!("--env {variable}: write NAME=VALUE")))?;
                variables.insert(name.to_owned(), value.to_owned());
            }
            let tty = tty.then(client::terminal_size);
            let request = Run {
                token: address.token,
                argv: command,
                env: variables,
                cwd,
                tty,
                timeout,
            };
            let code = client::run(address.port, request, !no_stdin);
            drop(in_use);
            code
        }
        Verb::Start { host } => host.start(&host.run_dir()?).map(|()| 0),
        Verb::Stop { host } => {
            let run_dir = host.run_dir()?;
            let _mine = run_dir.exclusive()?;
            run_dir.stop().map(|()| 0)
        }
        Verb::Status { host } => {
            let run_dir = host.run_dir()?;
            Ok(match run_dir.running()? {
                Some(address) => {
                    println!(
                        "runs: QEMU {}, port {}, logs {}",
                        address.qemu,
                        address.port,
                        run_dir.file("serial.log").display()
                    );
                    0
                }
                None => {
                    println!(
                        "does not run; logs of the last run are in {}",
                        run_dir.file("").display()
                    );
                    3
                }
            })
        }
        Verb::Agentd => agentd::serve().map(|()| 0),
        Verb::Supervise {
            run_dir,
            parts,
            clock,
            idle,
        } => {
            let parts: Parts = serde_json::from_str(&parts)?;
            RunDir::open(run_dir)?
                .supervise(&parts, clock, Duration::from_secs(idle))
                .map(|()| 0)
        }
        Verb::Load { boot } => Boot::from(boot).load().map(|()| 0),
        Verb::Freeze { boot, warm_up } => Boot::from(boot).freeze(&warm_up).map(|()| 0),
    }
}

fn main() {
    let code = run(Arguments::parse().verb).unwrap_or_else(|error| {
        eprintln!("test host: {error}");
        client::BROKEN
    });
    // Not a return: a thread may be waiting for standard input.
    std::process::exit(code)
}
