"""In-process transport and result store of Umbel: the official test double."""

from umbel_memory.shared import forget_all

__all__ = ["forget_all"]
