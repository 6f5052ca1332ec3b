"""PixelPrune beyond its golden cases: pictures rebuilt from what stays, slow restatements, and Qwen-VL models."""

import itertools

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.pixelprune import kept_positions
from accelerate_methods.stages.pixels import PixelCells, PixelMethod, check_choice
from tests.hosts.native import test_internvl as internvl
from tests.support import qwen_inputs as qwen

METRICS = ("max", "mae", "rmse")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def picture(rows, columns, levels=3, seed=0, noise=0.0, scale=(1.0,) * 3):
    """Cells of few different looks, so that many are like a neighbour, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    looks = torch.rand(levels, 2, 3, 4, generator=generator)
    which = torch.randint(0, levels, (rows, columns), generator=generator)
    same = torch.rand(rows, columns, generator=generator) < 0.6
    for row, column in itertools.product(range(rows), range(1, columns)):
        which[row, column] = which[row, column - 1] if same[row, column] else which[row, column]
    values = looks[which]
    return PixelCells(values + noise * torch.rand(values.shape, generator=generator), scale)


def distance(one, other, metric):
    off = (one - other).abs()
    return {"max": off.max(), "mae": off.mean(), "rmse": off.square().mean().sqrt()}[metric]


def slowly(cells, metric, threshold, anchored=True):
    """Kept cells, one after the other, and the picture that they rebuild."""
    rows, columns = cells.grid
    values, rebuilt = cells.values, cells.values.clone()
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for row, column in itertools.product(range(rows), range(columns)):
        seen = rebuilt if anchored else values
        if not row and not column:
            kept[0, 0] = True
            continue
        if not row:
            guess = seen[0, column - 1]
        elif not column:
            guess = seen[row - 1, 0]
        else:
            a, b, c = seen[row, column - 1], seen[row - 1, column], seen[row - 1, column - 1]
            edge = distance(c, a, metric) <= threshold and distance(c, b, metric) > threshold
            guess = b if edge else a
        kept[row, column] = distance(values[row, column], guess, metric) > threshold
        if not kept[row, column]:
            rebuilt[row, column] = guess
    return kept, rebuilt


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (8, 1), (6, 7), (12, 5)])
def test_the_picture_can_be_rebuilt_from_what_stays(rows, columns):
    cells = picture(rows, columns)
    kept = accelerate_methods.get("pixelprune").choose(cells)
    expected, rebuilt = slowly(cells, "max", 0)
    assert torch.equal(kept, expected) and torch.equal(rebuilt, cells.values)
    assert torch.equal(kept, accelerate_methods.get("pixelprune", metric="exact", threshold=0.5).choose(cells))
    assert kept[0, 0] and (rows * columns == 1 or not kept.all())


@pytest.mark.parametrize(("metric", "seed", "anchored"), itertools.product(METRICS, range(4), [True, False]))
def test_with_a_threshold(metric, seed, anchored):
    cells = picture(7 + seed, 9, levels=4, seed=seed, noise=0.12)
    threshold = {"max": 0.1, "mae": 0.035, "rmse": 0.042}[metric] * (1 + seed)
    method = accelerate_methods.get("pixelprune", metric=metric, threshold=threshold, anchored=anchored)
    expected, rebuilt = slowly(cells, metric, threshold, anchored)
    assert torch.equal(method.choose(cells), expected)
    assert 1 < expected.sum() < expected.numel(), "some stay, some go"
    if anchored:
        pairs = zip(cells.values.flatten(0, 1), rebuilt.flatten(0, 1), strict=True)
        assert max(distance(one, other, metric) for one, other in pairs) <= threshold, "no rebuilt token is further off"


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (30, 1), (1, 30), (20, 2), (2, 20)])
def test_narrow_pictures_with_a_threshold(rows, columns):
    """The last token of a row is no neighbour of the first one of the next."""
    cells = picture(rows, columns, levels=2, noise=0.12)
    expected, _ = slowly(cells, "max", 0.1)
    assert torch.equal(accelerate_methods.get("pixelprune", threshold=0.1).choose(cells), expected)


@pytest.mark.parametrize(
    ("scan", "threshold", "seed"), itertools.product(["raster", "serpentine"], [0.0, 0.11], range(3))
)
def test_runs(scan, threshold, seed):
    cells = picture(6, 40, levels=2, seed=seed, noise=0.1 * (threshold > 0))
    order = torch.arange(240).view(6, 40)
    if scan == "serpentine":
        order[1::2] = order[1::2].flip(1)
    values, kept = cells.values.flatten(0, 1), torch.zeros(240, dtype=torch.bool)
    last = None
    for cell in order.flatten().tolist():
        kept[cell] = last is None or distance(values[cell], values[last], "max") > threshold
        last = cell if kept[cell] else last
    got = accelerate_methods.get("pixelprune", scan=scan, threshold=threshold).choose(cells)
    assert torch.equal(got.flatten(), kept) and 1 < kept.sum() < 240


def test_distances_are_those_of_pixels_between_0_and_1():
    cells = picture(6, 8, levels=4, noise=0.12)
    scale = (0.5, 0.25, 2.0)
    given = PixelCells(cells.values / torch.tensor(scale)[:, None], scale)
    for metric, threshold in zip(METRICS, (0.1, 0.035, 0.042), strict=True):
        method = accelerate_methods.get("pixelprune", metric=metric, threshold=threshold)
        assert torch.equal(method.choose(cells), method.choose(given))


def test_a_choice_that_does_not_fit_is_refused():
    cells = picture(2, 3)
    with pytest.raises(MethodError, match=r"must return a bool tensor \[2, 3\]"):
        check_choice("mine", torch.ones(3, 2, dtype=torch.bool), cells)
    with pytest.raises(MethodError, match="nothing is left of the image"):
        check_choice("mine", torch.zeros(2, 3, dtype=torch.bool), cells)


# -- Qwen-VL models ----------------------------------------------------------------------------------------------------


def flat_areas(inputs, seed=0):
    """The same inputs with pixels of which many tokens repeat the one before."""
    draw = torch.Generator().manual_seed(seed)
    for name in {"pixel_values", "pixel_values_videos"} & set(inputs):
        tokens = inputs[name].view(-1, 4, inputs[name].shape[1])
        for number in range(1, len(tokens)):
            if torch.rand(1, generator=draw) < 0.6:
                tokens[number] = tokens[number - 1]
    return inputs


def ask(model, *questions):
    return flat_areas(qwen.inputs(model, *[qwen.QUESTIONS.get(q, q) for q in questions]))


class Everything(PixelMethod):
    name = "everything"

    def choose(self, cells):
        return torch.ones(cells.grid, dtype=torch.bool)


@pytest.mark.parametrize("name", qwen.MODELS)
def test_all_kept_is_the_dense_model_bit_for_bit(name):
    model = qwen.qwen(name)
    inputs = ask(model, "image and video")
    dense = model(**inputs).logits
    with accelerate(model, Everything()):
        assert torch.equal(model(**inputs).logits, dense)


def encoded_slowly(model, inputs, masks, first):
    """[K, D] what the merger gives of the images' kept tokens, every segment of every block run by itself."""
    visual, config = model.model.visual, model.config.vision_config
    caught, grids = {}, inputs["image_grid_thw"].tolist()

    def note(number):
        def hook(module, args, kwargs):
            caught[number] = args[0] if args else kwargs["hidden_states"]
            caught["rotary"] = kwargs["position_embeddings"]

        return hook

    hooks = [block.register_forward_pre_hook(note(n), with_kwargs=True) for n, block in enumerate(visual.blocks)]
    visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    window = getattr(config, "window_size", 0) // config.spatial_merge_size // config.patch_size
    segments, windows, kept, base = [], [], [], 0
    for (_, rows, columns), mask in zip(grids, masks, strict=True):
        rows, columns = rows // 2, columns // 2
        place = torch.arange(rows * columns)
        if window:
            number = place // columns // window * 1000 + place % columns // window
            order = torch.argsort(number, stable=True)
        else:
            number, order = torch.zeros_like(place), place
        left = [(base + at, int(number[cell])) for at, cell in enumerate(order.tolist()) if mask.flatten()[cell]]
        segments.append([at for at, _ in left])
        windows += [[at for at, of in left if of == one] for one in dict.fromkeys(of for _, of in left)]
        back = {int(cell): base + at for at, cell in enumerate(order.tolist())}
        kept += [back[cell] for cell in mask.flatten().nonzero().flatten().tolist()]
        base += rows * columns
    states = caught[first].unflatten(0, (-1, 4))
    rotary = [table.unflatten(0, (-1, 4)) for table in caught["rotary"]]
    whole = getattr(config, "fullatt_block_indexes", range(len(visual.blocks)))
    for number in range(first, len(visual.blocks)):
        for part in segments if number in whole else windows:
            ends = torch.tensor([0, 4 * len(part)], dtype=torch.int32)
            tables = tuple(table[part].flatten(0, 1) for table in rotary)
            out = visual.blocks[number](states[part].flatten(0, 1), cu_seqlens=ends, position_embeddings=tables)
            states[part] = out.unflatten(0, (-1, 4))
    return visual.merger(states[kept].flatten(0, 1))


