"""Every registered method with parameters that fit the tiny models of the tests. Methods added later need no entry."""

import accelerate_methods
from accelerate_methods.registry import method_class
from accelerate_methods.stages.method import Method

#: parameters without which a method does not fit a decoder of four layers, or has nothing to do
OVERRIDES = {
    "earlytom": {"k": 2},
    "flashvid": {"pruning_layer": 2},
    "holitom": {"k": 2},
    "mmtok": {"question": "prompt"},  # without a tokenizer
    "pdrop": {"layer_list": (1, 2)},
    "prunevid": {"selected_layer": 1},
    "streamingllm": {"start_size": 3, "recent_size": 20},  # prompts are short
    "v2drop": {"layer_list": (1, 3)},
}

#: of methods that act in every decode step: what they do before the first one
BEFORE_DECODING = {
    "dycoke": {"dp": False},
    "streamingllm": {"start_size": None, "recent_size": None, "budget": 0.4},
}

#: further settings in which a method behaves differently
VARIANTS = {
    "framefusion": [{"cost": 0.6, "similarity_lower_bound": 0.2}, {"ratio_lower_bound": 1.0}],
    "sparsevlm": [{"version": "2.0"}, {"version": "1.0", "scale": 1.0, "bias": 0.0}],
    "cdpruner": [{"relevance": "none"}, {"visual_token_num": 3}],
    "dart": [{"k": 1, "max_num": 12}, {"pivot_image_token": 1, "pivot_text_token": 0}, {"reduction_ratio": 0.7}],
    "dycoke": [{"dp": False}, {"ttm": False, "threshold": 2.0}, {"p": 1.0, "threshold": 2.0}],
    "earlytom": [
        {"inner": False, "tau": -1.0, "max_window": 1000}, {"merge_mode": "naive_mixing", "layers": (0,)},
        {"tau": 0.9, "keep_last_middle": True, "r": 0.8, "k": 1, "causal_score_layer": False},
        {"grid_newlines": "as_released"},
    ],
    "evit": [{"fuse_token": True, "token_order": "raster"}, {"fuse_token": True, "unmerge": True}],
    "tome": [{"unmerge": True}, {"token_order": "first_patch", "variant": "lightcompress"}],
    "fastervlm": [{"merge": "spatial_unpad"}],
    "holitom": [{"inner": False}, {"tau": 0.2, "r": 0.8, "k": 1, "causal_score_layer": False}],
    "hiprune": [{"neighbours": "grid", "alpha": 1.0}, {"exclude": "released"}, {"tokens_per_image": 7}],
    "fastv": [{"k": 0}, {"k": 1}],
    "flashvid": [
        {"llm_retention_ratio": 1.0, "min_segment_num": 2, "trees": "mean"},
        {"token_selection_method": "attn", "alpha": 0.0},
        {"do_segment": False, "temporal_threshold": 0.0, "token_selection_method": "attn_div"}, {"alpha": 1.0},
    ],
    "vidcom2": [{"exact": True}],
    "fastvid": [{"c": 2, "tau": 0.5, "d": 1.0}],
    "pdrop": [{"image_token_ratio_list": (0.5, 0.0)}, {"layer_list": (1,)}, {"tokens_per_image": 2}],
    "pixelprune": [
        {"threshold": 0.8, "metric": "mae"}, {"threshold": 0.9, "scan": "serpentine", "vit_layer": 1},
        {"threshold": 0.8, "metric": "rmse", "anchored": False, "vit_layer": -1},
    ],
    "prumerge": [{"retention_ratio": None}, {"reduction_ratio": 0.125}],
    "prumerge_plus": [{"retention_ratio": None}],
    "prunevid": [{"merging": False}, {"selection": False}, {"selected_layer": 0, "alpha": 0.9}],
    "streamingllm": [
        {"start_size": 2, "recent_size": 5}, {"start_size": 0, "recent_size": 4, "original_positions": True},
        {"start_size": 3, "recent_size": 2, "pos_shift": False}, {"policy": "for_space", "recent_size": 2},
        {"start_size": None, "recent_size": None, "budget": 0.4},
    ],
    "mmtok": [{"alpha": 0.0}, {"tokens_per_view": 3, "exclude_padding": False}],
    "scope": [{"alpha": 0.0}, {"combine": "add", "alpha": 2.0}, {"tokens_per_image": 7}],
    "v2drop": [
        {"keep_ratio_list": (0.5, 0.0)}, {"keep_ratio_list": (0.5, 0.0), "keep_one": False},
        {"layer_list": (2, 3), "metric": "cosine"}, {"tokens_per_image": 2, "metric": "l1"},
    ],
    "vispruner": [{"important_ratio": 0.0}, {"important_ratio": 1.0}],
    "visionzip": [{"dominant": 3, "contextual": 0}, {"dominant": 1, "contextual": 2}, {"grid_order": "as_released"}],
}


#: methods whose tokens are sums that overlap: provenance names one of those that hold a token
OVERLAPPING = frozenset({"prumerge", "prumerge_plus"})
#: methods of which two tokens can stand at one place
SHARING = frozenset({"flashvid"})


def configured(name: str, ratio: float = 0.3, **params: object) -> Method:
    """The method at a retention ratio if it has one, with its own defaults otherwise."""
    cls = method_class(name)
    params = {**OVERRIDES.get(name, {}), **params}
    # a variant may state its budget in another way
    if "retention_ratio" in cls.parameters() and not set(cls.budget_fields()) & set(params):
        params["retention_ratio"] = ratio
    return accelerate_methods.get(name, **params)


def variants(*stage_classes: type[Method]) -> list[tuple[str, dict[str, object]]]:
    """(name, parameters beside the budget) of every method with one of the stage classes, variants included."""
    names = [n for n in accelerate_methods.available() if issubclass(method_class(n), stage_classes or Method)]
    return [(name, params) for name in names for params in ({}, *VARIANTS.get(name, ()))]
