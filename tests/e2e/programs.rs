//! Real programs of a Debian system in the microVM. Servers are asked from inside their container, by loopback.

use std::cell::Cell;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tempfile::TempDir;

use crate::command::{Finished, Input, Running, run};
use crate::containerd::{RUNTIME, ctr_run};

const DEBIAN: &str = "localhost/debian:13";
/// nginx, Redis, PostgreSQL, Python, and packages of Debian in /srv/repository (tests/host/build-image).
const PROGRAMS: &str = "localhost/programs:13";

#[test]
fn apt_get_tells_its_version() {
    let done = ctr_run("apt", DEBIAN, &["apt-get", "--version"]).expect_code(0);
    assert!(done.out().starts_with("apt "), "{}", done.out());
}

#[test]
fn python_with_threads_and_files() {
    let script = r#"
import ssl, json, threading, subprocess, os, hashlib
from concurrent.futures import ThreadPoolExecutor
os.makedirs('/var/tmp/pool', exist_ok=True)
def work(n):
    path = f'/var/tmp/pool/{n}.json'
    with open(path, 'w') as f: json.dump({'n': n, 'data': 'x' * n * 100}, f)
    with open(path) as f: return json.load(f)['n']
with ThreadPoolExecutor(8) as pool: total = sum(pool.map(work, range(64)))
out = subprocess.run(['ls', '/var/tmp/pool'], capture_output=True, text=True, check=True).stdout.split()
print(total, len(out), bool(ssl.OPENSSL_VERSION), threading.active_count())
"#;
    let done = ctr_run("python", DEBIAN, &["python3", "-c", script]).expect_code(0);
    assert_eq!(done.out(), "2016 64 True 1\n");
}

#[test]
fn git_on_a_small_repository() {
    let script = "set -e; cd /root; git init -q -b main r; cd r; git config user.email a@b; git config user.name n; \
                  for i in 1 2 3; do echo $i > f$i; git add .; git commit -qm c$i; done; \
                  git clone -q . ../c; cd ../c; git log --oneline | wc -l; git fsck --full >/dev/null 2>&1 && echo sound; \
                  git status --short | wc -l";
    let done = ctr_run("git", DEBIAN, &["sh", "-c", script]).expect_code(0);
    assert_eq!(done.out(), "3\nsound\n0\n");
}

/// A server in a container in the foreground; removed at the end of the test, whatever becomes of it.
struct Server {
    id: &'static str,
    running: Option<Running>,
    questions: Cell<u32>,
}

impl Server {
    /// Runs `script` by the container's shell. `options` are those of `ctr run`.
    #[track_caller]
    fn start(id: &'static str, options: &[&str], script: &str) -> Self {
        let mut argv = vec!["ctr", "run", "--rm", "--runtime", RUNTIME];
        argv.extend(options);
        argv.extend([PROGRAMS, id, "sh", "-c", script]);
        let running = Some(Running::start(&argv, Input::Nothing));
        Self {
            id,
            running,
            questions: Cell::new(0),
        }
    }

    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        self.running.as_mut().unwrap().wait_for(text);
    }

    /// Runs `command` in the container, which must succeed; gives its output.
    #[track_caller]
    fn ask(&self, command: &[&str]) -> String {
        let question = self.questions.get() + 1;
        self.questions.set(question);
        let exec = format!("e{question}");
        let mut argv = vec!["ctr", "task", "exec", "--exec-id", &exec, self.id];
        argv.extend(command);
        run(&argv).expect_code(0).out()
    }

    #[track_caller]
    fn sh(&self, script: &str) -> String {
        self.ask(&["sh", "-ec", script])
    }

    #[track_caller]
    fn python(&self, script: &str) -> String {
        self.ask(&["python3", "-c", script])
    }

    /// Sends a signal to the server and waits for its end.
    #[track_caller]
    fn end(mut self, signal: &str) -> Finished {
        run(&["ctr", "task", "kill", "-s", signal, self.id]).expect_code(0);
        self.running.take().unwrap().finish(Duration::from_secs(90))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            eprintln!("--- {} said\n{}", self.id, running.seen());
            drop(running);
            run(&["ctr", "task", "rm", "-f", self.id]);
            run(&["ctr", "container", "rm", self.id]);
        }
    }
}

