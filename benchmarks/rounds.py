"""
Time to the first token of the next round of a dialogue in the ChatGLM2-6B shape on the CPU: with the cache of the last round,
and with the history encoded again.

    python -m benchmarks.rounds --output build/rounds.json

INT4, random weights, through `chat`.
"""

import statistics
import sys

from transformers import AutoTokenizer

from common.package import TINY

from .measure import options, report, seconds
from .systems import Ours


QUERY = "Tell me more about that, please."


def long_history(tokenizer, tokens: int) -> list[tuple[str, str]]:
    """Returns a history of about so many tokens."""
    history = []
    while len(tokenizer(tokenizer.build_prompt(QUERY, history))["input_ids"]) < tokens:
        history.append((f"What is number {len(history)}?", "It is one of many, and each has a story. " * 8))
    return history


class Dialogue:
    """A dialogue that asks something new at each turn, and keeps the cache."""

    def __init__(self, model, tokenizer, history: list[tuple[str, str]]):
        self.model, self.tokenizer, self.history, self.cache = model, tokenizer, history, None

    def ask(self):
        query = f"Number {len(self.history)} please. {QUERY}"
        _, self.history, self.cache = self.model.chat(
            self.tokenizer, query, self.history, past_key_values=self.cache, return_past_key_values=True,
            do_sample=False, max_new_tokens=1,
        )  # fmt: skip


def main():
    parser = options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096], help="tokens of history")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds, args.lengths = 1, 1, [128]
    model = Ours(args.work, args.layers, 4).model
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)

    rows = []
    for length in args.lengths:
        dialogue = Dialogue(model, tokenizer, long_history(tokenizer, length))
        first = seconds(dialogue.ask)
        tokens = dialogue.cache.get_seq_length()
        later = statistics.median(seconds(dialogue.ask) for _ in range(args.rounds))
        print(f"  {tokens} tokens: {first:.2f} s, with the cache {later:.2f} s", file=sys.stderr)
        rows.append({"history_tokens": tokens, "encoded_again_s": first, "with_cache_s": later, "ratio": first / later})
    report({"layers": args.layers, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
