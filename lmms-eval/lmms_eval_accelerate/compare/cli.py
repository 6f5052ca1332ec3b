"""Run the dense model and methods one after the other through the lmms-eval command line, and compare them.

The weights are loaded once; every setting is a run of its own with its own output folder, and a failure names it. The
same ``--output`` goes on where an interrupted comparison stopped. Ends with a table, ``comparison.json`` /
``comparison.md`` and two pictures. ``--dry-run`` prints the commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import accelerate_methods
from accelerate_methods.registry.configs import CONFIG_DIR, read_config
from accelerate_methods.registry.settings import Setting, has_budget, settings_of
from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import ASSETS, ROOT
from lmms_eval_accelerate.compare import table as comparison
from lmms_eval_accelerate.models.arguments import COMMON, HF
from lmms_eval_accelerate.runs.fingerprint import checkpoint_facts, code_hash, versions
from lmms_eval_accelerate.runs.launch import LaunchError, Machines, Run, default_processes, execute, shell_prefix

EMBEDDED = ASSETS / "tiny-llava-onevision"
#: with --pretrained: tasks of the methods' papers
TASKS_OF_FAMILY = {"llava": "gqa,mme,pope", "llava_onevision": "videomme", "llava_video": "videomme", "hf": "videomme"}
EMBEDDED_FAMILY = "llava_onevision"
EMBEDDED_ARGS = {"max_frames_num": 16, "save_provenance": 4}
EMBEDDED_CONFIG = "embedded"  # configs/<method>/embedded.yaml: where a method's own values do not fit a tiny model
PLANNED = "comparison_plan.json"
EMBEDDED_METHODS = "dense {method}@0.25 {method} {method}@0.05 random@0.25 random@0.1"
EMBEDDED_METHODS_FIXED = "dense {method} random@0.25 random@0.1"  # a method whose budget follows from its parameters


@dataclasses.dataclass
class Plan:
    """Everything the runs share."""

    family: str
    config: str
    pretrained: str
    tasks: str
    output: Path
    model_args: dict[str, Any]
    limit: str | None
    batch_size: str
    machines: Machines

    def run(self, setting: Setting) -> Run:
        """What lmms-eval-accelerate is asked for one setting."""
        arguments = {"pretrained": self.pretrained, **self.model_args}
        if setting.method is not None:
            config = self.config_of(setting.method)
            if config is None:
                arguments["method"] = setting.method
            else:
                arguments |= {"config": config, **self._not_from(config)}
            arguments |= dict(setting.params)
        argv = [
            *("--model", f"{self.family}_accelerated"),
            *("--model_args", ",".join(f"{k}={_text(v)}" for k, v in arguments.items())),
            *("--tasks", self.tasks),
            *("--batch_size", self.batch_size),
            *(("--limit", self.limit) if self.limit else ()),
        ]
        return Run(setting.label, self.output / setting.folder, tuple(argv))

    def _not_from(self, config: str) -> dict[str, Any]:
        """Arguments that only the config of another method sets: back to their defaults, all runs share one setting."""
        if self.family != "hf" or config == self.config:
            return {}
        own = {"family", "pretrained", *self.model_args}
        return {key: {**COMMON, **HF}[key] for key in read_config(config)["model"] if key not in own}

    def config_of(self, method: str) -> str | None:
        """The config that holds a method's parameters for this model, or None: then its defaults."""
        model = Path(self.config).name
        names = [EMBEDDED_CONFIG, model, EMBEDDED_FAMILY] if self.pretrained == str(EMBEDDED) else [model]
        paths = {name: CONFIG_DIR / method / f"{name}.yaml" for name in names}
        fit = [n for n, path in paths.items() if path.is_file() and read_config(path)["model"]["family"] == self.family]
        return f"{method}/{fit[0]}" if fit else None


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    console = Console()
    try:
        plan = _plan(args)
    except MethodError as error:
        raise SystemExit(f"error: {error}") from error
    config = read_config(args.config)
    retention = args.retention_ratio or config["params"].get("retention_ratio") or 0.1
    embedded = EMBEDDED_METHODS if has_budget(config["method"]) else EMBEDDED_METHODS_FIXED
    default = f"dense {config['method']}" if args.pretrained else embedded.format(method=config["method"])
    try:
        settings = settings_of(args.methods or default, retention, config, plan.family)
    except MethodError as error:
        raise SystemExit(f"error: {error}") from error
    runs = [plan.run(setting) for setting in settings]
    if args.dry_run:
        prefix = shell_prefix(plan.machines, args.data)
        for run in runs:
            print(prefix + shlex.join(run.command()))
        together = plan.machines.command(["--runs", str(plan.output / "plan.json")])
        print(f"# all of them, with one loading of the weights: {prefix}{shlex.join(together)}")
        return
    if plan.machines.machines > 1 and args.output is None:
        raise SystemExit("error: several machines need --output (OUTPUT=...), the same folder on all of them.")
    _settle(plan, runs, args.data)
    console.print(f"[bold]{len(settings)} runs[/] of {plan.tasks} on {plan.pretrained}; results in {plan.output}")
    started = time.time()
    try:
        execute(runs, plan.machines, plan.output, console, args.data)
    except LaunchError as error:
        console.print(f"[bold red]{escape(str(error))}[/]")
        console.print(escape("\n".join(error.tail)))
        raise SystemExit(1) from error
    if args.machine_rank != 0:
        return  # rank 0's machine has the results of all
    rows = comparison.read({s.label: plan.output / s.folder for s in settings})
    comparison.write(rows, plan.output)
    console.print(comparison.tables(rows))
    for picture in _pictures(plan, args, settings, rows):
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(f"{time.time() - started:.0f} s; everything is in {plan.output}", soft_wrap=True)


