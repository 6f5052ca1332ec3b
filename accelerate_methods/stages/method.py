"""What a method is: hyper-parameters plus one pure tensor function per stage where its paper acts.

    sample --> encode --> compress --> prefill --> decode

A method knows no model class. It declares the **signals** it reads (names in :data:`.signals.SIGNALS`); a host computes
those and only those. Subclass the stage classes beside this file, one per stage that the paper touches, as a frozen
dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from accelerate_methods.stages import fields
from accelerate_methods.stages.errors import MethodError, UnknownNameError

STAGES = ("sample", "encode", "compress", "prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Fields are hyper-parameters under the names of the paper; keyword-only.

    Class attributes:
        name: registry name, also used in configs, on the command line and in result files.
        title, paper, licence: for tables and acknowledgements.
        code: repository of the official release, "owner/name@commit".
        signals: names out of :data:`.signals.SIGNALS` that the host must provide.
        substitutes: signal -> signal that serves where an encoder lacks the first; its use is reported as adaptation.
        needs_question: whether it reads ``question`` of an item; asking for a text signal implies it.
        text_tower: checkpoint (name on the hub or folder) of the text tower for "text_embeds"; None: that of the
            model's own vision tower. A method may have a field of this name.
        misleading: names that other code bases use for something else than ours, with what to write here.
        budget_required: whether one of the fields declared as budget has to be given (see ``fields.py``).
        needs_grid: whether it compares tokens by their place in a frame, so that no method inside the vision encoder
            may have taken the grid away.
        modalities: kinds of visual item the method changes; others pass through unpruned.
        positions: "original" keeps the position ids of the uncompressed sequence (with gaps; generated tokens go on
            from the uncompressed length), "compact" re-numbers the shortened sequence.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    code: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    baseline: ClassVar[bool] = False
    signals: ClassVar[frozenset[str]] = frozenset()
    substitutes: ClassVar[Mapping[str, str]] = {}
    needs_question: ClassVar[bool] = False
    text_tower: ClassVar[str | None] = None
    misleading: ClassVar[Mapping[str, str]] = {}
    budget_required: ClassVar[bool] = True
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    needs_grid: ClassVar[bool] = False
    positions: ClassVar[str] = "compact"

    def __post_init__(self) -> None:
        """Check the fields; a method with conditions among several extends this."""
        fields.check(self)

    @classmethod
    def class_stages(cls) -> tuple[str, ...]:
        """Stages at which the method can act, in pipeline order: those whose stage class it inherits."""
        own = {base.__dict__.get("stage") for base in cls.__mro__}
        return tuple(stage for stage in STAGES if stage in own)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages at which this object acts: :meth:`class_stages` without those that a parameter has switched off."""
        off = self.stages_off()
        return tuple(s for s in self.class_stages() if s not in off)

    def asks_for(self, *signals: str) -> None:
        """For ``__post_init__`` of a method whose parameters choose encoder layers: what this object reads.

        The class's ``signals`` are then those of its defaults, for tables.
        """
        object.__setattr__(self, "signals", frozenset(signals))  # the dataclass is frozen

    def stages_off(self) -> tuple[str, ...]:
        """Stages that the parameters switch off; a method with such switches overrides this."""
        return ()

    def words(self, question: str) -> list[str]:
        """The words of a question whose embeddings are signal "question_rows", for methods that leave some out."""
        return question.split()

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Hyper-parameter names with their defaults (``dataclasses.MISSING`` where required)."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.init}

    @classmethod
    def create(cls, /, **params: Any) -> Method:
        """Build the method from keyword arguments.

        Raises:
            UnknownNameError: a name that is none of the parameters.
            MethodError: one that means something else here, a value that is not allowed.
        """
        params = cls.canonical(params)
        return cls(**cls.without_replaced_budget(params), **params)

    @classmethod
    def canonical(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """``params`` under the names of the fields: aliases are translated, unknown names refused."""
        allowed, aliases = cls.parameters(), fields.aliases(cls)
        found: dict[str, Any] = {}
        for key, value in params.items():
            name = aliases.get(key, key)
            if name in found:
                both = " and ".join(other for other in params if aliases.get(other, other) == name)
                raise MethodError(f"{cls.name}: {both} are names of one parameter; give one of them.")
            if name in cls.misleading:
                raise MethodError(f"{cls.name} has no parameter {name!r}: {cls.misleading[name]}.")
            if name == "retention_ratio" and name not in allowed:
                raise MethodError(f"{cls.name} has no retention_ratio: {cls._budget_in_words()}.")
            if name not in allowed:
                raise UnknownNameError(f"parameter of method {cls.name!r}:", key, allowed)
            found[name] = value
        return found

    @classmethod
    def _budget_in_words(cls) -> str:
        own = cls.budget_fields()
        if own:
            return f"say how much it keeps with {' or '.join(own)}"
        return f"how much it keeps follows from {', '.join(cls.parameters()) or 'the input alone'}"

    @classmethod
    def without_replaced_budget(cls, given: Mapping[str, Any]) -> dict[str, None]:
        """None for the budget fields that ``given`` replaces: all others, as soon as it holds one."""
        if all(given.get(name) is None for name in cls.budget_fields()):
            return {}
        return {name: None for name in cls.budget_fields() if name not in given}

    @classmethod
    def budget_fields(cls) -> tuple[str, ...]:
        """Parameters that say how much is kept. A caller who gives one replaces all of them."""
        return tuple(name for names in fields.budgets(cls).values() for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Name and hyper-parameters, as a config file would hold them."""
        return {"method": self.name, **{f: getattr(self, f) for f in self.parameters()}}

    def describe(self) -> str:
        """One line for tables and logs: the name and the parameters that differ from their defaults."""
        changed = [f"{k}={getattr(self, k)!r}" for k, d in self.parameters().items() if getattr(self, k) != d]
        return f"{self.name}({', '.join(changed)})"
