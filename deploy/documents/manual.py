"""nodeagent(8): the options from the command line's own definitions, and what they leave unsaid."""

import argparse
from collections.abc import Iterator

from deploy.documents import roff
from nodeagent.cli import parser
from nodeagent.config import Config
from nodeagent.config_file import DEFAULT_PATH

DESCRIPTION = """\
nodeagent is the container runtime of a Kubernetes node. It serves the Container Runtime Interface (CRI) on a unix
socket and does the work itself: pods, containers, cgroups, images and a bridge network. The kubelet and crictl use that
socket.

Besides the agent, which this command starts, there is a launcher, and one supervisor for each pod. They go on when the
agent ends or is killed, and so do pods; the next agent takes them over.

After SIGTERM or SIGINT the agent ends within 20 seconds. Without a READY pod it removes its launcher, links, nf_tables
tables and cgroups; with one they stay for the next agent.
"""
FAILURE = """\
The command failed, and the reason is on standard error. Of check: something that is needed is missing, or something of
the pod would be refused. Of serve: something was not over 20 seconds after SIGTERM; the log names it.
"""
EXIT_STATUS = (
    ("0", "Success."),
    ("1", FAILURE.strip()),
    ("2", "The command line is wrong."),
)
ENVIRONMENT = (
    (
        "HTTP_PROXY, HTTPS_PROXY, NO_PROXY",
        "Proxies for pulls from registries; read when the agent starts.",
    ),
    ("NOTIFY_SOCKET", "Where the agent reports READY=1 and STOPPING=1 (sd_notify(3))."),
)


def manual() -> str:
    """nodeagent(8)."""
    return "".join(_requests())


def _requests() -> Iterator[str]:
    command = parser()
    verbs = list(_verbs(command, ""))
    yield roff.title("nodeagent", 8, "container runtime of a Kubernetes node")
    yield roff.section("SYNOPSIS")
    yield roff.example(_synopsis(name, verb) for name, verb, _ in verbs)
    yield roff.section("DESCRIPTION")
    yield from map(roff.paragraph, DESCRIPTION.strip().split("\n\n"))
    yield roff.section("COMMANDS")
    for name, verb, meaning in verbs:
        yield roff.subsection(name)
        yield roff.paragraph(_sentence(meaning))
        yield from map(_option, _own(verb))
    yield roff.section("OPTIONS")
    yield roff.paragraph("Before the command:")
    yield from map(_option, _options(command))
    yield roff.paragraph("After every command but version:")
    yield from map(_option, _common(verbs))
    yield roff.section("EXIT STATUS")
    yield from (roff.item(*each) for each in EXIT_STATUS)
    yield roff.section("ENVIRONMENT")
    yield from (roff.item(*each) for each in ENVIRONMENT)
    yield roff.section("FILES")
    yield from (roff.item(*each) for each in _files())
    yield roff.section("SEE ALSO")
    yield roff.paragraph("nodeagent.toml(5), docs/operations.md, docs/kubelet.md")


def _files() -> Iterator[tuple[str, str]]:
    defaults = Config()
    yield str(DEFAULT_PATH), "Configuration, nodeagent.toml(5)."
    yield (
        f"{defaults.certs_dir}/<host>/hosts.toml",
        "Servers, mirrors and certificates of a registry.",
    )
    yield defaults.root, "Persistent data: images, containers, database."
    yield defaults.state, "Runtime state, gone after a reboot: sockets, exit records, launcher.log."


Verb = tuple[str, argparse.ArgumentParser, str]


def _verbs(command: argparse.ArgumentParser, prefix: str) -> Iterator[Verb]:
    """Every command with its parser and its meaning; one with commands of its own is those."""
    for action in command._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        meanings = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, verb in action.choices.items():
            below = list(_verbs(verb, f"{prefix}{name} "))
            yield from below or [(f"{prefix}{name}", verb, meanings[name])]


def _options(command: argparse.ArgumentParser) -> list[argparse.Action]:
    kinds = (argparse._SubParsersAction, argparse._HelpAction)
    return [action for action in command._actions if not isinstance(action, kinds)]


def _common(verbs: list[Verb]) -> list[argparse.Action]:
    """Those that the first command shares with the others."""
    shared = set.intersection(*(set(map(_term, _options(v))) for _, v, _ in verbs if _options(v)))
    return [action for action in _options(verbs[0][1]) if _term(action) in shared]


def _own(verb: argparse.ArgumentParser) -> list[argparse.Action]:
    common = set(map(_term, _common(list(_verbs(parser(), "")))))
    return [action for action in _options(verb) if _term(action) not in common]


def _synopsis(name: str, verb: argparse.ArgumentParser) -> str:
    terms = [f"[{_term(a)}]" if a.option_strings else _term(a) for a in _own(verb)]
    options = ["[OPTION]..."] if _options(verb) else []
    return " ".join(["nodeagent", name, *options, *terms])


def _option(action: argparse.Action) -> str:
    return roff.item(_term(action), _sentence(action.help or ""))


def _term(action: argparse.Action) -> str:
    value = f" {action.metavar}" if action.metavar else ""
    return (
        f"{', '.join(action.option_strings)}{value}{'...' if action.nargs == '+' else ''}".strip()
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
