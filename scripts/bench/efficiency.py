"""The same as ``python -m accelerate_methods.bench``; see its --help and docs/efficiency.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accelerate_methods.bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
