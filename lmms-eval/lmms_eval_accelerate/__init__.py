"""Plugin for the released lmms-eval: models ``<family>_<method>``, their costs, small tasks, a command.

Importing this package imports neither torch nor lmms-eval.
"""

from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "assets").is_dir()  # a wheel carries them in the package, see lmms-eval/setup.py

#: folder with our task YAMLs, for ``--include_path``
TASKS = _PACKAGE / "tasks"
#: what files of the project are named relative to: the checkout, or the installed package
ROOT = _PACKAGE if _INSTALLED else _PACKAGE.parents[1]
#: clips and questions of our tasks, the embedded model
ASSETS = ROOT / "assets"
#: below which results are written where nothing else is said: the checkout, or the working directory
WORK = Path.cwd() if _INSTALLED else ROOT
