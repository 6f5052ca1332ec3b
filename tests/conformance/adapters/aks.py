"""AKS: scores and candidates, judge-and-split, and what the models are given of it."""

from __future__ import annotations

import torch

from accelerate_methods.aks import normalised, split
from accelerate_methods.hosts.scorers import cosine_scores, match_scores
from llava.frame_choice import chosen_frames
from tests.conformance import vocabulary


def select(inputs, params, context):
    """``out.frames`` are frame numbers; parts of the video as far as the case has them."""
    method = vocabulary.method_of(context, params | {"depth_rule": "as_released"})
    scores, frames = inputs["scores"], inputs["frames"]
    out = {"frames": frames[method.frames(scores, params["max_num_frames"])]}
    count, ratio = params["max_num_frames"], params["ratio"]
    thinned = scores[::ratio][: len(scores) // ratio]
    if len(thinned) >= count:
        starts, lengths, levels = split(normalised(thinned), count, params["all_depth"], params["t1"], params["t2"])
        # a part without frames stands at the end of the one before it
        first = frames[::ratio][starts.clamp(max=len(thinned) - 1)]
        out |= {"seg_first_frame": first, "seg_len": lengths, "seg_depth": levels}
    return out


def score(inputs, params, context):
    candidates = vocabulary.method_of(context, {}).candidates(params["total_frames"], params["avg_fps"])
    if params["scorer"] == "blip":
        scores = match_scores(inputs["itm_logits"])
    else:
        scores = cosine_scores(inputs["text_features"], inputs["image_features"])
    return {"scores": scores, "frames": torch.tensor(candidates)}


def model_frames(inputs, params, context):
    selected = [] if params.get("uniform") else inputs["selected"].tolist()
    sample = chosen_frames(selected, params["max_frames"], params["total_frames"], params["avg_fps"])
    assert sample.frame_time == params["time_text"]
    return {"frames": torch.tensor(sample.indices), "times": torch.tensor(sample.seconds, dtype=torch.float64)}


ADAPTERS = {("aks", "select"): select, ("aks", "score"): score, ("aks", "model_frames"): model_frames}
