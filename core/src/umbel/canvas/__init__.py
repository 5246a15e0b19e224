"""Signatures: a task's call as a value. Chains, groups and chords build on them."""
