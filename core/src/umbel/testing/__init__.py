"""What a plugin's author tests with. Needs the extra ``umbel-core[testing]``; nothing at run time imports it.

``umbel.testing.contracts`` holds the laws of each port.
"""

import sys

if "pytest" in sys.modules:  # else this is a child of a pool under test, which must start quickly
    import pytest

    pytest.register_assert_rewrite("umbel.testing.contracts")
