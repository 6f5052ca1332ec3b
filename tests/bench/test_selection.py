"""The bench of the methods' own work: every case can run, and stands beside plain baselines of the same run."""

import torch

from accelerate_methods.bench.selection import CASES, Case, measure, video


def test_a_case_is_measured_in_turn_with_plain_baselines():
    case = Case("fastvid", "tiny", video("fastvid", 4, 16, 8, retention_ratio=0.5))
    result = measure(case, torch.device("cpu"), torch.float32, threads=1, repeats=3)
    assert len(result["ms"]) == len(result["random_ms"]) == len(result["copy_ms"]) >= 3
    assert result["input_bytes"] == 4 * 16 * 8 * 4 and not any("official" in key for key in result)


def test_every_selection_has_something_to_be_compared_with():
    small = [case for case in CASES if "DP" in case.what or "choice" in case.what]
    for case in small:
        result = measure(case, torch.device("cpu"), torch.float32, threads=1, repeats=1)
        assert set(result) >= {"ms", "input_bytes", "extra_bytes"}
        assert "random_ms" in result or "copy_ms" in result or case.method == "dycoke"
