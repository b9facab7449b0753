//! Published ports: a server in a container, asked from all sides.

use super::{BUSYBOX, Container, PROGRAMS, begin, docker_ok, foreground, on_host};
use crate::case::Runtime;

/// Sends back each datagram.
const UDP: &str = "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 5300))
while True:
    data, peer = s.recvfrom(65536)
    s.sendto(data[::-1], peer)";

#[test]
fn nginx() {
    let census = begin();
    let script = format!(
        "cd /var/www/html; echo page >page; head -c 8000000 /dev/urandom >big; python3 -c \"{UDP}\" & \
         exec nginx -g 'daemon off;'"
    );
    let options = ["-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "5300:5300/udp"];
    let web = Container::start(Runtime::Husk, "web", &options, PROGRAMS, &["sh", "-c", &script]);
    let shown = docker_ok(&["port", "web"]);
    for line in [
        "80/tcp -> 0.0.0.0:8080",
        "80/tcp -> 127.0.0.1:8081",
        "5300/udp -> 0.0.0.0:5300",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let get = "curl -sS -m 60 -g --retry 240 --retry-delay 1 --retry-all-errors";
    for address in [
        "127.0.0.1:8080",
        "[::1]:8080",
        "127.0.0.1:8081",
        "172.17.0.1:8080",
    ] {
        assert_eq!(
            on_host(&format!("{get} http://{address}/page")),
            "page\n",
            "{address}"
        );
    }
    let sum = web.sh("sha256sum </var/www/html/big");
    assert_eq!(
        on_host(&format!("{get} http://127.0.0.1:8080/big | sha256sum")),
        sum
    );
    let many = format!("seq 40 | xargs -P 20 -I{{}} {get} http://127.0.0.1:8080/page | sort | uniq -c");
    assert_eq!(on_host(&many).trim(), "40 page");
    let echoed = on_host("printf abc | socat -t 20 -T 20 - UDP4:127.0.0.1:5300,shut-none | head -c 3");
    assert_eq!(echoed, "cba");
    // From another container: by its address, and by the host's.
    let address = web.inspect("{{.NetworkSettings.Networks.bridge.IPAddress}}");
    let script = format!(
        "wget -q -T 60 -O - http://{address}/page; wget -q -T 60 -O - http://172.17.0.1:8080/page; \
         wget -q -T 60 -O - http://{address}/big | sha256sum"
    );
    let done = foreground(&[], BUSYBOX, &["sh", "-ec", &script]).expect_code(0);
    assert_eq!(done.out(), format!("page\npage\n{sum}"));
    // nginx ends in order when Docker stops it.
    docker_ok(&["stop", "-t", "60", "web"]);
    assert_eq!(web.inspect("{{.State.ExitCode}}"), "0");
    web.remove();
    census.assert_unchanged();
}
