"""The command line: serve, check, config, image load, image ls, version."""

import argparse
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

from nodeagent import config_file, config_reference, control, files
from nodeagent.config import Config
from nodeagent.errors import NodeAgentError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 with the reason on stderr; 2 for a wrong command line."""
    options = parser().parse_args(arguments)
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


def parser() -> argparse.ArgumentParser:
    """The command line; nodeagent(8) is made from it as well."""
    made = argparse.ArgumentParser(
        prog="nodeagent",
        description="The container runtime of a Kubernetes node, which serves the CRI.",
    )
    made.add_argument(
        "--debug", action="store_true", help="log at level debug, whatever the configuration says"
    )
    verbs = made.add_subparsers(required=True, metavar="COMMAND")
    common = _common_options()
    _add_serve(verbs.add_parser("serve", parents=[common], help="run the agent"))
    _add_check(
        verbs.add_parser(
            "check", parents=[common], help="report what this machine offers and what is missing"
        )
    )
    _add_config(
        verbs.add_parser(
            "config", parents=[common], help="print the effective configuration as TOML"
        )
    )
    images = verbs.add_parser("image", help="load and list images").add_subparsers(
        required=True, metavar="COMMAND"
    )
    load = images.add_parser(
        "load", parents=[common], help="load images from an OCI layout or a docker archive"
    )
    load.add_argument("file", metavar="FILE|-", help="tar file, or - for standard input")
    load.set_defaults(run=_load)
    images.add_parser("ls", parents=[common], help="list the images of the node").set_defaults(
        run=_list
    )
    verbs.add_parser("version", help="print the version").set_defaults(run=_version)
    return made


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"configuration file, instead of {config_file.DEFAULT_PATH}",
    )
    common.add_argument(
        "--root", metavar="DIR", help="persistent data: images, containers, database"
    )
    common.add_argument(
        "--state", metavar="DIR", help="runtime state, gone after a reboot: sockets, exit records"
    )
    return common


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--listen", metavar="unix:///PATH", help="socket of the CRI")
    serve.add_argument(
        "--metrics", metavar="ADDR:PORT", help="Prometheus endpoint, http://ADDR:PORT/metrics"
    )
    serve.add_argument(
        "--streaming", metavar="ADDR:PORT", help="server for exec, attach and port-forward"
    )
    serve.add_argument(
        "--certs-dir", metavar="DIR", help="registry settings, DIR/<host>/hosts.toml"
    )
    serve.set_defaults(run=_serve)


def _add_check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--pod",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="report instead what this node would refuse or skip of a pod, described in JSON: crictl's files of "
        'a sandbox and its containers, or one {"sandbox": …, "containers": […]}',
    )
    verb.add_argument(
        "--data",
        action="store_true",
        help="verify instead the database, blobs, layers and profiles, and name what is damaged; an agent may run",
    )
    verb.add_argument(
        "--repair",
        action="store_true",
        help="the same, and set aside what is damaged, so that the next pull fetches it again; no agent may run",
    )
    verb.set_defaults(run=_check)


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--defaults",
        action="store_true",
        help="print instead every setting with its meaning and default, commented out: a file to start from",
    )
    verb.set_defaults(run=_config)


def _configuration(options: argparse.Namespace) -> Config:
    overrides: dict[str, object] = {
        name: value
        for name in ("root", "state", "listen", "metrics", "certs_dir")
        if (value := getattr(options, name, None)) is not None
    }
    if getattr(options, "streaming", None) is not None:
        overrides["streaming"] = {"address": options.streaming}
    return config_file.load(options.config, overrides)


def _serve(options: argparse.Namespace) -> int:
    from nodeagent import agent  # gRPC takes 0.1 s to import, which the other verbs need not wait

    config = _configuration(options)
    logging.getLogger("nodeagent").setLevel("DEBUG" if options.debug else config.log.level.upper())
    agent.run(config)
    return 0


def _check(options: argparse.Namespace) -> int:
    if options.pod:
        return _check_pod(options)
    if options.data or options.repair:
        return _check_data(options)
    import asyncio  # a tenth of a second, with what check imports, which the other verbs need not wait for

    from nodeagent import check

    features = asyncio.run(check.features(_configuration(options)))
    for feature in features:
        print(feature)
    return 0 if all(feature.present for feature in features if feature.needed) else 1


def _check_data(options: argparse.Namespace) -> int:
    """Exit status 1 where damage is left."""
    from nodeagent import repair

    config = _configuration(options)
    report = repair.repair(config) if options.repair else repair.look(config)
    for finding in report.findings:
        print(finding)
    print(report)
    return 1 if report.left else 0


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
        print(config_reference.commented_defaults(), end="")
    else:
        print(config_file.dumps(_configuration(options)), end="")
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
