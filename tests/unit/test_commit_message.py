"""The check of commit messages: what it refuses, and that the hook runs it."""

from pathlib import Path

import pytest
import yaml

from tests.tools import commit_message

BODY = "\n\nA reader of the log learns why.\n"

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "message",
    [
        "Part probes from the doctor" + BODY,
        "net: name the route that is in the way" + BODY,
        "cri, metrics: call a pod a pod" + BODY,
        "docs/design.md: draw the sequence" + BODY,
        "# a comment of git's\nCap a supervisor's memory" + BODY,
        "C" * commit_message.MAX_SUBJECT + BODY,
        "Merge branch 'main' into work",
        'Revert "Part probes from the doctor, and much more that makes this line too long"',
        "fixup! net: name the route that is in the way",
    ],
)
def test_a_message_in_form(message: str) -> None:
    assert commit_message.problems(message) == []


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("C" * (commit_message.MAX_SUBJECT + 1) + BODY, "has 73 characters"),
        ("Part probes from the doctor." + BODY, "full stop"),
        ("part probes from the doctor" + BODY, "capital letter"),
        ("net:name the route" + BODY, "capital letter"),
        ("Part probes\nfrom the doctor", "second line"),
        ("Part probes from the doctor\n", "no body"),
        ("Part probes from the doctor\n\nSigned-off-by: A <a@example.com>\n", "no body"),
        ("Part probes\n\n# a comment\n", "no body"),
        ("Part probes\n# ------------------------ >8 ------------------------\n\ndiff", "no body"),
        ("", "capital letter"),
    ],
)
def test_a_message_out_of_form(message: str, problem: str) -> None:
    assert any(problem in found for found in commit_message.problems(message))


def test_the_author_is_told_what_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "COMMIT_EDITMSG"
    path.write_text("Part probes from the doctor\n")
    assert commit_message.main(str(path)) == 1
    assert "there is no body" in (told := capsys.readouterr().err)
    assert f"git commit -e -F {path}" in told
    path.write_text("Part probes from the doctor" + BODY)
    assert commit_message.main(str(path)) == 0


def test_the_hook_runs_it_on_messages_only() -> None:
    config = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    assert set(config["default_install_hook_types"]) == {"pre-commit", "commit-msg"}
    (hook,) = (h for h in config["repos"][0]["hooks"] if h.get("stages") == ["commit-msg"])
    assert (PROJECT / hook["entry"].split()[1]).samefile(str(commit_message.__file__))
    assert config["default_stages"] == ["pre-commit"]
