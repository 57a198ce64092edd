"""Private and version-dependent names of other libraries, one file per library, each use with its reason.

No file outside this folder uses them, which ``tests/test_compat.py`` checks. So a new release of a library can break only
files of this folder.
"""
