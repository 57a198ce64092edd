"""Every private or version-bound name of another library, one file a library, each with the reason.

No other file uses a name that its owner calls private; ``tests/test_compat.py`` checks that. What breaks with a new release
of a library therefore breaks here, and is mended here.
"""
