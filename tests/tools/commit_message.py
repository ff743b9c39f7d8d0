"""The form of a commit message; git's hook commit-msg runs it: ``commit_message.py FILE``.

Only form is checked. That the subject is an imperative and that the body says why is for the author to see to.
"""

import re
import sys
from pathlib import Path

MAX_SUBJECT = 72

_SCISSORS = re.compile(r"^# -+ >8 -+$", re.MULTILINE)
"""What follows this line is a diff that ``git commit --verbose`` shows and leaves out (git-commit(1))."""

_MADE_BY_GIT = re.compile(r'Merge |Revert "|(fixup|squash|amend)! ')
_START = re.compile(r"[A-Z]|[\w./-]+(, [\w./-]+)*: \S")
_TRAILER = re.compile(r"[\w-]+-by: ")


def problems(message: str) -> list[str]:
    """What is wrong with a message; nothing for those that git words itself, or that a rebase will take in."""
    kept = _SCISSORS.split(message)[0].splitlines()
    lines = "\n".join(line for line in kept if not line.startswith("#")).strip().splitlines()
    subject, *rest = lines or [""]
    if _MADE_BY_GIT.match(subject):
        return []
    body = [line for line in rest if line.strip() and not _TRAILER.match(line)]
    checks = {
        f"the subject has {len(subject)} characters, {MAX_SUBJECT} at most": (
            len(subject) <= MAX_SUBJECT
        ),
        "the subject ends with a full stop": not subject.endswith("."),
        'the subject begins neither with a capital letter nor with "area: "': (
            _START.match(subject) is not None
        ),
        "the second line is not blank": not rest or not rest[0].strip(),
        "there is no body: say why, after a blank line": bool(body),
    }
    return [problem for problem, is_right in checks.items() if not is_right]


def main(path: str) -> int:
    found = problems(Path(path).read_text(encoding="utf-8", errors="replace"))
    for problem in found:
        print(f"commit message: {problem}", file=sys.stderr)
    if found:
        print(f"commit message: kept; correct it with git commit -e -F {path}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
