"""Questions of :mod:`.test_every_method` as inputs of transformers' own models, and what these answer."""

from __future__ import annotations

import functools
from typing import Any

import torch

from accelerate_methods.hosts.layouts import image_item, video_item
from llava.mm_utils import get_anyres_image_grid_shape
from tests.methods.test_every_method import (
    ANYRES,
    IMAGE,
    IMAGES,
    ONE,
    OV,
    PLAIN,
    TALL,
    TEXT,
    TILE,
    TWO,
    V15,
    V16,
    Item,
    Question,
    pixels,
    video,
)
from tests.support.native_models import native_model, tree_model

IMAGE_TOKEN = 700  # none of the ids that the questions hold as text
VIDEO_TOKEN = IMAGE_TOKEN + 1
PAD = 0

#: what transformers' models take: any-resolution images have tiles, videos of one call are of one length
QUESTIONS = {
    V15: IMAGES,
    V16: ANYRES,
    OV: {
        "wide image": ANYRES["wide image"],
        "two anyres images": Question(TWO, (TILE, TALL)),
        "two images": IMAGES["two images"],
        "video of 1": Question(ONE, (video(1),)),
        "video of 5": Question(ONE, (video(5),)),
        "two videos": Question(TWO, (video(3), video(3, 4))),
        "image and video": Question(TWO, (TILE, video(3))),
    },
}
MAIN = {V15: "two images", V16: "wide image", OV: "image and video"}
BATCH = {
    V15: [TEXT, IMAGES["image"], IMAGES["two images"], Question((IMAGE, 9), (Item(seed=1),))],
    V16: [ANYRES["tall image"], TEXT, Question((IMAGE, 9), (PLAIN,))],
    OV: [
        Question((IMAGE, 9), (video(3, 5),)),
        QUESTIONS[OV]["image and video"],
        TEXT,
        Question((5, 6, IMAGE, 7, 8, 9), (TILE,)),
    ],
}


def native(name: str) -> Any:
    return native_model(name, IMAGE_TOKEN)


def views_of(tree: Any, item: Item) -> int:
    """Views (or frames) of an item."""
    if item.size is None:
        return item.frames
    across, down = get_anyres_image_grid_shape(item.size, tree.config.image_grid_pinpoints, side_of(tree))
    return 1 + across * down


def side_of(tree: Any) -> int:
    return tree.get_vision_tower().image_size


@functools.cache
def length_of(name: str, item: Item) -> int:
    """Rows of an item in the uncompressed prompt."""
    tree = tree_model(name)
    patches = tree.get_vision_tower().num_patches
    newline = torch.zeros(1)
    if item.kind == "video":
        pooled = (int(patches**0.5) + 1) // 2
        return video_item(torch.zeros(item.frames, pooled**2, 1), newline, "one_token", "spatial_unpad").length
    features = torch.zeros(views_of(tree, item), patches, 1)
    return image_item(features, newline, item.size, side_of(tree), tree.config).length


def inputs(name: str, *questions: Question, left: bool = True) -> dict[str, Any]:
    """What the processor of ``name`` would give: expanded placeholders, left (or right) padding, stacked pixels."""
    tree = tree_model(name)
    side = side_of(tree)
    rows = [_expanded(name, question) for question in questions]
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    ids = [[PAD] * n + row if left else row + [PAD] * n for n, row in zip(pads, rows, strict=True)]
    mask = [[0] * n + [1] * len(r) if left else [1] * len(r) + [0] * n for n, r in zip(pads, rows, strict=True)]
    out = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    items = [item for question in questions for item in question.items]
    images, videos = ([i for i in items if i.kind == kind] for kind in ("image", "video"))
    if videos:
        out["pixel_values_videos"] = torch.stack([pixels(v.frames, side, v.seed) for v in videos])
    if images and name == V15:
        out["pixel_values"] = torch.cat([pixels(1, side, i.seed) for i in images])
    elif images:
        views = [pixels(views_of(tree, i), side, i.seed) for i in images]
        most = max(map(len, views))
        padded = [torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in views]
        out["pixel_values"] = torch.stack(padded)
        out["image_sizes"] = torch.tensor([(i.size or (side, side))[::-1] for i in images])
        if any(i.size is None for i in images):
            counts = [sum(i.kind == "image" for i in question.items) for question in questions]
            out["batch_num_images"] = torch.tensor(counts)
    return out


def _expanded(name: str, question: Question) -> list[int]:
    ids, items = [], iter(question.items)
    for token in question.ids:
        if token != IMAGE:
            ids.append(token)
            continue
        item = next(items)
        ids += [IMAGE_TOKEN if item.kind == "image" else VIDEO_TOKEN] * length_of(name, item)
    return ids


GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def answer(model: Any, asked: dict[str, Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids [B, 3] and their logits [B, 3, V]."""
    out = model.generate(**asked, **{**GREEDY, **more}, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, asked["input_ids"].shape[1] :], torch.stack(out.logits, 1)
