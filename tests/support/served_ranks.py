"""Prints, as JSON, the greedy ids of a checkpoint served over so many ranks: ``python served_ranks.py FOLDER RANKS``.

A script of its own: engines of several processes start it again.
"""

import json
import sys

METHODS = (None, {"method": "fastervlm", "retention_ratio": 0.5}, {"method": "prumerge", "retention_ratio": 0.25})


def main() -> None:
    from vllm import LLM, SamplingParams

    from tests.support.served_engines import picture

    folder, ranks = sys.argv[1], int(sys.argv[2])
    sizes = {"max_model_len": 1024, "max_num_seqs": 2}
    llm = LLM(model=folder, tensor_parallel_size=ranks, enforce_eager=True, dtype="float32", **sizes)
    parameters = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = []
    for method in METHODS:
        prompt = {"prompt": "<user><image>What is it?\n<assistant>", "multi_modal_data": {"image": picture()}}
        if method is not None:
            prompt["mm_processor_kwargs"] = {"visual_compression": method}
        output = llm.generate([prompt], parameters, use_tqdm=False)[0]
        answers.append([len(output.prompt_token_ids), list(output.outputs[0].token_ids)])
    print("ANSWERS", json.dumps(answers))


if __name__ == "__main__":
    main()
