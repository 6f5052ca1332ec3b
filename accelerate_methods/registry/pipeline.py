"""Composition: which methods act at which stage, and the ways a user can say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_methods.registry.configs import ConfigModel, config_model, written_config
from accelerate_methods.registry.names import get, method_class
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from accelerate_methods.stages.method import STAGES, Method
from accelerate_methods.stages.sample import outside_of_models
from accelerate_methods.stages.signals import missing_signals

if TYPE_CHECKING:
    from accelerate_methods.stages.compress import CompressMethod
    from accelerate_methods.stages.decode import DecodeMethod
    from accelerate_methods.stages.encode import EncodeMethod
    from accelerate_methods.stages.prefill import PrefillMethod
    from accelerate_methods.stages.sample import SampleMethod

#: "levels" lists further parameter sets: the other rows of the paper's table. Only comparisons read it.
_CONFIG_KEYS = {"method", "params", "levels", "model", "description"}


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a pipeline must know of a model before it is attached.

    Attributes:
        name: in errors ("LLaVA-OneVision").
        stages: where methods can act; signals: what the vision encoder gives; modalities: kinds of visual item.
        layers: of the decoder.
        limits: why no more modalities, a sentence for errors; signal_limits: why no more signals.
    """

    name: str
    stages: frozenset[str]
    signals: frozenset[str]
    modalities: frozenset[str]
    layers: int
    limits: str = ""
    signal_limits: str = ""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Methods that act together, at most one per stage; at the prefill stage several, each at layers of its own.

    Attributes:
        models: what the configs that they came from are written for; :meth:`check` refuses other models.
    """

    methods: tuple[Method, ...] = ()
    models: tuple[ConfigModel, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for stage in STAGES:
            acting = [m.name for m in self.methods if stage in m.stages]
            if len(acting) > 1 and (stage != "prefill" or len(set(acting)) < len(acting)):
                raise MethodError(
                    f"{' and '.join(acting)} both act at the {stage} stage and cannot be combined; "
                    "compose methods whose stages differ."
                )
        for method in self.methods if self.loses_grid else ():
            if method.needs_grid:
                raise MethodError(
                    f"{method.name} needs the grid of tokens, which {self.encode.name} takes away inside the vision "
                    "encoder; have it put every patch back behind the encoder (unmerge=True), or leave one of them out."
                )

    def _at(self, stage: str) -> Method | None:
        return next((m for m in self.methods if stage in m.stages), None)

    @property
    def sample(self) -> SampleMethod | None:
        return self._at("sample")

    @property
    def encode(self) -> EncodeMethod | None:
        return self._at("encode")

    @property
    def loses_grid(self) -> bool:
        """Whether an encode method leaves tokens of which none has a place in a grid."""
        return self.encode is not None and not self.encode.keeps_grid

    @property
    def shortens_inside(self) -> bool:
        """Whether an encode method leaves the language model fewer tokens."""
        return self.encode is not None and self.encode.shortens

    @property
    def compress(self) -> CompressMethod | None:
        return self._at("compress")

    @property
    def prefills(self) -> tuple[PrefillMethod, ...]:
        """Those that act between decoder layers, in the order in which they were named."""
        return tuple(m for m in self.methods if "prefill" in m.stages)

    @property
    def decode(self) -> DecodeMethod | None:
        return self._at("decode")

    @property
    def acts_on_text(self) -> bool:
        """Whether prompts without visual tokens are not left to the model's own forward."""
        return self.decode is not None and self.decode.acts_on_text

    @property
    def signals(self) -> frozenset[str]:
        return frozenset().union(*(m.signals for m in self.methods))

    @property
    def text_tower(self) -> str | None:
        """The text tower that a method names, the first one's."""
        return next((m.text_tower for m in self.methods if m.text_tower is not None), None)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(s for s in STAGES if self._at(s) is not None)

    @property
    def positions(self) -> str:
        """Position rule of the spliced sequence; a prefill stage's own gaps are its Selection's matter."""
        if self.loses_grid:  # then it is for the encode method to say whether tokens still stand where they stood
            return self.encode.positions
        return "compact" if self.compress is None else self.compress.positions

    def check(self, facts: ModelFacts) -> None:
        """Refuse, with one clear error, what the methods cannot do on a model.

        Raises:
            MethodError: a config written for another model; a stage, signal or modality that the model lacks, or a
                layer that it does not have.
        """
        for model in self.models:
            model.check(facts.name)
        for method in self.methods:
            for stage in method.stages:
                if stage not in facts.stages | outside_of_models(method):
                    raise MethodError(
                        f"{method.name} acts at the {stage} stage, which {facts.name} models do not offer "
                        f"(offered: {', '.join(sorted(facts.stages))})."
                    )
            missing = missing_signals(method, facts.signals)
            if missing:
                raise MethodError(
                    f"{method.name} needs {', '.join(missing)}, which this {facts.name} model cannot give "
                    f"(it gives: {', '.join(sorted(facts.signals)) or 'none'}). {facts.signal_limits}".rstrip()
                )
            if not method.modalities & facts.modalities:
                raise MethodError(
                    f"{method.name} cannot act on {facts.name} models: it acts on "
                    f"{', '.join(sorted(method.modalities))} only, they have {', '.join(sorted(facts.modalities))} "
                    f"only. {facts.limits}".rstrip()
                )
        self.check_layers(facts.layers)

    def check_layers(self, num_layers: int) -> None:
        """
        Raises:
            MethodError: a method names a layer that a decoder with ``num_layers`` lacks, or two name the same one.
        """
        taken: dict[tuple[str, int], str] = {}
        for method in self.prefills:
            points = [("before", layer) for layer in method.prefill_layers(num_layers)]
            points += [("inside", layer) for layer in method.inner_layers(num_layers)]
            for point in points:
                other = taken.setdefault(point, method.name)
                if other != method.name:
                    where = f"{point[0]} decoder layer {point[1]}"
                    raise MethodError(f"{other} and {method.name} both act {where}; give them different layers.")
        if self.decode is not None:
            self.decode.decode_layer(num_layers)
        if self.prefills and getattr(self.decode, "cache_positions", "original") != "original":
            raise MethodError(
                f"{self.prefills[0].name} leaves other tokens in each layer's cache, so {self.decode.name} cannot "
                "number them by their place in it. Keep original positions."
            )

    @property
    def name(self) -> str:
        return "+".join(m.name for m in self.methods) or "dense"

    def describe(self) -> str:
        return " + ".join(m.describe() for m in self.methods) or "dense"

    def to_dict(self) -> list[dict[str, Any]]:
        return [m.to_dict() for m in self.methods]


