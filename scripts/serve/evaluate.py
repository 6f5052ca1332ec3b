"""lmms-eval against a server, dense and with methods: a run folder for each, and one report over all of them.

    bash scripts/serve/eval.sh                       # starts a server on the embedded model and runs this
    python scripts/serve/evaluate.py URL --tasks shapes_video --methods "dense uniform@0.25" --output FOLDER

The server has to run with --trust-request-mm-kwargs and, where tasks have videos, --allowed-local-media-path. The
folders are those of any run of lmms_eval_accelerate; an interrupted series goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys

from lmms_eval_accelerate.manifest import SERVED
from lmms_eval_accelerate.report.__main__ import MARKDOWN, write
from lmms_eval_accelerate.runs.launch import LaunchError, Machines
from lmms_eval_accelerate.runs.options import Parser, documents, path, positive, text
from lmms_eval_accelerate.runs.request import Request, Run
from lmms_eval_accelerate.runs.runner import Runner
from rich.console import Console

from accelerate_methods.registry.settings import settings_of
from accelerate_methods.stages.errors import MethodError


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, with /v1")
    parser.add_argument("--methods", type=text, default="dense uniform@0.25", help="as those of compare")
    parser.add_argument("--tasks", type=text, default="shapes_video")
    parser.add_argument("--limit", type=documents, help="documents per task; default: all")
    parser.add_argument("--frames", type=positive, default=16, help="of a video")
    parser.add_argument("--concurrent", type=positive, default=1, help="requests at a time")
    parser.add_argument("--output", type=path, required=True)
    options = parser.parse_args()
    shared = {"base_url": options.url, "frames": options.frames, "concurrent": options.concurrent}
    console, output = Console(markup=False, emoji=False), options.output.expanduser().resolve()
    try:
        runs = []
        for setting in settings_of(options.methods, 0.25, {}, "hf"):
            method = {} if setting.method is None else {"method": setting.method, **dict(setting.params)}
            request = Request(SERVED, {**shared, **method}, options.tasks, limit=options.limit)
            runs.append(Run(setting.label, output / setting.folder, request.argv()))
        Runner(Machines(), output, None, console).run(runs)
        report = output / "report"
        write([run.output for run in runs], report, "Served models: accuracy and cost", 1000, sys.argv[1:])
    except (MethodError, OSError) as error:
        sys.exit(f"error: {error}")
    except LaunchError as error:
        sys.exit("\n".join([f"error: {error}", *error.tail]))
    print((report / MARKDOWN).read_text(encoding="utf-8"))
    print(f"Runs and report: {output}")


if __name__ == "__main__":
    main()