def _settle(plan: Plan, runs: list[Run], data: Path | None) -> None:
    """Make the output folder, or make sure that it is of the same runs."""
    file = plan.output / (PLANNED if plan.machines.machine_rank == 0 else f"{plan.machines.machine_rank}_{PLANNED}")
    wanted = {
        "runs": {run.name: [str(run.output), *run.argv] for run in runs},
        "checkpoint": checkpoint_facts(plan.pretrained),
        "data": str(data) if data else None,
        "gpus_per_model": plan.machines.gpus_per_model,
        "versions": versions(),
        "code": code_hash(),
    }
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        if there != wanted:
            other = ", ".join(key for key in wanted if there.get(key) != wanted[key])
            raise SystemExit(
                f"error: {plan.output} holds another comparison ({file.name}: other {other}); choose another --output."
            )
    elif plan.output.is_dir() and any(plan.output.iterdir()) and plan.machines.machines == 1:
        raise SystemExit(f"error: {plan.output} is not empty and holds no comparison; choose another --output.")
    plan.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _plan(args: argparse.Namespace) -> Plan:
    model = read_config(args.config)["model"]
    model_args = dict(pair.split("=", 1) for pair in args.model_args.split(",") if pair)
    tasks = args.tasks
    if args.pretrained is None and model["family"] == "hf":
        print(f"error: {args.config} needs a checkpoint, e.g. PRETRAINED={model['pretrained']}.", file=sys.stderr)
        raise SystemExit(2)
    if args.picture is not None and model["family"] == "hf":
        raise MethodError("--picture draws models of the llava package only; save_provenance=N shows kept tokens.")
    if args.pretrained is None:
        if not (EMBEDDED / "config.json").is_file():
            raise SystemExit(f"error: the embedded model is missing ({EMBEDDED}); set PRETRAINED to a checkpoint.")
        model = model if model["family"] == "llava_video" else {**model, "family": EMBEDDED_FAMILY}
        model_args = {**EMBEDDED_ARGS, **model_args}
        tasks = tasks or ("shapes_video_full,easy_vqa_full" if args.full else "shapes_video,easy_vqa")
    else:
        # the setting of the paper for every method that is compared, not only for the one whose config this is
        model_args = {k: v for k, v in model.items() if k not in ("family", "pretrained")} | model_args
    stamp = time.strftime("%Y%m%d_%H%M%S")
    output = args.output or ROOT / "outputs" / f"{args.config.replace('/', '_')}_{stamp}"
    return Plan(
        family=model["family"],
        config=args.config,
        pretrained=_absolute(args.pretrained) if args.pretrained else str(EMBEDDED),
        tasks=tasks or TASKS_OF_FAMILY[model["family"]],
        output=Path(output).resolve(),
        model_args=model_args,
        limit=args.limit,
        batch_size=args.batch_size,
        machines=Machines(
            processes=args.num_processes or (default_processes(args.gpus_per_model) if args.pretrained else 1),
            machines=args.num_machines,
            machine_rank=args.machine_rank,
            main_ip=args.main_process_ip,
            main_port=args.main_process_port,
            gpus_per_model=args.gpus_per_model,
        ),
    )


