"""Official names of the SigLIP tower and its parts.

LLaVA-NeXT carries a copy of SigLIP under these names. Here the tower runs on transformers' SigLIP, and the names of its
parts are transformers' classes themselves: ``isinstance`` and reading work, and a change to one of them reaches every
SigLIP in the process.
"""

from transformers import SiglipVisionConfig as SigLipVisionConfig
from transformers import SiglipVisionModel as SigLipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipAttention as SigLipAttention
from transformers.models.siglip.modeling_siglip import SiglipEncoder as SigLipEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer as SigLipEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipMLP as SigLipMLP
from transformers.models.siglip.modeling_siglip import (
    SiglipMultiheadAttentionPoolingHead as SigLipMultiheadAttentionPoolingHead,
)
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings as SigLipVisionEmbeddings

from llava.image_processing import SigLipImageProcessor
from llava.model.multimodal_encoder.tower import SigLipVisionTower

__all__ = [
    "SigLipAttention",
    "SigLipEncoder",
    "SigLipEncoderLayer",
    "SigLipImageProcessor",
    "SigLipMLP",
    "SigLipMultiheadAttentionPoolingHead",
    "SigLipVisionConfig",
    "SigLipVisionEmbeddings",
    "SigLipVisionModel",
    "SigLipVisionTower",
]
