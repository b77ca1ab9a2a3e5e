"""
Speed of the tokenizer, beside a slow one that works as the published tokenizer does: SentencePiece behind the library's
Python class, each piece looked up by itself.

    python -m benchmarks.tokenizer --tokenizer path/to/tokenizer.model --data ../shared/data/eval

Texts are the questions of GSM8K and C-Eval. Both tokenizers take turns; reported are medians, and their ratio.
"""

import csv
import json
import statistics
from functools import partial
from pathlib import Path

import sentencepiece
import tokenizers
from transformers import PythonBackend
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from common.package import ROOT

from .measure import SHARED, in_turn, options, report, seconds


class SlowTokenizer(PythonBackend):
    """SentencePiece under the library's Python class, with the published prefix."""

    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file, **kwargs):
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        self.special_tokens = {}
        super().__init__(unk_token="<unk>", pad_token="<unk>", eos_token="</s>", padding_side="left", **kwargs)

    @property
    def vocab_size(self):
        return self.sp_model.vocab_size() + 5

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(self.sp_model.vocab_size())}

    def _tokenize(self, text, **kwargs):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.convert_token_to_id(token)

    def convert_token_to_id(self, token):
        return self.special_tokens[token] if token in self.special_tokens else self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_model.decode(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        n = self.sp_model.vocab_size()
        return [n + 1, n + 3] + token_ids_0 + (token_ids_1 or [])

    def _pad(self, encoded_inputs, *args, **kwargs):
        length = len(encoded_inputs["input_ids"])
        encoded_inputs = super()._pad(encoded_inputs, *args, **kwargs)
        padding = len(encoded_inputs["input_ids"]) - length
        encoded_inputs["position_ids"] = [0] * padding + list(range(length))
        return encoded_inputs


def read_texts(data: Path) -> dict[str, list[str]]:
    gsm8k = [json.loads(line)["question"] for line in open(data / "gsm8k/test.jsonl", encoding="utf-8")]
    ceval = []
    for path in sorted((data / "ceval/val").glob("*.csv")):
        for row in csv.DictReader(open(path, encoding="utf-8")):
            ceval.append(row["question"] + "".join(f"\n{c}. {row[c]}" for c in "ABCD"))
    return {"GSM8K": gsm8k, "C-Eval": ceval}


def main():
    parser = options(__doc__, rounds=7)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizer/tokenizer.model")
    parser.add_argument("--data", type=Path, default=SHARED / "eval")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    for path in (args.tokenizer, args.data):
        if not path.exists():
            raise SystemExit(f"{path} is missing: give it with --tokenizer or --data.")

    fast = get_class_from_dynamic_module("tokenization_chatglm.ChatGLMTokenizer", ROOT)(args.tokenizer)
    slow = SlowTokenizer(args.tokenizer)
    rows = []
    for name, texts in read_texts(args.data).items():
        texts = texts[:20] if args.quick else texts
        ids = [fast.encode(text, add_special_tokens=False) for text in texts]
        assert ids == [slow.encode(text, add_special_tokens=False) for text in texts]
        tokens = sum(map(len, ids)) / 1e6
        for task, call in {
            "single": lambda tokenizer, texts=texts: [tokenizer(text) for text in texts],
            "batch": lambda tokenizer, texts=texts: tokenizer(texts),
            "batch, padded": lambda tokenizer, texts=texts: tokenizer(texts, padding=True),
            "decode": lambda tokenizer, ids=ids: [tokenizer.decode(i, skip_special_tokens=True) for i in ids],
        }.items():
            runs = {"slow": partial(seconds, partial(call, slow)), "this": partial(seconds, partial(call, fast))}
            rates = {system: tokens / statistics.median(s) for system, s in in_turn(runs, args.rounds).items()}
            rows.append({"text": name, "task": task, **rates, "ratio": rates["this"] / rates["slow"]})
    versions = {"tokenizers": tokenizers.__version__, "sentencepiece": sentencepiece.__version__}
    report({"versions": versions, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
