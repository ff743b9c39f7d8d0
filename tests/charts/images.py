"""The images of the charts: ours in the place of theirs, with what theirs say of users and volumes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

from tests.charts.chart import Json, charts, exec_commands
from tests.support import images
from tests.support.images import PATH, Image, Layer, Tree

# Serves TCP ports, each request with "ok", and UDP ports, each datagram with itself. It says so, and ends on SIGTERM,
# and on systemd's signal to halt.
STAND_IN = r"""
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static const char answer[] = "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nok\n";

static void leave(int number) { (void)number; write(1, "terminated\n", 11); _exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, 0, WNOHANG) > 0) ; }

static int serve(const char *argument, int datagrams)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(atoi(argument)) };
	int one = 1, listener = socket(AF_INET, datagrams ? SOCK_DGRAM : SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (void *)&address, sizeof address) || (!datagrams && listen(listener, 16))) {
		perror(argument);
		exit(1);
	}
	return listener;
}

int main(int count, char **arguments)
{
	static struct pollfd polled[64];
	static int datagrams[64];
	char data[4096];
	signal(SIGTERM, leave);
	signal(SIGRTMIN + 3, leave);
	signal(SIGCHLD, reap);
	signal(SIGPIPE, SIG_IGN);
	for (int i = 1; i < count; i++) {
		datagrams[i] = strstr(arguments[i], "/udp") != NULL;
		polled[i].fd = serve(arguments[i], datagrams[i]);
		polled[i].events = POLLIN;
	}
	polled[0].fd = -1;
	printf("serving %d ports\n", count - 1);
	fflush(stdout);
	for (;;) {
		if (poll(polled, count, -1) < 0)
			continue;
		for (int i = 1; i < count; i++) {
			struct sockaddr_in peer;
			socklen_t length = sizeof peer;
			if (!(polled[i].revents & POLLIN))
				continue;
			if (datagrams[i]) {
				ssize_t size = recvfrom(polled[i].fd, data, sizeof data, 0, (void *)&peer, &length);
				if (size >= 0)
					sendto(polled[i].fd, data, size, 0, (void *)&peer, length);
				continue;
			}
			int connection = accept(polled[i].fd, NULL, NULL);
			if (connection < 0)
				continue;
			read(connection, data, sizeof data);
			write(connection, answer, sizeof answer - 1);
			close(connection);
		}
	}
}
"""

# security.capability, version 2: cap_net_bind_service=ep, as CoreDNS has it
NET_BIND_SERVICE = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
USERS = (
    "vault:x:100:1000:vault:/home/vault:/bin/sh\n"
    "nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n"
)
GROUPS = "vault:x:1000:\nnonroot:x:65532:\n"

# What the kubelet executes in a container says what it was asked to do.
COMMAND = '#!/bin/sh\necho "${0##*/} $*"\n'


# As systemd's own units: what the first target has, and what systemd's signal to halt starts.
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = {
    "default.target": "[Unit]\nDefaultDependencies=no\nWants=job.service\n",
    "job.service": """[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/sh -c 'cat /proc/self/cgroup > /run/job; exec /stand-in'
StandardOutput=tty
TTYPath=/dev/console
""",
    "halt.target": "[Unit]\nDefaultDependencies=no\nConflicts=job.service\nWants=exit.service\n",
    "exit.service": """[Unit]
DefaultDependencies=no
After=job.service
SuccessAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/true
""",
}


def reference(given: Json) -> str:
    """The name of the image of a container with these facts in it."""
    facts = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]
    return f"charts.example/stand-in:{facts}"


def catalog() -> Iterable[Image]:
    """One image for each set of facts that the charts have; all have the same layers."""
    layers = (images.busybox().layers[0], _programs())
    facts = {
        reference(container.get("image", {})): container.get("image", {})
        for chart in charts()
        for container in chart.all_containers
    }
    for name, given in facts.items():
        if given.get("systemd") and not SYSTEMD.exists():
            continue
        repository, _, tag = name.rpartition(":")
        config = {
            "Env": [PATH],
            "Entrypoint": ["/stand-in"],
            "User": given.get("User", ""),
            "Volumes": {path: {} for path in given.get("Volumes", ())},
            "StopSignal": given.get("StopSignal", ""),
        }
        more = (_systemd(),) if given.get("systemd") else ()
        yield Image(repository, (tag,), (*layers, *more), config)


def write_archive(path: Path) -> None:
    """All of them in one OCI image layout."""
    tree = Tree().file("oci-layout", images.encode({"imageLayoutVersion": "1.0.0"}))
    entries = []
    for image in catalog():
        top, media_type = image.top()
        for blob in (*image.blobs(), *image.manifests(), top):
            tree.file("blobs/" + images.digest(blob).replace(":", "/"), blob)
        name = f"{image.repository}:{image.tags[0]}"
        annotations = {"org.opencontainers.image.ref.name": name}
        entries.append(images.descriptor(top, media_type) | {"annotations": annotations})
    tree.file("index.json", images.encode({"schemaVersion": 2, "manifests": entries}))
    path.write_bytes(tree.tar())


def _programs() -> Layer:
    stand_in = images.compiled(STAND_IN)
    tree = Tree().file("stand-in", stand_in, 0o755)
    tree.capable("stand-in-below-1024", stand_in, NET_BIND_SERVICE)
    tree.file("etc/passwd", images.PASSWD + USERS).file("etc/group", images.GROUP + GROUPS)
    tree.directory("var/lib/docker", 0o710)
    for chart in charts():
        for container in chart.all_containers:
            for program, *_ in exec_commands(container):
                path = program.strip("/") if program.startswith("/") else f"usr/bin/{program}"
                tree.file(path, COMMAND, 0o755)
    return images.layer(tree)


def _systemd() -> Layer:
    """This machine's, with two units of ours."""
    tree = Tree()
    for program in (SYSTEMD, SYSTEMD.parent / "systemd-shutdown", Path("/bin/systemctl")):
        tree.program(str(program)[1:], program)
    for name, text in UNITS.items():
        tree.file(f"etc/systemd/system/{name}", text)
    return images.layer(tree)
