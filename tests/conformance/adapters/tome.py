"""ToMe: schedules, matchings and merges, single blocks, whole vision transformers and towers, and a model with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import accelerate_methods
from accelerate_methods.engine.encoder_blocks import BlockRun, EncodedTokens
from accelerate_methods.tome import (
    Matching,
    match,
    match_every,
    match_random,
    merge_mean,
    schedule_of,
    schedule_of_list,
)
from tests.conformance.adapters import whole_models
from tests.support.tiny_vit import TimmBlock, TinyViT


def method_of(params: dict[str, Any]) -> Any:
    """``r`` of a case is a number, (r, inflect), or a list."""
    given, more = params["r"], {}
    pair = (
        params["r_form"].startswith("tuple")
        if "r_form" in params
        else isinstance(given, list) and (len(given) == 2 and isinstance(given[1], float))
    )
    if pair:
        more = {"r": given[0], "inflect": given[1]}
    else:
        more = {"r_per_block": given} if isinstance(given, list) else {"r": given}
    if params.get("variant") == "lightcompress":
        more["variant"] = "lightcompress"
    order = {"token_order": params["token_order"]} if "token_order" in params else {}
    return accelerate_methods.get("tome", prop_attn=params.get("prop_attn", True), **more, **order)


def weights_of(inputs: dict[str, Tensor], params: dict[str, Any], context: Any) -> dict[str, Tensor]:
    """``in.w.*`` of the case, or of the one it names."""
    if "weights_from" in params:
        from tests.conformance.runner import load_case

        inputs = load_case(context.root / context.method / f"{params['weights_from']}.safetensors").inputs
    return {name.removeprefix("w."): value.float() for name, value in inputs.items() if name.startswith("w.")}


def enlarged(small: Tensor, side: int) -> Tensor:
    factor = side // small.shape[-1]
    return small.float().repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def with_special(encoded: EncodedTokens) -> Tensor:
    """[V, S + P] token of every special token and patch, special tokens counted."""
    front = torch.arange(encoded.special).expand(len(encoded.tokens.owner), -1)
    return torch.cat([front, encoded.tokens.owner + encoded.special], dim=1)


def sizes_of(encoded: EncodedTokens) -> Tensor:
    """[V, T, 1]."""
    sizes = encoded.tokens.sizes
    return torch.ones(*encoded.hidden.shape[:2], 1) if sizes is None else sizes[..., None]


def schedule(inputs, params, context):
    def padded(rows: list[tuple[int, ...]]) -> Tensor:
        width = max(context.expected["r_per_layer"][1], context.expected["r_from_list"][1])
        return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])

    cases = zip(inputs["r"].tolist(), inputs["inflect"].tolist(), inputs["num_layers"].tolist(), strict=True)
    lists = [schedule_of_list(case["r"], case["num_layers"]) for case in params["lists"]]
    return {"r_per_layer": padded([schedule_of(*case) for case in cases]), "r_from_list": padded(lists)}


def _sizes(inputs: dict[str, Tensor]) -> Tensor | None:
    return inputs["size"][..., 0].float() if "size" in inputs else None


def merge(inputs, params, context):
    x, special = inputs["x"].float(), params["class_token"] + params["distill_token"]
    found = match(inputs["metric"].float(), params["r"], special)
    if found is None:
        every = torch.arange(x.shape[1]).expand(x.shape[:2])
        return {"x": x, "size": torch.ones(*x.shape[:2], 1), "group": every, "unmerged": x}
    sizes = _sizes(inputs) if params["mode"] == "wavg" else None  # a mean without weights counts tokens
    out, after = merge_mean(x, found, sizes)
    if params["mode"] == "amax":  # a way of merging that the official functions know and no model of theirs uses
        owner = found.owner[..., None].expand_as(x)
        out = torch.full_like(out, -torch.inf).scatter_reduce(1, owner, x, "amax")
    even = found.source % 2 == 0
    return {
        "x": out,
        "size": after[..., None],
        "group": found.owner,
        "kept_a": found.source[even].view(len(x), -1),
        "merged_src": found.sources,
        "merged_dst": found.source.gather(1, found.into),
        "unmerged": _unmerged(out, found.owner),
    }


def _unmerged(out: Tensor, owner: Tensor) -> Tensor:
    return out.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, out.shape[-1]))


def _plain(inputs: dict[str, Tensor], found: Matching, length: int) -> dict[str, Tensor]:
    out, after = merge_mean(inputs["x"].float(), found, _sizes(inputs))
    return {"x": out, "size": after[..., None], "unmerged": _unmerged(out, found.owner)[:, :length]}


def kth(inputs, params, context):
    metric = inputs["metric"].float()
    found = match_every(metric, params["k"])
    return _plain(inputs, found, metric.shape[1] // params["k"] * params["k"]) | {"dst_group": found.into}


def random(inputs, params, context):
    found = match_random(inputs["metric"].float(), params["r"], inputs["order"])
    return _plain(inputs, found, inputs["x"].shape[1])


def one_block(inputs: dict[str, Tensor], params: dict[str, Any]) -> TimmBlock:
    """The block of a case. Cases of the attention alone come with normed states and without an MLP."""
    weights = {name.removeprefix("w."): value.float() for name, value in inputs.items() if name.startswith("w.")}
    weights |= {f"attn.{name}": weights[name] for name in list(weights) if name.startswith(("qkv.", "proj."))}
    return TimmBlock(weights, params["heads"], params.get("norm_eps", 1e-5))


class _Sized(BlockRun):
    """A run whose tokens already have sizes."""

    sizes: Tensor | None = None

    def _attention(self, block, hidden, tokens, weighted):
        tokens.sizes = self.sizes
        return super()._attention(block, hidden, tokens, self.sizes is not None and self.method.proportional)


def attention(inputs, params, context):
    x = inputs["x"].float()
    run = _Sized([one_block(inputs, params)], accelerate_methods.get("tome", r=1), depth=1)
    run.sizes = _sizes(inputs)
    index = torch.arange(x.shape[1]).expand(x.shape[:2])
    found = run._attention(run.blocks[0], x, accelerate_methods.stages.encode.TokenMap(index, index), False)
    return {"x": run.blocks[0].attended(0, found.output()), "metric": found.keys()}


def block(inputs, params, context):
    run = _Sized(
        [one_block(inputs, params)], method_of(params), depth=1, special=params["class_token"] + params["distill_token"]
    )
    run.sizes = _sizes(inputs)
    out = run(inputs["x"].float())
    return {"x": out.hidden, "size": out.tokens.sizes[..., None], "group": with_special(out)}


def vit(inputs, params, context):
    model = TinyViT(weights_of(inputs, params, context), params["heads"], params["norm_eps"], params["global_pool"])
    pixels, counts = enlarged(inputs["pixel_small"], params["img"]), []
    for at in model.blocks:
        at.feed_forward = _counted(at.feed_forward, counts)
    out = model.encode(pixels, method_of(params))
    counts = counts[: len(model.blocks)]
    sizes = out.tokens.sizes
    return {
        "logits": model.classify(out.hidden, sizes),
        "base_logits": model.dense(pixels),
        "tokens": out.hidden if params["global_pool"] else model.norm(out.hidden),
        "size": sizes_of(out),
        "group": with_special(out),
        "tokens_per_layer": torch.tensor(counts),
    }


def _counted(function: Any, counts: list[int]) -> Any:
    def counted(hidden: Tensor) -> Tensor:
        counts.append(hidden.shape[1])
        return function(hidden)

    return counted


def tower(inputs, params, context):
    vision, counts = whole_models.load_tiny(params, context).get_vision_tower(), []
    with WatchedMlps(vision, counts):
        encoded = vision.look(enlarged(inputs["pixel_small"], vision.image_size), method=method_of(params)).merged
    features = encoded.hidden[:, encoded.special :]
    return {
        "features": features,
        "size": sizes_of(encoded),
        "group": encoded.tokens.owner,
        "first_patch": encoded.tokens.first_patch(),
        "tokens_per_layer": torch.tensor(counts),
        "unmerged_mean": encoded.full()[:, encoded.special :].mean(-1),
    }


class WatchedMlps:
    """Block in which the lengths that the MLPs of a tower see are noted."""

    def __init__(self, vision: Any, counts: list[int]):
        self._handles = [
            layer.mlp.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
            for layer in vision.vision_tower.encoder.layers
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()


def e2e(inputs, params, context):
    question, counts = whole_models.ask(inputs, params, context, method=method_of(params)), []
    vision = question.model.get_vision_tower()
    with accelerate_methods.accelerate(question.model, question.method):
        with WatchedMlps(vision, counts):
            (item,) = question.items()
        out = whole_models.answer(question)
    encoded = vision.look(question.media["images"], method=question.method)
    merged, unordered = encoded.merged, method_of(params | {"token_order": "as_is"})
    plain = vision.look(question.media["images"], method=unordered).merged
    return out | {
        "n_visual": torch.tensor(item.num_tokens),
        "tokens_per_layer": torch.tensor(counts),
        "group": with_special(plain),
        "size": sizes_of(plain),
        "first_patch": merged.tokens.first_patch(),
    }


ADAPTERS = {
    ("tome", "schedule"): schedule,
    ("tome", "merge"): merge,
    ("tome", "kth"): kth,
    ("tome", "random"): random,
    ("tome", "attention"): attention,
    ("tome", "block"): block,
    ("tome", "vit"): vit,
    ("tome", "tower"): tower,
    ("tome", "e2e"): e2e,
}
