"""PruneVid beyond the golden vectors: small cases by hand, invariances, edge cases, and its stage inside a decoder."""

import dataclasses
import math
import random

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import accelerate_methods
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.ops.density import density_peak_scores, dpc_knn, squared_distances
from accelerate_methods.ops.segment import refine_runs, run_lengths
from accelerate_methods.prunevid import Group, best_per_group, frame_scenes, static_similarity
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.prefill import VisualSpan


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def get(**params):
    return accelerate_methods.get("prunevid", **params)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(frames, per_frame, width=16, scenes=2, still=0.4, seed=0):
    """Scenes of random content in which a share of the positions hardly changes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(scenes, per_frame, width, generator=generator)
    static = torch.rand(scenes, per_frame, 1, generator=generator) < still
    scene = torch.arange(frames) * scenes // frames
    noise = torch.randn(frames, per_frame, width, generator=generator)
    return torch.where(static[scene], base[scene] + 0.2 * noise, 0.5 * base[scene] + noise)


def flat(frames):
    positions = torch.arange(frames.shape[0] * frames.shape[1]).view(frames.shape[:2])
    return VisualItem("video", frames, positions, positions.numel())


def compress(frames, **params):
    return get(**params).compress(flat(frames))


# -- clustering --------------------------------------------------------------------------------------------------------


def cluster_reference(x, clusters, k):
    """Section 3.1 token by token, in float64; equal densities: the lower index is the denser."""
    x = x.double()
    n = len(x)
    d = [[float((x[i] - x[j]).square().sum().sqrt() / math.sqrt(x.shape[1])) for j in range(n)] for i in range(n)]
    rho = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, n)) for row in d]
    farthest = max(map(max, d))
    score = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        score.append((min(denser) if denser else farthest) * rho[i])
    centres = sorted(range(n), key=lambda i: -score[i])[:clusters]
    labels = [min(range(len(centres)), key=lambda c: d[i][centres[c]]) for i in range(n)]
    for label, centre in enumerate(centres):
        labels[centre] = label
    return labels, centres


@pytest.mark.parametrize(("size", "clusters", "k"), [(1, 1, 7), (5, 2, 7), (24, 6, 5), (40, 20, 7), (40, 1, 1)])
def test_clusters_equal_the_slow_way(size, clusters, k):
    for seed in range(4):
        x = randn(size, 8, seed=seed)
        labels, centres = dpc_knn(x[None], clusters, k)
        expected, expected_centres = cluster_reference(x, clusters, k)
        assert labels[0].tolist() == expected and centres[0].tolist() == expected_centres


def test_clusters_of_a_batch_equal_those_one_by_one():
    x = randn(5, 30, 8)
    labels, centres = dpc_knn(x, 9, 7)
    for row in range(5):
        one, one_centres = dpc_knn(x[row : row + 1], 9, 7)
        assert torch.equal(labels[row], one[0]) and torch.equal(centres[row], one_centres[0])


def test_two_heaps():
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.3]])
    labels, centres = dpc_knn(x[None], 2, 3)
    assert labels[0].tolist() == [0, 0, 0, 1, 1, 1] or labels[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert set(centres[0].tolist()) == {1, 4}


def test_cluster_numbers_out_of_range_are_clipped():
    x = randn(1, 4, 3)
    assert dpc_knn(x, 0, 7)[0].tolist() == [[0] * 4]
    assert sorted(dpc_knn(x, 99, 7)[0][0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_equal_tokens_are_clustered_by_index(value):
    labels, centres = dpc_knn(torch.full((1, 40, 8), value), 4, 7)
    assert centres[0].tolist() == [0, 1, 2, 3] and labels[0].tolist() == [0, 1, 2, 3] + [0] * 36


def test_tokens_far_apart_are_clustered_as_if_they_were_not():
    """Densities underflow at this scale; the official noise would decide."""
    x = randn(1, 60, 8)
    far = x * 100
    assert (density_peak_scores(far, 7)[0] == 0).any()
    # densities are exp(-scale * spread): with more scale, the same order of densities
    spread = squared_distances(x).topk(7, largest=False).values.mean(-1)
    first = dpc_knn(far, 3, 7)[1][0, 0]
    assert first == spread.argmin()


def test_squared_distances_both_ways():
    x = randn(2, 60, 8) + 3
    assert torch.allclose(squared_distances(x), squared_distances(x, exact=True), atol=1e-4)
    assert (squared_distances(x).diagonal(dim1=1, dim2=2) == 0).all()


# -- scenes ------------------------------------------------------------------------------------------------------------


def refine_reference(labels):
    """Section 3.2 frame by frame."""
    labels, free = list(labels), None
    runs, start = [], 0
    for length in run_lengths(labels):
        runs.append((labels[start], start, length))
        start += length
    out = list(labels)
    for label in set(labels):
        most = max(n for v, _, n in runs if v == label)
        for v, at, n in runs:
            if v == label and (most == 1 or n < most):
                out[at : at + n] = [free] * n
    i = 0
    while i < len(out):
        if out[i] is not free:
            i += 1
            continue
        end = i
        while end < len(out) and out[end] is free:
            end += 1
        left = right = 0
        while i - left - 1 >= 0 and out[i - left - 1] == out[i - 1]:
            left += 1
        while end + right < len(out) and out[end + right] == out[end]:
            right += 1
        value = 0 if not left and not right else out[i - 1] if left >= right else out[end]
        out[i:end] = [value] * (end - i)
    return out


def test_refining_equals_the_slow_way():
    draw = random.Random(0)
    for _ in range(3000):
        labels = [draw.randrange(draw.choice([1, 2, 3, 5])) for _ in range(draw.choice([1, 2, 5, 8, 16, 32]))]
        assert refine_runs(labels) == refine_reference(labels), labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], [0] * 3 + [1] * 13),  # the spec's example
        ([3], [0]),
        ([2, 1, 0], [0, 0, 0]),  # nothing stands
        ([5, 1, 1], [1, 1, 1]),
        ([1, 1, 5], [1, 1, 1]),
        ([1, 1, 5, 2, 2], [1, 1, 1, 2, 2]),  # equal neighbours: the left one
        ([1, 1, 5, 2, 2, 2], [1, 1, 2, 2, 2, 2]),
        ([1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1]),  # two runs of a label that tie are two scenes
        ([1, 1, 5, 1, 1], [1, 1, 1, 1, 1]),
    ],
)
def test_refining_by_hand(labels, expected):
    assert refine_runs(labels) == expected


def test_scenes_of_a_video():
    frames = torch.cat([base.expand(n, 4, 8) for base, n in zip(randn(4, 4, 8), (7, 9, 8, 8), strict=True)])
    _, scenes = frame_scenes(frames + 0.01 * randn(32, 4, 8), 0.125, 7)
    assert run_lengths(scenes) == [7, 9, 8, 8]


def test_frames_that_are_there_twice_do_not_both_become_centres():
    """Without a rule for ties both copies would: neither is denser than the other."""
    for seed in range(5):
        frames = video(8, 6, scenes=4, seed=seed).repeat_interleave(2, 0)
        _, centres = dpc_knn(frames.mean(1)[None], 4, 7, exact=True)
        assert len({int(c) // 2 for c in centres[0]}) == 4
        for size in run_lengths(frame_scenes(frames, 0.25, 7)[1]):
            assert size % 2 == 0


# -- static and dynamic ------------------------------------------------------------------------------------------------


def test_similarity_is_the_mean_over_pairs():
    frames, sizes = randn(7, 5, 6), [3, 1, 2, 1]
    similarity, means = static_similarity(frames, sizes)
    start = 0
    for scene, size in enumerate(sizes):
        part = frames[start : start + size].double()
        torch.testing.assert_close(means[scene], part.mean(0).float())
        pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
        if pairs:
            expected = sum(torch.cosine_similarity(part[i], part[j], dim=-1) for i, j in pairs) / len(pairs)
            torch.testing.assert_close(similarity[scene], expected.float())
        else:
            assert (similarity[scene] == -torch.inf).all()
        start += size


def test_merging_by_hand():
    """Two frames of three positions: the first two stay the same, the third turns round."""
    frames = torch.tensor([[[1.0, 0], [0, 2], [3, 0]], [[3.0, 0], [0, 4], [-3, 0]]])
    out = compress(frames)
    assert out.info == {"static_sizes": [2], "dynamic_sizes": [2], "window_sizes": [2]}
    assert out.tokens.tolist() == [[2, 0], [0, 3], [3, 0], [-3, 0]]
    assert out.owner.tolist() == [[0, 1, 2], [0, 1, 3]]
    assert out.positions.tolist() == [0, 1, 2, 5]
    assert out.order == "given" and out.newlines == "last"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("frames", "per_frame"), [(16, 36), (9, 25), (32, 16), (2, 49), (1, 30), (1, 1), (3, 1)])
def test_sizes_order_and_owners_agree(frames, per_frame, dtype):
    source = video(frames, per_frame).to(dtype)
    out = compress(source)
    static, dynamic, windows = (out.info[name] for name in ("static_sizes", "dynamic_sizes", "window_sizes"))
    assert sum(windows) == frames and sum(static) + sum(dynamic) == len(out.tokens)
    assert all(d % w == 0 for d, w in zip(dynamic, windows, strict=True))
    assert out.tokens.dtype == dtype and len(set(out.positions.tolist())) == len(out.positions)
    # every token is the mean of those it holds, and stands where one of them stood
    flat_owner, flat_source = out.owner.flatten(), source.flatten(0, 1).float()
    assert (flat_owner >= 0).all()
    assert torch.equal(flat_owner[out.positions], torch.arange(len(out.positions)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for token in range(len(out.tokens)):
        mean = flat_source[flat_owner == token].mean(0)
        assert torch.allclose(out.tokens[token].float(), mean, atol=tolerance, rtol=tolerance)
    # groups stand one after the other: static tokens in the first frame of their scene, then frame by frame
    expected, start = [], 0
    for still, moving, window in zip(static, dynamic, windows, strict=True):
        expected += [start] * still + [f for f in range(start, start + window) for _ in range(moving // window)]
        start += window
    assert (out.positions // per_frame).tolist() == expected


def test_a_static_token_holds_its_positions_in_every_frame_of_the_scene():
    out = compress(video(8, 30, still=0.7))
    static = [n for n in range(len(out.tokens)) if len({int(f) for f in (out.owner == n).nonzero()[:, 0]}) > 1]
    assert len(static) == sum(out.info["static_sizes"]) > 0
    start = 0
    for still, window in zip(out.info["static_sizes"], out.info["window_sizes"], strict=True):
        first = out.owner[start]
        for frame in range(start, start + window):
            same = torch.isin(first, torch.tensor(static))
            assert torch.equal(out.owner[frame][same], first[same])
        assert len(first[same].unique()) == still
        start += window


# -- invariances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "per_frame"), [(16, 36), (8, 15), (5, 14)])
def test_identical_frames_become_one(frames, per_frame):
    out = compress(randn(1, per_frame, 16).expand(frames, -1, -1).contiguous())
    count = per_frame // 2 if per_frame > 14 else per_frame
    assert out.info == {"static_sizes": [count], "dynamic_sizes": [0], "window_sizes": [frames]}


def test_sizes_do_not_depend_on_the_basis():
    frames = video(16, 36)
    sizes = compress(frames).info
    rotation = torch.linalg.qr(randn(16, 16, seed=1).double()).Q.float()
    for changed in (frames[..., torch.randperm(16)], frames @ rotation):
        assert compress(changed).info == sizes


def test_tau_above_one_leaves_nothing_static():
    out = compress(video(16, 36, still=1.0), tau=1.01)
    assert sum(out.info["static_sizes"]) == 0 and len(out.tokens) == 16 * 18
    assert sum(compress(video(16, 36), tau=-1.0).info["dynamic_sizes"]) == 0


def test_noise_on_video_without_ties_changes_no_size():
    frames, state = video(16, 36), torch.get_rng_state()
    quiet, noisy = compress(frames), compress(frames, tie_noise=1e-6)
    assert quiet.info == noisy.info and torch.equal(compress(frames, tie_noise=1e-6).tokens, noisy.tokens)
    assert torch.equal(state, torch.get_rng_state())


def test_small_groups_keep_their_order():
    out = compress(video(8, 14, still=0.0), tau=2.0)
    assert out.positions.tolist() == list(range(8 * 14)) and torch.equal(
        out.tokens, flat(video(8, 14, still=0.0)).dense()
    )
    assert len(compress(video(8, 14, still=0.0), tau=2.0, min_tokens=13).tokens) == 8 * 7


@pytest.mark.parametrize("kind", ["zero", "constant", "signs"])
def test_ties(kind):
    frames = {"zero": torch.zeros(8, 20, 4), "constant": torch.full((8, 20, 4), 2.5), "signs": randn(8, 20, 4).sign()}
    first, again = compress(frames[kind]), compress(frames[kind])
    assert torch.equal(first.tokens, again.tokens) and torch.isfinite(first.tokens).all()
    if kind == "constant":
        assert first.info == {"static_sizes": [10], "dynamic_sizes": [0], "window_sizes": [8]}


@pytest.mark.parametrize("layout", ["one_token", "grid", "frame", "no_token"])
def test_one_newline_after_the_video(layout):
    frames, newline = video(4, 16), torch.full((16,), 7.0)
    item = video_item(frames, newline, layout, "spatial_unpad")
    out = get().compress(item)
    sequence = assemble(item, out)
    count = len(out.tokens)
    assert torch.equal(sequence.tokens[:count], out.tokens), "the given order"
    assert sequence.is_content.tolist() == [True] * count + [False] * (layout != "no_token")
    if layout != "no_token":
        assert torch.equal(sequence.tokens[count], newline)
    assert torch.equal(out.tokens, compress(frames).tokens), "newlines play no part"


# -- quotas ------------------------------------------------------------------------------------------------------------


def keep_reference(scores, groups):
    keep = set(range(len(scores)))
    for start, size, quota in groups:
        rows = sorted(range(start, start + size), key=lambda r: (-scores[r], r))
        keep -= set(rows[quota:])
    return sorted(keep)


def test_quotas_equal_the_slow_way():
    draw = random.Random(1)
    for _ in range(100):
        batch, samples, length = draw.choice([1, 3]), [], 40
        for _ in range(batch):
            start, groups = draw.randrange(5), []
            while draw.random() < 0.8 and start < 30:
                size = draw.randrange(8)
                groups.append(Group(start, size, size, draw.randint(0, size)))
                start += size + draw.choice([0, 0, 3])
            samples.append(groups)
        scores = torch.randint(6, (batch, length), generator=torch.Generator().manual_seed(draw.randrange(99))).float()
        visual = torch.zeros(batch, length, dtype=torch.bool)
        for row, groups in enumerate(samples):
            for group in groups:
                visual[row, group.start : group.start + group.length] = True
        keep = best_per_group(scores, visual, samples)
        for row, groups in enumerate(samples):
            expected = keep_reference(scores[row].tolist(), [(g.start, g.count, g.quota) for g in groups])
            assert keep[row].nonzero().flatten().tolist() == expected


def test_newlines_inside_a_group_always_stay():
    visual = torch.tensor([[False, True, True, False, True, True, False, False]])
    scores = torch.tensor([[9.0, 1, 2, 0, 4, 3, 0, 9]])
    keep = best_per_group(scores, visual, [[Group(1, 6, 4, 2)]])
    assert keep[0].nonzero().flatten().tolist() == [0, 3, 4, 5, 6, 7]


# -- inside a decoder --------------------------------------------------------------------------------------------------

LAYERS, WIDTH = 4, 32
INFO = {"static_sizes": [5, 0], "dynamic_sizes": [6, 8], "window_sizes": [2, 1]}  # groups of 5, 3, 3, 0 and 8
_models = {}


def make(dtype=torch.float32):
    """A tiny random Qwen2 with grouped heads and biases."""
    if dtype not in _models:
        torch.manual_seed(2)
        config = Qwen2Config(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        _models[dtype] = Qwen2ForCausalLM(config).eval().to(dtype)
    return _models[dtype]


@dataclasses.dataclass
class Prompt:
    """Text of random embeddings around videos; ``spans`` as (start, content, newlines after it, info)."""

    length: int
    spans: list
    seed: int = 0

    def embeds(self):
        return randn(1, self.length, WIDTH, seed=self.seed)

    def layout(self, pad=0):
        visual = torch.zeros(1, self.length + pad, dtype=torch.bool)
        spans = []
        for start, content, newlines, info in self.spans:
            visual[0, start + pad : start + pad + content] = True
            spans.append(VisualSpan(start + pad, content + newlines, "video", content, info))
        return PromptLayout(visual, [self.length], [spans])


def run(prompts, steps=4, dtype=torch.float32, **params):
    """Greedy through the loop, padded on the left: kept rows, logits of every step, cache."""
    model, width = make(dtype), max(p.length for p in prompts)
    method = get(**{"selected_layer": 1, "merging": False, **params})
    pads = [width - p.length for p in prompts]
    embeds = torch.cat(
        [torch.cat([torch.zeros(1, n, WIDTH), p.embeds()], 1) for n, p in zip(pads, prompts, strict=True)]
    )
    mask = torch.tensor([[0] * n + [1] * p.length for n, p in zip(pads, prompts, strict=True)])
    layouts = [p.layout(n) for n, p in zip(pads, prompts, strict=True)]
    layout = PromptLayout(
        torch.cat([part.visual for part in layouts]), [p.length for p in prompts], [part.spans[0] for part in layouts]
    )
    cache, logits, next_positions = DynamicCache(config=model.config), [], []
    inputs, positions, kept = embeds.to(dtype), (mask.cumsum(1) - 1).clamp(min=0), None
    for step in range(steps):
        out = run_decoder(
            model.model, Pipeline((method,)), inputs_embeds=inputs, attention_mask=mask, past_key_values=cache,
            position_ids=positions, use_cache=True, layout=layout if not step else None,
        )  # fmt: skip
        if not step and out.kept is not None:
            valid = out.kept_valid if out.kept_valid is not None else torch.ones_like(out.kept, dtype=torch.bool)
            kept = [(r[v] - n).tolist() for r, v, n in zip(out.kept, valid, pads, strict=True)]
        logits.append(model.lm_head(out.last_hidden_state)[:, -1])
        inputs, positions = model.model.embed_tokens(logits[-1].argmax(-1)[:, None]), None
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        next_positions.append(cache.accelerate_state.next_position.flatten().tolist())
    return kept, torch.stack(logits, 1), cache, next_positions


def weights_of(prompt, layer):
    """[H, L, L] softmax of layer ``layer`` without rotary embedding and mask, from the model's own parts."""
    model = make()
    hidden = model.model(inputs_embeds=prompt.embeds(), output_hidden_states=True).hidden_states[layer]
    block = model.model.layers[layer]
    normed, attention = block.input_layernorm(hidden)[0], block.self_attn
    query = attention.q_proj(normed).view(prompt.length, 4, 8).transpose(0, 1)
    key = attention.k_proj(normed).view(prompt.length, 2, 8).transpose(0, 1).repeat_interleave(2, 0)
    return (query @ key.transpose(1, 2) / math.sqrt(8)).softmax(-1)


