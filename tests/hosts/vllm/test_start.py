"""What the plugin does while an engine starts: encoder budget, models that it refuses, releases. None is started."""

from types import SimpleNamespace

import pytest
import torch

from accelerate_methods.hosts import vllm as plugin
from accelerate_methods.hosts.vllm.spec import KEY, VARIABLE, method_of, sent
from accelerate_methods.stages.errors import MethodError

pytestmark = pytest.mark.engine
UNIFORM = {"method": "uniform", "retention_ratio": 0.25}
BUDGET, DENSE, KEPT = 2048, 800, 200


def request(name, dense=DENSE, kept=KEPT, items=1):
    """As vLLM's, of videos; without a method where ``dense`` is None."""
    from accelerate_methods.hosts.vllm.processing import FIELD

    data = {}
    if dense is not None:
        text = torch.frombuffer(bytearray(sent(method_of(UNIFORM), dense)), dtype=torch.uint8)
        data = {f"{FIELD}video": SimpleNamespace(data=text)}
    features = [SimpleNamespace(identifier=f"{name}/{i}", modality="video", data=data) for i in range(items)]
    return SimpleNamespace(request_id=name, mm_features=features, get_num_encoder_embeds=lambda i: kept)


def admitted(manager, requests, budget=BUDGET):
    """Names of the requests of which a step encodes an item, by the scheduler's way of asking."""
    found = []
    for one in requests:
        scheduled = 0
        for index in range(len(one.mm_features)):
            if not manager.can_allocate(one, index, budget, scheduled):
                break
            scheduled += one.get_num_encoder_embeds(index)
            budget -= one.get_num_encoder_embeds(index)
            manager.allocate(one, index)
            found.append(one.request_id)
    manager.get_freed_mm_hashes()
    return found


def managers():
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    from accelerate_methods.hosts.vllm.encoder_budget import DenseEncoderBudget

    return EncoderCacheManager(10_000), DenseEncoderBudget(10_000)


def test_a_step_encodes_as_many_items_as_without_a_method():
    stock, ours = managers()
    dense = admitted(stock, [request(f"d{i}", None, DENSE) for i in range(8)])
    requests = [request(f"r{i}") for i in range(8)]
    assert admitted(ours, requests) == ["r0", "r1"] == [name.replace("d", "r") for name in dense]
    assert admitted(ours, requests[2:]) == ["r2", "r3"], "the next step has its own budget"
    assert len(admitted(managers()[0], requests)) == 8, "vLLM's own count takes all at once"


def test_items_of_one_request_and_items_without_a_method_spend_of_the_same_budget():
    _, ours = managers()
    several = request("several", items=3)
    assert admitted(ours, [several]) == ["several", "several"]
    mixed = [request("a"), request("b", None, DENSE), request("c")]
    assert admitted(ours, mixed) == ["a", "b"]


def test_an_item_larger_than_the_budget_is_encoded_alone():
    _, ours = managers()
    large = [request(f"large{i}", dense=3 * BUDGET) for i in range(2)]
    assert admitted(ours, large) == ["large0"]
    assert admitted(ours, large[1:]) == ["large1"]


def test_what_the_cache_holds_is_counted_by_rows_that_are_kept():
    from accelerate_methods.hosts.vllm.encoder_budget import DenseEncoderBudget

    ours = DenseEncoderBudget(2 * KEPT)
    assert admitted(ours, [request("a"), request("b")]) == ["a", "b"]
    assert ours.num_free_slots == 0


def engine_of(monkeypatch, told, multimodal=True):
    from vllm.config.ec_manager_config import EncoderCacheManagerConfig

    monkeypatch.delenv(VARIABLE, raising=False)
    hf_config = SimpleNamespace() if told is None else SimpleNamespace(**{KEY: told})
    model = SimpleNamespace(hf_config=hf_config, multimodal_config=None, is_multimodal_model=multimodal)
    return SimpleNamespace(model_config=model, ec_manager_config=EncoderCacheManagerConfig())


def hook(architecture):
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    plugin.register()
    plugin.register()
    found = MODELS_CONFIG_MAP[architecture]
    assert not isinstance(found._before, plugin.ConfigHook), "registered twice"
    return found


