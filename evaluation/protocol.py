"""
The published protocols as tasks of lm-evaluation-harness. Their prompts are in `tasks/*.yaml`.

| | chat model | base model |
|---|---|---|
| MMLU, C-Eval | no example, a chain of thought, then the choice in a second turn | 5 examples, the choice only |
| GSM8K, its Chinese variant | 8 worked examples, chain of thought, in one query | the same, without the chat's format |
| BBH | 3 worked examples, chain of thought, in one query | the same |
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from . import answers
from .data import LETTERS, SUBJECTS


FOLDER = Path(__file__).with_name("tasks")
HARNESS = Path(lm_eval.__file__).parent / "tasks"
SUITES = {
    "mmlu": list(SUBJECTS["mmlu"]),
    "ceval": list(SUBJECTS["ceval"]),
    "gsm8k": [None],
    "gsm8k_zh": [None],
    "bbh": list(SUBJECTS["bbh"]),
    "perplexity": ["wikitext2", "ceval"],
}
CHOICES = ("mmlu", "ceval")
# What the next question begins with, after which a base model writes on
NEXT_QUESTION = {"gsm8k": "Q:", "gsm8k_zh": "问题：", "bbh": "Q:"}
PROTOCOLS = ("chat", "base")


@lru_cache
def read_yaml(path: Path) -> dict:
    return load_yaml(path)


def task_name(suite: str, subject: str | None) -> str:
    return f"{suite}-{subject}" if subject else suite


def build(suite: str, subject: str | None, protocol: str, data: str | None = None, file: str | None = None):
    """Returns the task of a suite's subject, with its rows read and checked (see `data.load` for the errors)."""
    config = {}
    if suite == "bbh":  # the published prompts, as the harness has them
        config = read_yaml(HARNESS / f"bbh/cot_fewshot/{subject}.yaml")
    elif suite == "gsm8k":
        config = read_yaml(HARNESS / "gsm8k/gsm8k-cot.yaml")
    name = f"{suite}_{protocol}" if suite in CHOICES else suite
    config = {**config, **read_yaml(FOLDER / f"{name}.yaml"), "task": task_name(suite, subject)}
    if suite in NEXT_QUESTION:
        # A chat model ends its answers itself, and may have blank lines in them.
        next_question = NEXT_QUESTION[suite]
        until = [f"\n\n{next_question}"] if protocol == "chat" else [f"\n{next_question}", "\n\n"]
        config["generation_kwargs"] = {**config["generation_kwargs"], "until": until}
    if subject == "sports_understanding":  # as published, where its examples go on in the same line
        config |= {"doc_to_text": "Q: {{input}}\nA: Let's think step by step.", "target_delimiter": " "}
    config["metadata"] = {"suite": suite, "subject": subject, "data": data, "file": file, "protocol": protocol}
    if suite in CHOICES:
        subject_name = SUBJECTS[suite][subject]["name"]
        for key in ("doc_to_text", "description"):
            config[key] = config.get(key, "").replace("SUBJECT", subject_name)
    for key in ("tag", "include", "dataset_path", "dataset_name"):
        config.pop(key, None)
    task = (TwoTurns if "conclusion" in config else PublishedTask)(config)
    task.chat = protocol == "chat" and suite != "perplexity"
    return task


class PublishedTask(ConfigurableTask):
    """A task of the harness whose prompts fit the model's context. Longer prompts get fewer examples."""

    chat = False

    def __init__(self, config: dict):
        super().__init__(config=dict(config))
        self.count_tokens, self.room = None, None
        self.shots = Counter()  # how many prompts have how many examples
        self.cut = 0  # prompts that do not fit without any

    def fit(self, count_tokens, context: int):
        """Sets the model's `count_tokens(text)` and context length, which prompts must fit into."""
        self.count_tokens = count_tokens
        self.room = context - (self.config.generation_kwargs or {}).get("max_gen_toks", 1)

    def fewshot_context(self, doc, num_fewshot, **kwargs):
        context = super().fewshot_context(doc, num_fewshot, **kwargs)
        if self.room is not None and self.OUTPUT_TYPE != "loglikelihood_rolling":
            while self.count_tokens(context) > self.room:
                if not num_fewshot:
                    self.cut += 1
                    break
                num_fewshot -= 1
                context = super().fewshot_context(doc, num_fewshot, **kwargs)
        self.shots[num_fewshot] += 1
        return Prompt(context, num_fewshot)

    def construct_requests(self, doc, ctx, **kwargs):
        requests = super().construct_requests(doc, str(ctx), **kwargs)
        for request in requests if isinstance(requests, list) else [requests]:
            request.shots = ctx.shots  # requests with the same examples share their encoding
        return requests

    def process_results(self, doc, results):
        if self.OUTPUT_TYPE == "multiple_choice":
            scores = [score for score, _ in results]
            said = scores.index(max(scores))
            return {"acc": float(said == doc["answer"])}
        if self.OUTPUT_TYPE == "loglikelihood_rolling":
            return {"perplexity": results[0]}
        target = self.doc_to_target(doc)
        return {"acc": float(answers.same(results[0], str(target)))}


class Prompt(str):
    """A prompt with the number of its examples."""

    def __new__(cls, text: str, shots: int):
        prompt = super().__new__(cls, text)
        prompt.shots = shots
        return prompt


class TwoTurns(PublishedTask):
    """
    A chain of thought, then the choice. As in the published script, query, answer, a line break and `conclusion` form a
    new query, and the most likely next token among the letters A to D is the choice.
    """

    def __init__(self, config: dict):
        self.conclusion = config.pop("conclusion")
        super().__init__(config)

    def construct_requests(self, doc, ctx, chat_template=None, **kwargs):
        query = self.doc_to_text(doc)
        first = super().construct_requests(doc, ctx, **kwargs)

        def ask(answer: str) -> str:
            return chat_template([{"role": "user", "content": f"{query}{answer}\n{self.conclusion}"}])

        seconds = [
            SecondTurn("loglikelihood", doc, (ask, " " + letter), i, first=first, metadata=kwargs["metadata"])
            for i, letter in enumerate(LETTERS, start=1)
        ]
        return [first, *seconds]

    def process_results(self, doc, results):
        scores = [score for score, _ in results[1:]]
        return {"acc": float(scores.index(max(scores)) == doc["answer"])}


@dataclass
class SecondTurn(Instance):
    """A request whose prompt contains the answer to the first request."""

    first: Instance = field(default=None, kw_only=True)

    @property
    def args(self):
        ask, continuation = self.arguments
        return ask(self.first.resps[0]), continuation