ONE = Prompt(32, [(3, 19, 1, INFO)])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_selection_by_hand(layer):
    """Groups at rows 3..7, 8..10, 11..13 and 14..21; the newline in row 22 asks too."""
    kept, _, cache, positions = run([ONE], selected_layer=layer)
    scores = weights_of(ONE, layer)[:, 22:].amax((0, 1)).tolist()
    expected = keep_reference(scores, [(3, 5, 2), (8, 3, 1), (11, 3, 1), (14, 8, 3)])
    assert kept == [expected] and len(expected) == 32 - 12
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [len(expected) + 3] * LAYERS
    assert positions == [[32], [33], [34], [35]]


def test_selection_equals_a_run_without_cache():
    """Layers above see the kept rows with their old positions; generated tokens see the kept rows in every layer."""
    model, (kept, logits, _, _) = make(), run([ONE], steps=3)
    rows = torch.tensor(kept[0])
    embeds, generated = ONE.embeds(), []
    for _ in range(3):
        length = embeds.shape[1]
        alive = torch.cat([rows, torch.arange(32, length)])
        hidden, positions = embeds, torch.arange(length)[None]
        for index, block in enumerate(model.model.layers):
            if index == 2:
                hidden, positions = hidden[:, alive], alive[None]
            size = hidden.shape[1]
            allowed = torch.ones(size, size, dtype=torch.bool).tril()
            if index < 2:
                allowed[32:] &= torch.isin(torch.arange(length), alive)
            mask = torch.zeros(1, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)
            rope = model.model.rotary_emb(hidden, positions)
            out = block(hidden, attention_mask=mask, position_embeddings=rope)
            hidden = out[0] if isinstance(out, tuple) else out
        generated.append(model.lm_head(model.model.norm(hidden))[:, -1])
        embeds = torch.cat([embeds, model.model.embed_tokens(generated[-1].argmax(-1)[:, None])], 1)
    torch.testing.assert_close(torch.stack(generated, 1), logits, atol=1e-4, rtol=1e-4)


