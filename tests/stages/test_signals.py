"""Signals and their names."""

import copy
import pickle
from typing import ClassVar

import pytest

from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.signals import SIGNALS, Signal, missing_signals, resolve_signal


def test_a_plain_name_is_the_feature_layers_mean_over_heads():
    for name in SIGNALS:
        assert Signal(name) == name and Signal(name).layer == "feature" and Signal(name).heads == "mean"


@pytest.mark.parametrize(
    ("signal", "text"),
    [
        (Signal("key_states", "next", "joined"), "key_states@next/joined"),
        (Signal("cls_attention", heads="joined"), "cls_attention@feature/joined"),
        (Signal("received_attention", -2), "received_attention@-2"),
        (Signal("received_attention", 0.375), "received_attention@0.375"),
    ],
)
def test_a_signal_is_its_own_name(signal, text):
    for same in (Signal(text), copy.deepcopy(signal), pickle.loads(pickle.dumps(signal))):
        assert same == signal == text
        assert (same.name, same.layer, same.heads) == (signal.name, signal.layer, signal.heads)


@pytest.mark.parametrize(
    "wrong", [("frame_features", "next"), ("key_states", "last"), ("key_states", 1.5), ("key_states", 0, "max")]
)
def test_refuses(wrong):
    with pytest.raises(MethodError):
        Signal(*wrong)


def test_a_substitute_serves_in_the_layer_that_is_asked_for():
    class Probe(Method):
        signals = frozenset({Signal("cls_attention", "next", "joined")})
        substitutes: ClassVar = {"cls_attention": "received_attention"}

    (asked,) = Probe.signals
    assert resolve_signal(Probe, asked, frozenset({"cls_attention"})) == asked
    assert resolve_signal(Probe, asked, frozenset({"received_attention"})) == "received_attention@next/joined"
    assert missing_signals(Probe, frozenset({"key_states"})) == [asked]
