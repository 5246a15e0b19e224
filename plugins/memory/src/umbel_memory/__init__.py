"""In-process transport and result store of Umbel: the official test double."""
