"""What every method says about itself."""

import dataclasses

import pytest

import accelerate_methods
from accelerate_methods.registry import method_class
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from accelerate_methods.stages.signals import SIGNALS, Signal


@pytest.mark.parametrize("name", accelerate_methods.available())
def test_description_of_every_method(name):
    cls = method_class(name)
    assert cls.name == name and cls.title and cls.paper and cls.__doc__
    assert cls.__dataclass_params__.frozen
    assert {Signal(name).name for name in cls.signals} <= set(SIGNALS) and cls.modalities <= {"image", "video"}
    assert cls.positions in ("original", "compact")
    needed = {"retention_ratio": 0.5} if "retention_ratio" in cls.parameters() else {}
    method = accelerate_methods.get(name, **needed)
    assert method.stages and method == accelerate_methods.resolve(method.to_dict()).methods[0]
    assert hash(method) is not None
    for field in dataclasses.fields(method):
        assert field.name in cls.parameters()
    with pytest.raises(UnknownNameError):
        accelerate_methods.get(name, no_such_parameter=1)
    if "retention_ratio" in cls.parameters():
        for wrong in (0.0, -0.1, 1.5, float("nan"), "half", True):
            with pytest.raises(MethodError):
                accelerate_methods.get(name, retention_ratio=wrong)
