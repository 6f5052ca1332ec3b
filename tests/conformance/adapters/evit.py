"""EViT: counts and scores, reorganised tokens, single blocks, whole vision transformers, and a model with it."""

from __future__ import annotations

from typing import Any

import torch

import accelerate_methods
from accelerate_methods.engine.encoder_block import BlockAttention
from accelerate_methods.engine.encoder_blocks import BlockRun
from accelerate_methods.evit import keep_rate_at, left_of, reorganize
from accelerate_methods.stages.encode import EncodeStep, TokenMap
from tests.conformance.adapters import whole_models
from tests.conformance.adapters.tome import WatchedMlps, enlarged, one_block, weights_of
from tests.support.tiny_vit import TinyViT


class Rates(accelerate_methods.evit.EViT):
    """EViT with a rate, or a count, for each block; notes which tokens every shrinking block keeps."""

    def encode_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(num_blocks))

    def left(self, step: EncodeStep, count: int) -> int:
        rate, tokens = self.rates[step.block]
        return tokens or (left_of(count, rate) if rate < 1 else count)

    def encode(self, step: EncodeStep) -> Any:
        merge = super().encode(step)
        if merge is not None:
            self.kept.append(merge.source[:, step.special : merge.source.shape[1] - self.fuse_token] - step.special)
        return merge


def method_of(params: dict[str, Any], rates: list[tuple[float, int | None]], **more: Any) -> Rates:
    """
    Args:
        rates: rate and count of each block.
    """
    method = Rates(fuse_token=params["fuse_token"], **more)
    object.__setattr__(method, "rates", rates)
    object.__setattr__(method, "kept", [])
    return method


def keep_schedule(inputs, params, context):
    names, rates = params["columns"], []
    for row in inputs["cases"].tolist():
        case = dict(zip(names, row, strict=True))
        whole = [int(case[n]) for n in ("iter", "epoch", "warmup_epochs", "total_epochs", "iters_per_epoch")]
        rates.append(keep_rate_at(*whole, case["base_keep_rate"], case["max_keep_rate"]))
    return {"keep_rate": torch.tensor(rates, dtype=torch.float64)}


def counts(inputs, params, context):
    cases = zip(inputs["n_patches"].tolist(), inputs["keep_rate"].tolist(), strict=True)
    return {"left_tokens": torch.tensor([left_of(int(count), rate) for count, rate in cases])}


def score(inputs, params, context):
    x, block = inputs["x"].float(), one_block(inputs, params)
    index = torch.arange(x.shape[1] - 1).expand(len(x), -1)
    attention = BlockAttention(block, block.project(x, TokenMap(index, index)), None, 1, 1, None)
    scores = attention.cls_attention()
    left = params["tokens"] or left_of(scores.shape[1], params["keep_rate"])
    kept = reorganize(x, scores, left, 1, fuse=False).source[:, 1:] - 1
    return {
        "x": block.attended(0, attention.output()),
        "cls_attn": scores,
        "idx": kept,
        "left_tokens": torch.tensor(left),
    }


def rearrange(inputs, params, context):
    x, scores = inputs["x"].float(), inputs["cls_attn"].float()
    left = left_of(scores.shape[1], params["keep_rate"])
    merge = reorganize(x, scores, left, 1, params["fuse_token"])
    return {"x": merge.hidden, "idx": merge.source[:, 1 : 1 + left] - 1}


def block(inputs, params, context):
    method = method_of(params, [(params["keep_rate"], params["tokens"])])
    out = BlockRun([one_block(inputs, params)], method, depth=1, special=1)(inputs["x"].float())
    kept = {"idx": method.kept[0]} if method.kept else {}
    return {"x": out.hidden, "n_tokens": torch.tensor(out.hidden.shape[1] - 1)} | kept


def vit(inputs, params, context):
    model = TinyViT(weights_of(inputs, params, context), params["heads"], params["norm_eps"])
    runtime, lengths = params["runtime_keep_rate"], []
    rates = [runtime if runtime is not None and rate < 1 else rate for rate in params["keep_rate"]]
    tokens = params["tokens"] if isinstance(params["tokens"], list) else [params["tokens"]] * len(rates)
    method = method_of(params, list(zip(rates, tokens, strict=True)))
    run = BlockRun(model.blocks, method, depth=len(model.blocks), special=1)
    out = run(model.embed(enlarged(inputs["pixel_small"], params["input_size"])))
    count = (params["input_size"] // params["patch"]) ** 2
    kept = {f"idx{number}": index for number, index in enumerate(method.kept)}
    for rate, given in zip(rates, tokens, strict=True):
        left = given or left_of(count, rate)
        count = left + params["fuse_token"] if left < count else count
        lengths.append(count)
    return kept | {
        "logits": model.classify(out.hidden),
        "n_tokens": torch.tensor(lengths),
        "patch_index": out.tokens.stands,
    }


def e2e(inputs, params, context):
    method = method_of(params, [(rate, None) for rate in params["keep_rate"]], token_order=params["token_order"])
    question, seen = whole_models.ask(inputs, params, context, method=method), []
    vision = question.model.get_vision_tower()
    with accelerate_methods.accelerate(question.model, method):
        with WatchedMlps(vision, seen):
            (item,) = question.items()
        out = whole_models.answer(question)
    merged = vision.look(question.media["images"], method=method).merged
    return out | {
        "n_visual": torch.tensor(item.num_tokens),
        "n_tokens": torch.tensor(seen) - 1,
        "patch_index": merged.tokens.stands,
    }


ADAPTERS = {
    ("evit", "keep_schedule"): keep_schedule,
    ("evit", "counts"): counts,
    ("evit", "score"): score,
    ("evit", "reorganize"): rearrange,
    ("evit", "block"): block,
    ("evit", "vit"): vit,
    ("evit", "e2e"): e2e,
}
