"""``python -m tests.conformance DIR``: run golden vectors against the implementation. See runner.py."""

import sys

from tests.conformance.runner import main

sys.exit(main())
