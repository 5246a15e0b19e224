"""Settings: ``schema`` says what there is, ``sources`` reads and merges, ``structure`` checks and explains.

``umbel.settings.sources.load`` is the way in. Importing this package imports none of the three.
"""
