"""The command line: serve, check, config, image load, image ls, version."""

import argparse
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

from nodeagent import check, control, files
from nodeagent import config as configuration
from nodeagent.config import Config
from nodeagent.errors import NodeAgentError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 with the reason on stderr; 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    os.umask(files.UMASK)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(options.run(options))
    except NodeAgentError as error:
        print(f"nodeagent: {error}", file=sys.stderr)
    except OSError as error:
        print(f"nodeagent: {_described(error)}", file=sys.stderr)
    return 1


def _described(error: OSError) -> str:
    """Path and reason, without the number that `str` begins with, and what to do where that is known."""
    names = (error.filename, error.filename2)
    paths = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    text = ": ".join((*paths, error.strerror or str(error)))
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        text += "; nodeagent has to run as root"
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nodeagent", description="The container runtime of a node."
    )
    parser.add_argument("--debug", action="store_true", help="log more")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, metavar="FILE", help=f"default: {configuration.DEFAULT_PATH}"
    )
    common.add_argument("--root", metavar="DIR", help="what stays over a reboot")
    common.add_argument("--state", metavar="DIR", help="what does not")

    serve = verbs.add_parser("serve", parents=[common], help="serve the CRI")
    serve.add_argument("--listen", metavar="unix:///PATH", help="the CRI socket")
    serve.add_argument("--metrics", metavar="ADDR:PORT", help="Prometheus metrics over HTTP")
    serve.add_argument("--streaming", metavar="ADDR:PORT", help="exec, attach and port-forward")
    serve.add_argument("--certs-dir", metavar="DIR", help="registry hosts: DIR/<host>/hosts.toml")
    serve.set_defaults(run=_serve)

    verb = verbs.add_parser("check", parents=[common], help="what this machine offers")
    verb.add_argument(
        "--pod",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="instead, what this node would refuse or skip of a pod: JSON of a sandbox and of containers, "
        'as crictl takes them, or {"sandbox": …, "containers": […]}',
    )
    verb.set_defaults(run=_check)
    verb = verbs.add_parser("config", parents=[common], help="print the effective configuration")
    verb.add_argument(
        "--defaults",
        action="store_true",
        help="print every setting with its meaning and default instead, commented out: a file to begin with",
    )
    verb.set_defaults(run=_config)
    images = verbs.add_parser("image", help="load and list images").add_subparsers(required=True)
    load = images.add_parser("load", parents=[common], help="load an OCI layout or docker archive")
    load.add_argument("file", metavar="FILE|-", help="a tar file, or - for standard input")
    load.set_defaults(run=_load)
    images.add_parser("ls", parents=[common], help="list images").set_defaults(run=_list)
    verbs.add_parser("version", help="print the version").set_defaults(run=_version)
    return parser


def _configuration(options: argparse.Namespace) -> Config:
    overrides: dict[str, object] = {
        name: value
        for name in ("root", "state", "listen", "metrics", "certs_dir")
        if (value := getattr(options, name, None)) is not None
    }
    if getattr(options, "streaming", None) is not None:
        overrides["streaming"] = {"address": options.streaming}
    return configuration.load(options.config, overrides)


def _serve(options: argparse.Namespace) -> int:
    from nodeagent import agent  # gRPC takes 0.1 s to import, which the other verbs need not wait

    config = _configuration(options)
    logging.getLogger("nodeagent").setLevel("DEBUG" if options.debug else config.log.level.upper())
    agent.run(config)
    return 0


def _check(options: argparse.Namespace) -> int:
    if options.pod:
        return _check_pod(options)
    features = check.features(_configuration(options))
    for feature in features:
        print(feature)
    return 0 if all(feature.present for feature in features if feature.needed) else 1


def _check_pod(options: argparse.Namespace) -> int:
    """Exit status 1 where something is refused."""
    from nodeagent.cri import examination  # with protobuf, which the other verbs need not wait for

    findings = examination.examine(_configuration(options), examination.load(options.pod))
    for finding in findings:
        print(finding)
    refused = sum(finding.outcome == "refused" for finding in findings)
    print("nothing is refused" if not refused else f"{refused} refused")
    return 1 if refused else 0


def _config(options: argparse.Namespace) -> int:
    if options.defaults:
        print(configuration.commented_defaults(), end="")
    else:
        print(configuration.dumps(_configuration(options)), end="")
    return 0


def _load(options: argparse.Namespace) -> int:
    for name in control.load(_configuration(options), options.file):
        print(f"loaded {name}")
    return 0


def _list(options: argparse.Namespace) -> int:
    for line in control.list_images(_configuration(options)):
        print(line)
    return 0


def _version(_: argparse.Namespace) -> int:
    print(version("nodeagent"))
    return 0