def test_alpha_one_prunes_nothing():
    model = make()
    kept, logits, _, _ = run([ONE], steps=1, alpha=1.0)
    assert kept is None
    dense = model.lm_head(model.model(inputs_embeds=ONE.embeds()).last_hidden_state)[:, -1]
    torch.testing.assert_close(logits[:, 0], dense, atol=1e-4, rtol=1e-4)


def test_groups_too_small_for_alpha_vanish():
    kept, _, _, _ = run([ONE], alpha=0.1)
    assert kept == [[0, 1, 2, *range(22, 32)]]


def test_after_the_last_layer_only_the_cache_is_cut():
    model = make()
    kept, logits, cache, _ = run([ONE], steps=1, selected_layer=LAYERS - 1)
    assert len(kept[0]) == 20 and cache.get_seq_length(LAYERS - 1) == 20
    dense = model.lm_head(model.model(inputs_embeds=ONE.embeds()).last_hidden_state)[:, -1]
    torch.testing.assert_close(logits[:, 0], dense, atol=1e-4, rtol=1e-4)


BATCH = [
    ONE,
    Prompt(26, [(2, 19, 0, INFO)], seed=1),
    Prompt(
        40, [(1, 8, 1, {"static_sizes": [4], "dynamic_sizes": [4], "window_sizes": [2]}), (12, 19, 1, INFO)], seed=2
    ),
    Prompt(9, [], seed=3),
    Prompt(20, [(4, 10, 0, {})], seed=4),
]