def _pictures(plan: Plan, args: argparse.Namespace, settings: list[Setting], rows: list[comparison.Row]) -> list[Path]:
    made = []
    if comparison.cut_tasks(rows):
        made.append(comparison.draw_curve(rows, plan.output / "accuracy_vs_retention.png"))
    video = args.picture or (ASSETS / "shapes_video" / "clips" / "0000.mp4" if args.pretrained is None else None)
    config = read_config(args.config)
    of_config = [s for s in settings if s.method == config["method"]]
    usual = [s for s in of_config if dict(s.params).items() <= config["params"].items()]
    drawn = next(iter(usual or of_config), None)
    if video is not None and drawn is not None:
        made.append(draw_clip(plan, drawn, video, plan.output / "kept_tokens.png"))
    return made


def draw_clip(plan: Plan, setting: Setting, video: Path, path: Path) -> Path:
    """Which visual tokens of ``video`` the method of ``setting`` keeps, drawn over its frames."""
    import torch
    from transformers.utils import logging

    from accelerate_methods.visualize import draw_kept_tokens
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.builder import load_pretrained_model
    from llava.video_utils import load_video

    logging.disable_progress_bar()
    _, model, processor, _ = load_pretrained_model(
        plan.pretrained, device_map="auto", torch_dtype="auto" if torch.cuda.is_available() else "float32"
    )
    frames = load_video(str(video), num_frames=int(plan.model_args["max_frames_num"])).frames
    pixels = processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    spec = plan.config_of(setting.method) or setting.method
    method = accelerate_methods.accelerate(model, spec, **dict(setting.params))
    with method, accelerate_methods.record() as requests, torch.no_grad():
        model(torch.tensor([[IMAGE_TOKEN_INDEX, 0]], device=model.device), images=[pixels], modalities=["video"])
    item = requests[0].samples[0].items[0]
    title = f"{setting.label}: {item.tokens_after} of {item.tokens_before} visual tokens of {Path(video).name}"
    return draw_kept_tokens(frames, item, path, title)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmms_eval_accelerate.compare.cli", description=__doc__)
    parser.add_argument("--config", default="fastvid/llava_onevision", help="config whose method and setting are run")
    parser.add_argument("--pretrained", help="checkpoint; default: the embedded model and benchmark")
    parser.add_argument("--tasks", help="comma-separated lmms-eval tasks")
    parser.add_argument("--methods", help='e.g. "dense fastvid@0.25 dycoke(k=0.3)"; "levels"; "all"')
    parser.add_argument("--retention-ratio", type=float, help="for methods given without one (default: the config's)")
    parser.add_argument("--limit", help="documents per task")
    parser.add_argument("--batch-size", default="1")
    parser.add_argument("--model-args", default="", help="further model arguments, k=v,k=v")
    parser.add_argument("--output", type=Path, help="a new folder, or that of an interrupted comparison to go on with")
    parser.add_argument("--picture", type=Path, help="video on which the kept tokens are drawn")
    parser.add_argument("--num-processes", type=int, help="per machine; default: the visible GPUs (embedded: 1)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--main-process-ip")
    parser.add_argument("--main-process-port")
    parser.add_argument("--gpus-per-model", type=int, default=1, help="GPUs over which a large model is spread")
    parser.add_argument("--data", type=Path, help="local data folder; runs offline on it (docs/benchmarks.md)")
    parser.add_argument("--full", action="store_true", help="embedded benchmark: the full sets")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser


def _absolute(pretrained: str) -> str:
    """A folder by its full path (the runs may have another working directory), a hub name as it is."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.is_dir() else pretrained


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

