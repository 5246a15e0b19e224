"""Refuse a name that could not serve everywhere, before anything is written."""

import re
import sys

name = "{{ cookiecutter.name }}"

if not re.fullmatch("[a-z][a-z0-9]*", name) or name in ("core", "testing"):
    sys.exit(f"name is {name!r}: it must be one word of lower-case letters and digits, and not core or testing")
