"""Pruning a decoder's weights: masks, policies, the search, and checkpoints that load again."""

import importlib.util
import itertools
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accelerate_methods.stages.errors import MethodError
from llava.model.builder import load_pretrained_model
from llava.model.pruning.masks import METHODS, keep_mask, pruned, reconstructed
from llava.model.pruning.policy import Policy, matrices_of, sizes_of, zeros_of
from llava.model.pruning.pruner import Pruner
from llava.model.pruning.samples import Sample, read_entries
from llava.model.pruning.saving import changed_weights, save_checkpoint
from llava.model.pruning.search import Evolution, at_share, search
from tests.support.paths import CHECKPOINTS, ROOT

CHECKPOINT = CHECKPOINTS / "tiny-llava-1.5"
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_for(method, width, seed=1):
    rows = draw(200, width, seed=seed) @ draw(width, width, seed=seed + 1)
    return {"magnitude": None, "wanda": rows.square().mean(0), "sparsegpt": rows.T @ rows / len(rows)}[method]


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "pattern", "ratio"),
    [
        *itertools.product(METHODS, ["unstructured", "columns"], [0.0, 0.25, 0.5, 0.9]),
        *itertools.product(METHODS, ["2:4", "1:4"], [0.0]),
        *[(method, "2:4", 0.5) for method in METHODS],
        *[(method, "1:4", 0.75) for method in METHODS],
    ],
)
def test_as_many_zeros_as_asked_for_and_no_more_the_second_time(method, pattern, ratio):
    weight, inputs = draw(24, 160), inputs_for(method, 160)
    once = pruned(weight, ratio, method, pattern, inputs)
    assert int((once == 0).sum()) == round(ratio * weight.numel())
    if ratio == 0:
        assert torch.equal(once, weight)
    if pattern == "columns":
        assert int((once == 0).all(0).sum()) == round(ratio * 160)
    if ":" in pattern and ratio:
        assert ((once != 0).view(-1, 4).sum(1) == int(pattern[0])).all()
    torch.testing.assert_close(pruned(once, ratio, method, pattern, inputs), once)


def test_what_stays():
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, 1.0, 1.0]])
    assert keep_mask(weight.abs(), 0.5).tolist() == [[True, False, True, True], [False, True, False, False]]
    by_row = pruned(weight, 0.5, "wanda", inputs=torch.tensor([1.0, 100.0, 1.0, 1.0]))
    assert by_row.tolist() == [[4, -1, 0, 0], [1, 5, 0, 0]], "each row by itself, of equal ones the first"


def test_reconstruction_makes_up_for_what_goes():
    weight = draw(32, 160, seed=3)
    rows = draw(500, 160, seed=4) @ draw(160, 160, seed=5)
    products = rows.T @ rows / len(rows)
    errors = {
        method: float((rows @ (pruned(weight, 0.5, method, inputs=given) - weight).T).square().mean())
        for method, given in (("magnitude", None), ("wanda", products.diagonal()), ("sparsegpt", products))
    }
    assert errors["sparsegpt"] < 0.8 * min(errors["wanda"], errors["magnitude"])
    independent = reconstructed(weight[:, :128], 0.5, "unstructured", torch.eye(128))
    torch.testing.assert_close(independent, pruned(weight[:, :128], 0.5, "magnitude"), msg="nothing to make up with")
    silent = products.clone()
    silent[7], silent[:, 7] = 0, 0
    assert reconstructed(weight, 0.5, "unstructured", silent).isfinite().all()


@pytest.mark.parametrize(("pattern", "ratio", "says"), [
    ("2:4", 0.3, "pattern 2:4 prunes 0.5 of a matrix or nothing"), ("4:2", 0.5, "n:m such as 2:4"),
    ("rows", 0.5, "unstructured, columns, or n:m"),
])  # fmt: skip
def test_patterns_that_cannot_be(pattern, ratio, says):
    with pytest.raises(MethodError, match=says):
        pruned(draw(4, 8), ratio, "magnitude", pattern)
    with pytest.raises(MethodError, match="rows of 6 weights are not made of groups of 4"):
        pruned(draw(4, 6), 0.5, "magnitude", "2:4")


# -- search ------------------------------------------------------------------------------------------------------------


def test_a_share_is_kept():
    weights = torch.tensor([0.5, 0.3, 0.2])
    for ratios in (torch.tensor([0.9, 0.1, 0.5]), torch.zeros(3), torch.tensor([5.0, -5.0, 0.5])):
        found = at_share(ratios, weights, 0.4, (0.1, 0.7))
        assert float((found * weights).sum()) == pytest.approx(0.4, abs=1e-4)
        assert found.min() >= 0.1 and found.max() <= 0.7


