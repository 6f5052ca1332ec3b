"""The stock functions of HallusionBench, with those of its aggregations that read yes and no themselves."""

from lmms_eval.tasks.hallusion_bench.evaluate_hb import (  # noqa: F401 - the task file takes them from here
    hb_aggregation_result_aAcc_intern,
    hb_aggregation_result_fAcc_intern,
    hb_aggregation_result_qAcc_intern,
    hb_doc_to_text,
    hb_doc_to_visual,
    hb_process_results,
)
