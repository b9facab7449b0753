//! Real programs of a Debian system in the microVM.

use crate::containerd::ctr_run;

const DEBIAN: &str = "localhost/debian:13";

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
