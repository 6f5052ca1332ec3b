"""Analytic work: against the figures that papers print, and against what torch counts."""

from types import SimpleNamespace

import pytest
import torch

from accelerate_methods.engine.flops import (
    MacCounter,
    decode_macs,
    head_macs,
    kv_cache_values,
    layer_macs,
    prefill_macs,
    prefill_macs_papers,
    projector_macs,
    tower_macs,
)

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
            single = layer_macs(1, config) - 2 * 8  # everything but the attention over one key
            total += single + 2 * (cached + step) * 8
    assert decode_macs([11, 5, 5], 7, config) == total
    assert decode_macs([11, 5, 5], 0, config) == 0


def test_head_dim_of_its_own_and_plain_heads():
    wide = SimpleNamespace(
        hidden_size=8, intermediate_size=20, num_attention_heads=2, num_key_value_heads=2, head_dim=8
    )
    plain = SimpleNamespace(hidden_size=8, intermediate_size=20, num_attention_heads=2)
    assert layer_macs(3, wide) == 4 * 3 * 8 * 16 + 2 * 9 * 16 + 3 * 3 * 8 * 20
    assert layer_macs(3, plain) == 4 * 3 * 8 * 8 + 2 * 9 * 8 + 3 * 3 * 8 * 20


# -- the papers' formula -----------------------------------------------------------------------------------------------


def vicuna(width: int, inner: int, heads: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=width, intermediate_size=inner, num_attention_heads=heads)


VICUNA_7B, VICUNA_13B = vicuna(4096, 11008, 32), vicuna(5120, 13824, 40)
TERA = 1e12


@pytest.mark.parametrize("text", [35, 36])
@pytest.mark.parametrize(
    ("k", "percent"), [(2, (55, 33, 20)), (3, (57, 35, 23)), (5, (60, 40, 28))], ids=["K2", "K3", "K5"]
)
def test_fastv_ratios(text, k, percent):
    """Paper, and its README: 576 visual tokens, of which 50, 25 and 10 % go on after layer K."""
    full = prefill_macs_papers([576 + text] * 32, VICUNA_7B)
    for kept, expected in zip((288, 144, 58), percent, strict=True):
        cut = prefill_macs_papers([576 + text] * k + [kept + text] * (32 - k), VICUNA_7B)
        assert 100 * cut / full == pytest.approx(expected, abs=0.75)


def test_fastv_per_layer():
    """Averages per layer in GFLOP as the paper prints them: 99.3 (7B), 154.6 (13B), 84.6 for 13B at K=2, R=50 %."""
    assert round(prefill_macs_papers([612], VICUNA_7B) / 1e9, 1) == 99.3
    assert round(prefill_macs_papers([612], VICUNA_13B) / 1e9, 1) == 154.6
    cut = prefill_macs_papers([612] * 2 + [324] * 38, VICUNA_13B)
    assert round(cut / 40 / 1e9, 1) == 84.6


def prompt_length(tera: float, layers: int, config: SimpleNamespace) -> float:
    """The length at which the papers' formula gives ``tera``."""
    low, high = 0.0, 1e5
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if prefill_macs_papers([middle], config) * layers < tera * TERA else (low, middle)
    return low


@pytest.mark.parametrize(
    ("layers", "config", "visual", "kept", "full", "cut"),
    [
        (32, VICUNA_7B, 576, 56, 3.2280, 0.5122),
        (40, VICUNA_13B, 576, 56, 6.2813, 1.0020),
        (32, VICUNA_7B, 1152, 115, 6.5386, 0.9371),
    ],
    ids=["7B", "13B", "video"],
)
def test_divprune(layers, config, visual, kept, full, cut):
    """The text length is an average over its tasks that is not printed: solved from the full figure, it must give the
    other one. 9.8 % of 576 tokens are 56, 10 % of 8 x 144 are 115."""
    text = prompt_length(full, layers, config) - visual
    assert 30 < text < 100
    assert prefill_macs_papers([kept + text] * layers, config) / TERA == pytest.approx(cut, abs=2e-4)


def test_divprune_text_is_the_same_for_both_models():
    seven, thirteen = prompt_length(3.2280, 32, VICUNA_7B), prompt_length(6.2813, 40, VICUNA_13B)
    assert seven == pytest.approx(thirteen, abs=0.1)


