//! Stand-ins: the processes that stand for containers and execs on the host. See the program, `husk-standin`.

use std::{ffi::CString, io, os::fd::OwnedFd, path::Path, sync::Arc, time::Duration};

use husk_standin::{
    CHANNEL, NAMESPACES,
    wire::{MAX_LEN, Order, Step, Word},
};
use tokio::time::timeout;

use super::{
    cgroup::Cgroup,
    child::{self, Child, End, Program, Surroundings},
    namespaces::{Kind, Namespace},
    pid::Identity,
    seqpacket::Seqpacket,
};

/// How long a stand-in may take to stand. It does a handful of system calls.
const STAND: Duration = Duration::from_secs(20);

/// How long one that was told to end may take.
const END: Duration = Duration::from_secs(5);

/// What a stand-in is to be.
#[derive(Debug)]
pub struct Role<'a> {
    /// `husk-standin`.
    pub program: &'a Path,
    /// Whom it stands for, shown by `ps`.
    pub name: &'a str,
    /// Namespaces to join.
    pub join: Vec<OwnedFd>,
    /// Namespaces to make: `CLONE_NEW…` flags.
    pub unshare: i32,
    /// Where it is born.
    pub cgroup: Option<Arc<Cgroup>>,
}

/// A stand-in. Dropped, it ends as if it were killed.
#[derive(Debug)]
pub struct StandIn {
    child: Child,
    channel: Seqpacket,
    cgroup: Option<Arc<Cgroup>>,
}

/// What happens to a stand-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It was sent a signal which is meant for whom it stands for.
    Signal(i32),
    /// It was killed, by this signal.
    Killed(i32),
}

/// Why there is no stand-in.
#[derive(Debug, thiserror::Error)]
pub enum StandInError {
    /// The program cannot be executed.
    #[error("cannot start {path}", path = path.display())]
    Execute {
        /// The program.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not do what it had to.
    #[error("the stand-in cannot {what}")]
    Step {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended before it stood.
    #[error("the stand-in {0}")]
    Ended(End),
    /// It did not get there.
    #[error("the stand-in is not there after {} s", STAND.as_secs())]
    Late,
}

impl StandIn {
    /// Starts one.
    ///
    /// # Errors
    /// Then there is none.
    pub async fn start(role: Role<'_>) -> Result<Self, StandInError> {
        let execute = |source| StandInError::Execute {
            path: role.program.to_owned(),
            source,
        };
        let (channel, theirs) = Seqpacket::pair().map_err(execute)?;
        let null = std::fs::File::options()
            .write(true)
            .open("/dev/null")
            .map_err(execute)?;
        let order = Order::Stand {
            unshare: role.unshare,
        };
        channel.send(&order.encode(), None).await.map_err(execute)?;
        let fds = [(2, null.into()), (CHANNEL, theirs)].into_iter();
        let program = Program {
            path: role.program,
            fds: fds.chain((NAMESPACES..).zip(role.join)).collect(),
        };
        let surroundings = Surroundings {
            args: vec![CString::new(role.name).map_err(|error| execute(error.into()))?],
            cgroup: role.cgroup.clone(),
            ..Surroundings::default()
        };
        let child = child::spawn_in(program, surroundings).await.map_err(execute)?;
        let this = Self {
            child,
            channel,
            cgroup: role.cgroup,
        };
        match timeout(STAND, this.first_word()).await {
            Ok(Ok(())) => Ok(this),
            failed => {
                this.child.kill();
                this.child.ended().await;
                Err(match failed {
                    Ok(Err(error)) => error,
                    _ => StandInError::Late,
                })
            }
        }
    }

    async fn first_word(&self) -> Result<(), StandInError> {
        match self.word().await {
            Some(Word::Ready) => Ok(()),
            Some(Word::Failed { step, errno }) => Err(StandInError::Step {
                what: match step {
                    Step::Join(index) => format!("join the namespace of its descriptor {index}"),
                    Step::Unshare => "make its namespaces".into(),
                    Step::Signals => "take charge of its signals".into(),
                    Step::Lockdown => "give up its rights".into(),
                },
                source: io::Error::from_raw_os_error(errno),
            }),
            Some(Word::Signal(_)) | None => Err(StandInError::Ended(self.child.ended().await)),
        }
    }

    /// Its next word; `None` when there will be none.
    async fn word(&self) -> Option<Word> {
        let mut packet = [0; MAX_LEN];
        let length = self.channel.recv(&mut packet).await.ok()?;
        Word::decode(packet.get(..length)?)
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Where it was born.
    pub fn cgroup(&self) -> Option<Arc<Cgroup>> {
        self.cgroup.clone()
    }

    /// Its pid and start time.
    pub fn identity(&self) -> Identity {
        self.child.identity()
    }

    /// One of its namespaces: of the network, to be wired.
    ///
    /// # Errors
    /// When it has ended.
    pub fn namespace(&self, kind: Kind) -> io::Result<Namespace> {
        Namespace::of(self.pid(), kind)
    }

    /// What happens to it next. Its end is the last; it is to be dropped then. May be dropped half-way.
    pub async fn next(&self) -> Happening {
        let end = tokio::select! {
            biased;
            word = self.word() => match word {
                Some(Word::Signal(signal)) => return Happening::Signal(signal),
                _ => self.child.ended().await,
            },
            end = self.child.ended() => end,
        };
        Happening::Killed(match end {
            End::Killed(signal) => signal as i32,
            End::Exited(_) | End::Lost(_) => libc::SIGKILL,
        })
    }

    /// Ends it with the status of whom it stands for: as a shell reports it. Returns when it is gone.
    pub async fn end(&self, status: u32) {
        let code = i32::try_from(status).unwrap_or(255);
        // One that was killed meanwhile does not listen.
        let told = self.channel.send(&Order::Exit(code).encode(), None).await;
        if told.is_err() || timeout(END, self.child.ended()).await.is_err() {
            self.kill().await;
        }
    }

    /// Kills it. Returns when it is gone.
    pub async fn kill(&self) {
        self.child.kill();
        self.child.ended().await;
    }

    /// How it ended, when it has.
    pub async fn ended(&self) -> End {
        self.child.ended().await
    }
}
