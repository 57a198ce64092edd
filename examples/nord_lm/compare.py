"""Moved to ``studies/language_model/compare.py``; this command stays for one release."""

import os
import sys
from pathlib import Path

STUDY = Path(__file__).resolve().parents[2] / "studies" / "language_model" / "compare.py"

if __name__ == "__main__":
    print("note: this command is studies/language_model/compare.py now", file=sys.stderr)
    os.execv(sys.executable, [sys.executable, str(STUDY), *sys.argv[1:]])
