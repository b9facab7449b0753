//! An agent that lies: PID 1 of a guest with husk's kernel. It speaks the agent's wire to the engine and keeps the rules
//! but for one, which a word on the kernel's command line chooses, `hostile=WORD` (the kernel hands it over in the
//! environment). No container is ever made; what it says of them is made up.

mod lie;
mod wire;

use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use husk_agent_protocol::limits::AGENT_PORT;
use husk_agent_protocol::messages::{
    ContainerStatsResponse, CreateContainerRequest, CreateContainerResponse, Empty, Event,
    ExecProcessResponse, ListProcessesResponse, SetupRequest, SetupResponse, StartContainerResponse, Stdio,
    event::{Exit, Oom},
    list_processes_response::Process,
};
use protobuf::Message;
use ttrpc::proto::{Code, Request};

use lie::{ESCAPES, Lie, strange_failure};
use wire::{CLOSED, DATA, MAX_FRAME, RESPONSE, Wire, dial, encode};

/// Bytes of a flood of frames: what the engine reads at once, and some seconds' worth.
const FLOOD: usize = 12 << 20;
/// Bytes of output of a process.
const OUTPUT: usize = 8 << 20;

fn main() {
    let word = std::env::var("hostile").unwrap_or_default();
    println!("hostile agent: {word}");
    if let Err(error) = run(&word) {
        println!("hostile agent: {word}: {error}");
    }
    // The end of PID 1 is a panic of the kernel's. Where that is the point, it comes now; else the engine has yet to
    // say what it thinks.
    if !word.starts_with("exit") {
        forever();
    }
}

fn forever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

/// The connection to the engine, and what it asked for.
struct Agent {
    wire: Wire,
    word: String,
    /// Stream of the events.
    events: u32,
    container: String,
    /// Its process does not end by itself.
    runs_on: bool,
    stdio: Stdio,
    /// With this the streams of processes begin.
    secret: Vec<u8>,
}

