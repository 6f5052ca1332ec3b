"""What a comparison runs: which model and tasks, and what is asked for each setting."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate_methods.bench.matching import Target
from accelerate_methods.registry.configs import CONFIG_DIR, config_model, config_path, read_config, written_config
from accelerate_methods.registry.families import families, keys
from accelerate_methods.registry.names import method_class
from accelerate_methods.registry.settings import Setting
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from lmms_eval_accelerate import WORK, embedded
from lmms_eval_accelerate.benchmarks.contents import task_facts
from lmms_eval_accelerate.benchmarks.task_names import checked_tasks
from lmms_eval_accelerate.compare import matched
from lmms_eval_accelerate.manifest import TRAINED, any_method
from lmms_eval_accelerate.models.arguments import COMMON, HF, Arguments, names_of, parse
from lmms_eval_accelerate.runs.files import COMPARISON_PLAN, read_json, write_json
from lmms_eval_accelerate.runs.fingerprint import checkpoint_facts, code_hash, versions
from lmms_eval_accelerate.runs.launch import Machines
from lmms_eval_accelerate.runs.request import Request, Run
from lmms_eval_accelerate.runs.runner import differing

EMBEDDED_FAMILY = "llava_onevision"
EMBEDDED_ARGS = {"max_frames_num": 16, "save_provenance": 4}
#: model arguments that have an option of this command
_OPTIONS = {
    **{"pretrained": "--pretrained", "method": "--methods", "config": "--config", "batch_size": "--batch-size"},
    **{"gpus_per_model": "--gpus-per-model", "match": "--match"},
}
EMBEDDED_CONFIG = "embedded"  # configs/<method>/embedded.yaml: where a method's own values do not fit a tiny model


class NoCheckpointError(MethodError):
    """The config's model cannot be the embedded one, and no other was named."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that the runs share.

    Attributes:
        config: name of the config whose model, and method, are compared.
        pretrained: folder or hub name.
        tasks: names with commas between them.
        model_args: arguments of the model for every run.
        match: what the budget of every method that has a free one is solved for.
    """

    family: str
    config: str
    pretrained: str
    tasks: str
    output: Path
    model_args: Mapping[str, Any]
    limit: str | None = None
    batch_size: str = "1"
    match: Target | None = None

    def run(self, setting: Setting) -> Run:
        """What lmms-eval-accelerate is asked for one setting.

        Raises:
            MethodError: what the run would refuse.
        """
        self.parsed(setting)
        model, arguments = self._asked(setting)
        request = Request(model, arguments, self.tasks, self.batch_size, self.limit)
        return Run(setting.label, self.output / setting.folder, request.argv())

    def parsed(self, setting: Setting) -> Arguments:
        """The model arguments of a run, read as the run reads them."""
        return parse(*self._asked(setting))

    def _asked(self, setting: Setting) -> tuple[str, dict[str, Any]]:
        """Model id and model arguments of a run."""
        arguments = {"pretrained": self.pretrained, **self.model_args}
        if setting.method is not None:
            config = self.config_of(setting.method)
            if config is None:
                arguments["method"] = setting.method
            elif self._of_another_model(config):
                arguments |= {"method": setting.method, **_replaced(setting, read_config(config).get("params") or {})}
            else:
                arguments |= {"config": config, **self._not_from(config)}
        arguments |= dict(setting.params) | matched.arguments(setting.method, self.match)
        return any_method(self.family), arguments

    def _of_another_model(self, config: str) -> bool:
        """Whether a config of transformers' models is for another one than the checkpoint: its values are then written
        out, as a run refuses the config itself. Checkpoints of the llava package are told apart by their family."""
        model = read_config(config)["model"]
        if self.family != "hf" or Path(self.pretrained).name == Path(str(model.get("pretrained"))).name:
            return False
        file = Path(self.pretrained) / "config.json"
        classes = (read_json(file).get("architectures") or []) if file.is_file() else []
        found = {family.name for family in families() if set(classes) & set(family.classes)}
        written_for = config_model(written_config(config), config)
        return not found or (written_for is not None and not found & set(written_for.families))

    def _not_from(self, config: str) -> dict[str, Any]:
        """Arguments that only the config of another method sets: back to their defaults, all runs share one setting."""
        if self.family != "hf" or config == self.config:
            return {}
        own = {"family", "pretrained", *self.model_args}
        return {key: {**COMMON, **HF}[key] for key in read_config(config)["model"] if key not in own}

    def config_of(self, method: str) -> str | None:
        """The config that holds a method's parameters for this model, or None: then its defaults."""
        own = config_path(self.config)
        if not own.is_relative_to(CONFIG_DIR) and read_config(own).get("method") == method:
            return str(own.resolve())  # a file of the user's own
        model = Path(self.config).name
        names = [EMBEDDED_CONFIG, model, EMBEDDED_FAMILY] if self.pretrained == str(embedded.MODEL) else [model]
        paths = {name: CONFIG_DIR / method / f"{name}.yaml" for name in names}
        fit = [n for n, path in paths.items() if path.is_file() and read_config(path)["model"]["family"] == self.family]
        return f"{method}/{fit[0]}" if fit else None

    def plan(self, runs: Sequence[Run], machines: Machines, data: Path | None) -> dict[str, Any]:
        """Everything that can change the results, as it is kept in the output folder.

        Raises:
            MethodError: the folder is of other runs, or holds something else.
        """
        file = self.output / _plan_name(machines.machine_rank)
        wanted = {
            "runs": {run.name: [str(run.output), *run.argv] for run in runs},
            "checkpoint": checkpoint_facts(self.pretrained),
            "data": {"folder": str(data) if data else None, **task_facts(self.tasks, data)},
            "gpus_per_model": machines.gpus_per_model,
            "versions": versions(),
            "code": code_hash(),
        }
        if file.is_file():
            if other := differing(read_json(file), wanted):
                raise MethodError(
                    f"{self.output} holds another comparison ({file.name}: other {', '.join(other)}); choose another "
                    "--output."
                )
        elif self.output.is_dir() and any(self.output.iterdir()) and machines.machines == 1:
            raise MethodError(f"{self.output} is not empty and holds no comparison; choose another --output.")
        return wanted

    def take_output(self, plan: Mapping[str, Any], machine_rank: int) -> None:
        """Make the output folder, with what :meth:`plan` says.

        Raises:
            OSError: it cannot be written.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / _plan_name(machine_rank), plan)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the user asked for. None: what the config, or the embedded benchmark, says.

    Attributes:
        full: the full sets of the embedded benchmark.
    """

    config: str
    pretrained: str | None = None
    tasks: str | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output: Path | None = None
    limit: str | None = None
    batch_size: str = "1"
    full: bool = False
    match: Target | None = None


