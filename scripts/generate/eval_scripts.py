"""``scripts/eval/<method>_<model>.sh``: one script per config of a method that is no baseline; and
``scripts/eval/<model id>.sh`` and ``configs/models/<model id>.yaml`` of every trained architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate_methods.registry.architectures import ARCHITECTURES, Architecture
from accelerate_methods.registry.configs import config_names, read_config, read_model
from accelerate_methods.registry.models import families_of
from accelerate_methods.registry.names import method_class

#: scripts of these methods are also known by the short name of LLaVA-OneVision, "fastvid_llava_ov.sh"
SHORT_NAMES = ("dycoke", "fastervlm", "fastv", "fastvid", "prunevid", "visionzip")

TEMPLATE = """\
#!/usr/bin/env bash
# {title} on {model}: what configs/{config}.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
{examples}
source "$(dirname "${{BASH_SOURCE[0]}}")/../lib/run_eval.sh"
{needs}arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config {config} "${{arguments[@]}}" "$@"
"""


OF_ARCHITECTURE = """\
#!/usr/bin/env bash
# {name}: the model as it is{levels}; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
{example}
{more}source "$(dirname "${{BASH_SOURCE[0]}}")/../lib/run_eval.sh"
needs_checkpoint models/{key} {pretrained}
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/{key} "${{arguments[@]}}" "$@"
"""

MODEL = """\
# {name}, as accelerate_methods/registry/architectures.py declares it. A method's config may change any key below.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py.
title: {name}
family: {key}
pretrained: {pretrained}
conv_template: {template}
{frames}dtype: null
attn_implementation: null
"""


def files() -> dict[Path, str]:
    out = {}
    for entry in ARCHITECTURES:
        out[_path(entry.key)] = script_of_architecture(entry)
        out[Path("configs", "models", f"{entry.key}.yaml")] = MODEL.format(
            name=entry.name,
            key=entry.key,
            pretrained=_pretrained(entry),
            template=entry.template,
            frames=f"max_frames_num: {entry.frames}\n" if "video" in entry.modalities else "",
        )
    for config in config_names():
        method, _, model = config.partition("/")
        if model == "embedded" or method_class(method).baseline:
            continue
        out[_path(f"{method}_{model}")] = script(config, f"{method}_{model}")
        if model == "llava_onevision" and method in SHORT_NAMES:
            out[_path(f"{method}_llava_ov")] = script(config, f"{method}_llava_ov")
    return out


def _path(name: str) -> Path:
    return Path("scripts", "eval", f"{name}.sh")


def _pretrained(entry: Architecture) -> str:
    return entry.checkpoints[0] if entry.checkpoints else f"path/to/{entry.key}"


def script_of_architecture(entry: Architecture) -> str:
    """The script of a trained architecture."""
    call = f"PRETRAINED={_pretrained(entry)} TASKS={entry.tasks} NUM_PROCESSES=8"
    command = f"bash scripts/eval/{entry.key}.sh"
    lines = [f"{call} {command}"] if len(call) + len(command) < 110 else [f"{call} \\", f"    {command}"]
    more = [f'METHODS="dense({_given(level)})": one of them; METHODS=levels: all.' for level in entry.levels[:1]]
    more += [f"MODEL_ARGS={a.name}=...: for all runs (default: {a.default})." for a in entry.arguments]
    return OF_ARCHITECTURE.format(
        name=entry.name,
        key=entry.key,
        levels=f" and at {len(entry.levels)} levels of its own" if entry.levels else "",
        example="\n".join(f"#     {line}" for line in lines),
        more="".join(f"# {line}\n" for line in more),
        pretrained=_pretrained(entry),
    )


def _given(level: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in level.items())


def script(config: str, name: str) -> str:
    """The script called ``name`` (without its suffix) for one config."""
    content = read_config(config)
    model = content["model"]
    title = method_class(content["method"]).title
    call = f"bash scripts/eval/{name}.sh"
    (family, *_) = families_of(config.partition("/")[2])
    native = model["family"] == "hf"
    examples = []
    if not native:  # the embedded model is one of the llava package
        small = " (a small LLaVA-OneVision)" if model["family"] == "llava" else ""
        examples += [f"No GPU, no weights needed: the embedded model{small} and benchmark, table and pictures:"]
        examples += [f"    {call}"]
    setting = f"PRETRAINED={model['pretrained']} TASKS={family.tasks} NUM_PROCESSES=8"
    line = f"    {setting} {call}"
    examples += ["On 8 GPUs:", *([line] if len(line) <= 116 else [f"    {setting} \\", f"        {call}"])]
    if content.get("levels"):
        examples += [f"METHODS=levels: {title} at all {len(content['levels'])} levels that the config lists."]
    if native:
        examples += ["Other models of transformers: PRETRAINED, and MODEL_ARGS if their limits differ."]
    return TEMPLATE.format(
        title=title,
        model=read_model(config.partition("/")[2])["title"] + (" of transformers" if native else ""),
        config=config,
        examples="\n".join(f"# {line}" for line in examples),
        needs=f"needs_checkpoint {config} {model['pretrained']}\n" if native else "",
    )
