"""``scripts/eval/<method>_<model>.sh``: one script per config of a method that is no baseline."""

from __future__ import annotations

from pathlib import Path

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


def files() -> dict[Path, str]:
    out = {}
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
