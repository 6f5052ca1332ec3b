"""Write every file of the project that is made from something else, or tell which are stale.

    python scripts/generate            # write them
    python scripts/generate --check    # list what is stale and exit with 1; changes nothing

Every module beside this one with a function ``files()`` is a generator. It returns the whole new content of each of its
files by its path relative to the project's folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: in the first lines of a file that nobody should edit
MARK = "Made by `python scripts/generate`"
#: where files with that mark may lie; one that no generator makes any more is stale
MARKED = ("scripts/eval/*.sh", "docs/**/*.md", "configs/models/*.yaml")


def generated() -> dict[Path, str]:
    """Path relative to the project's folder -> content, from all generators."""
    out: dict[Path, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name == "__main__.py":
            continue
        spec = importlib.util.spec_from_file_location(f"generate_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, content in module.files().items() if hasattr(module, "files") else ():
            if name in out:
                raise SystemExit(f"error: {path.name} makes {name}, which another generator makes, too.")
            out[name] = content
    return out


def leftovers(wanted: dict[Path, str], root: Path) -> list[Path]:
    """Files with the mark that no generator makes."""
    found = (path for pattern in MARKED for path in root.glob(pattern))
    names = (path.relative_to(root) for path in found if MARK in path.read_text(encoding="utf-8")[:600])
    return sorted(name for name in names if name not in wanted)


def stale(wanted: dict[Path, str], root: Path) -> list[Path]:
    """Files that are missing or differ."""
    return sorted(name for name, content in wanted.items() if _text(root / name) != content)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python scripts/generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="list stale files and exit with 1; change nothing")
    args = parser.parse_args(argv)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
    wanted = generated()
    changed, gone = stale(wanted, root), leftovers(wanted, root)
    if args.check:
        for name in changed:
            print(f"stale: {name}")
        for name in gone:
            print(f"no longer made: {name}")
        if changed or gone:
            print("run: python scripts/generate")
        return int(bool(changed or gone))
    for name in changed:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(wanted[name], encoding="utf-8")
        if name.suffix == ".sh":
            target.chmod(0o755)
        print(f"written: {name}")
    for name in gone:
        (root / name).unlink()
        print(f"removed: {name}")
    print(f"{len(wanted)} files, {len(changed)} written, {len(gone)} removed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
