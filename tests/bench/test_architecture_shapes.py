"""Trained architectures as shapes of the bench: their sizes, and a small run of each."""

import dataclasses
import types

import pytest
import torch
from transformers import BertConfig

from accelerate_methods.bench import architecture_shapes, shapes
from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.stages.errors import MethodError
from tests.bench.test_bench import built, rows_of
from tests.support.paths import GOLDEN

SHAPES = architecture_shapes.ARCHITECTURE_SHAPES
#: what the language models have without vision side; Video-XL's has 28 layers of projections of its summary tokens
_SUMMARIES = 28 * (3584 * 3584 + 3584 + 2 * (3584 * 512 + 512)) + 3584
_VICUNA_7B, _VICUNA_13B, _PHI_2 = 6_738_415_616, 13_015_864_320, 2_779_683_840
#: LLaMA-VID's Q-Former, BERT-base with a row for [DEC], whose queries read an image in every second layer; and what is
#: between it and the decoder
_BERT = (30_523 + 512 + 2 + 32) * 768 + 12 * (4 * 768 * 769 + 2 * (2 * 768 * 3072 + 3072 + 768) + 6 * 768)
_BERT += 6 * (2 * 768 * 769 + 2 * 768 * 1409 + 2 * 768)
_CONTEXT = 2 * 1408 + 769 * 1408 + 1409 * 1408
#: FlashSloth's queries, the MLP of its pooling, and what refreshes the queries
_QUERIES = 9 * 2560 + 1152 * 1153 + 1153
_QUERIES += 2561 * 576 + 1153 * 576 + 1153 * 2560 + 6 * 576 + 5 * 577 * 576 + 1153 * 1152
#: LLaVA-Mini's compressor, and four layers of its decoder
_LLAMA_31_8B = 8_030_261_248
_MINI = 2 * 1024 + 4 * 1024 * 1025 + 4 * 1024 + 4 * (2 * 4096 * (4096 + 1024 + 1) + 3 * 4096 * 14336)
#: TG-LLaVA's text model, its queries with two layers of BERT-large, and the patch encoder
_CLIP_TEXT = (49_408 + 77) * 768 + 12 * (4 * 768 * 769 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768) + 2 * 768
_GUIDE = 769 * 1024 + 1025 * 1024 + 576 * 1024 + 2 * 1024 + 2 * (2 * 1024 * 4096 + 4096 + 3 * 1024)
_GUIDE += 3 * (4 * 1024 * 1025 + 2 * 1024)
_DETAILS = 2304 * 1024 + 2 * 1025 * 1024 + 1025 * 3584 + 3585 * 3584 + 769 * 1024 + 64 * 1024 + 1024
_DETAILS += 2 * (3 * 1024 + 2 * 1024 * (1536 + 384) + 3 * 1024 * 4096)
PARAMETERS = {
    "mqt-llava-7b": _VICUNA_7B,
    "fastvlm-7b": 7_615_616_512,
    "fastvlm-1.5b": 1_543_714_304,
    "fastvlm-0.5b": 494_032_768,
    "video-xl-7b": 7_615_616_512 + _SUMMARIES,
    "llama-vid-7b-video": _VICUNA_7B + _BERT + _CONTEXT + 1409 * 4096,
    "llama-vid-13b-video": _VICUNA_13B + _BERT + _CONTEXT + 1409 * 5120,
    "llama-vid-7b-336": _VICUNA_7B + _BERT + _CONTEXT + 1409 * 4096,
    "llama-vid-13b-336": _VICUNA_13B + _BERT + _CONTEXT + 1409 * 5120,
    "flashsloth-3.2b": _PHI_2 + _QUERIES,
    "llava-mini-8b": _LLAMA_31_8B + _MINI,
    "llava-mini-8b-video": _LLAMA_31_8B + _MINI,
    "voco-llama-7b": _VICUNA_7B + 2 * 4096,
    "hicom-7b": 7_615_616_512,
    "tg-llava-7b": 7_615_616_512 + _CLIP_TEXT + _GUIDE + _DETAILS,
}
_DECODER = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": 56, "patch_size": 14, "num_channels": 3, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "projection_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_released_sizes(tmp_path, name):
    """Built without memory."""
    model = shapes.build(SHAPES[name], torch.device("meta"), torch.bfloat16, "sdpa", tmp_path)
    core = model.get_model()
    side = [*core.vision_tower.parameters(), *core.mm_projector.parameters()]
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in side) == PARAMETERS[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_every_shape_is_of_an_architecture():
    for shape in SHAPES.values():
        entry = next(entry for entry in ARCHITECTURES if entry.file == shape.architecture)
        assert entry.key == shape.family
    assert {entry.bench for entry in ARCHITECTURES} - {""} <= set(SHAPES)
    assert architecture_shapes.ALL_SHAPES.keys() == {*shapes.SHAPES, *SHAPES}
    assert shapes.shape_of("fastvlm-7b", architecture_shapes.ALL_SHAPES) is SHAPES["fastvlm-7b"]


def test_a_small_mqt_llava_is_measured_with_its_run_parameter(tmp_path):
    from accelerate_methods.bench.run import run_parameters

    shape = dataclasses.replace(SHAPES["mqt-llava-7b"], decoder=_DECODER, tower=_CLIP)
    model, inputs = built(shape, tmp_path)
    work = {}
    for words, tokens in (("", 256), ("num_visual_tokens=12", 12)):
        inputs.call = run_parameters(model, words)
        rows = rows_of(model, inputs, "dense fastv@0.5", "mqt_llava")
        dense = rows["dense"].facts
        layers = rows["fastv@0.5"].facts["prompt_tokens"]["layers"]
        assert dense["visual_tokens"]["before"] == tokens and layers[0] - layers[-1] == tokens // 2
        work[tokens] = dense["tflops"]["projector"], dense["tflops"]["llm_prefill"]
    assert work[12][0] < work[256][0] and work[12][1] < work[256][1]
    with pytest.raises(MethodError, match="outside the allowed range"):
        run_parameters(model, "num_visual_tokens=0")
    plain = types.SimpleNamespace(about=None)
    assert run_parameters(plain, "") == {}
    with pytest.raises(MethodError, match="plain LLaVA"):
        run_parameters(plain, "num_visual_tokens=3")


def test_a_small_fastvlm_is_measured(tmp_path):
    from llava.model.checkpoint import read_config

    small = read_config(GOLDEN / "fastvlm/tiny_fastvlm")["fastvithd_config"]
    llava = {"mm_vision_tower": "mobileclip_ta_128", "mm_hidden_size": 128, "fastvithd_config": small}
    shape = dataclasses.replace(SHAPES["fastvlm-7b"], decoder=_DECODER, llava=llava)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense fastv@0.5", "fastvlm")
    dense = rows["dense"].facts
    assert dense["visual_tokens"]["before"] == 4 and dense["tflops"]["tower"] > dense["tflops"]["projector"] > 0
    assert rows["fastv@0.5"].ok


def test_a_small_video_xl_is_measured(tmp_path):
    llava = SHAPES["video-xl-7b"].llava | {"beacon_window": 16, "beacon_stride": 16, "beacon_ratio": [2]}
    shape = dataclasses.replace(SHAPES["video-xl-7b"], decoder=_DECODER, tower=_CLIP, llava=llava, frames=8)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense random@0.5", "video_xl")
    dense, fewer = rows["dense"].facts, rows["random@0.5"].facts
    entries = 20 + 8 * 4 // 2  # text, and one summary token for two of the four tokens of a frame
    assert dense["kv_cache_bytes"] == entries * 4 * 2 * 2 * 16 * 4
    assert fewer["tflops"]["llm_prefill"] < dense["tflops"]["llm_prefill"]


def test_a_small_llama_vid_is_measured(tmp_path):
    """Its tower and the words of the question are made up, too."""
    bert = tmp_path / "bert"
    bert.mkdir()
    settings = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    settings.save_pretrained(bert)
    small = {
        "mm_hidden_size": 32,
        "eva_heads": 2,
        "eva_depth": 2,
        "image_processor": "clip-56",
        "bert_folder": str(bert),
    }
    llava = SHAPES["llama-vid-7b-video"].llava | small
    shape = dataclasses.replace(SHAPES["llama-vid-7b-video"], decoder=_DECODER, llava=llava, frames=8)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense random@0.5", "llama_vid")
    dense, fewer = rows["dense"].facts, rows["random@0.5"].facts
    assert (dense["visual_tokens"]["before"], fewer["visual_tokens"]["after"]) == (16, 8)


def test_a_small_flashsloth_is_measured(tmp_path):
    decoder = _DECODER | {"num_hidden_layers": 9, "num_key_value_heads": 4}
    tower = _CLIP | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
    shape = dataclasses.replace(
        SHAPES["flashsloth-3.2b"], decoder=decoder, tower=tower, llava={"learnable_token_index": 250}
    )
    shape.llava["query_base_token_id"] = 7
    model, inputs = built(shape, tmp_path)
    assert (inputs.ids == 250).sum() >= len(inputs.ids)
    rows = rows_of(model, inputs, "dense fastv@0.5", "flashsloth")
    assert rows["dense"].facts["visual_tokens"]["before"] == 4 and rows["fastv@0.5"].ok


@pytest.mark.parametrize("frames", [0, 6])
def test_a_small_llava_mini_is_measured(tmp_path, frames):
    decoder = _DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    shape = dataclasses.replace(SHAPES["llava-mini-8b"], decoder=decoder, tower=_CLIP, frames=frames)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense fastv@0.5", "llava_mini")
    dense = rows["dense"].facts
    assert dense["visual_tokens"]["before"] == max(frames, 1) and rows["fastv@0.5"].ok
    entries = inputs.text_tokens + max(frames, 1)
    assert dense["kv_cache_bytes"] == entries * 4 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("frames", [0, 6])
def test_a_small_voco_llama_is_measured(tmp_path, frames):
    shape = dataclasses.replace(
        SHAPES["voco-llama-7b"], decoder=_DECODER, tower=_CLIP, frames=frames, llava={"voco_token_id": 250}
    )
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense random@0.5", "voco_llama")
    dense, fewer = rows["dense"].facts, rows["random@0.5"].facts
    text = inputs.text_tokens - 14  # those behind the tokens
    assert dense["kv_cache_bytes"] == (max(frames, 1) * 2 + text) * 4 * 2 * 2 * 16 * 4 == fewer["kv_cache_bytes"]
    assert fewer["tflops"]["llm_prefill"] < dense["tflops"]["llm_prefill"]


def test_a_small_hicom_is_measured(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    tower = _CLIP | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "text_config": text}
    llava = SHAPES["hicom-7b"].llava | {"hicom_head_dim": 16}
    shape = dataclasses.replace(SHAPES["hicom-7b"], decoder=_DECODER, tower=tower, llava=llava, frames=8)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense fastv@0.5", "hicom")
    dense = rows["dense"].facts
    assert dense["visual_tokens"]["before"] == 2 * 2 * 2 + 32 and rows["fastv@0.5"].ok


def test_a_small_tg_llava_is_measured(tmp_path):
    text = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    small = {"qformer": {"num_attention_heads": 2}, "perceiver": {"num_heads": 4, "head_dim": 6}}
    llava = {"mm_text_hidden_size": 24, "tiny_overrides": small}
    tower = _CLIP | {"text_config": text}
    shape = dataclasses.replace(SHAPES["tg-llava-7b"], decoder=_DECODER, tower=tower, llava=llava)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense fastv@0.5", "tg_llava")
    assert rows["dense"].facts["visual_tokens"]["before"] == 16 + 64 and rows["fastv@0.5"].ok
