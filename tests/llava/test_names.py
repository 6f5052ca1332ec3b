"""Names that code built on LLaVA imports: 82, read from 17 public repositories. Each is here, or says why it is not."""

import importlib
import json
import subprocess
import sys

import pytest

import llava
from llava.left_out import REASONS
from tests.project.test_imports import BLOCK
from tests.support.paths import ROOT

#: module -> names that are here ("" for the module alone, "*" for whatever it exports)
HERE = {
    "llava": ["", "LlavaLlamaForCausalLM", "conversation"],
    "llava.constants": [
        "CONTROLLER_HEART_BEAT_EXPIRATION", "DEFAULT_IMAGE_PATCH_TOKEN", "DEFAULT_IMAGE_TOKEN", "DEFAULT_IM_END_TOKEN",
        "DEFAULT_IM_START_TOKEN", "IGNORE_INDEX", "IMAGE_PLACEHOLDER", "IMAGE_TOKEN_INDEX", "LOGDIR",
        "WORKER_HEART_BEAT_INTERVAL",
    ],
    "llava.conversation": ["SeparatorStyle", "conv_templates", "default_conversation"],
    "llava.eval.m4c_evaluator": ["EvalAIAnswerProcessor", "TextVQAAccuracyEvaluator"],
    "llava.mm_utils": [
        "KeywordsStoppingCriteria", "expand2square", "get_anyres_image_grid_shape", "get_model_name_from_path",
        "load_image_from_base64", "load_pretrained_model", "process_anyres_image", "process_highres_image",
        "process_highres_image_crop_split", "process_images", "tokenizer_image_token",
    ],
    "llava.model": ["*"],
    "llava.model.builder": ["load_pretrained_model"],
    "llava.model.language_model.llava_gemma": ["LlavaGemmaConfig"],
    "llava.model.language_model.llava_llama": ["LlavaConfig", "LlavaLlamaForCausalLM"],
    "llava.model.language_model.llava_mistral": ["LlavaMistralConfig"],
    "llava.model.language_model.llava_mixtral": ["LlavaMixtralConfig"],
    "llava.model.language_model.llava_qwen": ["LlavaQwenConfig", "LlavaQwenForCausalLM"],
    "llava.model.language_model.llava_qwen_moe": ["LlavaQwenMoeConfig"],
    "llava.model.llava_arch": ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"],
    "llava.model.multimodal_encoder.clip_encoder": ["CLIPVisionTower"],
    "llava.model.multimodal_encoder.siglip_encoder": [
        "SigLipAttention", "SigLipEncoderLayer", "SigLipImageProcessor", "SigLipMultiheadAttentionPoolingHead",
        "SigLipVisionConfig", "SigLipVisionModel", "SigLipVisionTower",
    ],
    "llava.model.utils": ["auto_upgrade"],
    "llava.utils": [
        "build_logger", "disable_torch_init", "moderation_msg", "pretty_print_semaphore", "process_video_with_decord",
        "process_video_with_pyav", "rank0_print", "rank_print", "server_error_msg", "violates_moderation",
    ],
}  # fmt: skip