def resolve(spec: Any, /, **params: Any) -> Pipeline:
    """Turn whatever a caller may give as ``method=`` into a :class:`Pipeline`.

    Args:
        spec: None or "none"/"dense" (nothing), a name ("fastvid"), names joined by "+" ("fastvid+fastv"), a config
            (path to a YAML file, or its name below ``configs/`` such as "fastvid/llava_onevision"), a mapping
            ``{"method": name, **params}``, a :class:`Method`, a :class:`Pipeline`, or a list of these.
        params: hyper-parameters; they override those of a config. With several methods, prefix them with the
            method's name: ``resolve("fastvid+fastv", **{"fastv.k": 2})``.

    Raises:
        UnknownNameError, MethodError: as :func:`accelerate_methods.get`; also when ``params`` fit nothing.
    """
    models: list[ConfigModel] = []
    pending = _expand(spec, models)
    if not pending:
        if params:
            raise MethodError(f"parameters {', '.join(sorted(params))} given, but no method to apply them to.")
        return Pipeline()
    names = [p.name if isinstance(p, Method) else p["method"] for p in pending]
    overrides: list[dict[str, Any]] = [{} for _ in pending]
    for key, value in params.items():
        owner, dot, field = key.partition(".")
        if dot:
            if owner not in names:
                raise UnknownNameError("method prefix in parameter", key, [f"{n}.{field}" for n in names])
            target = names.index(owner)
        elif len(pending) == 1:
            target, field = 0, key
        else:
            raise MethodError(f"parameter {key!r} is ambiguous for {'+'.join(names)}; write it as <method>.{key}.")
        overrides[target][field] = value
    methods = tuple(_built(p, o) for p, o in zip(pending, overrides, strict=True))
    return Pipeline(methods, tuple(dict.fromkeys(models)))


