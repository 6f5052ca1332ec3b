"""The decoder of VoCo-LLaMA: a prompt runs in two causal calls, and the images leave the cache between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import rotate_half

from accelerate_methods.engine.cached_keys import gather_keys, gather_rows
from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.masks import key_mask
from accelerate_methods.stages.errors import MethodError
from llava.model.architectures.voco_llama.cache import DividedLayout, Kept, VocoCache
from llava.model.architectures.voco_llama.division import Division, Looks, visible
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaModel
from llava.model.llava_arch import LlavaMetaModel

#: rows that the layers get at once while images are read; looks beyond that follow in a further call
ROWS_AT_ONCE = 8192


class VocoConfig(LlavaConfig):
    model_type = "voco_llama"


class VocoModel(LlavaLlamaModel):
    """LLaMA whose forward knows a :class:`.cache.VocoCache`; with any other cache it is LLaMA's own."""

    config_class = VocoConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        request, layout = kwargs.pop("request", None), kwargs.pop("layout", None)
        kwargs.pop("pipeline", None)  # what is attached has acted in front of the decoder
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        begins = isinstance(layout, DividedLayout) and inputs_embeds is not None  # generate repeats it at every step
        if begins and getattr(cache, "awaits", None) is None:
            cache = VocoCache.of(layout, cache)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache, **kwargs}
        given |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        if not isinstance(cache, VocoCache):
            return self._causal(**given)
        if cache.awaits is None:
            out = self._continue(cache, given)
        else:
            for name in ("output_attentions", "output_hidden_states"):
                if kwargs.get(name) or (name not in kwargs and getattr(self.config, name, None)):
                    raise MethodError(f"{name}: images and text run apart here, so no layer has states of the prompt.")
            out = self._begin(cache, inputs_embeds, position_ids, use_cache)
        if request is not None and use_cache:
            request.cached.append([cache.get_seq_length(layer) for layer in range(len(cache.layers))])
        return out

    def _causal(self, **arguments: Any):
        """LLaMA's own forward."""
        return super(LlavaMetaModel, self).forward(**arguments)

    # -- a prompt ----------------------------------------------------------------------------------------------------

    def _begin(self, cache: VocoCache, embeds: Tensor, position_ids: Tensor | None, use_cache: bool):
        division, kept = cache.awaits.division, cache.awaits.given
        position_ids = cache.awaits.positions if position_ids is None else position_ids
        if self.gradient_checkpointing and self.training:
            return self._whole(division, embeds, position_ids)
        batch = len(division.text)
        times = len(embeds) // batch  # beams, or several answers to a prompt: images are read once
        out = embeds.new_zeros(batch, *embeds.shape[1:])
        if kept is None:
            kept, out = self.look(division, embeds[::times], position_ids[::times], out)
        out = out.repeat_interleave(times, 0) if times > 1 else out
        cache.begin(kept.repeated(times))
        device = embeds.device
        text, real_text, entries = (
            moved(part, device).repeat_interleave(times, 0) for part in (division.text, division.real_text, kept.real)
        )
        if not (division.real_text.all() and kept.real.all()):
            cache.real = torch.cat([entries, real_text], dim=1)
        if text.shape[1]:
            hidden = self._causal(
                inputs_embeds=gather_rows(embeds, text),
                attention_mask=cache.real,
                position_ids=position_ids.gather(1, text),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            hidden = moved(hidden, device)
            numbers = torch.arange(len(out), device=device)[:, None].expand_as(text)
            filled = moved(division.real_text.repeat_interleave(times, 0).nonzero(), device)
            places = numbers[filled[:, 0], 0], text[filled[:, 0], filled[:, 1]]
            out = out.index_put(places, hidden[filled[:, 0], filled[:, 1]])
        last = moved(division.last, device).repeat_interleave(times, 0)[:, None]
        cache.following = position_ids.gather(1, last) + 1
        return BaseModelOutputWithPast(last_hidden_state=out, past_key_values=cache if use_cache else None)

    def look(self, division: Division, embeds: Tensor, position_ids: Tensor, out: Tensor) -> tuple[Kept, Tensor]:
        """Read everything up to the last ``<voco>`` of each prompt.

        Args:
            embeds: [B, L, D]; position_ids: [B, L]; out: [B, L, D], which gets the output of these rows.

        Returns:
            What is kept, and ``out``.
        """
        looks = division.looks
        source, places = looks.written
        count, width = looks.rows.shape
        step = max(1, ROWS_AT_ONCE // width)
        states, keys, values = [], [], []
        for start in range(0, count, step):
            chunk = looks.some(slice(start, start + step))
            hidden, cache = self._run(chunk, embeds, position_ids)
            own = source[(source >= start * width) & (source < (start + step) * width)] - start * width
            states.append(hidden.flatten(0, 1)[moved(own, hidden.device)])
            keys.append([self._kept(layer.keys, chunk, shift=chunk.moves) for layer in cache.layers])
            values.append([self._kept(layer.values, chunk, shift=False) for layer in cache.layers])
        out = out.flatten(0, 1).index_copy(0, moved(places, embeds.device), torch.cat(states)).view_as(out)
        entries = division.entries

        def by_sample(parts: list[list[Tensor]], layer: int) -> Tensor:
            flat = torch.cat([part[layer] for part in parts]).transpose(1, 2).flatten(0, 1)
            return flat[moved(entries, flat.device)].transpose(1, 2)

        layers = range(len(keys[0]))
        kept = Kept(
            [by_sample(keys, layer) for layer in layers],
            [by_sample(values, layer) for layer in layers],
            division.real_entries,
        )
        return kept, out

    def _run(self, looks: Looks, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Looks through all layers, [R, H, D], and everything that they cached."""
        device, cache = embeds.device, DynamicCache()
        sample, rows = moved(looks.sample, device)[:, None], moved(looks.rows, device)
        own = moved(looks.own_positions, device)[:, None]
        hidden = self._causal(
            inputs_embeds=embeds[sample, rows],
            position_ids=torch.where(own, moved(looks.positions, device), position_ids[sample, rows]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return moved(hidden, device), cache

    def _kept(self, states: Tensor, looks: Looks, shift: bool) -> Tensor:
        """[R, G, H, d] -> [R, G, K, d] of the ``<voco>`` tokens; keys turned on to where they stand in the prompt."""
        kept = gather_keys(states, moved(looks.kept, states.device))
        if not shift:
            return kept
        cos, sin = self.rotary_emb(kept.float(), position_ids=moved(looks.shift, kept.device)[:, None])
        cos, sin = (moved(part, kept.device)[:, None] / self.rotary_emb.attention_scaling for part in (cos, sin))
        turned = kept.float() * cos + rotate_half(kept.float()) * sin
        return turned.to(kept.dtype)

    def _whole(self, division: Division, embeds: Tensor, position_ids: Tensor):
        """The prompt in one call, as gradient checkpointing needs it, which has no cache: with the official mask."""
        config = self.config
        if "flash" in (config._attn_implementation or "") or division.looks is None or division.positions:
            raise MethodError("gradient checkpointing needs attn_implementation 'sdpa' or 'eager', and no videos.")
        looks, batch, width = division.looks, *embeds.shape[:2]
        columns = torch.zeros(batch, width, dtype=torch.bool)
        columns[looks.sample[:, None].expand_as(looks.rows)[looks.real], looks.rows[looks.real]] = True
        samples = torch.arange(batch)[:, None].expand_as(division.text)
        columns[samples[division.real_text], division.text[division.real_text]] = True
        allowed = torch.stack([self._seen(division, columns, number) for number in range(batch)])
        mask = key_mask(config, embeds, None, moved(allowed, embeds.device)[:, None])
        return self._causal(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        )

    @staticmethod
    def _seen(division: Division, real: Tensor, number: int) -> Tensor:
        """[L, L] the mask of one sample; ``real`` [B, L] columns that are no padding."""
        looks = division.looks
        mine = (looks.sample == number).nonzero().flatten()
        voco = torch.zeros(1, 0, dtype=torch.long)
        if len(mine):
            count = int(division.real_entries[number].sum())
            rows = looks.rows[mine[0]][looks.real[mine[0]]]
            voco = rows[None, -count:]
        return visible(real[number : number + 1], voco)[0]

    # -- behind it ---------------------------------------------------------------------------------------------------

    def _continue(self, cache: VocoCache, given: dict[str, Any]):
        """Rows behind a prompt; ``given``: arguments of the decoder's forward."""
        tokens = next(value for value in (given["inputs_embeds"], given["input_ids"]) if value is not None)
        rows, mask, position_ids = tokens.shape[1], given["attention_mask"], given["position_ids"]
        if mask is not None and mask.ndim != 2:
            raise MethodError(f"a 2-D attention_mask is needed behind compressed images, got {mask.ndim}-D.")
        if position_ids is None:
            position_ids = moved(cache.following, tokens.device) + torch.arange(rows, device=tokens.device)
        cache.following = position_ids[:, -1:] + 1
        real = cache.grow(rows, mask, tokens)
        return self._causal(**{**given, "attention_mask": real, "position_ids": position_ids})
