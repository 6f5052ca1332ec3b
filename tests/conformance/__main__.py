"""``python -m tests.conformance DIR``: run golden vectors against the implementation. See runner.py."""

import sys

from .runner import main

sys.exit(main())
