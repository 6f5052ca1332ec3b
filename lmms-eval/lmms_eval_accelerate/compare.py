"""Run the dense model and methods one after the other through the lmms-eval command line, and compare them.

Every setting is a process of its own with its own output folder, so that no state is shared and a failure names its
setting. Ends with a table, ``comparison.json`` / ``comparison.md`` and two pictures. ``--dry-run`` prints the commands.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import accelerate_methods
from accelerate_methods.errors import MethodError
from accelerate_methods.pipeline import CONFIG_DIR, read_config
from lmms_eval_accelerate import TASKS, comparison
from lmms_eval_accelerate.settings import Setting, has_budget, settings_of

ROOT = Path(accelerate_methods.__file__).resolve().parent.parent
EMBEDDED = ROOT / "assets" / "tiny-llava-onevision"
#: with --pretrained: tasks of the methods' papers
TASKS_OF_FAMILY = {"llava": "gqa,mme,pope", "llava_onevision": "videomme", "llava_video": "videomme"}
EMBEDDED_FAMILY = "llava_onevision"
EMBEDDED_ARGS = {"max_frames_num": 16, "save_provenance": 4}
EMBEDDED_CONFIG = "embedded"  # configs/<method>/embedded.yaml: where a method's own values do not fit a tiny model
EMBEDDED_METHODS = "dense {method}@0.25 {method} {method}@0.05 random@0.25 random@0.1"
EMBEDDED_METHODS_FIXED = "dense {method} random@0.25 random@0.1"  # a method whose budget follows from its parameters
_PROGRESS = re.compile(r"_accelerated: .*?(\d+)/(\d+) \[")  # the model's own bar, named after it


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
    processes: int
    machines: int
    machine_rank: int
    main_ip: str | None
    main_port: str | None

    def command(self, setting: Setting, tasks: str | None = None) -> list[str]:
        """The lmms-eval command line of one setting."""
        arguments = {"pretrained": self.pretrained, **self.model_args}
        if setting.method is not None:
            config = self.config_of(setting.method)
            arguments |= {"method": setting.method} if config is None else {"config": config}
            arguments |= dict(setting.params)
        command = [
            *self.launcher(),
            *("--model", f"{self.family}_accelerated"),
            *("--model_args", ",".join(f"{k}={_text(v)}" for k, v in arguments.items())),
            *("--tasks", tasks or self.tasks),
            *("--batch_size", self.batch_size),
            *("--output_path", str(self.output / setting.folder)),
        ]
        return [*command, "--limit", self.limit] if self.limit else command

    def config_of(self, method: str) -> str | None:
        """The config that holds a method's parameters for this model, or None: then its defaults."""
        model = Path(self.config).name
        names = [EMBEDDED_CONFIG, model, EMBEDDED_FAMILY] if self.pretrained == str(EMBEDDED) else [model]
        paths = {name: CONFIG_DIR / method / f"{name}.yaml" for name in names}
        fit = [n for n, path in paths.items() if path.is_file() and read_config(path)["model"]["family"] == self.family]
        return f"{method}/{fit[0]}" if fit else None

    def launcher(self) -> list[str]:
        """How the processes are started: accelerate on GPUs, torchrun on CPUs, neither for a single process."""
        module = ["-m", "lmms_eval_accelerate"]
        if self.processes * self.machines == 1:
            return [sys.executable, *module]
        if _gpus():
            return [
                *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
                *("--num_processes", str(self.processes * self.machines)),
                *("--num_machines", str(self.machines), "--machine_rank", str(self.machine_rank)),
                *(("--main_process_ip", self.main_ip) if self.main_ip else ()),
                *(("--main_process_port", self.main_port) if self.main_port else ()),
                *module,
            ]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)),
            *("--nnodes", str(self.machines), "--node_rank", str(self.machine_rank)),
            *(("--master_addr", self.main_ip) if self.main_ip else ()),
            *(("--master_port", self.main_port) if self.main_port else ()),
            *module,
        ]


