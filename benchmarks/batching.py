"""
Measures the throughput of several requests in the ChatGLM2-6B shape on the CPU: one by one, as one padded batch, and with
continuous batching (`generate_batch`).

    python -m benchmarks.batching --output build/batching.json

INT4, random weights. Prompts differ in length. Tokens per second count the generated tokens; the time includes prefill.
"""

import statistics
from functools import partial

import torch
from transformers import GenerationConfig

from .measure import in_turn, options, report, seconds
from .systems import Ours, random_prompt


def main():
    parser = options(__doc__, rounds=1)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate for each")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.requests, args.tokens = 1, [2], 4
    model = Ours(args.work, args.layers, 4).model
    implementation = model.config._attn_implementation
    greedy = GenerationConfig(max_new_tokens=args.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def one_by_one(prompts: list[list[int]]):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)

    def padded(prompts: list[list[int]]):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.generate(ids, attention_mask=mask, generation_config=greedy)

    def continuous(prompts: list[list[int]]):
        outputs = model.generate_batch(inputs=prompts, generation_config=greedy, progress_bar=False)
        model.set_attn_implementation(implementation)  # some releases leave it in paged form
        if any(len(output.generated_tokens) != args.tokens for output in outputs.values()):
            raise RuntimeError("generate_batch did not finish: see the log.")

    def tokens_per_second(way, prompts: list[list[int]]) -> float:
        return len(prompts) * args.tokens / seconds(lambda: way(prompts))

    ways = {"one by one": one_by_one, "padded batch": padded, "continuous batching": continuous}
    rows = []
    for requests in args.requests:
        prompts = [random_prompt(40 + 7 * i % 50, seed=i) for i in range(requests)]
        runs = {name: partial(tokens_per_second, way, prompts) for name, way in ways.items()}
        rates = {name: statistics.median(values) for name, values in in_turn(runs, args.rounds).items()}
        ratios = {name: rate / rates["one by one"] for name, rate in rates.items()}
        rows.append({"requests": requests, "tokens_s": rates, "ratio": ratios})
    report({"layers": args.layers, "tokens": args.tokens, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