def test_pyramiddrop():
    """4nD^2 + 2n^2D + 3nDM over the visual tokens: our formula without GQA."""
    assert round(prefill_macs([576] * 32, VICUNA_7B) / TERA, 2) == 3.82
    stages = [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert round(prefill_macs(stages, VICUNA_7B) / TERA, 2) == 1.78
    assert round(prefill_macs([2880] * 32, VICUNA_7B) / TERA, 1) == 20.8


def test_dense_figure_of_holitom():
    """40.8 T where FastVID prints 48.8 T for the same model and 6272 tokens: another formula, not another model."""
    assert round(prefill_macs_papers([6272] * 28, QWEN2_7B) / TERA, 1) == 40.8


# -- against torch's counter -------------------------------------------------------------------------------------------


def counted(call) -> int:
    counter = MacCounter()
    with torch.no_grad():
        counter.counted(call)()
    return counter.macs


def stack_counts_alike() -> bool:
    """Whether torch's counter sees SDPA on the CPU (2.11 does not), and transformers rotates without a matrix product
    (5.17 uses one for the angles, which is no work worth counting)."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    query = torch.zeros(1, 1, 4, 8)
    attends = counted(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    config = Qwen2Config(hidden_size=32, num_attention_heads=4)
    turns = counted(lambda: Qwen2RotaryEmbedding(config)(query, torch.arange(4)[None]))
    return attends == 2 * 4 * 4 * 8 and turns == 0


against_torch = pytest.mark.skipif("not stack_counts_alike()", reason="this torch or transformers counts other things")


@against_torch
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_prefill_and_decode_as_torch_counts(key_heads, attention):
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=key_heads,
        num_hidden_layers=3, vocab_size=50, attn_implementation=attention,
    )  # fmt: skip
    model, cache = Qwen2ForCausalLM(config).eval(), DynamicCache(config=config)
    ids = torch.arange(37)[None]
    prefill = counted(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
    assert prefill == prefill_macs([37] * 3, config) + head_macs(config)
    assert sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) == kv_cache_values([37] * 3, config)
    single = torch.ones(1, 1, dtype=torch.long)

    def decode():
        for _ in range(4):
            model(input_ids=single, past_key_values=cache, use_cache=True)

    assert counted(decode) == decode_macs([37] * 3, 4, config) + head_macs(config, 4)


@against_torch
@pytest.mark.parametrize("special", [0, 1], ids=["siglip", "clip"])
def test_tower_and_projector_as_torch_counts(special):
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    sizes = dict(
        hidden_size=32, intermediate_size=72, num_attention_heads=2, num_hidden_layers=3, image_size=56, patch_size=14
    )
    if special:
        config = CLIPVisionConfig(**sizes)
        model = CLIPVisionModel(config)
    else:
        config = SiglipVisionConfig(**sizes, vision_use_head=False)
        model = SiglipVisionModel(config)
    pixels = torch.zeros(5, 3, 56, 56)
    assert counted(lambda: model(pixels)) == tower_macs(5, config, 3, special)
    projector = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    assert counted(lambda: projector(torch.zeros(7, 32))) == projector_macs(7, projector)
    assert tower_macs(5, config, 3, special, side=28) < tower_macs(5, config, 3, special) / 3


@against_torch
def test_pruned_prefill_as_torch_counts(tiny):
    """The decoder loop with FastV, text and all: what the layers did, plus the rows of attention that it asks for."""
    import accelerate_methods

    model = tiny("tiny-llava-onevision")
    config = model.config
    ids = torch.tensor([[5, 6, -200, 7, 8, 9]])
    side = model.get_vision_tower().image_size
    arguments = {"images": [torch.randn(4, 3, side, side)], "modalities": ["video"]}
    with accelerate_methods.accelerate(model, "fastv", k=2, retention_ratio=0.25), torch.no_grad():
        spliced = model.prepare_multimodal(ids, None, None, **arguments)
        with accelerate_methods.record() as requests:
            accelerate_methods.engine.recording.new_request()
            requests[0].samples.append(accelerate_methods.engine.recording.SampleRecord(length=spliced.lengths[0]))
            inputs = {"inputs_embeds": spliced.inputs_embeds, "layout": spliced.layout, "request": requests[0]}
            total = counted(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        layers = requests[0].layer_lengths(0)
    assert layers[0] == spliced.lengths[0] and layers[-1] < layers[0]
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    # the query of the last row, and its scores against every key
    row = config.hidden_size * heads * dim + layers[0] * heads * dim
    rest = total - prefill_macs(layers, config) - head_macs(config)
    assert rest == row
