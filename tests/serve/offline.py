"""vLLM's LLM on a bank, in a process of its own: python offline.py < request > answers, both JSON.

A request has the model's folder, options of LLM and jobs: pairs of an adapter's name (null: the base model) and a
prompt's token ids, which all go into one call of `generate`.  An answer has the tokens and their log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    from loraxs_kernels.integrations.vllm import adapter

    llm = LLM(request["model"], enable_lora=True, **request["options"])
    sampling = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True)
    names, prompts = zip(*request["jobs"], strict=True)
    requests = [name and adapter(name) for name in names]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, lora_request=requests)
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        found = [each[token].logprob for token, each in zip(tokens, output.outputs[0].logprobs, strict=True)]
        answers.append({"tokens": tokens, "logprobs": found})
    json.dump(answers, out)
    out.flush()


if __name__ == "__main__":
    main()