def test_the_search_finds_what_is_better_than_uniform():
    sizes = {"a": 100, "b": 300, "c": 200}
    best = {"a": 0.7, "b": 0.4, "c": 0.55}
    evolution = Evolution(share=0.5, generations=12, candidates=12, seed=3)

    def fitness(policy):
        assert policy.share(sizes) == pytest.approx(0.5, abs=1e-4)
        return sum((policy.ratios[name] - ratio) ** 2 for name, ratio in best.items())

    found, again = search(sizes, evolution, fitness), search(sizes, evolution, fitness)
    assert found.policy == again.policy, "what is drawn follows from the seed"
    assert found.history == sorted(found.history, reverse=True) and found.fitness < 0.2 * found.history[0]
    asked = []
    few = Evolution(generations=2, candidates=3, parents=2)
    search(sizes, few, fitness, lambda policy: asked.append(policy) or True)
    assert len(asked) == 2, "between the rounds"


def test_numbers_of_a_search_that_cannot_be():
    with pytest.raises(MethodError, match=r"share must be in \[0, 0.95\]"):
        Evolution(share=1.0)
    with pytest.raises(MethodError, match="1 <= parents <= candidates"):
        Evolution(candidates=2, parents=3)


# -- whole models ------------------------------------------------------------------------------------------------------


def load(path):
    return load_pretrained_model(str(path), device_map="cpu", torch_dtype="float32", attn_implementation="sdpa")


@pytest.fixture(scope="module")
def samples():
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    ids = [torch.tensor([row]) for row in ([1, 5, -200, 7, 8, 9, 10], [1, 6, -200, 11, 12, 13], [1, 6, 9, 30])]
    labels = [torch.where(torch.arange(one.shape[1]) < one.shape[1] - 2, -100, one) for one in ids]
    media = [{"images": pixels[:1]}, {"images": pixels[1:]}, {}]
    return [Sample(*parts) for parts in zip(ids, labels, media, strict=True)]


def logits_of(model, samples):
    with torch.no_grad():
        return [model(input_ids=sample.ids, **sample.media).logits for sample in samples]


