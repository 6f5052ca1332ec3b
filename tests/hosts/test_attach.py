"""Attaching methods to models, saying which ones, and recording what they did."""

import re
import threading
import types
from pathlib import Path

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, Pipeline, UnknownNameError, accelerate, detach, record, resolve
from accelerate_methods.hosts import host_for

IMAGE = -200
OV, V15, VIDEO = "tiny-llava-onevision", "tiny-llava-1.5", "tiny-llava-video"


def ids(*values):
    return torch.tensor([values])


def frames(count=4, seed=0, side=384):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def logits(model, count=4):
    return model(input_ids=ids(5, IMAGE, 7, 8), images=[frames(count)], modalities=["video"]).logits


def length(model):
    return logits(model).shape[1]


DENSE, TENTH = 4 * 196 + 1 + 3, 4 * 19 + 1 + 3


def test_context_manager_and_call(tiny):
    model = tiny(OV)
    before, names = logits(model), list(model.state_dict())
    with accelerate(model, "fastvid") as attached:
        assert length(model) <= TENTH and "attached to" in repr(attached)
        assert list(model.state_dict()) == names
    assert "detached from" in repr(attached)
    assert torch.equal(logits(model), before) and "acceleration" not in model.__dict__
    attached = accelerate(model, "uniform", retention_ratio=0.1)
    assert length(model) == 78 + 1 + 3
    attached.detach()
    attached.detach()
    assert torch.equal(logits(model), before)
    with pytest.raises(MethodError, match="detached"), attached:
        pass


def test_leaves_the_block_after_an_error(tiny):
    model = tiny(OV)
    with pytest.raises(RuntimeError, match="mine"), accelerate(model, "fastvid"):
        raise RuntimeError("mine")
    assert length(model) == DENSE


def test_nesting(tiny):
    model = tiny(OV)
    with accelerate(model, "uniform", retention_ratio=0.5):
        half = length(model)
        with accelerate(model, "uniform", retention_ratio=0.1):
            assert length(model) < half
            with accelerate(model, None):
                assert length(model) == DENSE
            assert length(model) < half
        assert length(model) == half
    assert length(model) == DENSE


def test_order_of_detaching(tiny):
    model = tiny(OV)
    first = accelerate(model, "uniform", retention_ratio=0.5)
    second = accelerate(model, "uniform", retention_ratio=0.1)
    with pytest.raises(MethodError, match="later"):
        first.detach()
    second.detach()
    first.detach()
    assert length(model) == DENSE
    with accelerate(model, "fastvid"):
        detach(model)
        assert length(model) == DENSE
    assert length(model) == DENSE


def test_two_models_two_methods(tiny):
    one, two = tiny(OV), tiny(VIDEO)
    dense = logits(two).shape[1]
    with accelerate(one, "uniform", retention_ratio=0.5):
        assert logits(two).shape[1] == dense
        with accelerate(two, "random", retention_ratio=0.1):
            assert length(one) == 4 * 98 + 1 + 3 and logits(two).shape[1] < dense / 2
    assert type(one).acceleration is None


def test_composition_errors():
    with pytest.raises(MethodError, match=r"fastvid and uniform both act at the compress stage"):
        resolve(["fastvid", {"method": "uniform", "retention_ratio": 0.5}])
    with pytest.raises(MethodError, match="compress"):
        resolve("fastvid+fastvid")


@pytest.mark.parametrize(
    ("spec", "params", "hint"),
    [
        ("fastvd", {}, "Did you mean 'fastvid'"),
        ("fastvid", {"retention_rato": 0.1}, "Did you mean 'retention_ratio'"),
        ("fastvid/llava_onevison", {}, "Did you mean 'fastvid/llava_onevision'"),
        ("fastvid+rndom_prefill", {}, "Did you mean 'random_prefill'"),
        ("fastvid+random_prefill", {"fastvd.c": 2}, "Did you mean 'fastvid.c'"),
        ({"method": "fastvid", "parms": {"c": 2}}, {}, "Did you mean 'p'|unknown"),
        ({"method": "fastvid", "params": {}, "extra": 1}, {}, "extra"),
        ({"methods": ["fastvid"], "extra": 1}, {}, "'extra'. Allowed: description, methods, model"),
    ],
)
def test_unknown_names(spec, params, hint):
    with pytest.raises(UnknownNameError, match=hint):
        resolve(spec, **params)


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        ("fastvid", {"retention_ratio": 1.5}, r"outside the allowed range \(0, 1\]"),
        ("fastvid", {"c": 0}, r"outside the allowed range \[1"),
        ("fastvid", {"c": "8"}, "must be an integer"),
        ("random", {}, "exactly one budget"),
        ("random", {"retention_ratio": 0.5, "tokens_per_frame": 3}, "exactly one budget"),
        ("fastvid+random_prefill", {"retention_ratio": 0.5}, "ambiguous"),
        (None, {"retention_ratio": 0.5}, "no method to apply"),
        (42, {}, "cannot make a method out of int"),
        (b"fastvid", {}, "cannot make a method out of bytes"),
        ({"params": {}}, {}, "no 'method'"),
        ({"methods": "fastvid"}, {}, "'methods' must be a list of methods, got 'fastvid'"),
        ({"methods": 3}, {}, "'methods' must be a list of methods, got 3"),
        ({"method": ["fastvid"]}, {}, "'method' must be a name, got .* in a list 'methods'"),
        ("fastvid@0.25", {}, r"called 'fastvid', and parameters are given beside it \(retention_ratio=0.25\)"),
        ({"method": "fastvid(c=2)"}, {}, r"beside it \(c=2\)"),
        (Path("/nowhere/mine.yaml"), {}, "config /nowhere/mine.yaml: no such file"),
    ],
)
def test_wrong_values(spec, params, message):
    with pytest.raises(MethodError, match=message):
        resolve(spec, **params)