#: (module, name) that is not here -> what its reason says
TRAINING, DATA = "this tree is for inference", "no part of this tree"
NOT_HERE = {
    ("llava.data.dataset", "LazySupervisedDataset"): DATA,
    ("llava.model.constants", "DEFAULT_IMAGE_TOKEN"): "copy of llava.constants",
    ("llava.model.constants", "IMAGE_TOKEN_INDEX"): "copy of llava.constants",
    ("llava.model.constants", "key_info"): "Yi-VL checkpoints are not supported",
    ("llava.model.language_model.llava_llama_pdrop", "LlavaLlamaForCausalLM_PDrop"): "methods attach to the plain",
    ("llava.model.language_model.modeling_qwen2", "Qwen2Config"): "the plain classes are transformers'",
    ("llava.model.language_model.modeling_qwen2", "Qwen2ForCausalLM"): "accelerate(model, <method>)",
    ("llava.model.language_model.modeling_qwen2", "Qwen2Model"): "accelerate(model, <method>)",
    ("llava.model.language_model.modelling_sparse_llama", "LlamaDynamicvitFlashAttention2"): "methods attach to the",
    ("llava.model.modeling_llama_pdrop", "LlamaForCausalLM"): "methods attach to the plain",
    ("llava.model.modeling_llama_pdrop", "LlamaModel"): "methods attach to the plain",
    ("llava.model.s2wrapper", "forward"): "multi-scale",
    ("llava.train.llama_xformers_attn_monkey_patch", "replace_llama_attn_with_xformers_attn"): TRAINING,
    ("llava.train.llava_next_trainer", "LLaVATrainer"): TRAINING,
    ("llava.train.llava_trainer", "LLaVADPOTrainer"): TRAINING,
    ("llava.train.llava_trainer", "LLaVATrainer"): TRAINING,
    ("llava.train.pdrop_train", "train"): TRAINING,
    ("llava.train.pdrop_train_next", "train"): TRAINING,
    ("llava.train.sparse_llava_trainer", "LLaVADynamicTrainer"): TRAINING,
    ("llava.train.sparse_train", "train"): TRAINING,
    ("llava.train.train", "train"): TRAINING,
}

#: import statements in, "fine" or the text of the ImportError out
TRY = """
import json
out = {}
for line in json.loads(input()):
    try:
        exec(line, {})
        out[line] = "fine"
    except ImportError as error:
        out[line] = str(error)
print(json.dumps(out))
"""


def tried(lines):
    """What happens to import statements where no optional package is installed."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + TRY], input=json.dumps(lines), cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def line_of(module, name):
    return f"from {module} import {name}" if name else f"import {module}"


def test_names_that_are_here():
    names = [(module, name) for module, listed in HERE.items() for name in listed]
    assert len(names) + len(NOT_HERE) == 82
    found = tried([line_of(*name) for name in names])
    assert {line: said for line, said in found.items() if said != "fine"} == {}


def test_names_that_are_not_say_why():
    found = tried([line_of(*name) for name in NOT_HERE])
    for name, reason in NOT_HERE.items():
        assert reason in found[line_of(*name)] and "docs/llava_names.md" in found[line_of(*name)]


def test_no_other_name_is_accepted():
    wrong = [
        "import llava.trains", "from llava import nothing", "from llava.model import Nothing",
        "from llava.model import modeling_llama", "from llava.constants import nothing",
        "from llava.mm_utils import nothing", "from llava.model.builder import nothing",
    ]  # fmt: skip
    found = tried(wrong)
    for line in wrong:
        assert found[line].startswith(("No module named", "cannot import name")), found[line]
    absent = "import llava.model; assert not hasattr(llava, 'nothing') and not hasattr(llava.model, 'Nothing')"
    assert tried([absent])[absent] == "fine"


def test_a_reason_is_only_given_for_what_is_not_there():
    for module in REASONS:
        path = ROOT / module.replace(".", "/")
        assert not path.is_dir() and not path.with_suffix(".py").exists(), module


def test_the_finder_is_there_once():
    def count():
        return sum(getattr(finder, "__module__", None) == "llava.left_out" for finder in sys.meta_path)

    assert count() == 1
    importlib.reload(llava)
    assert count() == 1


def test_the_page_has_every_name():
    page = (ROOT / "docs/llava_names.md").read_text(encoding="utf-8")
    for module, listed in HERE.items():
        rows = [row for row in page.splitlines() if row.startswith(f"| `{module}` |")]
        assert len(rows) == 1, module
        assert [name for name in listed if name not in ("", "*") and f"`{name}`" not in rows[0]] == [], module
    for module, name in NOT_HERE:
        assert f"`{name}`" in page and any(f"`{given}" in page for given in REASONS if module.startswith(given))
    assert f"**{82 - len(NOT_HERE)} of the 82**" in page


@pytest.mark.parametrize("module", ["llava", "llava.utils", "llava.constants", "llava.eval.m4c_evaluator"])
def test_light_modules(module):
    heavy = ("torch", "transformers", "numpy", "PIL")
    code = f"import sys, {module}; sys.exit(', '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