def run(plan: Plan, setting: Setting, console: Console, progress: Progress) -> Path:
    """Run one setting with a progress bar; its log goes to <output>/<folder>.log. Exits on failure."""
    command = plan.command(setting)
    log_path = plan.output / f"{setting.folder}.log"
    bar = progress.add_task(f"{setting.label}: starting", total=None)
    tail: collections.deque[str] = collections.deque(maxlen=40)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    with log_path.open("w", encoding="utf-8") as log:
        log.write(shlex.join(command) + "\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        for line in _lines(process.stdout):
            log.write(line + "\n")
            tail.append(line)
            if match := _PROGRESS.search(line):
                progress.update(bar, description=setting.label, completed=int(match[1]), total=int(match[2]))
    if process.wait() != 0:
        progress.stop()
        console.print(f"[bold red]{setting.label} failed[/] (exit code {process.returncode}); end of {log_path}:")
        console.print(escape("\n".join(tail)))
        raise SystemExit(1)
    progress.update(bar, description=f"{setting.label}: done", total=1, completed=1)
    return plan.output / setting.folder


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    console = Console()
    plan = _plan(args)
    config = read_config(args.config)
    retention = args.retention_ratio or config["params"].get("retention_ratio") or 0.1
    embedded = EMBEDDED_METHODS if has_budget(config["method"]) else EMBEDDED_METHODS_FIXED
    default = f"dense {config['method']}" if args.pretrained else embedded.format(method=config["method"])
    try:
        settings = settings_of(args.methods or default, retention, config, plan.family)
    except MethodError as error:
        raise SystemExit(f"error: {error}") from error
    if args.dry_run:
        for setting in settings:
            print(shlex.join(plan.command(setting)))
        return
    plan.output.mkdir(parents=True, exist_ok=False)
    console.print(f"[bold]{len(settings)} runs[/] of {plan.tasks} on {plan.pretrained}; results in {plan.output}")
    started = time.time()
    with Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        for number, setting in enumerate(settings, 1):
            begin = time.time()
            run(plan, setting, console, progress)
            if not console.is_terminal:  # where bars are not drawn, a line per run is the progress
                print(f"{number}/{len(settings)} {setting.label}: {time.time() - begin:.0f} s", flush=True)
    if args.machine_rank != 0:
        return  # rank 0's machine has the results of all
    rows = comparison.read({s.label: plan.output / s.folder for s in settings})
    comparison.write(rows, plan.output)
    console.print(comparison.tables(rows))
    for picture in _pictures(plan, args, settings, rows):
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(f"{time.time() - started:.0f} s; everything is in {plan.output}", soft_wrap=True)


def _plan(args: argparse.Namespace) -> Plan:
    model = read_config(args.config)["model"]
    model_args = dict(pair.split("=", 1) for pair in args.model_args.split(",") if pair)
    tasks = args.tasks
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
        pretrained=str(args.pretrained or EMBEDDED),
        tasks=tasks or TASKS_OF_FAMILY[model["family"]],
        output=Path(output).resolve(),
        model_args=model_args,
        limit=args.limit,
        batch_size=args.batch_size,
        processes=args.num_processes or (max(1, _gpus()) if args.pretrained else 1),
        machines=args.num_machines,
        machine_rank=args.machine_rank,
        main_ip=args.main_process_ip,
        main_port=args.main_process_port,
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _pictures(plan: Plan, args: argparse.Namespace, settings: list[Setting], rows: list[comparison.Row]) -> list[Path]:
    made = []
    if comparison.cut_tasks(rows):
        made.append(comparison.draw_curve(rows, plan.output / "accuracy_vs_retention.png"))
    video = args.picture or (TASKS / "shapes_video" / "clips" / "0000.mp4" if args.pretrained is None else None)
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
    parser = argparse.ArgumentParser(prog="python -m lmms_eval_accelerate.compare", description=__doc__)
    parser.add_argument("--config", default="fastvid/llava_onevision", help="config whose method and setting are run")
    parser.add_argument("--pretrained", help="checkpoint; default: the embedded model and benchmark")
    parser.add_argument("--tasks", help="comma-separated lmms-eval tasks")
    parser.add_argument("--methods", help='e.g. "dense fastvid@0.25 dycoke(k=0.3)"; "levels"; "all"')
    parser.add_argument("--retention-ratio", type=float, help="for methods given without one (default: the config's)")
    parser.add_argument("--limit", help="documents per task")
    parser.add_argument("--batch-size", default="1")
    parser.add_argument("--model-args", default="", help="further model arguments, k=v,k=v")
    parser.add_argument("--output", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--picture", type=Path, help="video on which the kept tokens are drawn")
    parser.add_argument("--num-processes", type=int, help="per machine; default: the visible GPUs (embedded: 1)")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--main-process-ip")
    parser.add_argument("--main-process-port")
    parser.add_argument("--full", action="store_true", help="embedded benchmark: the full sets")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    return parser


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lines(stream: Any) -> Iterator[str]:
    """Lines of a stream in which progress bars end theirs with a carriage return (universal newlines split both)."""
    for line in stream:
        if line.strip():
            yield line.rstrip()


if __name__ == "__main__":
    main()
