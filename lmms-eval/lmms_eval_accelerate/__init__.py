"""Plugin for the released lmms-eval: models ``<family>_<method>``, their costs, small tasks, a command.

Importing this package imports neither torch nor lmms-eval.
"""

from pathlib import Path

__version__ = "0.1.0"

#: folder with our task YAMLs, for ``--include_path``
TASKS = Path(__file__).resolve().parent / "tasks"
