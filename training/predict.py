"""Answers the prompts of a test file, and computes ROUGE and BLEU as the published script does."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import write_json

from .data import DataArguments, encode_prompt


def predict(model, tokenizer, rounds: list[tuple], data_args: DataArguments, args) -> dict[str, float]:
    """
    Writes the greedy answers to `generated_predictions.txt`, one line of JSON each, and the scores to
    `predict_results.json`, both in `args.output_dir`.

    Args:
        rounds: List of (query, response, history). Only rounds with a response (not None) are scored.
    """
    prompts = [encode_prompt(tokenizer, query, history, data_args.max_source_length)[0] for query, _, history in rounds]
    answers = generate(model, tokenizer, prompts, args.per_device_eval_batch_size, args.max_new_tokens)
    references = [response for _, response, _ in rounds]
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "generated_predictions.txt", "w", encoding="utf-8") as file:
        for reference, answer in zip(references, answers):
            labels = {} if reference is None else {"labels": reference}
            file.write(json.dumps({**labels, "predict": answer}, ensure_ascii=False) + "\n")
    pairs = [(answer, reference) for answer, reference in zip(answers, references) if reference is not None]
    scores = score(*zip(*pairs)) if pairs else {}
    metrics = {f"predict_{name}": value for name, value in scores.items()} | {"predict_samples": len(answers)}
    if len(pairs) < len(answers):
        print(f"{len(answers) - len(pairs):,} of {len(answers):,} rows have no response and are not scored.")
    write_json(output / "predict_results.json", metrics)
    print("\n".join(f"{name} = {value}" for name, value in metrics.items()))
    return metrics


@torch.inference_mode()
def generate(model, tokenizer, prompts: list[list[int]], batch_size: int, max_new_tokens: int) -> list[str]:
    """Returns the greedy answer to each prompt as ids. Batches have prompts of similar length."""
    model.eval()
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(prompts), desc="Answering") as progress:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = {"input_ids": [prompts[i] for i in chosen]}
            batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
            output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
            new = output[:, batch["input_ids"].shape[1] :]
            for i, answer in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True)):
                answers[i] = answer.strip()
            progress.update(len(chosen))
    return answers


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    Returns the means of the F scores of ROUGE-1, ROUGE-2 and ROUGE-L over jieba's words, and of BLEU-4 over characters
    (smoothing 3 of Chen and Cherry 2014), all in percent.
    """
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(jieba.logging.WARNING)
    smoothing = SmoothingFunction().method3
    sums = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4"), 0.0)
    for answer, reference in zip(answers, references):
        words = [" ".join(jieba.cut(text)) for text in (answer, reference)]
        if all(text.strip() for text in words):  # rouge_chinese takes nothing that is empty, which scores 0
            for name, scores in Rouge().get_scores(*words)[0].items():
                sums[name] += scores["f"]
            sums["bleu-4"] += sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)
    return {name: round(100 * value / len(answers), 4) for name, value in sums.items()}
