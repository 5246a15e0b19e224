"""The distribution is installed, and Umbel finds the plugin by its name."""

import subprocess
import sys
from importlib.metadata import entry_points

from {{ cookiecutter.__package }}.{{ cookiecutter.port }} import {{ cookiecutter.__object }}


def test_the_plugin_is_installed() -> None:
    (point,) = entry_points(group="{{ cookiecutter.__group }}", name="{{ cookiecutter.name }}")
    assert point.dist is not None
    assert point.dist.name == "{{ cookiecutter.__distribution }}"
    assert point.load() is {{ cookiecutter.__object }}


def test_umbel_finds_nothing_wrong_with_it() -> None:
    command = [sys.executable, "-m", "umbel", "plugins", "check", "{{ cookiecutter.name }}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "nothing is wrong with {{ cookiecutter.name }}\n"), done.stderr
