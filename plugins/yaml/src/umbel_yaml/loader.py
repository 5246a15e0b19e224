"""Reading YAML with every growth bounded: depth, aliases, tags, numbers.

libyaml scans and parses where PyYAML was built with it. Its own composer is not used: it recurses without a bound, and
shows nothing until the whole document is there.
"""

from __future__ import annotations

from typing import Any, Final

import yaml

from umbel.errors import DecodeError

from umbel_yaml._pyyaml import Base

_INT: Final = "tag:yaml.org,2002:int"
_ALIASED: Final = 1_000_000
"""What aliases may repeat in any case, in characters; and as much again as the document is long."""
_INT_LENGTH: Final = 4300
"""The interpreter's own bound on decimal integers. Base 60 has none, and takes quadratic time."""
_KEY_LENGTH: Final = 20
"""64 bits in decimal. Beyond them, integers of one hash are made at will, and a dict of such keys takes quadratic time."""
