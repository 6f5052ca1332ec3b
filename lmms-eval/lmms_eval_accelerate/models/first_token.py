"""The distribution that the first token of an answer is taken from, captured while ``generate`` runs.

Where a custom logits processor stands in transformers (5.17 to 5.23, ``GenerationMixin._get_logits_processor``): behind
the processors that a generation config asks for (repetition penalty, forbidden tokens, ...) and before temperature,
top-k, top-p, watermark and normalisation. So what is captured is

* for ``generate`` with embeddings, as in the LLaVA tree: the softmax of the model's own logits, at any temperature. The
  sequence of generated ids is empty at the first step, and repetition penalties and n-gram bans have nothing to act on
  (LLaVA-OneVision's generation config has a penalty of 1.05);
* for ``generate`` with ids (models of transformers) the same, but behind a repetition penalty or n-gram ban of the
  generation config: it acts on the prompt's tokens there;
* unless the generation config or a task forbids or biases tokens outright (``min_new_tokens``, ``suppress_tokens``,
  ``bad_words_ids``, ``sequence_bias``, guidance): then the softmax of what these leave, which is what the answer is
  taken from. Forbidden tokens have no mass and are not logged.

In a beam search processors get log-probabilities instead of logits, whose softmax is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from accelerate_methods.stages.errors import MethodError
from lmms_eval_accelerate import distributions


class NotANumber(MethodError):
    """The model's logits are NaN: whatever is decoded from them says nothing."""


class FirstToken(LogitsProcessor):
    """Captures one ``generate`` call; make a new one per call. Changes nothing and waits for nothing.

        first = FirstToken([question.document for question in questions])
        model.generate(..., logits_processor=[first])
        first.packed()

    Args:
        documents: (task, document number) of each sample of the batch, for the error message; their number says how
            many rows belong to a sample (beams, or several returned sequences, of which the first is taken).
        k: how many tokens to keep (all, if the vocabulary is smaller).
    """

    def __init__(self, documents: Sequence[Any], k: int = distributions.K):
        self.documents = list(documents)
        self.k = k
        self._found: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [samples * beams, vocabulary] of the next token, any float type; returned as they are."""
        if self._found is None:
            beams, remainder = divmod(scores.shape[0], len(self.documents))
            if remainder or not beams:
                raise ValueError(f"{scores.shape[0]} rows of logits for {len(self.documents)} samples.")
            # float32 on the device; a copy of k numbers is all that stays
            logprobs = scores[::beams].detach().float().log_softmax(-1)
            values, ids = logprobs.topk(min(self.k, logprobs.shape[-1]), dim=-1)
            rest = logprobs.scatter(-1, ids, float("-inf")).logsumexp(-1)
            self._found = ids, values, rest
        return scores

    def packed(self) -> list[str]:
        """The distribution of every sample as :func:`lmms_eval_accelerate.distributions.pack` writes it.

        Raises:
            NotANumber: logits of a sample are NaN or infinite.
            MethodError: ``generate`` was not called, or stopped before the first token.
        """
        if self._found is None:
            raise MethodError("no first token: generate was not called with this processor, or generated nothing.")
        ids, values, rest = (tensor.cpu() for tensor in self._found)
        bad = [document for document, row in zip(self.documents, values, strict=True) if row.isnan().any()]
        if bad:
            named = ", ".join(_name(document) for document in bad[:8]) + (", ..." if len(bad) > 8 else "")
            raise NotANumber(
                f"NaN in the logits of the first token ({named}): half precision overflows with this model, or weights "
                "are missing or damaged. Try dtype=bfloat16 or dtype=float32, attn_implementation=sdpa. Decoded, it "
                'would have been an answer such as "!!!!" (token 0 of Qwen\'s tokenizers).'
            )
        rows = zip(ids.numpy(), values.numpy(), rest.tolist(), strict=True)
        return [distributions.pack(*row) for row in rows]


def _name(document: Any) -> str:
    return f"task {document[0]}, doc {document[1]}" if isinstance(document, tuple) else "a prompt of no document"
