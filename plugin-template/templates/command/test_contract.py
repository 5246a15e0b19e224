"""What Umbel wants of a command: ``umbel`` finds it, explains it and runs it."""

import pytest
from click.testing import CliRunner

from umbel.cli.group import root


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "Hello, world!\n"), (["Ada"], "Hello, Ada!\n"), (["Ada", "--shout"], "HELLO, ADA!\n")],
)
def test_umbel_runs_it(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(root, ["{{ cookiecutter.name }}", *arguments])
    assert (done.exit_code, done.output) == (0, said)


def test_umbel_lists_and_explains_it() -> None:
    assert "From {{ cookiecutter.__distribution }}." in CliRunner().invoke(root, ["--help"]).output
    assert "Greet somebody." in CliRunner().invoke(root, ["{{ cookiecutter.name }}", "--help"]).output


def test_a_wrong_call_is_refused() -> None:
    assert CliRunner().invoke(root, ["{{ cookiecutter.name }}", "--whisper"]).exit_code == 2