def _replaced(setting: Setting, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a config; a budget that the setting gives takes the place of the config's."""
    gone = method_class(setting.method).without_replaced_budget(dict(setting.params))
    return {name: value for name, value in params.items() if name not in gone}


def comparison_of(wanted: Wanted) -> Comparison:
    """
    Raises:
        NoCheckpointError: see there.
        MethodError: files of the embedded model or tasks are missing.
    """
    config = read_config(wanted.config)
    model = config.get("model") or {}
    for key in ("model",) if model.get("family") in TRAINED else ("method", "model"):
        if not config.get(key):
            raise MethodError(f"config {wanted.config} has no {key!r}, and a comparison needs it.")
    if model.get("family") not in keys():
        raise UnknownNameError(f"family of config {wanted.config}:", str(model.get("family")), keys())
    tasks, model_args = wanted.tasks, dict(wanted.model_args)
    if wanted.pretrained is None and model["family"] in (TRAINED | {"hf"}):
        raise NoCheckpointError(f"{wanted.config} needs a checkpoint, e.g. PRETRAINED={model['pretrained']}.")
    if wanted.pretrained is None:
        embedded.require_model()
        model = model if model["family"] == "llava_video" else {**model, "family": EMBEDDED_FAMILY}
        model_args = {**EMBEDDED_ARGS, **model_args}
        if tasks is None:
            tasks = "shapes_video_full,easy_vqa_full" if wanted.full else "shapes_video,easy_vqa"
        elif wanted.full:
            raise MethodError("--full (FULL=1) chooses the embedded tasks; with --tasks (TASKS=...) it means nothing.")
    elif wanted.full:
        raise MethodError("--full (FULL=1) is for the embedded benchmark; with --pretrained it means nothing.")
    else:
        # the setting of the paper for every method that is compared, not only for the one whose config this is
        model_args = {k: v for k, v in model.items() if k not in ("family", "pretrained")} | model_args
    _check_arguments(wanted.model_args, model["family"])
    tasks = keys()[model["family"]][0].tasks if tasks is None else tasks
    tasks = checked_tasks(tasks)
    embedded.require_tasks(tasks)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    output = wanted.output
    if output is None:
        output = WORK / "outputs" / f"{wanted.config.replace('/', '_')}_{stamp}"
    return Comparison(
        family=model["family"],
        config=wanted.config,
        pretrained=str(embedded.MODEL) if wanted.pretrained is None else _absolute(wanted.pretrained),
        tasks=tasks,
        output=Path(output).expanduser().resolve(),
        model_args=model_args,
        limit=wanted.limit,
        batch_size=wanted.batch_size,
        match=wanted.match,
    )


def _check_arguments(given: Mapping[str, Any], family: str) -> None:
    """Refuse arguments of --model-args that not all runs can share."""
    allowed = names_of(family) - set(_OPTIONS)
    for key in given:
        if key not in allowed:
            hint = f" Use {_OPTIONS[key]}." if key in _OPTIONS else ""
            raise MethodError(
                f"--model-args {key}=...: not an argument that all runs can share; parameters of methods stand in "
                f'--methods "name(parameter=value)".{hint} {UnknownNameError("argument", key, allowed)}'
            )


def _plan_name(machine_rank: int) -> str:
    return COMPARISON_PLAN if machine_rank == 0 else f"{machine_rank}_{COMPARISON_PLAN}"


def _absolute(pretrained: str) -> str:
    """A folder by its full path (the runs may have another working directory), a hub name as it is."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.is_dir() else pretrained
