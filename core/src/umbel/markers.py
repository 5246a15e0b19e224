"""The two markers a plugin needs to take part: ``hookimpl`` to implement, ``hookspec`` to specify."""

from __future__ import annotations

import pluggy

PROJECT = "umbel"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
