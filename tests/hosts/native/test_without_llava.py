"""A transformers model is accelerated without the llava package: it need not even be there."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# None in sys.modules is what python itself takes for "not to be had"
BLOCKED = """
import sys
sys.modules["llava"] = None
import torch, accelerate_methods
torch.manual_seed(0)
small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
"""

MODELS = {
    "LLaVA-OneVision": """
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
vision = SiglipVisionConfig(**small, num_hidden_layers=2, image_size=32, patch_size=8, vision_use_head=False)
text = Qwen2Config(**small, num_key_value_heads=2, num_hidden_layers=4, vocab_size=64)
config = LlavaOnevisionConfig(
    vision_config=vision, text_config=text, image_token_id=7, video_token_id=8, image_grid_pinpoints=[[32, 32]],
    vision_feature_layer=-1,
)
model = LlavaOnevisionForConditionalGeneration(config).eval()
inputs = {"input_ids": torch.tensor([[5, *[8] * (3 * 4 + 1), 9]]), "pixel_values_videos": torch.randn(1, 3, 3, 32, 32)}
""",
    "Qwen2-VL": """
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
config = Qwen2VLConfig(
    text_config={**small, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 64,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    image_token_id=7, video_token_id=8, vision_start_token_id=10, vision_end_token_id=11,
)
model = Qwen2VLForConditionalGeneration(config).eval()
ids = torch.tensor([[5, 10, *[7] * 8, 11, 9]])
inputs = {
    "input_ids": ids, "pixel_values": torch.randn(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 8]]),
    "mm_token_type_ids": (ids == 7).long(),
}
""",
}

ACCELERATED = """
budgets = {"random.retention_ratio": 0.5, "fastv.k": 2, "fastv.r": 0.5}
with accelerate_methods.accelerate(model, "random+fastv", **budgets):
    with accelerate_methods.record() as requests:
        ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
(sample,) = requests[0].samples
assert ids.shape[1] == inputs["input_ids"].shape[1] + 1
assert sample.visual_tokens_after < sample.visual_tokens_before
assert requests[0].layer_lengths(0)[-1] < requests[0].layer_lengths(0)[0] == sample.length
loaded = [name for name in sys.modules if name.split(".")[0] in ("llava", "lmms_eval", "lmms_eval_accelerate")]
assert loaded == ["llava"], loaded
print(sample.visual_tokens_before, sample.visual_tokens_after)
"""


@pytest.mark.parametrize("name", MODELS)
def test_a_transformers_model_needs_no_llava(name):
    code = BLOCKED + MODELS[name] + ACCELERATED
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert 0 < after < before
