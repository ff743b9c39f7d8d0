"""AppArmor: which profiles the kernel has, and loading the default one.

The default profile is the file `nodeagent-default.apparmor` beside this module. AppArmor's own parser compiles and
loads it when the agent starts, and again if somebody has unloaded it by the time that a container needs it. A profile
of this name that is loaded already is left alone: an agent that ran before or the administrator loaded it.
"""

import logging
import shutil
import subprocess
import threading
from pathlib import Path

from nodeagent.errors import FailedPrecondition

log = logging.getLogger(__name__)

NAME = "nodeagent-default"
ENABLED = Path("/sys/module/apparmor/parameters/enabled")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
# The ABI keeps newer kernels from mediating what the profile's author could not know of (apparmor.d(5), "Feature ABI").
ABI = Path("/etc/apparmor.d/abi/3.0")
PARSER = "apparmor_parser"
PARSER_SECONDS = 30

_loading = threading.Lock()  # the parser runs once, however many containers wait for the profile


def is_enabled() -> bool:
    try:
        return ENABLED.read_text().startswith("Y")
    except OSError:
        return False


def is_loaded(name: str) -> bool:
    try:
        return any(line.startswith(f"{name} (") for line in PROFILES.read_text().splitlines())
    except OSError:
        return False


def has_default() -> bool:
    """Whether containers that name no profile get the default one: it is loaded, or can be."""
    return is_enabled() and (is_loaded(NAME) or has_parser())


def has_parser() -> bool:
    return shutil.which(PARSER) is not None


def prepare() -> None:
    """Load the default profile, or log why there is none. For the agent's start."""
    if not is_enabled():
        return
    try:
        ensure_default()
    except FailedPrecondition as error:
        log.warning("%s", error)


def ensure_default() -> None:
    """Load the default profile unless it is loaded; this can take a part of a second.

    Raises FailedPrecondition without a parser, and where the parser or the kernel refuses.
    """
    with _loading:
        if is_loaded(NAME):
            return
        if not has_parser():
            raise FailedPrecondition(
                f'AppArmor profile "{NAME}": not loaded, because {PARSER} is not installed; install it: '
                "until then, containers that name no profile run without one"
            )
        _load(text())


def text() -> str:
    """The default profile, in the form that this node's parser expects."""
    profile = Path(__file__).with_name(f"{NAME}.apparmor").read_text()
    return f"abi <abi/{ABI.name}>,\n{profile}" if ABI.exists() else profile


def _load(profile: str) -> None:
    try:
        # --replace also loads a profile that is not there; --add fails where another agent was faster.
        subprocess.run(
            [PARSER, "--skip-cache", "--replace"],
            input=profile,
            text=True,
            capture_output=True,
            timeout=PARSER_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        raise FailedPrecondition(f'AppArmor profile "{NAME}": not loaded: {reason}') from error