fn run(word: &str) -> io::Result<()> {
    let wire = match word {
        "exit-at-once" => return Ok(()),
        "noise" => connections()?,
        _ => dial(AGENT_PORT)?,
    };
    let mut agent = Agent {
        wire: Wire(wire),
        word: word.to_owned(),
        events: 0,
        container: String::new(),
        runs_on: false,
        stdio: Stdio::default(),
        secret: Vec::new(),
    };
    match word {
        "hang-up" => return drop_and_wait(agent),
        "garbage" => {
            let mut state = 0x2545_f491u32;
            let noise: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .take(FLOOD)
            .collect();
            agent.wire.0.write_all(&noise)?;
        }
        "huge-frame" => {
            agent.wire.frame_head(u32::MAX, 1, RESPONSE, 0)?;
            let zeroes = vec![0; 1 << 20];
            loop {
                agent.wire.0.write_all(&zeroes)?;
            }
        }
        "slow-frame" => {
            agent.wire.frame_head(MAX_FRAME as u32, 1, RESPONSE, 0)?;
            loop {
                agent.wire.0.write_all(&[0])?;
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        "noise" => agent.noise()?,
        _ => {}
    }
    agent.serve()
}

fn drop_and_wait(agent: Agent) -> io::Result<()> {
    drop(agent);
    forever()
}

/// Connections to ports that nobody offered, and more than one to the agent's: the first of these is the agent's.
fn connections() -> io::Result<File> {
    let refused = |port: u32| match dial(port) {
        Ok(_) => Err(io::Error::other(format!("connected to port {port}"))),
        Err(_) => Ok(()),
    };
    (0..200)
        .chain(0x1_0000..0x1_0040)
        .chain([u32::MAX - 1])
        .try_for_each(refused)?;
    let wire = dial(AGENT_PORT)?;
    [AGENT_PORT; 20].into_iter().try_for_each(refused)?;
    Ok(wire)
}

impl Agent {
    /// Frames that belong to no request.
    fn noise(&mut self) -> io::Result<()> {
        for kind in 0..=255 {
            for stream in [0, 2, 1001, u32::MAX] {
                self.wire.frame(stream, kind, kind, &[kind; 100])?;
            }
        }
        let frame = vec![0; 1000];
        for stream in 0..(FLOOD / 1010) as u32 {
            self.wire
                .frame(stream.wrapping_mul(2_654_435_761) | 0x1000, RESPONSE, 0, &frame)?;
        }
        Ok(())
    }

    fn answer(&mut self, stream: u32, message: &impl Message) -> io::Result<()> {
        let payload = encode(message)?;
        match self.word.as_str() {
            "wrong-streams" => self.wire.answer(stream + 1, payload),
            // Each answer twice.
            "noise" => {
                self.wire.answer(stream, payload.clone())?;
                self.wire.answer(stream, payload)
            }
            _ => self.wire.answer(stream, payload),
        }
    }

    fn refuse(&mut self, stream: u32) -> io::Result<()> {
        self.wire.refuse(stream, Code::INTERNAL, ESCAPES.repeat(40_000))
    }

    fn event(&mut self, event: Event) -> io::Result<()> {
        let bytes = encode(&event)?;
        self.wire.frame(self.events, DATA, 0, &bytes)
    }

    fn exited(&mut self, container: &str, exec: &str, status: u32) -> io::Result<()> {
        let mut event = Event::new();
        event.set_exit(Exit {
            container_id: container.into(),
            exec_id: exec.into(),
            status,
            ..Default::default()
        });
        self.event(event)
    }

    fn out_of_memory(&mut self, container: &str) -> io::Result<()> {
        let mut event = Event::new();
        event.set_oom(Oom {
            container_id: container.into(),
            ..Default::default()
        });
        self.event(event)
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let (stream, request) = self.wire.request()?;
            if !self.serve_one(stream, &request)? {
                return Ok(());
            }
        }
    }

    /// Whether to go on.
    fn serve_one(&mut self, stream: u32, request: &Request) -> io::Result<bool> {
        let word = self.word.clone();
        if request.method == "Setup" {
            let asked = SetupRequest::parse_from_bytes(&request.payload).map_err(io::Error::other)?;
            self.secret = asked.stream_secret;
        }
        if let Some(lie) = Lie::of(&word, &request.method) {
            lie.tell(&mut self.wire, stream)?;
            return Ok(true);
        }
        match (request.method.as_str(), word.as_str()) {
            (_, "silent") | ("CreateContainer", "silent-create") | ("StartContainer", "silent-start") => {}
            // Who has refused Setup could still say that the container has run, before the machine is ended.
            ("CreateContainer", "setup-error" | "setup-no-message") => {}
            ("Setup", "exit-setup")
            | ("CreateContainer", "exit-create")
            | ("StartContainer", "exit-start") => {
                return Ok(false);
            }
            ("Setup", "setup-error") => self.refuse(stream)?,
            ("Setup", "noise") => {
                let answer = SetupResponse {
                    agent_version: ESCAPES.repeat(20_000),
                    kernel_release: ESCAPES.repeat(20_000),
                    ..Default::default()
                };
                self.answer(stream, &answer)?;
            }
            ("Setup", "setup-no-message") => self.wire.frame(stream, RESPONSE, 0, &[0xff; 1000])?,
            ("Setup", _) => {
                let answer = SetupResponse {
                    agent_version: "0.0.0-hostile".into(),
                    kernel_release: "0-hostile".into(),
                    ..Default::default()
                };
                self.answer(stream, &answer)?;
            }
            ("Events", "events-end") => self.wire.frame(stream, DATA, CLOSED, &[])?,
            ("Events", _) => self.events = stream,
            ("CreateContainer", _) => self.create(stream, request)?,
            ("StartContainer", _) => self.start(stream)?,
            ("ListProcesses" | "ContainerStats" | "ExecProcess", _) => self.lie(stream, &request.method)?,
            (_, "stuck") => {}
            ("SignalProcess", _) => {
                self.answer(stream, &Empty::new())?;
                let container = self.container.clone();
                self.exited(&container, "", 137)?;
            }
            _ => self.answer(stream, &Empty::new())?,
        }
        Ok(true)
    }

    /// Dials a stream of a process.
    fn dial_stream(&self, port: u32) -> io::Result<File> {
        let mut stream = dial(port)?;
        stream.write_all(&self.secret)?;
        Ok(stream)
    }

    fn create(&mut self, stream: u32, request: &Request) -> io::Result<()> {
        let asked = CreateContainerRequest::parse_from_bytes(&request.payload).map_err(io::Error::other)?;
        self.container = asked.container_id;
        self.runs_on = asked.spec_json.windows(5).any(|word| word == b"sleep");
        self.stdio = asked.stdio.unwrap_or_default();
        let mut answer = CreateContainerResponse {
            pid: 42,
            ..Default::default()
        };
        match self.word.as_str() {
            "create-no-pid" => answer.pid = -1,
            "create-failed" => {
                answer.failure = Some(strange_failure()).into();
            }
            "ended-before-create" => {
                let container = self.container.clone();
                self.exited(&container, "", 9)?;
            }
            _ => {}
        }
        self.answer(stream, &answer)?;
        if self.word == "ended-at-create" {
            let container = self.container.clone();
            self.exited(&container, "", 9)?;
        }
        Ok(())
    }

    /// Answers, and says that the process has ended; some lie in between.
    fn start(&mut self, stream: u32) -> io::Result<()> {
        let word = self.word.clone();
        let container = self.container.clone();
        if word == "start-refused" {
            return self.refuse(stream);
        }
        self.answer(stream, &StartContainerResponse::new())?;
        let mut status = 7;
        match word.as_str() {
            "exit-started" => std::process::exit(0),
            "absurd" | "stuck" => return Ok(()),
            "events-flood" => {
                // About thirty bytes each.
                for number in 0..FLOOD / 128 {
                    self.exited(&format!("nobody-{number}"), "", 1)?;
                    self.exited(&container, &format!("exec-{number}"), 1)?;
                    self.out_of_memory(&format!("nobody-{number}"))?;
                    self.out_of_memory(&container)?;
                }
                status = u32::MAX;
            }
            "event-nonsense" => self.event(Event::new())?,
            "event-bad-id" => self.exited("../../../etc", "", 1)?,
            "output-flood" => {
                let mut stdout = self.dial_stream(self.stdio.stdout_port)?;
                let mut stderr = self.dial_stream(self.stdio.stderr_port)?;
                let bytes = vec![b'x'; 1 << 20];
                for _ in 0..OUTPUT / bytes.len() {
                    stdout.write_all(&bytes)?;
                    stderr.write_all(&bytes)?;
                }
            }
            "noise" => {
                // As one who does not know the secret, and then once more.
                let mut first = dial(self.stdio.stdout_port)?;
                // The host may have hung up by the second.
                let _ = first.write_all(&[b'f'; 32]);
                let _ = first.write_all(b"forged");
                let second = dial(self.stdio.stdout_port);
                println!("hostile agent: taken twice: {}", second.is_ok());
                drop(first);
                self.dial_stream(self.stdio.stderr_port)?;
            }
            _ => {}
        }
        if !["output-flood", "noise"].contains(&word.as_str()) {
            // A process without output.
            for port in [self.stdio.stdout_port, self.stdio.stderr_port] {
                if port != 0 {
                    self.dial_stream(port)?;
                }
            }
        }
        if self.runs_on {
            return Ok(());
        }
        self.exited(&container, "", status)?;
        if word == "noise" {
            self.exited(&container, "", 8)?;
        }
        Ok(())
    }

    fn lie(&mut self, stream: u32, method: &str) -> io::Result<()> {
        if self.word == "stuck" {
            return Ok(());
        }
        match method {
            "ListProcesses" => {
                let process = |pid| Process {
                    pid,
                    ..Default::default()
                };
                let answer = ListProcessesResponse {
                    processes: (1..500_000).map(process).collect(),
                    ..Default::default()
                };
                self.answer(stream, &answer)
            }
            "ContainerStats" => {
                let file = |number| (format!("{ESCAPES}/../{number}"), ESCAPES.repeat(10));
                let answer = ContainerStatsResponse {
                    files: (0..4000).map(file).collect(),
                    ..Default::default()
                };
                self.answer(stream, &answer)
            }
            _ => self.answer(
                stream,
                &ExecProcessResponse {
                    pid: i32::MIN,
                    ..Default::default()
                },
            ),
        }
    }
}
