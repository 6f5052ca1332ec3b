"""Plugin for the released lmms-eval: models ``<family>_<method>``, their costs, small tasks, a command.

Importing this package imports neither torch nor lmms-eval.
"""

from pathlib import Path

__version__ = "0.1.0"

#: folder with our task YAMLs, for ``--include_path``
TASKS = Path(__file__).resolve().parent / "tasks"
#: the checkout: what is run and written is named relative to it
ROOT = Path(__file__).resolve().parents[2]
#: clips and questions of our tasks, the embedded model
ASSETS = ROOT / "assets"
