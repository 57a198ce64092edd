"""Private and version-dependent names of other libraries, one file per library, each use with its reason.

No other file uses private names of other libraries; ``tests/test_compat.py`` checks that. So a new release of a library can
break the files of this folder only.
"""