@pytest.mark.parametrize(("told", "own"), [(None, False), ("none", True), (UNIFORM, True)])
def test_the_scheduler_is_changed_where_the_engine_is_told_of_compression(monkeypatch, told, own):
    engine = engine_of(monkeypatch, told)
    hook("LlavaForConditionalGeneration").verify_and_update_config(engine)
    found = engine.ec_manager_config.get_encoder_cache_manager_obj()
    assert (None if found is None else found.__name__) == ("DenseEncoderBudget" if own else None)


def test_a_method_for_a_model_that_has_none_ends_the_start(monkeypatch):
    other = hook("Gemma3ForConditionalGeneration")
    with pytest.raises(MethodError, match="uniform cannot be served on Gemma3ForConditionalGeneration"):
        other.verify_and_update_config(engine_of(monkeypatch, UNIFORM))
    other.verify_and_update_config(engine_of(monkeypatch, None))
    other.verify_and_update_config(engine_of(monkeypatch, "none"))
    draft = engine_of(monkeypatch, None, multimodal=False)
    monkeypatch.setenv(VARIABLE, "uniform")
    other.verify_and_update_config(draft)


def test_an_unknown_release_ends_the_start(monkeypatch):
    """vLLM goes on without a plugin that cannot be imported, but not without one that refuses."""
    import vllm.plugins

    found = SimpleNamespace(name="ours", value="", load=lambda: plugin.register)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [found])
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(MethodError, match=r"this is vLLM 0\.99\.0"):
        vllm.plugins.load_general_plugins()


@pytest.mark.parametrize("cut", [0, 4, 11])
def test_the_second_model_runner_gets_the_same_positions_and_plain_embeddings(cut):
    """vLLM's class for it, which runs on GPUs only, with everything around it made up: two requests of one step, of
    the second only what is not computed yet."""
    pruning = pytest.importorskip("vllm.v1.worker.gpu.model_states.mm_pruning")
    from accelerate_methods.hosts.vllm import grids
    from accelerate_methods.hosts.vllm.qwen_vl import QwenEncoding
    from tests.hosts.vllm.test_grids import IMAGE, VIDEO, case

    ids, before, columns, _, _ = case()
    width, length = 5, len(ids)
    model = object.__new__(QwenEncoding)
    model._carries, model.config = True, SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
    rows = [torch.cat([torch.rand(len(part), width), part], dim=1) for part in columns]
    places = [(2, 3), (9, 5)]  # offset and rows of the items of `case`
    features = [SimpleNamespace(mm_position=position(*place)) for place in places]
    staged = {}
    rope = SimpleNamespace(
        read_prefill_positions=lambda index, n: before[:, :n].int(),
        update_prefill_positions=lambda index, found, delta: staged.update({index: (found, delta)}),
    )
    pruner = pruning.MultiModalPruner(
        model, rope, SimpleNamespace(mm_features={"a": features, "b": features}), inputs_embeds_size=width
    )
    # as the runner gathers them: of each item the rows that the step computes
    window = [(rows[i], max(0, cut - offset)) for i, (offset, count) in enumerate(places) if offset + count > cut]
    embeds = [*rows, *(part[start:] for part, start in window)]
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        idx_mapping_np=torch.tensor([1, 0]),
        prefill_len_np=torch.tensor([length, length]),
        num_computed_prefill_tokens_np=torch.tensor([0, cut]),
        num_scheduled_tokens=torch.tensor([length, length - cut]),
    )
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids.expand(2, -1)))
    clean = pruner.recompute(embeds, batch, states)
    assert [tuple(part.shape) for part in clean] == [(len(part), width) for part in embeds]
    assert all(torch.equal(a, b[:, :width]) for a, b in zip(clean, pruner.strip(embeds), strict=True))
    whole = grids.with_encoded(ids, (IMAGE, VIDEO), before, 0, columns)
    assert torch.equal(staged[1][0].long(), whole)
    assert torch.equal(staged[0][0][:, cut:].long(), whole[:, cut:])
    assert staged[0][1] == staged[1][1] == int(whole[:, -1].max()) + 1 - length


def position(offset, length):
    from vllm.multimodal.inputs import PlaceholderRange

    return PlaceholderRange(offset, length)
