"""Every served method on every served model: the same greedy ids and log-probabilities as under transformers."""

import pytest

from tests.hosts.vllm.conftest import MARKS
from tests.support.clip_checkpoints import clip_folder
from tests.support.served_engines import picture
from tests.support.served_methods import PARAMETERS, PICTURES, specification

pytestmark = pytest.mark.engine
every_model = pytest.mark.parametrize("checkpoint", sorted(MARKS), indirect=True)
UNIFORM = {"method": "uniform", "retention_ratio": 0.25}
#: why a method does not act on a family's images or videos
REFUSED = ("cannot act on", "needs")


@every_model
@pytest.mark.parametrize("name", [None, *PARAMETERS])
def test_answers_are_those_of_transformers(served, reference, media, name):
    asked = None if name is None else specification(name)
    compared = 0
    for kind, make in media.items():
        medium = make(seed=PICTURES.get(name, 0)) if kind == "image" else make()
        prompt = served.prompt([medium], method=asked)
        try:
            answer = served.ask(prompt)[0]
        except ValueError as error:
            assert any(reason in str(error) for reason in REFUSED), error
            continue
        expected = reference.answer(prompt)
        assert answer.ids == expected.ids, kind
        assert answer.near(expected, 1e-3), kind
        compared += 1
    if name in (None, "uniform", "mmtok"):
        assert compared == len(media)
    if not compared:
        pytest.skip(f"{name} does not act on this model, and says so")


@every_model
def test_mixed_requests_of_one_batch_do_not_touch_each_other(served, media):
    prompts = [
        served.prompt([make(seed=seed)], method=method)
        for make in media.values()
        for seed, method in enumerate((UNIFORM, None, {**UNIFORM, "retention_ratio": 0.5}, {"method": "none"}))
    ]
    together = served.ask(*prompts)
    assert together == [served.ask(prompt)[0] for prompt in prompts]


@every_model
def test_several_media_per_prompt(served, reference, media):
    makers = list(media.values())
    prompt = served.prompt([makers[0](seed=1), makers[-1](seed=2)], method=UNIFORM)
    answer, expected = served.ask(prompt)[0], reference.answer(prompt)
    assert answer.ids == expected.ids
    assert answer.near(expected, 1e-3)


@every_model
def test_the_same_image_under_another_question_is_another_one(served, reference):
    for method in ("mmtok", "cdpruner"):
        for text in ("What colour is the square?", "Blue?"):
            prompt = served.prompt([picture(seed=3)], text, specification(method))
            assert served.ask(prompt)[0].near(reference.answer(prompt), 1e-3), text
    with pytest.raises(ValueError, match="this prompt says nothing"):
        served.ask({**served.prompt([picture()], method={"method": "mmtok"}), "prompt": served.marks["image"]})


@pytest.mark.parametrize("checkpoint", ["llava_1_5"], indirect=True)
def test_a_question_is_compared_in_clips_own_space(served, reference):
    method = {**specification("cdpruner"), "text_tower": str(clip_folder("tiny-llava-1.5"))}
    prompt = served.prompt([picture(seed=3)], method=method)
    answer, expected = served.ask(prompt)[0], reference.answer(prompt)
    assert answer.near(expected, 1e-3)
    assert not answer.near(served.one(picture(seed=3), method=specification("cdpruner")), 1e-3)
    with pytest.raises(ValueError, match="text tower"):
        served.one(picture(), method={**method, "text_tower": "/nowhere"})


@every_model
def test_videos_of_different_lengths_in_one_step(served, media):
    if "video" not in media:
        pytest.skip("no videos")
    for method in (None, UNIFORM):
        prompts = [served.prompt([media["video"](frames, seed=7)], method=method) for frames in (4, 8, 6)]
        assert served.ask(*prompts) == [served.ask(prompt)[0] for prompt in prompts]


@every_model
def test_a_repeated_prompt_hits_the_prefix_cache_and_answers_alike(served):
    prompt = served.prompt([picture(seed=5)], method=UNIFORM)
    assert served.ask(prompt) == served.ask(prompt)


@pytest.mark.parametrize("checkpoint", ["llava_1_5", "qwen2_5_vl"], indirect=True)
def test_requests_that_are_put_off_go_on_where_they_were(served):
    """Four answers that do not fit into the cache together; one after the other they do."""
    prompts = [served.prompt([picture(seed=20 + seed)], method=UNIFORM) for seed in range(4)]
    scheduler = served.llm.llm_engine.engine_core.engine_core.scheduler
    look_up, resumed = scheduler.kv_cache_manager.get_computed_blocks, []

    def watched(request):
        found = look_up(request)
        if request.num_preemptions:
            resumed.append(found[1])
        return found

    put_off = served.counted("vllm:num_preemptions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler.kv_cache_manager, "get_computed_blocks", watched)
        together = served.ask(*prompts, tokens=140)
    assert served.counted("vllm:num_preemptions") > put_off
    assert max(resumed) > 0, "no request found its first blocks in the prefix cache again"
    put_off = served.counted("vllm:num_preemptions")
    assert together == [served.ask(prompt, tokens=140)[0] for prompt in prompts]
    assert served.counted("vllm:num_preemptions") == put_off


@every_model
def test_retentions_share_no_cache_entry(served):
    lengths = [served.one(picture(seed=6), method={**UNIFORM, "retention_ratio": r}).prompt for r in (0.25, 0.5, 1.0)]
    dense = served.one(picture(seed=6)).prompt
    assert lengths[0] < lengths[1] < lengths[2] <= dense


@every_model
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "uniforn"}, "Did you mean 'uniform'"),
        ({"method": "uniform", "ratio": 0.5}, "unknown parameter"),
        ({"method": "uniform", "retention_ratio": 2}, "retention_ratio"),
        ({"method": "fastv"}, "between decoder layers"),
        ({"retention_ratio": 0.5}, "names no method"),
        (7, "must be a method's name or a mapping"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(served, asked, said):
    with pytest.raises(ValueError, match=said):
        served.one(picture(), method=asked)
    assert served.one(picture(), method=UNIFORM).ids