@pytest.mark.parametrize(("name", "first"), itertools.product(qwen.MODELS, [0, 1, 2]))
def test_blocks_see_what_is_left(name, first):
    model = qwen.qwen(name)
    inputs = ask(model, "two images")
    method = accelerate_methods.get("pixelprune", vit_layer=first)
    grids = [(rows // 2, columns // 2) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    parts = inputs["pixel_values"].split([4 * rows * columns for rows, columns in grids])
    masks = [method.choose(PixelCells.of_patches(part, grid, 4, 2)) for part, grid in zip(parts, grids, strict=True)]
    assert all(1 < mask.sum() < mask.numel() for mask in masks)
    expected = encoded_slowly(model, inputs, masks, first)
    with accelerate(model, method):
        found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    got = torch.cat([part[mask.flatten()] for part, mask in zip(found, masks, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", qwen.MODELS)
def test_a_batch_is_its_prompts_one_by_one(name):
    model, questions = qwen.qwen(name), ["two images", qwen.TEXT, "image and video", "image"]
    with accelerate(model, "pixelprune"):
        with record() as requests:
            together = ask(model, *questions)
            batch = model.generate(**together, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        first = {"pixel_values": 0, "pixel_values_videos": 0}
        for sample, question in enumerate(questions):
            alone = qwen.inputs(model, qwen.QUESTIONS.get(question, question))
            for pixels in {*first} & {*alone}:
                count = len(alone[pixels])
                alone[pixels] = together[pixels][first[pixels] : first[pixels] + count]
                first[pixels] += count
            with record() as own:
                one = model.generate(**alone, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert torch.equal(batch[sample, -3:], one[0, -3:])
            for item, same in zip(requests[0].samples[sample].items, own[0].samples[0].items, strict=True):
                assert torch.equal(item.kept, same.kept) and int(item.kept.sum()) == item.tokens_after
                assert (item.tokens_after < item.tokens_before) == (item.modality == "image")


def test_an_image_of_several_frames_and_labels():
    model = qwen.qwen(qwen.QWEN3)
    inputs = ask(model, (5, qwen.image(8, 12), 30, 31))
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"][:48], inputs["pixel_values"][:48]])
    inputs["image_grid_thw"] = torch.tensor([[2, 6, 8]])
    with accelerate(model, "pixelprune"), record() as requests:
        out = model(**inputs, labels=inputs["input_ids"])
    (item,) = requests[0].samples[0].items
    one, two = item.kept
    assert torch.equal(one, two) and 1 < one.sum() < 12, "every frame for itself"
    assert out.loss.isfinite()


def test_what_is_refused():
    model = qwen.qwen(qwen.QWEN3)
    with pytest.raises(MethodError, match=r"vit_layer=7 is outside the allowed range \[-1, 6\]"):
        accelerate(model, "pixelprune", vit_layer=7)
    with pytest.raises(MethodError, match="signals of vision blocks are not read"):
        accelerate(model, "pixelprune+visionzip")


@pytest.mark.parametrize("variant", ["hf", "vllm"])
def test_positions_of_a_whole_prompt(variant):
    """All tokens kept: the numbers that transformers gives."""
    model = qwen.qwen(qwen.QWEN3)
    inputs = qwen.inputs(model, qwen.QUESTIONS["two images"])
    ids, grid = inputs["input_ids"], inputs["image_grid_thw"]
    expected, delta = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grid)
    grids = [(1, rows // 2, columns // 2) for _, rows, columns in grid.tolist()]
    keep = [torch.arange(rows * columns) for _, rows, columns in grids]
    positions, more, rows = kept_positions(ids[0], qwen.IMAGE, grids, keep, variant)
    assert torch.equal(positions, expected[:, 0]) and more == int(delta)
    assert torch.equal(rows, torch.arange(ids.shape[1]))


# -- InternVL ----------------------------------------------------------------------------------------------------------


def screens(name, model):
    """The inputs of a question with tiles of few colours, and which tokens of each tile stay."""
    asked = internvl.inputs(name)
    side = int(internvl.PER_TILE**0.5)
    views, _, height, _ = asked["pixel_values"].shape
    colors = torch.randint(0, 2, (views, 1, side, side), generator=torch.Generator().manual_seed(3)).float()
    cell = height // side
    asked["pixel_values"] = colors.repeat_interleave(cell, 2).repeat_interleave(cell, 3).expand(-1, 3, -1, -1).clone()
    cells = [PixelCells(tile[0, ..., None, None, None].expand(-1, -1, 1, 3, 1)) for tile in colors]
    return asked, [accelerate_methods.get("pixelprune").choose(one) for one in cells]


@pytest.mark.parametrize(("variant", "first"), itertools.product(["plain", "6b"], [0, 1, -1]))
def test_internvl_tiles(variant, first):
    """Tokens of a tile see what is left of it, block after block; the prompt is cut to them."""
    model = internvl.internvl(variant)
    asked, masks = screens("tiled image", model)
    assert len({int(mask.sum()) for mask in masks}) > 1, "tiles keep different numbers"
    given = []
    hook = model.model.language_model.rotary_emb.register_forward_hook(lambda module, args, out: given.append(args[1]))
    with accelerate(model, "pixelprune", vit_layer=first):
        with record() as requests:
            logits = model(**asked).logits
        hook.remove()
        features = model.model.get_image_features(asked["pixel_values"]).pooler_output
    (item,) = requests[0].samples[0].items
    assert torch.equal(item.kept, torch.stack(masks).flatten(1)) and item.tokens_after == int(item.kept.sum())
    assert logits.shape[1] == asked["input_ids"].shape[1] - item.tokens_before + item.tokens_after
    rows = torch.ones(asked["input_ids"].shape[1], dtype=torch.bool)
    rows[(asked["input_ids"][0] == internvl.IMAGE).nonzero().squeeze(1)] = item.kept.flatten()
    assert torch.equal(given[0][0], rows.nonzero().squeeze(1)), "what is left has the numbers of the whole prompt"
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    blocks = layer if layer > 0 else len(tower.encoder.layer) + 1 + layer
    states = tower.embeddings(asked["pixel_values"])
    states = states[0] if isinstance(states, tuple) else states
    side, done = int(internvl.PER_TILE**0.5), []
    for tile, mask in zip(states, masks, strict=True):
        patches = mask.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
        rows, alone = torch.cat([torch.ones(1, dtype=torch.bool), patches]), tile[None]
        for number in range(blocks):
            alone = alone[:, rows] if number == first else alone
            alone = tower.encoder.layer[number](alone)
            alone = alone[0] if isinstance(alone, tuple) else alone
        alone = tower.layernorm(alone) if layer == -1 else alone
        full = tile.new_zeros(1, len(rows), tile.shape[-1])
        full[:, rows] = alone if alone.shape[1] == int(rows.sum()) else alone[:, rows]
        shuffled = model.model.pixel_shuffle(full[:, 1:].view(1, 2 * side, 2 * side, -1), scale_factor=0.5)
        done.append(model.model.multi_modal_projector(shuffled.flatten(1, 2))[0])
    for got, expected, mask in zip(features, done, masks, strict=True):
        torch.testing.assert_close(got[mask.flatten()], expected[mask.flatten()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "middle"])
def test_internvl_with_all_tokens_is_the_dense_model(variant):
    model, asked = internvl.internvl(variant), internvl.inputs("tiled image")
    dense = model(**asked).logits
    with accelerate(model, "pixelprune"):
        assert torch.equal(model(**asked).logits, dense)
    with pytest.raises(MethodError, match="signals of vision blocks are not read"):
        accelerate(model, "pixelprune+visionzip")
