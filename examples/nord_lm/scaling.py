"""Run ``studies/language_model/scaling.py``, to which this command has moved; release 0.2.0 removes this file."""

import os
import sys
from pathlib import Path

STUDY = Path(__file__).resolve().parents[2] / "studies" / "language_model" / "scaling.py"

if __name__ == "__main__":
    print("note: this command has moved to studies/language_model/scaling.py", file=sys.stderr)
    os.execv(sys.executable, [sys.executable, str(STUDY), *sys.argv[1:]])
