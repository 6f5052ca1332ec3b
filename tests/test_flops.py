"""Analytic work of the language model."""

from types import SimpleNamespace

import pytest

from accelerate_methods.profiling.flops import decode_macs, layer_macs, prefill_macs

QWEN2_7B = SimpleNamespace(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28
)


@pytest.mark.parametrize(("tokens", "tera"), [(6272, 48.82), (1568, 10.73), (1248, 8.46), (928, 6.23), (608, 4.04)])
def test_table_of_fastvid(tokens, tera):
    assert round(prefill_macs([tokens] * 28, QWEN2_7B) / 1e12, 2) == tera


def test_rows_of_fastv():
    for kept, tera in ((1568, 13.45), (1254, 11.38), (941, 9.35), (627, 7.36)):
        assert round(prefill_macs([6272] * 2 + [kept] * 26, QWEN2_7B) / 1e12, 2) == tera


def test_decode_equals_the_sum_of_steps():
    config = SimpleNamespace(hidden_size=8, intermediate_size=20, num_attention_heads=2, num_key_value_heads=1)
    total = 0
    for cached in (11, 5, 5):
        for step in range(1, 8):
            one = layer_macs(1, config) - 2 * 8  # everything but the attention over one key
            total += one + 2 * (cached + step) * 8
    assert decode_macs([11, 5, 5], 7, config) == total
    assert decode_macs([11, 5, 5], 0, config) == 0


def test_head_dim_of_its_own_and_plain_heads():
    wide = SimpleNamespace(
        hidden_size=8, intermediate_size=20, num_attention_heads=2, num_key_value_heads=2, head_dim=8
    )
    plain = SimpleNamespace(hidden_size=8, intermediate_size=20, num_attention_heads=2)
    assert layer_macs(3, wide) == 4 * 3 * 8 * 16 + 2 * 9 * 16 + 3 * 3 * 8 * 20
    assert layer_macs(3, plain) == 4 * 3 * 8 * 8 + 2 * 9 * 8 + 3 * 3 * 8 * 20