def test_ways_to_name_a_method(tmp_path):
    wanted = accelerate_methods.get("fastvid", retention_ratio=0.2)
    config = tmp_path / "mine.yaml"
    config.write_text("description: test\nmethod: fastvid\nparams:\n  retention_ratio: 0.2\nmodel: {pretrained: x}\n")
    for spec in (
        wanted, Pipeline((wanted,)), [wanted], {"method": "fastvid", "retention_ratio": 0.2}, str(config), config,
        {"methods": [{"method": "fastvid", "params": {"retention_ratio": 0.2}}]}, {"methods": [wanted]},
    ):  # fmt: skip
        assert resolve(spec) == Pipeline((wanted,))
    assert (
        resolve("fastvid", retention_ratio=0.2)
        == resolve(wanted)
        == resolve("fastvid", **{"fastvid.retention_ratio": 0.2})
    )
    assert resolve(str(config), c=4).methods[0].c == 4
    assert resolve(config, tokens_per_frame=9).methods[0].retention_ratio is None, "a count replaces the ratio"
    for nothing in (None, "", "none", "dense", "DENSE", [], {"method": None}, {"method": "dense"}, Pipeline()):
        assert resolve(nothing) == Pipeline() and resolve(nothing).name == "dense"
    config.write_text("- fastvid\n")
    with pytest.raises(MethodError, match="expected a mapping"):
        resolve(config)


def test_prefixed_parameters():
    pipeline = resolve("fastvid + random_prefill", **{"fastvid.c": 4, "random_prefill.layer": 1})
    assert pipeline.stages == ("compress", "prefill") and pipeline.name == "fastvid+random_prefill"
    assert pipeline.compress.c == 4 and pipeline.prefills[0].layer == 1
    assert resolve(pipeline.to_dict()) == pipeline
    assert "c=4" in pipeline.describe() and "layer=1" in pipeline.describe()


def test_shipped_configs():
    from accelerate_methods.registry.configs import config_names, read_config

    names = config_names()
    assert "fastvid/llava_onevision" in names
    for name in names:
        assert isinstance(read_config(name), dict)
        assert resolve(name).methods or "dense" in name


def test_refused_on_clip(tiny):
    with pytest.raises(
        MethodError, match=r"fastvid needs .*pooling_attention, which this LLaVA-1.5 model cannot give"
    ):
        accelerate(tiny(V15), "fastvid")
    assert "acceleration" not in tiny(V15).__dict__


@pytest.mark.parametrize("method", ["dycoke", "prunevid"])
@pytest.mark.parametrize(("name", "family"), [(V15, "LLaVA-1.5"), ("tiny-llava-1.6", "LLaVA-NeXT")])
def test_a_video_method_on_a_model_without_videos(tiny, name, family, method):
    """It would attach and change nothing."""
    with pytest.raises(MethodError, match=f"{method} cannot act on {family} models: .* they have image only.*config"):
        accelerate(tiny(name), method)
    assert "acceleration" not in tiny(name).__dict__


def test_llava_next_video_checkpoints_take_video_methods(tiny):
    """Official ones say in their config how videos are pooled."""
    with accelerate(tiny("tiny-llava-1.6", mm_spatial_pool_mode="average"), "dycoke") as attached:
        assert attached.pipeline.name == "dycoke"


def test_layer_out_of_range_is_an_error_at_once(tiny):
    with pytest.raises(MethodError, match=r"layers 0\.\.5"):
        accelerate(tiny(OV), "random_prefill", layer=6)


def test_unknown_model():
    for model in (torch.nn.Linear(1, 1), "model", None):
        with pytest.raises(MethodError, match=r"no host for .*LLaVA-OneVision"):
            host_for(model)


def test_wrappers_are_told_where_their_model_is(tiny):
    model = tiny(OV)
    inside = types.SimpleNamespace(model=model)  # as a pipeline or a trainer holds it
    adapted = types.SimpleNamespace(get_base_model=lambda: model)  # as peft does
    for wrapper, where in (
        (torch.nn.DataParallel(model), ".module"),
        (torch.compile(model, backend="eager"), "._orig_mod"),
        (inside, ".model"),
        (types.SimpleNamespace(module=adapted), ".module.get_base_model()"),
    ):
        with pytest.raises(MethodError, match=f"wrapper around a model.*its {re.escape(where)}"):
            accelerate(wrapper, "fastvid")


