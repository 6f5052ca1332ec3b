"""A model family that is not part of the project: VipLLaVA of transformers, and all methods that fit on it.

    python examples/new_host.py                                         # on a tiny model with random weights
    export ACCELERATE_METHODS_IMPORT=$PWD/examples/new_host.py          # now accelerate() knows these models

VipLLaVA projects the outputs of five layers of a CLIP tower at once. So methods act after its projector
(``views`` stays empty), and signals come from the deepest of these layers.
"""

from typing import Any

from accelerate_methods.hosts.native import Call, ClipTower, Family, PromptItem, expected, locate_items, register_family
from accelerate_methods.registry.families import ModelFamily
from accelerate_methods.stages.compress import VisualItem


@register_family
class VipLlava(Family):
    about = ModelFamily(
        name="VipLLaVA",
        classes=("VipLlavaForConditionalGeneration",),
        module="transformers.models.vipllava.modeling_vipllava",
        signals=frozenset({"cls_attention", "received_attention", "key_states"}),
        modalities=frozenset({"image"}),
    )

    def __init__(self, model: Any):
        super().__init__(model)  # refuses a model whose language model is not where it is expected
        with expected(model):  # and one without these parts
            tower, layers = model.model.vision_tower, self.config.vision_feature_layers
        states = tower.config.num_hidden_layers + 1
        deepest = max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))
        self.tower = ClipTower(tower, deepest)  # refuses other towers

    @property
    def signals(self) -> frozenset[str]:
        return self.tower.signals

    def prepare(self, wanted: frozenset[str]) -> None:
        self.tower.ask(wanted)

    def watch(self, seen: Any) -> list[Any]:
        return self.tower.watch(seen)

    def items(self, call: Call) -> list[PromptItem]:
        (encoded,) = call.seen["image"].encoded  # one run of the tower for all images
        images, tokens = encoded.patches.shape[:2]
        signals = self.tower.read(encoded, call.wanted)
        side = self.tower.side // self.tower.config.patch_size
        out = []
        for at in locate_items(call.ids, self.config.image_token_id, [tokens] * images, "image"):
            item = VisualItem(
                modality="image",
                features=call.embeds[at.sample, at.rows][None],
                positions=(at.rows - at.start)[None],
                length=tokens,
                grid=(side, side),
                signals={name: value[at.number][None] for name, value in signals.items()},
            )
            out.append(PromptItem(at.sample, at.rows, at.start, at.end, item))
        return out


def tiny() -> Any:
    """A VipLLaVA with random weights: 16 tokens per image, placeholder id 7."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**small, num_hidden_layers=6, image_size=32, patch_size=8)
    text = LlamaConfig(**small, num_hidden_layers=4, vocab_size=64)
    layers = [-2, -3, 2]
    config = VipLlavaConfig(vision_config=vision, text_config=text, vision_feature_layers=layers, image_token_index=7)
    torch.manual_seed(0)
    return VipLlavaForConditionalGeneration(config).eval()


def main() -> None:
    """Every method on the tiny model: tokens of the image, and of the prompt in every decoder layer."""
    import torch

    from accelerate_methods import MethodError, accelerate, available, record
    from accelerate_methods.registry import method_class

    model = tiny()
    inputs = {"input_ids": torch.tensor([[5, *[7] * 16, 8, 9]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    for name in available():
        budget = {"retention_ratio": 0.25} if "retention_ratio" in method_class(name).parameters() else {}
        try:
            with accelerate(model, name, **budget), record() as requests:
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
        except MethodError as error:
            print(f"{name:15} {error}")
            continue
        sample = requests[0].samples[0]
        print(f"{name:15} {sample.visual_tokens_after:2} of 16 tokens, layers {requests[0].layer_lengths(0)}")


if __name__ == "__main__":
    main()