/// A directory of the host that containers have at /data, writable to all of their users.
struct Volume {
    _directory: TempDir,
    mount: String,
}

impl Volume {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("husk-e2e-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let mount = format!(
            "type=bind,src={},dst=/data,options=rbind:rw",
            directory.path().display()
        );
        Self {
            _directory: directory,
            mount,
        }
    }
}

/// For Python clients: `get` waits for a server that is not up yet.
const CLIENT: &str = r#"
import hashlib, http.client, time
from concurrent.futures import ThreadPoolExecutor
def connect(host, port):
    while True:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            connection.connect()
            return connection
        except ConnectionRefusedError:
            time.sleep(0.1)
def ask(connection, method, path, body=None):
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()
def get(host, port, path): return ask(connect(host, port), 'GET', path)
"#;

#[test]
fn nginx() {
    let mut server = Server::start(
        "nginx",
        &[],
        "cd /var/www/html; head -c 1000000 /dev/urandom > big; echo small > page; nginx -t 2>&1; exec nginx -g 'daemon off;'",
    );
    server.wait_for("test is successful");
    let answers = server.python(&format!(
        r#"{CLIENT}
print(get('127.0.0.1', 80, '/page'), get('::1', 80, '/page'), get('127.0.0.1', 80, '/missing')[0])
expected = hashlib.sha256(open('/var/www/html/big', 'rb').read()).digest()
def fetch(n):
    connection = connect('127.0.0.1', 80)
    answers = [ask(connection, 'GET', '/big') for _ in range(4)]
    return sum(status == 200 and hashlib.sha256(body).digest() == expected for status, body in answers)
with ThreadPoolExecutor(8) as pool: print(sum(pool.map(fetch, range(8))), 'right')
"#
    ));
    assert_eq!(answers, "(200, b'small\\n') (200, b'small\\n') 404\n32 right\n");
    let users = server.sh("stat -c %U $(grep -lx 'Name:.nginx' /proc/[0-9]*/status) | sort -u");
    assert_eq!(users, "root\nwww-data\n");
    // A new configuration, without a new start.
    server.sh(
        "echo 'server { listen 8080; return 200 reloaded; }' > /etc/nginx/conf.d/more.conf; nginx -s reload",
    );
    let answer = server.python(&format!("{CLIENT}\nprint(get('127.0.0.1', 8080, '/'))"));
    assert_eq!(answer, "(200, b'reloaded')\n");
    server.end("SIGQUIT").expect_code(0);
}

/// What a database said that it wrote is there for the next container of the volume, though the first was killed.
#[test]
fn redis_keeps_its_data_in_a_volume() {
    let volume = Volume::new();
    let options = ["--user", "redis", "--mount", &volume.mount];
    let script = "exec redis-server --dir /data --appendonly yes --appendfsync always --save '' --enable-debug-command local";
    let contents = "redis-cli dbsize; redis-cli get key:777; redis-cli debug digest";
    let mut server = Server::start("redis-first", &options, script);
    server.wait_for("Ready to accept connections");
    let said = server.sh("seq 5000 | sed 's/.*/SET key:& value:&/' | redis-cli --pipe");
    assert!(said.contains("errors: 0, replies: 5000"), "{said}");
    let saved = server.sh(
        "redis-cli bgsave >&2; while redis-cli info persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.2; done; \
         redis-cli info persistence | grep -o rdb_last_bgsave_status:ok",
    );
    assert_eq!(saved, "rdb_last_bgsave_status:ok\n");
    // The results end each line; what goes before is progress.
    let measured = server.sh(
        "redis-benchmark -q -n 1000 -c 10 -t get,incr,lpush | tr '\\r' '\\n' | grep -c 'requests per second'",
    );
    assert_eq!(measured, "3\n");
    let before = server.sh(contents);
    assert!(before.contains("value:777"), "{before}");
    server.end("SIGKILL").expect_code(137);

    let mut server = Server::start("redis-second", &options, script);
    server.wait_for("Ready to accept connections");
    assert_eq!(server.sh(contents), before);
    server.end("SIGTERM").expect_code(0);
}

