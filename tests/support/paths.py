"""Where things lie that the tests read."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN, FIXTURES = TESTS / "golden", TESTS / "fixtures"
CHECKPOINTS = GOLDEN / "checkpoints"