def _built(entry: Method | dict[str, Any], overrides: dict[str, Any]) -> Method:
    """The method of an entry, with the caller's parameters over those of the entry."""
    if isinstance(entry, Method):
        if not overrides:
            return entry
        entry = entry.to_dict()
    name = entry["method"]
    cls = method_class(name)
    given, overrides = cls.canonical({k: v for k, v in entry.items() if k != "method"}), cls.canonical(overrides)
    # a budget given by the caller replaces the one that was there, whatever its unit
    return get(name, **{**given, **cls.without_replaced_budget(overrides), **overrides})


def _expand(spec: Any, models: list[ConfigModel]) -> list[Method | dict[str, Any]]:
    """Methods, or names with parameters; the models that configs among them are written for go to ``models``."""
    if spec is None:
        return []
    if isinstance(spec, Pipeline):
        models += spec.models
        return list(spec.methods)
    if isinstance(spec, Method):
        return [spec]
    if isinstance(spec, Mapping):
        return _expand_mapping(spec, "the method mapping", models)
    if isinstance(spec, Path):
        return _expand_mapping(written_config(spec), str(spec), models)
    if isinstance(spec, str):
        if spec.lower() in {"", "none", "dense"}:
            return []
        if spec.endswith((".yaml", ".yml")) or "/" in spec:
            return _expand_mapping(written_config(spec), spec, models)
        parts = [part.strip() for part in spec.split("+")]
        for part in parts:
            method_class(part)
        return [{"method": part} for part in parts]
    if isinstance(spec, Sequence) and not isinstance(spec, bytes):
        return [entry for part in spec for entry in _expand(part, models)]
    raise MethodError(
        f"cannot make a method out of {type(spec).__name__}; give a name, a YAML file of configs/, a mapping with a "
        "'method' key, or a method object."
    )


def _expand_mapping(content: Mapping[str, Any], where: str, models: list[ConfigModel]) -> list[Method | dict[str, Any]]:
    """One ``method:`` with ``params:``, or a list ``methods:`` of such entries."""
    if "methods" in content:
        extra = [key for key in ("method", "params", "levels") if content.get(key) is not None]
        if extra:
            raise MethodError(f"{where}: {extra[0]!r} beside 'methods' means nothing; it belongs into their entries.")
        unknown = sorted(str(key) for key in content if key not in _CONFIG_KEYS | {"methods"})
        if unknown:
            raise UnknownNameError(f"key of {where}:", unknown[0], {"methods", "model", "description"})
        if isinstance(content["methods"], str | bytes) or not isinstance(content["methods"], Sequence):
            raise MethodError(f"{where}: 'methods' must be a list of methods, got {content['methods']!r}.")
        entries = [entry for part in content["methods"] for entry in _expand(part, models)]
    elif "method" in content:
        entries = _expand_single(content, where)
    else:
        found = ", ".join(map(str, content)) or "nothing"
        raise MethodError(f"{where}: no 'method' (or 'methods') key; found {found}.")
    model = config_model(content, where)
    if model is not None:
        models.append(model)
    return entries


def _expand_single(content: Mapping[str, Any], where: str) -> list[Method | dict[str, Any]]:
    if "params" in content:
        params = content["params"] or {}
        extra = set(content) - _CONFIG_KEYS
        if extra:
            raise UnknownNameError(f"key of {where}:", sorted(extra)[0], _CONFIG_KEYS)
    else:
        params = {k: v for k, v in content.items() if k not in _CONFIG_KEYS}
    if not isinstance(params, Mapping):
        raise MethodError(f"{where}: 'params' must be a mapping, got {params!r}.")
    method = content["method"]
    if method is not None and not isinstance(method, str):
        raise MethodError(f"{where}: 'method' must be a name, got {method!r}; several stand in a list 'methods'.")
    if method is None or method.lower() in {"none", "dense"}:
        if params:
            raise MethodError(f"{where}: parameters {', '.join(sorted(params))} given, but no method to apply them to.")
        return []
    return [{"method": method, **params}]
