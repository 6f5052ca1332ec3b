"""Importing is cheap and needs no optional package."""

import subprocess
import sys

from tests.support.paths import ROOT

HEAVY = ("torch", "transformers", "lmms_eval", "decord", "av", "numpy", "yaml", "PIL")
OPTIONAL = (
    "lmms_eval", "decord", "av", "cv2", "deepspeed", "flash_attn", "peft", "bitsandbytes", "gradio", "matplotlib"
)  # fmt: skip

# None in sys.modules is what python itself takes for "not to be had": an import fails, find_spec finds nothing
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_import_is_light():
    out = python(
        "import sys, llava, accelerate_methods; accelerate_methods.available(); dir(accelerate_methods);"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_methods_need_no_model_code():
    out = python(
        "import sys, accelerate_methods as a; [a.registry.method_class(name) for name in a.available()];"
        "print([m for m in ('llava', 'lmms_eval', 'decord', 'av', 'transformers') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_works_without_optional_packages():
    out = python(
        BLOCK + "import llava, accelerate_methods, llava.model.builder, llava.mm_utils, llava.conversation\n"
        "from llava.model import LlavaQwenForCausalLM, LlavaLlamaForCausalLM, LlavaMistralForCausalLM\n"
        "from llava.model.language_model.llava_llama import LlavaConfig\n"
        "from llava.model.language_model.llava_qwen import LlavaQwenConfig\n"
        "from accelerate_methods import accelerate, record, resolve, Pipeline\n"
        "import llava.model.acceleration\n"
        "print('fine', LlavaConfig.model_type, LlavaQwenConfig.model_type)"
    )
    assert out.split() == ["fine", "llava_llama", "llava_qwen"]


def test_every_export_resolves():
    python(
        "import accelerate_methods as a, llava.model as m\n"
        "for module in (a, m):\n"
        "    for name in module.__all__: getattr(module, name)\n"
        "    try: module.nothing\n"
        "    except AttributeError: pass\n"
        "    else: raise SystemExit('no AttributeError')"
    )