@pytest.mark.parametrize("method", METHODS)
def test_the_policy_is_what_the_matrices_get(method, samples):
    model = load(CHECKPOINT)[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner, sizes = Pruner(model, samples, method=method), sizes_of(model)
    dense = logits_of(model, samples)
    pruner.prune(Policy.uniform(sizes, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(dense, logits_of(model, samples), strict=True)), "bit for bit"
    policy = Policy({name: 0.2 + 0.05 * (number % 7) for number, name in enumerate(sizes)})
    pruner.prune(policy)
    for name, share in zeros_of(model).items():
        assert share == pytest.approx(policy.ratios[name], abs=0.5 / matrices_of(model)[name].in_features + 1e-6)
    touched = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert touched == {f"{name}.weight" for name in sizes}, "no norm, embedding, head, tower or projector"
    pruner.restore()
    assert all(torch.equal(a, b) for a, b in zip(dense, logits_of(model, samples), strict=True))


def test_the_projector_is_fitted_alone_and_only_if_that_helps(samples):
    model = load(CHECKPOINT)[1]
    pruner = Pruner(model, samples[:2], method="wanda", projector_rate=1e-2)
    policy = Policy.uniform(sizes_of(model), 0.5)
    pruner.try_policy(policy)
    loss, before = pruner.loss(), {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [part.requires_grad for part in model.parameters()]
    assert pruner.fit_projector(policy, 4) and pruner.loss() < loss
    touched = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert touched and all(name.startswith("model.mm_projector.") for name in touched)
    assert [p.requires_grad for n, p in model.named_parameters() if "mm_projector" not in n] == [
        flag for flag, (name, _) in zip(wanted, model.named_parameters(), strict=True) if "mm_projector" not in name
    ]
    pruner.projector_rate = 1e3
    fitted = {name: value.clone() for name, value in model.get_model().mm_projector.state_dict().items()}
    assert not pruner.fit_projector(policy, 2)
    assert all(torch.equal(value, fitted[name]) for name, value in model.get_model().mm_projector.state_dict().items())


def test_a_saved_checkpoint_is_the_model(samples, tmp_path):
    model = load(CHECKPOINT)[1]
    pruner, sizes = Pruner(model, samples, method="magnitude"), sizes_of(model)
    pruner.prune(Policy.uniform(sizes, 0.4))
    target = tmp_path / "pruned"
    save_checkpoint(CHECKPOINT, target, changed_weights(model, projector=True))
    files = {file.name for file in CHECKPOINT.iterdir()}
    assert {file.name for file in target.iterdir()} == files, "the official format"
    one, two = load_file(CHECKPOINT / "model.safetensors"), load_file(target / "model.safetensors")
    assert one.keys() == two.keys() and all(one[name].dtype == two[name].dtype for name in one)
    again = load(target)[1]
    held = {name: value.to(one[name].dtype) for name, value in changed_weights(model, projector=True).items()}
    assert all(torch.equal(two[name], value) for name, value in held.items())
    rounding = 0.02 if one["lm_head.weight"].dtype != torch.float32 else 0.0
    for got, expected in zip(logits_of(again, samples), logits_of(model, samples), strict=True):
        torch.testing.assert_close(got, expected, atol=rounding, rtol=0)
    with pytest.raises(MethodError, match="is there already"):
        save_checkpoint(CHECKPOINT, target, {})
    with pytest.raises(MethodError, match="has no weight nowhere"):
        save_checkpoint(CHECKPOINT, tmp_path / "other", {"nowhere": torch.zeros(1)})


def _script():
    path = ROOT / "scripts" / "prune" / "efficient_llava.py"
    spec = importlib.util.spec_from_file_location("efficient_llava_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script(tmp_path, capsys):
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    entries = [
        {"image": "0.png", "conversations": turns}, {"image": "1.png", "question": "Which color?", "answer": "blue"},
        {"question": "one and one?", "answer": "two"},
    ]  # fmt: skip
    (tmp_path / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
    common = ["--model-path", str(CHECKPOINT), "--samples", str(tmp_path / "samples.json"), "--device", "cpu",
              "--image-folder", str(tmp_path)]  # fmt: skip
    few = ["--generations", "1", "--candidates", "2", "--projector-steps", "1", "--mask", "wanda", "--share", "0.3"]
    assert _script().main([*common, "--output", str(tmp_path / "one"), *few]) == 0
    assert "of the decoder's weights are zero" in capsys.readouterr().out
    said = json.loads((tmp_path / "one" / "pruning_policy.json").read_text(encoding="utf-8"))
    assert said["samples"] == 3 and len(said["fitness"]) == 2
    assert said["share"] == pytest.approx(0.3, abs=0.01), "rows of 64 weights lose whole weights"
    again = [*common, "--output", str(tmp_path / "two"), "--mask", "magnitude"]
    assert _script().main([*again, "--policy", str(tmp_path / "one" / "pruning_policy.json")]) == 0
    model = load(tmp_path / "two")[1]
    for name, share in zeros_of(model).items():
        assert share == pytest.approx(said["ratios"][name], abs=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--output", str(ROOT / "docs"), "is there already"),
        ("--output", str(ROOT / "README.md"), "README.md is no folder"),
        ("--output", str(ROOT / "README.md" / "pruned"), "README.md is no folder"),
        ("--mask", "best", "pruning method 'best'"),
        ("--samples", "nowhere.json", "samples 'nowhere.json' cannot be read"),
        ("--num-samples", "0", "0 samples are too few"),
    ],
)
def test_the_script_refuses_before_it_loads_a_model(option, value, says, tmp_path, capsys):
    given = {"--model-path": "/nowhere", "--output": str(tmp_path), "--samples": "nowhere.json", option: value}
    assert _script().main([word for pair in given.items() for word in pair]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1


def test_samples_that_cannot_be_read(tmp_path):
    file = tmp_path / "samples.jsonl"
    with pytest.raises(MethodError, match="cannot be read"):
        read_entries(file)
    file.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n', encoding="utf-8")
    assert len(read_entries(file, 1)) == 1
    with pytest.raises(MethodError, match="entry 1: 'conversations' of turns, or 'question' and 'answer'"):
        read_entries(file)
    with pytest.raises(MethodError, match="matrix of a pruning policy"):
        (tmp_path / "p.json").write_text('{"model.layers.0.nothing": 0.5}', encoding="utf-8")
        Policy.read(tmp_path / "p.json", {"model.layers.0.mlp.up_proj": 4})
    with pytest.raises(MethodError, match=r"must be in \[0, 1\)"):
        Policy({"a": 1.0})