def test_batch_equals_one_by_one():
    kept, logits, _, _ = run(BATCH)
    for row, prompt in enumerate(BATCH):
        one_kept, one_logits, _, _ = run([prompt])
        assert kept[row] == (one_kept[0] if one_kept else list(range(prompt.length)))
        torch.testing.assert_close(logits[row], one_logits[0], atol=1e-4, rtol=1e-4)


def test_several_videos_have_groups_of_their_own_and_one_question():
    prompt = BATCH[2]
    scores = weights_of(prompt, 1)[:, 31:].amax((0, 1)).tolist()
    groups = [(1, 4, 1), (5, 2, 0), (7, 2, 0), (12, 5, 2), (17, 3, 1), (20, 3, 1), (23, 8, 3)]
    assert run([prompt])[0] == [keep_reference(scores, groups)]


@pytest.mark.parametrize(
    "info", [{}, {"segment_sizes": [3]}, {"static_sizes": [9], "dynamic_sizes": [0], "window_sizes": [1]}]
)
def test_a_video_that_something_else_compressed_is_one_group(info):
    prompt = Prompt(24, [(4, 10, 1, info)])
    scores = weights_of(prompt, 1)[:, 14:].amax((0, 1)).tolist()
    assert run([prompt])[0] == [keep_reference(scores, [(4, 10, 4)])]


