"""Packages `llava` and `accelerate_methods`. The harness plugin is its own package in lmms-eval/."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """A wheel carries configs/ inside accelerate_methods, where registry/configs.py finds it. Not run by `-e`."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "accelerate_methods", "configs")
            shutil.rmtree(target, ignore_errors=True)  # a build folder may be an older one
            shutil.copytree(ROOT / "configs", target)


# Extras are kept small on purpose: the core must install in seconds and run on a laptop.
EXTRAS = {
    "video": ["decord>=0.6.0", "av>=12,<16"],
    "demo": ["gradio>=5"],
    "train": ["deepspeed>=0.16"],
    "flash-attn": ["flash-attn>=2.7"],
    "lora": ["peft>=0.15"],
    # the releases that the plugin is written for (accelerate_methods/hosts/vllm); a GPU build brings its own torch
    "vllm": ["vllm>=0.32,<0.34"],
    "plots": ["matplotlib>=3.9", "plotly>=6"],
    "dev": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9", "matplotlib>=3.9", "plotly>=6"],
}

setup(
    name="mllm-accelerate",
    version="0.1.0",
    description="Visual-token compression for multimodal LLMs: FastVID and others on LLaVA, through released lmms-eval",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["llava", "llava.*", "accelerate_methods", "accelerate_methods.*"]),
    package_data={
        "accelerate_methods": ["hosts/known_towers/*/*.json", "py.typed"],
        "llava": ["py.typed"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"vllm.general_plugins": ["mllm_accelerate = accelerate_methods.hosts.vllm:register"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "sentencepiece>=0.2.0,<0.2.2",
        "pillow>=10.1",
        "numpy>=1.26",
        "pyyaml>=6",
        "rich>=13",
    ],
    extras_require=EXTRAS,
)
