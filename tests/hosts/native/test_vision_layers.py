"""Which encoder layers a model's features are of: one, one in a list, several, none, or one that sees windows only.

Only methods that need the attention of that layer care. The others act as on any model.
"""

import copy

import pytest
import torch

from accelerate_methods import MethodError, accelerate, available, record
from accelerate_methods.registry import method_class
from accelerate_methods.stages.signals import missing_signals
from tests.support import native_questions as llava
from tests.support import qwen_inputs as qwen
from tests.support.configured import configured
from tests.support.native_models import tree_model

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
ASKED = {llava.V15: "two images", llava.V16: "wide image", llava.OV: "image and video"}
NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def of_layers(name, layers):
    """The tiny model with features of other encoder layers; the projector is as wide as those need."""
    config = copy.deepcopy(llava.native(name).config)
    config.vision_feature_layer = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(llava.native(name))(config).eval()
    weights = llava.native(name).state_dict()
    if isinstance(layers, list) and len(layers) > 1:
        weights = {key: value for key, value in weights.items() if "multi_modal_projector" not in key}
    model.load_state_dict(weights, strict=False)
    return model


def windows_only():
    """Qwen2.5-VL whose last vision block attends to windows."""
    model = copy.deepcopy(qwen.qwen(qwen.QWEN25))
    config = model.config.vision_config
    config.fullatt_block_indexes = model.model.visual.fullatt_block_indexes = [0]
    return model, qwen.inputs(model, qwen.QUESTIONS["image and video"])


def fitting(signals, modalities=("image", "video")):
    """Methods inside transformers' models that ask for none but these signals."""
    for name in available():
        method = method_class(name)
        if "sample" in method.class_stages() or not method.modalities & set(modalities):
            continue
        if getattr(method, "acts_on_text", False):  # whatever the vision encoder is
            continue
        if not missing_signals(method, frozenset(signals)):
            yield name


def asked_of(name):
    return llava.inputs(name, llava.QUESTIONS[name][ASKED[name]])


def answer(model, asked):
    out = model.generate(**asked, **NEW, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("method", ["random", "visionzip", "fastv", "prunevid"])
def test_one_layer_in_a_list_is_that_layer(method, name):
    if not method_class(method).modalities & ({"image", "video"} if name == llava.OV else {"image"}):
        pytest.skip("for videos")
    number, asked = llava.native(name).config.vision_feature_layer, asked_of(name)
    with accelerate(llava.native(name), configured(method)):
        ids, logits = answer(llava.native(name), asked)
    model = of_layers(name, [number])
    with accelerate(model, configured(method)):
        listed = answer(model, asked)
        assert torch.equal(listed[0], ids)
        torch.testing.assert_close(listed[1], logits)
        states = len(model.model.vision_tower.encoder.layers) + 1
        for same in (number, [number], number % states):
            torch.testing.assert_close(model(**asked, vision_feature_layer=same).logits, model(**asked).logits)
        with pytest.raises(MethodError, match="only that of the checkpoint"):
            model(**asked, vision_feature_layer=1)


@pytest.mark.parametrize("layers", [[-2, -1], [0, 2]], ids=str)
@pytest.mark.parametrize("name", ASKED)
def test_features_of_several_layers(name, layers):
    model, asked = of_layers(name, layers), asked_of(name)
    modalities = {"image", "video"} if name == llava.OV else {"image"}
    ids, logits = answer(model, asked)
    with accelerate(model, "random", retention_ratio=1.0):
        whole = answer(model, asked)
    assert torch.equal(whole[0], ids)
    torch.testing.assert_close(whole[1], logits)
    for method in fitting((), modalities):
        if "encode" in method_class(method).class_stages():
            with pytest.raises(MethodError, match="features of several encoder layers cannot be merged"):
                accelerate(model, configured(method))
            continue
        with accelerate(model, configured(method)), record() as requests:
            assert answer(model, asked)[0].shape == ids.shape
        (sample,) = requests[0].samples
        kept = sample.length if method_class(method).class_stages() == {"compress"} else requests[0].layer_tokens[-1][0]
        assert kept <= sample.dense_length
    for method in set(fitting(("received_attention", "key_states", "cls_attention"), modalities)) - set(fitting(())):
        with pytest.raises(MethodError, match=r"needs .*attention.*\(vision_feature_layer=.*\) are not those of one "):
            accelerate(model, configured(method))
    assert "forward" not in model.__dict__


def test_the_rows_that_stay_are_those_of_the_wider_features():
    """Dropping tokens takes whole rows of the projected features, whatever layers they were made of."""
    model, asked = of_layers(llava.V15, [-2, -1]), asked_of(llava.V15)
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(**asked)
    with accelerate(model, "uniform", retention_ratio=0.5):
        model(**asked)
    hook.remove()
    whole, cut = (states[0] for states in seen)
    assert len(cut) < len(whole)
    rows = (cut[:, None] == whole[None]).all(-1)
    assert rows.any(1).all(), "each of them is a row of the prompt"
    assert tree_model(llava.V15).config.hidden_size == cut.shape[1]


def test_a_last_block_that_sees_windows_only():
    model, asked = windows_only()
    ids, logits = answer(model, asked)
    for name, full in (("random", {"retention_ratio": 1.0}), ("fastv", {"k": 2, "r": 0.0})):
        with accelerate(model, name, **full):
            whole = answer(model, asked)
        assert torch.equal(whole[0], ids)
        torch.testing.assert_close(whole[1], logits, atol=1e-4, rtol=1e-4)
    for method in fitting(()):
        with accelerate(model, configured(method)):
            assert answer(model, asked)[0].shape == ids.shape
    for method in ("visionzip", "fastervlm", "fastvid"):
        gives = "frame_features, key_states, patch_pixels"
        with pytest.raises(MethodError, match=rf"^{method} needs .*attention.*: {gives}\). Its "):
            accelerate(model, configured(method))
    assert "forward" not in model.__dict__
