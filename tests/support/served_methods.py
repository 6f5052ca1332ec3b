"""Every method that vLLM can serve, with parameters for small inputs; the others say why not."""

from __future__ import annotations

from accelerate_methods.registry.names import available

#: method -> parameters under which its number of tokens is known, or a cap holds it
PARAMETERS: dict[str, dict[str, object]] = {
    "random": {"retention_ratio": 0.3},
    "uniform": {"retention_ratio": 0.25},
    "pool": {"retention_ratio": 0.3},
    "fastervlm": {"retention_ratio": 0.5},
    "visionzip": {"retention_ratio": 0.5},
    "vispruner": {"retention_ratio": 0.4},
    "divprune": {"retention_ratio": 0.3},
    "cdpruner": {"retention_ratio": 0.3},
    "mmtok": {"retention_ratio": 0.3},
    "hiprune": {"retention_ratio": 0.5},
    "scope": {"retention_ratio": 0.25},
    "prumerge": {"retention_ratio": 0.25},
    "prumerge_plus": {"retention_ratio": 0.25},
    "fastvid": {"retention_ratio": 0.3, "c": 2},
    "flashvid": {"retention_ratio": 0.3, "llm_retention_ratio": 1.0, "min_segment_num": 2},
    "holitom": {"retention_ratio": 0.3, "inner": False},
    "prunevid": {"selection": False, "cap": 0.3},
    "dycoke": {"dp": False},
    "vidcom2": {"retention_ratio": 0.25},
    "evs": {"pruning_rate": 0.6},
}
#: method -> seed of a picture of which rounding decides nothing (others: 0)
PICTURES: dict[str, int] = {"mmtok": 3}


def specification(name: str) -> dict[str, object]:
    return {"method": name, **PARAMETERS[name]}


def not_served() -> list[str]:
    return sorted(set(available()) - set(PARAMETERS))