def test_composed_stages(tiny):
    model = tiny(OV)
    with accelerate(model, "fastvid+random_prefill", **{"random_prefill.layer": 3}), record() as requests:
        model.generate(
            ids(5, IMAGE, 7, 8), images=[frames()], modalities=["video"], max_new_tokens=3, eos_token_id=None
        )
    sample = requests[0].samples[0]
    kept = sample.visual_tokens_after
    assert requests[0].layer_lengths(0) == [sample.length] * 3 + [sample.length - kept + kept // 4] * 3
    assert sample.length == kept + 1 + 3


# -- recording ---------------------------------------------------------------------------------------------------------


def test_records_tell_where_in_the_decoder_tokens_left(tiny):
    model = tiny(OV)
    with record() as requests:
        for method in ("fastv", "random+fastv"):
            params = {"fastv.r": 0.75, "random.retention_ratio": 0.5} if "+" in method else {"r": 0.75}
            with accelerate(model, method, **params):
                logits(model)
    for request, entering in zip(requests, (4 * 196, 2 * 196), strict=True):
        (item,) = request.samples[0].items
        assert item.num_layers == 6 and item.tokens_after == entering
        counts = torch.bincount(item.left_at.flatten(), minlength=7).tolist()
        assert counts[0] == 4 * 196 - entering and counts[2] + counts[6] == entering
        # one of the candidates is the newline after the video
        assert abs(counts[6] - (entering + 1) / 4) <= 1 and torch.equal(item.left_at > 0, item.owner >= 0)
        assert request.layer_lengths(0)[1] - request.layer_lengths(0)[2] in (counts[2], counts[2] + 1)


def test_records(tiny):
    model = tiny(OV)
    with record() as requests:
        model.generate(
            ids(5, IMAGE, 7, 8), images=[frames()], modalities=["video"], max_new_tokens=4, eos_token_id=None
        )
        with accelerate(model, "fastvid"):
            logits(model)
        model.generate(ids(5, 6, 7), max_new_tokens=2, eos_token_id=None)
    dense, compressed, text = requests
    assert dense.samples[0].dense_length == dense.samples[0].length == DENSE
    assert dense.samples[0].visual_tokens_before == dense.samples[0].visual_tokens_after == 4 * 196
    assert set(dense.stage_ms) == {"vision", "compress", "prefill", "decode"} and dense.decode_steps == 3
    assert dense.layer_lengths(0) == [DENSE] * 6 and dense.samples[0].items[0].kept.all()

    sample = compressed.samples[0]
    item = sample.items[0]
    assert sample.dense_length == DENSE and sample.visual_tokens_before == 4 * 196
    assert sample.visual_tokens_after == item.tokens_after <= 4 * 19
    assert sample.length == item.tokens_after + 1 + 3 and compressed.layer_lengths(0) == [sample.length] * 6
    assert item.modality == "video" and item.grid == (14, 14) and item.owner.shape == (4, 196)
    assert sum(item.info["segment_sizes"]) == 4 and compressed.decode_steps == 0
    assert set(compressed.stage_ms) == {"vision", "compress", "prefill"}

    assert text.samples[0].items == [] and text.samples[0].length == 3 and text.decode_steps == 1


def test_records_of_a_batch_and_of_beams(tiny):
    model = tiny(OV)
    batch = torch.tensor([[5, IMAGE, 7, 8], [5, 6, 7, 8]])
    with accelerate(model, "random_prefill", layer=1, retention_ratio=0.5), record() as requests:
        model.generate(
            batch, images=[frames(2)], modalities=["video"], max_new_tokens=2, eos_token_id=None, num_beams=2
        )
    request = requests[0]
    assert [s.length for s in request.samples] == [2 * 196 + 1 + 3, 4]
    assert request.layer_lengths(0) == [396] + [200] * 5 and request.layer_lengths(1) == [4] * 6


def test_nothing_is_recorded_outside(tiny):
    with record() as outer:
        with record() as inner:
            logits(tiny(OV), 1)
        assert (len(inner), len(outer)) == (1, 0)
    logits(tiny(OV), 1)
    assert (len(inner), len(outer)) == (1, 0)


def test_threads_do_not_see_each_other(tiny):
    model, counts = tiny(OV), {}

    def work(name, times, listen):
        if not listen:
            logits(model, 1)
            return
        with record() as requests:
            for _ in range(times):
                logits(model, 1)
            counts[name] = len(requests)

    with record() as outer:
        threads = [threading.Thread(target=work, args=a) for a in (("a", 1, True), ("b", 2, True), ("c", 1, False))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts == {"a": 1, "b": 2} and outer == []