def test_without_a_question_everything_stays():
    assert run([Prompt(22, [(3, 19, 0, INFO)])])[0] is None


def test_many_rows_are_looked_at_in_parts(monkeypatch):
    whole = run([ONE])[0]
    monkeypatch.setattr("accelerate_methods.prunevid._ROW_LIMIT", 3 * 32)
    assert run([ONE])[0] == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(dtype):
    kept, logits, _, _ = run([ONE], dtype=dtype)
    assert logits.dtype == dtype and len(kept[0]) == 20


def test_stages():
    assert get().stages == ("compress", "prefill")
    assert get(merging=False).stages == ("prefill",) and get(selection=False).stages == ("compress",)
    assert get().prefill_layers(28) == (11,) and get(selected_layer=3).prefill_layers(4) == (4,)
    with pytest.raises(MethodError, match=r"selected_layer=10.*0\.\.5"):
        get().prefill_layers(6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": 0}, {"gamma": 1.1}, {"beta": 0.0}, {"alpha": 0}, {"alpha": 2}, {"tau": -1.5}, {"tau": "high"},
        {"selected_layer": -1}, {"selected_layer": 1.5}, {"k": 0}, {"min_tokens": -1}, {"tie_noise": -1e-6},
        {"merging": False, "selection": False},
    ],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises(MethodError, match="prunevid"):
        get(**wrong)