#[test]
fn postgresql_recovers_its_data_in_a_volume() {
    let volume = Volume::new();
    let options = [
        "--user",
        "postgres",
        "--mount",
        &volume.mount,
        "--env",
        "PATH=/usr/lib/postgresql/17/bin:/usr/bin:/bin",
        "--env",
        "PGHOST=/tmp",
    ];
    let serve = "exec postgres -D /data/db -k /tmp -c shared_buffers=32MB -c max_connections=20 2>&1";
    let ready = "database system is ready to accept connections";
    let sums = "psql -XAtc 'select (select sum(abalance) from pgbench_accounts) = sum(delta), \
                (select sum(tbalance) from pgbench_tellers) = sum(delta), (select sum(bbalance) from pgbench_branches) = sum(delta), \
                count(*) from pgbench_history'";
    let first = format!("initdb -D /data/db -A trust --no-locale -E UTF8 && echo made && {serve}");
    let mut server = Server::start("postgres-first", &options, &first);
    server.wait_for("made");
    server.wait_for(ready);
    server.sh("pgbench -i -q -s 1 2>&1");
    let measured = server.sh("pgbench -n -c 4 -j 2 -t 50 2>&1");
    assert!(
        measured.contains("actually processed: 200/200") && measured.contains("failed transactions: 0 "),
        "{measured}"
    );
    assert_eq!(server.sh(sums), "t|t|t|200\n");
    // Its workers share memory by files in /dev/shm.
    let counted = server.sh(
        "psql -XAtq -c 'set debug_parallel_query = on; set min_parallel_table_scan_size = 0; set parallel_setup_cost = 0' \
         -c 'select count(*) from pgbench_accounts'",
    );
    assert_eq!(counted, "100000\n");
    server.end("SIGKILL").expect_code(137);

    let mut server = Server::start("postgres-second", &options, serve);
    server.wait_for("automatic recovery in progress");
    server.wait_for(ready);
    assert_eq!(server.sh(sums), "t|t|t|200\n");
    let done = server.end("SIGINT").expect_code(0);
    assert!(
        done.out().contains("database system is shut down"),
        "{}",
        done.out()
    );
}

#[test]
fn a_web_server_in_python() {
    let script = r#"
import hashlib, http.server, pathlib, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def answer(self, body):
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_PUT(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        pathlib.Path('/var/tmp' + self.path).write_bytes(body)
        self.answer(hashlib.sha256(body).hexdigest().encode())
    def do_GET(self): self.answer(pathlib.Path('/var/tmp' + self.path).read_bytes())
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer): request_queue_size = 64
def stop(*_):
    print('stopped', flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
server = Server(('', 8000), Handler)
print('listening', flush=True)
server.serve_forever()
"#;
    let mut server = Server::start("python-web", &[], &format!("exec python3 -c \"{script}\""));
    server.wait_for("listening");
    let answers = server.python(&format!(
        r#"{CLIENT}
import os
def exchange(n):
    connection, right = connect('127.0.0.1', 8000), 0
    for length in (0, 1, 4096, 65537, 500000):
        body = os.urandom(length)
        sum = ask(connection, 'PUT', f'/{{n}}', body)[1].decode()
        right += sum == hashlib.sha256(body).hexdigest() and ask(connection, 'GET', f'/{{n}}') == (200, body)
    return right
with ThreadPoolExecutor(16) as pool: print(sum(pool.map(exchange, range(16))), 'right')
"#
    ));
    assert_eq!(answers, "80 right\n");
    let done = server.end("SIGTERM").expect_code(3);
    assert!(done.out().ends_with("stopped\n"), "{}", done.out());
}

#[test]
fn apt_get_installs_and_removes_a_package() {
    let mut server = Server::start(
        "apt-repository",
        &[],
        "exec python3 -u -m http.server --bind 127.0.0.1 --directory /srv/repository 8000 2>&1",
    );
    server.wait_for("Serving HTTP");
    let done = server.sh(
        "rm -f /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] http://127.0.0.1:8000/ ./' > /etc/apt/sources.list; \
         export DEBIAN_FRONTEND=noninteractive; apt-get update >&2; apt-get install -y jq >&2; \
         dpkg --verify jq libjq1 libonig5 | grep -v ' /usr/share/' || :; echo '{\"a\": [1, 2, 39]}' | jq '.a | add'; \
         apt-get remove --purge -y jq >&2; test -e /usr/bin/jq || echo gone",
    );
    assert_eq!(done, "42\ngone\n");
    server.end("SIGKILL").expect_code(137);
}
