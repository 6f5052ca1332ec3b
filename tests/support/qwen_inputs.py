"""Tiny Qwen-VL models of transformers, prompts for them as a processor writes them, and naive signals."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from accelerate_methods.stages.compress import VisualItem
from tests.support.hand_cut import Dense
from tests.support.paths import CHECKPOINTS

QWEN2, QWEN25, QWEN3 = "tiny-qwen2-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl"
MODELS = (QWEN2, QWEN25, QWEN3)
START, END, IMAGE, VIDEO = 290, 291, 292, 293


@functools.cache
def qwen(name: str) -> Any:
    """The model in float32. There is no checkpoint of Qwen2-VL: its weights are drawn here."""
    if name != QWEN2:
        path = str(CHECKPOINTS / name)
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    text = {
        **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
    }
    vision = {
        **{"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        "initializer_range": 0.2,
    }
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2VLForConditionalGeneration(config).eval()


@dataclasses.dataclass(frozen=True)
class Visual:
    """An image (one frame) or a video of frames x rows x columns patches."""

    kind: str
    frames: int
    rows: int
    columns: int

    @property
    def per_frame(self) -> int:
        return self.rows * self.columns // 4


def image(rows: int, columns: int) -> Visual:
    return Visual("image", 1, rows, columns)


def video(frames: int, rows: int, columns: int) -> Visual:
    return Visual("video", frames, rows, columns)


Question = tuple[Any, ...]  # ids and visuals
TEXT: Question = (5, 6, 7, 8, 9)
QUESTIONS: dict[str, Question] = {
    "image": (5, 6, image(8, 12), 30, 31),
    "two images": (5, image(8, 12), 7, 8, image(6, 10), 30, 31),
    "video": (5, 6, video(5, 8, 12), 30, 31),
    "long video": (5, video(12, 4, 4), 30, 31),  # its moments count further than the text behind it
    "two videos": (5, video(4, 6, 6), 9, video(3, 8, 10), 30),
    "image and video": (video(4, 6, 10), 8, 9, image(10, 6), 30, 31),
}
BATCH = (QUESTIONS["image"], TEXT, QUESTIONS["image and video"], QUESTIONS["two videos"], (image(4, 4), 9))


def _written(model: Any, question: Question) -> list[int]:
    """Ids as the processor of this model writes them: Qwen3-VL has every frame by itself, behind its time."""
    ids: list[int] = []
    for part in question:
        if isinstance(part, int):
            ids.append(part)
        elif part.kind == "video" and "Qwen3" in type(model).__name__:
            for frame in range(part.frames):
                ids += [20 + frame, 21, START, *[VIDEO] * part.per_frame, END]
        else:
            ids += [START, *[IMAGE if part.kind == "image" else VIDEO] * (part.frames * part.per_frame), END]
    return ids


def inputs(model: Any, *questions: Question, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``forward`` and ``generate``, padded on the left."""
    rows = [_written(model, question) for question in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    out: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    draw = torch.Generator().manual_seed(seed)
    width = 3 * 2 * model.config.vision_config.patch_size**2
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        seen = [part for question in questions for part in question if isinstance(part, Visual) and part.kind == kind]
        if seen:
            # frames that resemble each other, as those of a video do
            parts = [
                torch.randn(1, p.rows * p.columns, width, generator=draw)
                + 0.5 * torch.randn(p.frames, p.rows * p.columns, width, generator=draw)
                for p in seen
            ]
            out[pixels] = torch.cat([part.flatten(0, 1) for part in parts])
            out[f"{kind}_grid_thw"] = torch.tensor([[p.frames, p.rows, p.columns] for p in seen])
    if len(out) > 2:
        out["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return out


# -- what a host should find -------------------------------------------------------------------------------------------


def naive_signals(model: Any, pixels: Tensor, grid: Tensor) -> list[dict[str, Tensor]]:
    """Per item [T, N, ...]: of the last vision block, and of the middle one that methods ask for."""
    middle = math.ceil(0.375 * len(model.model.visual.blocks)) - 1
    found = signals_of_block(model, pixels, grid, -1)
    for item, more in zip(found, signals_of_block(model, pixels, grid, middle), strict=True):
        item["received_attention@0.375"] = more["received_attention"]
    return found


@torch.no_grad()
def encoder_tokens(model: Any, pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """Per item [T, N, C]: what the merger gets, four patches averaged, windows undone by transformers' function."""
    tower, caught = model.model.visual, []
    hook = tower.merger.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    tower(pixels, grid_thw=grid)
    hook.remove()
    tokens = caught[0].unflatten(0, (-1, 4)).mean(1)
    if "Qwen2_5" in type(model).__name__:
        from transformers.vision_utils import get_vision_window_index

        config = model.config.vision_config
        order, _ = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        tokens = tokens[torch.argsort(order.cpu())]
    parts = tokens.split([frames * rows * columns // 4 for frames, rows, columns in grid.tolist()])
    return [part.unflatten(0, (int(frames), -1)) for part, frames in zip(parts, grid[:, 0], strict=True)]


@torch.no_grad()
def signals_of_block(model: Any, pixels: Tensor, grid: Tensor, index: int) -> list[dict[str, Tensor]]:
    """Per item [T, N, ...]: full attention maps of one vision block, windows undone by transformers' function."""
    tower, caught = model.model.visual, {}
    attention = tower.blocks[index].attn

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        caught["states"], caught["rotary"] = args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]

    hooks = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(lambda module, args, output: caught.update(output=output)),
    ]
    tower(pixels, grid_thw=grid)
    for hook in hooks:
        hook.remove()
    query, plain, value = attention.qkv(caught["states"]).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    rotate = importlib.import_module(type(tower).__module__).apply_rotary_pos_emb_vision
    query, key = rotate(query, plain, *caught["rotary"])
    back = None
    if "Qwen2_5" in type(model).__name__:
        from transformers.vision_utils import get_vision_window_index

        config = model.config.vision_config
        order, _ = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        back = torch.argsort(order.cpu())
    frames: list[dict[str, Tensor]] = []
    first = 0
    for number, rows, columns in grid.tolist():
        for _ in range(number):
            here = slice(first, first + rows * columns)
            first = here.stop
            q, k = query[here].transpose(0, 1), key[here].transpose(0, 1)  # [H, P, d]
            maps = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
            mixed = (maps @ value[here].transpose(0, 1)).transpose(0, 1).flatten(1)
            torch.testing.assert_close(attention.proj(mixed), caught["output"][here], atol=1e-5, rtol=1e-4)
            merged_keys = k.unflatten(1, (-1, 4)).mean(2)  # [H, N, d]
            pooled = torch.einsum("hd,hnd->hn", q.mean(1), merged_keys) / q.shape[-1] ** 0.5
            whole, wide = (part[here].flatten(1) for part in (query, key))
            joined = (whole @ wide.T / whole.shape[-1] ** 0.5).softmax(-1)
            frames.append(
                {
                    "received_attention@next/joined": joined.mean(0).view(-1, 4).mean(1),
                    "key_states@next/joined": plain[here].flatten(1).unflatten(0, (-1, 4)).mean(1),
                    "received_attention": maps.mean(0).mean(0).view(-1, 4).mean(1),
                    "pooling_attention": pooled.softmax(-1).mean(0),
                    "key_states": plain[here].mean(1).view(-1, 4, q.shape[-1]).mean(1),
                }
            )
    flat = {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}
    if back is not None:
        flat = {name: value[back] for name, value in flat.items()}
    sizes = [number * rows * columns // 4 for number, rows, columns in grid.tolist()]
    parts = {name: value.split(sizes) for name, value in flat.items()}
    return [
        {name: parts[name][i].unflatten(0, (int(number), -1)) for name in parts} for i, number in enumerate(grid[:, 0])
    ]


def items(model: Any, question_inputs: dict[str, Any], dense: Dense, sample: int, questions: list[Question]):
    """(rows of the prompt, item with naive signals) of each image and video of one sample, in order."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in question_inputs:
            found[kind] = naive_signals(model, question_inputs[pixels], question_inputs[f"{kind}_grid_thw"])
    everything = [[part for part in question if isinstance(part, Visual)] for question in questions]
    taken = {kind: 0 for kind in ("image", "video")}
    for part in itertools.chain.from_iterable(everything[:sample]):
        taken[part.kind] += 1
    used = {kind: 0 for kind in taken}
    out = []
    for part in everything[sample]:
        token = IMAGE if part.kind == "image" else VIDEO
        at = (question_inputs["input_ids"][sample] == token).nonzero().flatten()
        rows = at[used[part.kind] : used[part.kind] + part.frames * part.per_frame]
        used[part.kind] += len(rows)
        features = dense.embeds[sample, rows].view(part.frames, part.per_frame, -1)
        signals = dict(found[part.kind][taken[part.kind]])
        taken[part.kind] += 1
        item = VisualItem(
            modality=part.kind,
            features=features,
            positions=torch.arange(len(rows)).view(part.frames, -1),
            length=len(rows),
            layout="grid",
            grid=(part.rows // 2, part.columns // 2),
            signals=signals | {"frame_features": features.mean(1)},
        )
        out.append((rows, item))
    return out
