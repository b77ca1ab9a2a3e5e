"""The recipes, run on a small model: what they learn, save, resume, refuse, and how they fail."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from packaging import version
from safetensors.torch import load_file, save_file
from test_parallel import free_port
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from common.files import only_run
from conftest import ROOT, SMALL, TINY
from training import lora, options, precision, predict, pretrain, ptuning, sft
from training.arguments import DataArguments
from training.data import collator, encode_dialogue, encode_response
from training.muon import MuonWithAdamW
from training.objective import MixedObjective
from training.trainer import RecipeTrainer, last_checkpoint, output_folder


WORDS = "red green blue yellow black white pink brown".split()
STEPS = ["--max_steps", "8", "--logging_steps", "1", "--save_steps", "3", "--use_cpu", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def start(small_model, write_checkpoint, tmp_path_factory, tiny_tokenizer):
    """A folder with random weights and the tiny tokenizer."""
    config = {**SMALL, "padded_vocab_size": 8064, "seq_length": 128, "torch_dtype": "float32"}
    folder = write_checkpoint(tmp_path_factory.mktemp("start"), config, small_model(3, **config).state_dict())
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"Say {a} and {b}", "response": f"{a} {b}"} for a in WORDS for b in WORDS]
    rows = {"pairs": pairs, "texts": [{"text": " ".join(WORDS[i:] + WORDS[:i]) * 3} for i in range(8)] * 5}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def run(recipe, start, data, output, *options) -> list[dict]:
    """Runs a recipe in this process, and returns its log."""
    train_file = data["texts" if recipe is pretrain else "pairs"]
    required = ["--model_name_or_path", str(start), "--train_file", train_file, "--output_dir", str(output)]
    recipe.main([*required, *STEPS, *options])
    return log_of(output)


def log_of(output) -> list[dict]:
    state = json.loads(Path(output, "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def losses(log: list[dict]) -> list[float]:
    return [entry["loss"] for entry in log]


@pytest.mark.parametrize("recipe", [pretrain, sft, lora, ptuning])
def test_recipe_learns_and_reports(recipe, start, data, tmp_path):
    rate = "3e-2" if recipe in (lora, ptuning) else "1e-2"
    held_out = data["texts" if recipe is pretrain else "pairs"]
    log = run(recipe, start, data, tmp_path, "--learning_rate", rate, "--validation_file", held_out)
    assert len(log) == 8 and losses(log)[-1] < losses(log)[0]
    assert all("grad_norm" in entry and "train_tokens_per_second" in entry for entry in log)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert last_checkpoint(tmp_path).endswith("checkpoint-8")


def test_curve_has_the_held_out_loss(start, data, tmp_path, monkeypatch):
    """Of the evaluations during training, and of the last one after it; the title says what was trained where."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    often = ["--eval_strategy", "steps", "--eval_steps", "4"]
    run(sft, start, data, tmp_path, "--validation_file", data["pairs"], *often)
    (axes,) = figures[-1].axes
    held_out = next(line for line in axes.lines if line.get_label() == "held out")
    assert [int(step) for step in held_out.get_xdata()][:2] == [4, 8] and axes.get_ylabel() == "loss, nats per token"
    assert axes.get_title() == f"Training of {Path(start).name} on cpu"


def test_model_can_be_used_where_it_is_saved(start, data, tmp_path):
    run(sft, start, data, tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    response, history = model.chat(tokenizer, "Say red and blue", do_sample=False, max_new_tokens=4)
    assert len(history) == 1 and model.config.architectures == ["ChatGLMModel"]


@pytest.mark.parametrize("recipe", [pretrain, sft, lora, ptuning])
def test_interrupted_run_goes_on_exactly(recipe, start, data, tmp_path, monkeypatch):
    """Also where batches are drawn at random, and across the end of an epoch."""
    options = ("--per_device_train_batch_size", "10" if recipe is pretrain else "16", "--lora_dropout", "0.3")
    expected = run(recipe, start, data, tmp_path / "whole", *options)

    step = RecipeTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, start, data, tmp_path / "resumed", *options)
    monkeypatch.undo()
    (tmp_path / "resumed/checkpoint-7").mkdir()  # as a kill amid saving would leave one
    assert last_checkpoint(tmp_path / "resumed").endswith("checkpoint-6")
    torch.manual_seed(99)
    resumed = run(recipe, start, data, tmp_path / "resumed", *options)
    assert [entry["step"] for entry in resumed] == list(range(1, 9))
    assert losses(resumed) == losses(expected)


def test_resuming_with_other_settings_is_refused(start, data, tmp_path):
    run(sft, start, data, tmp_path)
    with pytest.raises(ValueError, match="holds a run with other settings: learning_rate 0.01, now 0.5. Go on with"):
        run(sft, start, data, tmp_path, "--learning_rate", "0.5")
    with pytest.raises(ValueError, match="max_source_length 1024, now 100"):
        run(sft, start, data, tmp_path, "--max_source_length", "100")
    run(
        sft, start, data, tmp_path, "--logging_steps", "2", "--validation_file", data["pairs"]
    )  # nothing is learned otherwise
    other = data | {"pairs": str(tmp_path / "other.jsonl")}
    Path(other["pairs"]).write_text('{"prompt": "a", "response": "b"}\n' * 9)
    with pytest.raises(ValueError, match="train_file .*rows '"):
        run(sft, start, other, tmp_path)
    with pytest.raises(ValueError, match="learning_rate"):  # of the run that is gone on with, wherever that is
        again = ("--learning_rate", "0.5", "--resume_from_checkpoint", last_checkpoint(tmp_path))
        run(sft, start, data, tmp_path / "again", *again)
    Path(last_checkpoint(tmp_path), "trainer_state.json").write_text('{"epoch": 0.5, "glo')  # cut short
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json is missing. It says how the results beside it were made"):
        run(sft, start, data, tmp_path)
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(ValueError, match="settings.json is empty.* Choose another --output"):
        run(sft, start, data, tmp_path)


def test_resuming_on_other_weights_is_refused(start, data, tmp_path):
    """An adapter goes on only with the frozen weights that it was begun on."""
    base = Path(shutil.copytree(start, tmp_path / "base"))
    run(lora, base, data, tmp_path / "out")
    weights = base / "model.safetensors"
    os.utime(weights, (weights.stat().st_atime, weights.stat().st_mtime + 5))
    with pytest.raises(ValueError, match="holds a run with other settings: weights .*model.safetensors"):
        run(lora, base, data, tmp_path / "out")


@pytest.mark.parametrize("recipe", [pretrain, sft, lora, ptuning])
@pytest.mark.parametrize("length", [("--max_steps", "3"), ("--max_steps", "-1", "--num_train_epochs", "1")])
def test_finished_run_is_only_saved_again(recipe, length, start, data, tmp_path):
    """Not trained on: the same log, the same weights, also where the end was killed between checkpoint and final save."""
    options = (
        *length,
        "--per_device_train_batch_size",
        "32",
        "--validation_file",
        data["texts" if recipe is pretrain else "pairs"],
    )
    expected = run(recipe, start, data, tmp_path, *options)
    saved = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.suffix in (".safetensors", ".bin")}
    saved.pop("training_args.bin")
    held_out = json.loads((tmp_path / "eval_results.json").read_text())
    results = (tmp_path / "train_results.json").read_text()
    for name in saved:
        (tmp_path / name).unlink()
    torch.manual_seed(99)
    assert run(recipe, start, data, tmp_path, *options) == expected
    assert saved and {name: (tmp_path / name).read_bytes() for name in saved} == saved
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == held_out["eval_loss"]
    assert (tmp_path / "train_results.json").read_text() == results
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == len(expected)


def test_resume_from_checkpoint(start, data, tmp_path, logs):
    """ "True" is the last checkpoint of the output folder, as for the Trainer's own option; "False" is none."""
    with pytest.raises(ValueError, match="There is no checkpoint in .* to resume from"):
        run(sft, start, data, tmp_path, "--resume_from_checkpoint", "True")
    run(sft, start, data, tmp_path, "--resume_from_checkpoint", "False")
    with pytest.raises(ValueError, match="checkpoint-8 is there: to start anew, add --overwrite-output-dir"):
        run(sft, start, data, tmp_path, "--resume_from_checkpoint", "False")
    shutil.rmtree(tmp_path / "checkpoint-8")
    logs.clear()
    assert len(run(sft, start, data, tmp_path, "--resume_from_checkpoint", "true")) == 8
    assert f"Going on from {tmp_path / 'checkpoint-6'}" in logs.text
    shutil.rmtree(tmp_path / "checkpoint-8")
    logs.clear()
    run(sft, start, data, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-6"))
    assert f"Going on from {tmp_path / 'checkpoint-6'}" in logs.text
    for path in (str(tmp_path), "nowhere"):
        with pytest.raises(ValueError, match=f"{path} is not a folder checkpoint-N with a trainer_state.json"):
            run(sft, start, data, tmp_path, "--resume_from_checkpoint", path)


def test_overwriting_the_output(start, data, tmp_path):
    """A run anew, without what an earlier one with other settings left; never without what it starts from."""
    run(ptuning, start, data, tmp_path, "--pre_seq_len", "4")
    again = ("--overwrite_output_dir", "--pre_seq_len", "4", "--max_steps", "2", "--save_steps", "1")
    again += ("--save_total_limit", "9")
    with pytest.raises(
        ValueError, match="would remove .*checkpoint-6 .--ptuning-checkpoint., which this run starts from"
    ):
        run(ptuning, start, data, tmp_path, *again, "--ptuning_checkpoint", str(tmp_path / "checkpoint-6"))
    assert len(run(ptuning, start, data, tmp_path, *again)) == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(ValueError, match="exclude each other"):
        run(ptuning, start, data, tmp_path, *again, "--resume_from_checkpoint", "True")


def test_two_runs_into_one_folder(start, data, tmp_path):
    with only_run(tmp_path, "--output_dir"):
        with pytest.raises(ValueError, match="Another process is writing to .*choose another --output"):
            run(sft, start, data, tmp_path)
    run(sft, start, data, tmp_path)


@pytest.mark.parametrize("recipe", [sft, lora, ptuning, pretrain])
def test_label_smoothing_is_of_the_next_tokens(recipe, start, data, tmp_path, monkeypatch):
    """The formula of Szegedy et al. 2016 on shifted labels, in batches of any size; held-out data are not smoothed."""
    seen = []
    compute_loss = RecipeTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        batch, state = {name: value.clone() for name, value in inputs.items()}, torch.get_rng_state()
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if model.training:
            labels = batch.pop("labels")[:, 1:]
            torch.set_rng_state(state)  # the dropout of the prefix
            with torch.no_grad():
                logits = model(**batch).logits[:, :-1][labels != -100].log_softmax(-1)
            target = logits.gather(1, labels[labels != -100][:, None])
            seen.append((loss.item(), -(0.7 * target + 0.3 * logits.mean(-1, keepdim=True)).mean().item()))
        return loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", watched)
    held_out = ("--validation_file", data["texts" if recipe is pretrain else "pairs"])
    options = ("--max_steps", "2", "--learning_rate", "0", *held_out)
    run(recipe, start, data, tmp_path / "smooth", *options, "--label_smoothing_factor", "0.3")
    assert len(seen) == 2
    for loss, expected in seen:
        assert loss == pytest.approx(expected, rel=1e-4)
    monkeypatch.undo()
    plain = run(recipe, start, data, tmp_path / "plain", *options)
    assert losses(plain)[0] != pytest.approx(seen[0][0], rel=1e-3)
    losses_held_out = [
        json.loads((tmp_path / name / "eval_results.json").read_text())["eval_loss"] for name in ("smooth", "plain")
    ]
    assert losses_held_out[0] == pytest.approx(losses_held_out[1], rel=1e-5)


def test_label_smoothing_does_not_depend_on_how_batches_are_split(start, data, tmp_path):
    options = ("--max_steps", "2", "--label_smoothing_factor", "0.2", "--max_grad_norm", "0")
    whole = run(sft, start, data, tmp_path / "a", *options, "--per_device_train_batch_size", "8")
    split = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    assert losses(run(sft, start, data, tmp_path / "b", *options, *split)) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("packing", [(), ("--packing", "--max_source_length", "20", "--max_target_length", "20")])
@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_perplexity_is_of_all_tokens(start, tmp_path, batch_size, packing):
    """However they are batched."""
    pairs = [("a", "red " * 12)] * 3 + [("b", "blue")] * 8
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    options = ["--model_name_or_path", str(start), "--validation_file", str(path), "--output_dir", str(tmp_path)]
    sft.main([*options, "--do_eval", "--per_device_eval_batch_size", batch_size, "--use_cpu", *packing])
    reported = json.loads((tmp_path / "eval_results.json").read_text())["eval_perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True).eval()
    total = tokens = 0
    for prompt, response in pairs:
        example = encode_response(tokenizer, prompt, response, [], DataArguments())
        labels = torch.tensor([example.labels])
        n = int((labels != -100).sum())
        total, tokens = total + n * model(torch.tensor([example.input_ids]), labels=labels).loss.item(), tokens + n
    assert reported == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_loss_that_is_not_finite_stops_the_run(start, data, tmp_path, monkeypatch):
    compute_loss = RecipeTrainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 4 else loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", broken)
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan in step 5. The last good checkpoint is .*checkpoint-3"
    ):
        run(sft, start, data, tmp_path)
    weights = AutoModel.from_pretrained(last_checkpoint(tmp_path), trust_remote_code=True).state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())


def test_weights_that_are_not_finite_are_not_saved(start, data, tmp_path, monkeypatch):
    """Gradients may be infinite where the loss is not yet."""
    step = RecipeTrainer.training_step

    def broken(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 5:
            next(model.parameters()).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", broken)
    with pytest.raises(FloatingPointError, match="is not finite any more in step 7.*checkpoint-3"):
        run(sft, start, data, tmp_path)
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")


def test_full_disk_leaves_the_last_checkpoint(start, data, tmp_path, monkeypatch):
    save = RecipeTrainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 6:
            Path(output_dir, "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(RecipeTrainer, "_save_optimizer_and_scheduler", full)
    options = ("--save_total_limit", "1")
    with pytest.raises(OSError, match=r"checkpoint-6 could not be written .*No space left.*checkpoint-3 is whole"):
        run(sft, start, data, tmp_path, *options)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    assert len(run(sft, start, data, tmp_path, *options)) == 8


def test_prefix_is_saved_and_loaded_as_published(start, data, tmp_path, chatglm):
    options = ("--pre_seq_len", "6", "--learning_rate", "3e-2")
    run(ptuning, start, data, tmp_path, *options)
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "transformer.prefix_encoder.embedding.weight": (6, SMALL["num_layers"] * 2 * 2 * SMALL["kv_channels"])
    }
    assert not list(tmp_path.rglob("*.safetensors"))
    # The published README's way to load it
    config = chatglm.ChatGLMConfig.from_pretrained(start, pre_seq_len=6)
    model = AutoModel.from_pretrained(start, config=config, trust_remote_code=True)
    prefix = {name.removeprefix("transformer.prefix_encoder."): value for name, value in saved.items()}
    model.transformer.prefix_encoder.load_state_dict(prefix)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    expected = [
        model.eval().chat(tokenizer, f"Say {word} and red", do_sample=False, max_new_tokens=6)[0] for word in WORDS[:3]
    ]

    # and the recipe's
    test = tmp_path / "test.jsonl"
    test.write_text(
        "".join(json.dumps({"prompt": f"Say {w} and red", "response": f"{w} red"}) + "\n" for w in WORDS[:3])
    )
    checkpoint = ["--model_name_or_path", str(start), "--ptuning_checkpoint", str(tmp_path), "--pre_seq_len"]
    task = ["--do_predict", "--test_file", str(test), "--max_new_tokens", "6", "--output_dir", str(tmp_path / "p")]
    ptuning.main([*checkpoint, "6", *task, "--use_cpu"])
    lines = (tmp_path / "p/generated_predictions.txt").read_text().splitlines()
    assert [json.loads(line)["predict"] for line in lines] == expected
    assert set(json.loads((tmp_path / "p/predict_results.json").read_text())) == {
        "predict_rouge-1", "predict_rouge-2", "predict_rouge-l", "predict_bleu-4", "predict_samples"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"\(6, 64\).*takes.*\(7, 64\).*give the --pre-seq-len"):
        ptuning.main([*checkpoint, "7", *task, "--use_cpu"])
    with pytest.raises(ValueError, match="There is no pytorch_model.bin in"):
        ptuning.load_prefix(model, str(start))


@pytest.mark.parametrize("recipe", [lora, ptuning])
def test_quantized_weights_stay_as_they_are(recipe, start, data, tmp_path):
    log = run(
        recipe, start, data, tmp_path, "--quantization_bit", "4", "--learning_rate", "3e-2", "--gradient_checkpointing"
    )
    assert losses(log)[-1] < losses(log)[0]
    for other in (sft, pretrain):
        with pytest.raises(ValueError, match="Quantized weights are frozen.*run training.lora or training.ptuning"):
            run(other, start, data, tmp_path / "other", "--quantization_bit", "4")
    assert not (tmp_path / "other").exists()


def test_qlora_on_bitsandbytes(start, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    log = run(lora, start, data, tmp_path, "--load_in_4bit", "--learning_rate", "3e-2")
    assert losses(log)[-1] < losses(log)[0]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def peft_table() -> list[tuple[str, list[str], str]]:
    """(class, target_modules, other arguments) of the methods that docs/training.md names."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+Config)` \| (.*?) \| (.*?) ?\|$", page, re.M)
    return [(name, re.findall(r"`(\w+)`", modules), other.strip("` ")) for name, modules, other in rows]


@pytest.mark.parametrize("name, modules, other", peft_table())
def test_adapters_of_the_page(name, modules, other, start):
    """PEFT has no modules of its own for them; with those of the page every adapter gets a gradient."""
    import peft

    options = {"task_type": "CAUSAL_LM"} | ({"total_step": 10} if name == "AdaLoraConfig" else {})
    options |= {"vector_length": 8} if name == "VBLoRAConfig" else {}
    base = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True)
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        peft.get_peft_model(base, getattr(peft, name)(**options))
    base = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True)
    config = getattr(peft, name)(**options, target_modules=modules, **eval(f"dict({other})"))
    model = peft.get_peft_model(base, config)
    ids = torch.arange(300, 320)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    adapted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) > SMALL["num_layers"] * len(modules) / 2
    assert all(p.grad is not None for p in adapted.values())


@pytest.mark.parametrize("form", ["messages", "prompt and completion", "strings"])
def test_forms_of_trl(form, start, tmp_path):
    """Conversations give the ids of the recipes; strings do not end in </s>, which docs/training.md says."""
    from trl import SFTConfig, SFTTrainer

    messages = [{"role": "user", "content": "Say red"}, {"role": "assistant", "content": "red blue"}]
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=True)
    row = {"messages": messages}
    if form == "prompt and completion":
        row = {"prompt": messages[:1], "completion": messages[1:]}
    elif form == "strings":
        row = {"prompt": tokenizer.build_prompt("Say red"), "completion": "red blue"}
    answers = {"assistant_only_loss": True} if form == "messages" else {}
    args = SFTConfig(tmp_path, max_steps=1, use_cpu=True, bf16=False, report_to="none", **answers)
    model = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list([row] * 8), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = encode_dialogue(tokenizer, messages, DataArguments())
    if form == "strings":
        assert tokenizer.eos_token_id not in batch["input_ids"][0] and "TRL appends the text `</s>`" in (
            ROOT / "docs/training.md"
        ).read_text(encoding="utf-8")
        return
    assert batch["input_ids"][0].tolist() == expected.input_ids
    assert batch["labels"][0].tolist() == expected.labels
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_adapters_can_be_merged(start, data, tmp_path):
    from peft import PeftModel

    run(
        lora,
        start,
        data,
        tmp_path,
        "--learning_rate",
        "3e-2",
        "--lora_target_modules",
        "query_key_value",
        "dense_4h_to_h",
    )
    model = AutoModel.from_pretrained(start, trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.tensor([[64, 300, 400]])
    adapted = PeftModel.from_pretrained(model, tmp_path)
    logits = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_and_bfloat16(start, data, tmp_path):
    plain = losses(run(sft, start, data, tmp_path / "a"))
    saving = losses(run(sft, start, data, tmp_path / "b", "--gradient_checkpointing"))
    assert saving == pytest.approx(plain, rel=1e-4)
    short = losses(run(sft, start, data, tmp_path / "c", "--bf16"))
    assert short == pytest.approx(plain, rel=5e-2)


def test_bf16_is_chosen_by_measuring_and_kept(start, data, tmp_path, monkeypatch, logs):
    """On a CPU; a run that is resumed keeps what was chosen, whatever is measured then."""
    measured = []
    monkeypatch.setattr(precision, "NARROW", 1)
    monkeypatch.setattr(precision, "step_time", lambda layer, bf16: measured.append(layer) or (1.0 if bf16 else 2.0))
    run(sft, start, data, tmp_path / "a", "--max_steps", "4")
    settings = json.loads((tmp_path / "a/settings.json").read_text())["training"]
    assert settings["bf16"] is True and "faster on this CPU" in logs.text
    assert len(measured) == 2 and measured[0].out_features == 8064  # the output layer
    monkeypatch.setattr(precision, "step_time", lambda layer, bf16: 1.0)
    assert len(run(sft, start, data, tmp_path / "a", "--max_steps", "4")) == 4
    run(sft, start, data, tmp_path / "b", "--max_steps", "1")
    assert json.loads((tmp_path / "b/settings.json").read_text())["training"]["bf16"] is False
    run(lora, start, data, tmp_path / "c", "--max_steps", "1", "--quantization_bit", "8")
    assert json.loads((tmp_path / "c/settings.json").read_text())["training"]["bf16"] is False


def test_layers_are_measured_without_changing_them():
    layer = torch.nn.Linear(8, 16)
    layer.weight.requires_grad_(False)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert min(precision.step_time(layer, True), precision.step_time(layer, False)) > 0
    assert layer.weight.grad is layer.bias.grad is None and torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_is_resumed_exactly_and_schedules_both_parts(start, data, tmp_path, monkeypatch):
    options = ("--muon", "--lr_scheduler_type", "linear", "--weight_decay", "0.1")
    expected = run(sft, start, data, tmp_path / "a", *options)
    assert losses(expected)[-1] < losses(expected)[0]
    step, steps = RecipeTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        rates = {group["lr"] for group in self.optimizer.param_groups}
        assert len(rates) == 1 and len(self.optimizer.param_groups) == 3
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(sft, start, data, tmp_path / "b", *options)
    assert losses(run(sft, start, data, tmp_path / "b", *options)) == losses(expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_takes_the_matrices_of_the_layers(small_model):
    model = small_model(add_bias_linear=True)
    optimizer = MuonWithAdamW(model, 1e-3, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    kinds = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    assert len(groups[0]) == 8 and all(name.split(".")[-2] in kinds for name in groups[0])
    assert groups[1] == ["transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"]
    assert sum(map(len, groups)) == len(names) and [group["weight_decay"] for group in optimizer.param_groups] == [
        0.1,
        0.1,
        0,
    ]


def test_muon_needs_a_torch_that_has_it(small_model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="--muon needs torch 2.9 or newer, this is .*Leave it out"):
        MuonWithAdamW(small_model(), 1e-3, 0.1)


@pytest.mark.parametrize("recipe", [lora, ptuning])
@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_gradient_checkpointing_of_frozen_weights(recipe, reentrant, start, data, tmp_path):
    """Adapters and prefixes get their gradients, though nothing before them is trained."""
    options = ("--learning_rate", "3e-2", "--max_steps", "3")
    plain = losses(run(recipe, start, data, tmp_path / "a", *options))
    kind = ("--gradient_checkpointing", "--gradient_checkpointing_kwargs", f'{{"use_reentrant": {reentrant}}}')
    assert losses(run(recipe, start, data, tmp_path / "b", *options, *kind)) == pytest.approx(plain, rel=1e-4)


def test_epochs_draw_anew(start, data, tmp_path, monkeypatch):
    """The tasks of a document differ from one epoch to the next, and are the same in the next run."""
    seeds = []
    collate = MixedObjective.__call__
    monkeypatch.setattr(
        MixedObjective, "__call__", lambda self, rows: (seeds.append([r["seed"] for r in rows]), collate(self, rows))[1]
    )
    options = ("--max_steps", "-1", "--num_train_epochs", "2", "--per_device_train_batch_size", "40")
    for name in "ab":
        run(pretrain, start, data, tmp_path / name, *options)
    drawn = [set(seeds[i]) for i in range(len(seeds))]
    first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert first == second and len(set().union(*first)) == 80


def test_prefix_in_mixed_precision(start, data, tmp_path):
    """On weights in float16, which the published ones are."""
    plain = losses(run(ptuning, start, data, tmp_path / "a", "--pre_seq_len", "6"))
    mixed = losses(run(ptuning, start, data, tmp_path / "b", "--pre_seq_len", "6", "--bf16", "--dtype", "float16"))
    assert mixed == pytest.approx(plain, rel=5e-2)
    (prefix,) = torch.load(tmp_path / "b/pytorch_model.bin", weights_only=True).values()
    assert prefix.dtype == torch.float32  # which small steps need


def test_wrong_tests_are_refused_before_training(start, data, tmp_path):
    test = tmp_path / "test.json"
    test.write_text('[{"question": "a", "answer": "b"}]')
    with pytest.raises(ValueError, match="no column prompt in the data; there are question, answer"):
        run(sft, start, data, tmp_path / "out", "--do_predict", "--test_file", str(test))
    assert not (tmp_path / "out").exists()
    model = ["--model_name_or_path", str(start), "--do_predict", "--test_file", data["pairs"], "--use_cpu"]
    for recipe in (lora, ptuning):
        with pytest.raises(ValueError, match="cannot load an adapter|no prefix to answer with"):
            recipe.main(model)


def test_packing_learns_the_same(start, data, tmp_path):
    options = ("--max_source_length", "64", "--max_target_length", "63")
    padded = losses(run(sft, start, data, tmp_path / "a", *options))
    packed = losses(run(sft, start, data, tmp_path / "b", "--packing", *options))
    assert packed == pytest.approx(padded, rel=1e-3)


def test_yaml_and_command_line(start, data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model_name_or_path: {start}\ntrain_file: {data['pairs']}\nlearning_rate: 1e-2\nmax_steps: 2\n")
    sft.main(["--config", str(config), "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu"])
    settings = json.loads((tmp_path / "out/settings.json").read_text())["training"]
    assert settings["max_steps"] == 1 and settings["learning_rate"] == 0.01
    config.write_text(f"model_name_or_path: {start}\nno_such_option: 1\n")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: }")
    for arguments, message in (
        (["--config", str(config)], "no_such_option"),
        (["--config", "missing.yaml"], "There is no file 'missing.yaml'"),
        (["--config=missing.yaml"], "There is no file 'missing.yaml'"),
        (["--train_file", "x.json", "--config"], "There is no file ''"),
        (["--config", str(broken)], "while scanning|while parsing"),
        (["--train_file", "x.json"], "Give either --model or"),
        (["--model_name_or_path", "x", "--quantization_bit", "3"], "--quantization must be int4 or int8 .*, got 3"),
        (["--model_name_or_path", "x", "--quantization_bit", "4", "--load_in_4bit"], "exclude each other"),
    ):
        with pytest.raises(SystemExit, match=message):
            sft.main(arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "training/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_understood(path, data, tmp_path, monkeypatch):
    """Each is read by its recipe, which reads the data, and then looks for its model."""
    recipe = {"pretrain": pretrain, "sft": sft, "polish": sft, "lora": lora, "qlora": lora, "ptuning": ptuning}
    recipe = recipe[path.stem.removeprefix("tiny_")]
    file = data["texts" if recipe is pretrain else "pairs"]
    options = ["--config", str(path), "--bf16", "false", "--use_cpu", "--train_file", file]
    options += ["--validation_file", file] * path.stem.startswith("tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not in the Hub's cache|There is no folder build/tiny"):
        recipe.main(options)


@pytest.mark.parametrize("recipe", [pretrain, sft, lora, ptuning])
def test_data_are_checked_before_the_model_is_loaded(recipe, start, data, tmp_path, monkeypatch):
    """All files of a run; nothing is written."""
    monkeypatch.setattr(options.checkpoint, "load", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    good = data["texts" if recipe is pretrain else "pairs"]
    for train, validation, message in (
        ("nowhere.json", good, "There is no file nowhere.json"),
        (good, "nowhere.json", "There is no file nowhere.json"),
        (str(empty), good, "empty.json has no rows"),
        (good, str(empty), "empty.json has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe, start, data, tmp_path / "out", "--train_file", train, "--validation_file", validation)
    with pytest.raises(ValueError, match="There is no validation data: pass --validation-file"):
        run(recipe, start, data, tmp_path / "out", "--do_eval")
    if recipe is not pretrain:
        with pytest.raises(ValueError, match="empty.json has no rows"):
            run(recipe, start, data, tmp_path / "out", "--do_predict", "--test_file", str(empty))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_file", "nowhere.json"], "training.sft: There is no file nowhere.json."),
        (["--train_file", "[]"], "has no rows."),
        (["--train_file", '[{"prompt": 5, "response": "a"}]'], "Row 1 of the data cannot be read: prompt must be a text"),
        (["--source_prefix", "x", "--foo"], "training.sft: --source_prefix is no option any more: Write it into the prompts."),
    ],
)  # fmt: skip
def test_errors_are_one_line(options, message, start, tmp_path):
    """Of the command, without a traceback."""
    if options[1].startswith("["):
        (tmp_path / "rows.json").write_text(options[1])
        options = [options[0], str(tmp_path / "rows.json")]
    command = [sys.executable, "-m", "training.sft", "--model_name_or_path", str(start), "--use_cpu", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert message in result.stderr.strip().splitlines()[-1]


def test_weight_that_is_missing_is_named(start, data, tmp_path):
    """It would be random; that of the prefix that is trained may be missing, and a whole model may be random."""
    base = Path(shutil.copytree(start, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    del weights["transformer.encoder.final_layernorm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for recipe in (sft, lora, ptuning, pretrain):
        with pytest.raises(ValueError, match="lacks transformer.encoder.final_layernorm.weight, which would be random"):
            run(recipe, base, data, tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_layers": "2"}))
    with pytest.raises(ValueError, match="config.json: .*num_layers.*expected int, got str"):
        run(sft, base, data, tmp_path / "out")


def test_rows_are_padded_on_the_right(start):
    """As the published script trains, to a multiple of 8; answers are padded on the left."""
    _, tokenizer = options.load(options.ModelArguments(str(start)))
    rows = [{"input_ids": list(range(300, 300 + n)), "labels": list(range(300, 300 + n))} for n in (3, 10)]
    batch = collator(tokenizer, DataArguments())(rows)
    assert batch["input_ids"][0].tolist() == [300, 301, 302] + [tokenizer.pad_token_id] * 13
    assert batch["labels"][0].tolist() == [300, 301, 302] + [-100] * 13
    assert batch["attention_mask"][0].tolist() == [1] * 3 + [0] * 13


def test_half_precision_is_not_trained_on_a_cpu(start, data, tmp_path, logs):
    """Whose products of float16 are many times slower; unless it is asked for."""
    half = Path(shutil.copytree(start, tmp_path / "half"))
    save_file(
        {k: v.half() for k, v in load_file(half / "model.safetensors").items()},
        half / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    arguments = options.ModelArguments(str(half), dtype="auto")
    expected = torch.float16 if torch.accelerator.is_available() else torch.float32
    assert options.load(arguments)[0].dtype == expected
    assert ("float16 is many times slower on CPUs" in logs.text) == (expected == torch.float32)
    assert options.load(replace(arguments, dtype="float16"))[0].dtype == torch.float16
    assert options.load(replace(arguments, model_name_or_path=None, config_name=str(half)))[0].dtype == expected


# The published train.sh and evaluate.sh, whose data have these columns
PUBLISHED = (
    "--overwrite_cache --prompt_column content --response_column summary --overwrite_output_dir --max_source_length 64 "
)
TRAIN = PUBLISHED + (
    "--do_train --preprocessing_num_workers 2 --max_target_length 128 --per_device_train_batch_size 1 "
    "--per_device_eval_batch_size 1 --gradient_accumulation_steps 16 --predict_with_generate --max_steps 2 --logging_steps 10 "
    "--save_steps 1000 --learning_rate 2e-2 --pre_seq_len 8 --quantization_bit 4"
)
EVALUATE = PUBLISHED + (
    "--do_predict --max_target_length 64 --per_device_eval_batch_size 1 --predict_with_generate --pre_seq_len 8 "
    "--quantization_bit 4"
)


def test_options_of_the_published_scripts(start, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("".join(json.dumps({"content": f"类型#{word}", "summary": word}) + "\n" for word in WORDS))
    files = [
        "--model_name_or_path",
        str(start),
        "--use_cpu",
        "--output_dir",
        str(tmp_path / "out"),
        "--validation_file",
        str(rows),
    ]
    ptuning.main([*files, "--train_file", str(rows), *TRAIN.split()])
    checkpoint = last_checkpoint(tmp_path / "out")
    assert checkpoint.endswith("checkpoint-2")
    test = ["--test_file", str(rows), "--ptuning_checkpoint", checkpoint, "--max_new_tokens", "3"]
    ptuning.main([*files, *test, *EVALUATE.split()])
    lines = (tmp_path / "out/generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["labels"] for line in lines] == WORDS
    assert last_checkpoint(tmp_path / "out") == checkpoint  # nothing is trained, and so nothing removed


@pytest.mark.parametrize(
    "ours, trainers",
    [
        (["--model", "a", "--output=b"], ["--model_name_or_path", "a", "--output_dir", "b"]),
        (["--quantization", "int4", "--max-steps", "3"], ["--quantization_bit", "4", "--max_steps", "3"]),
        (["--device=cpu", "--learning_rate", "1e-3"], ["--use_cpu", "True", "--learning_rate", "1e-3"]),
    ],
)
def test_options_of_all_commands_are_the_trainers(ours, trainers):
    assert options.translate(ours) == trainers


@pytest.mark.parametrize("words", [["--quantization", "int3"], ["--device", "toaster"]])
def test_wrong_values_of_options_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit:
        options.translate(words)
    assert exit.value.code == 2 and words[1] in capsys.readouterr().err


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_args, data_args, args = options.parse(
        "",
        lora.LoraArguments,
        DataArguments,
        options.RecipeArguments,
        args=["--config", "qlora.yaml", "--device", "cpu"],
    )
    assert (model_args.model_name_or_path, model_args.quantization_bit) == ("THUDM/chatglm2-6b", 4)
    assert data_args.train_file == str(ROOT / "training/example.jsonl") and args.output_dir == "output/qlora"
    assert args.use_cpu and args.bf16 is None and args.logging_steps == 1


def test_help_lists_the_options_of_this_package_first(capsys):
    for word, shown, hidden in (("--help", "--train-file", "--adam_beta1"), ("--help-all", "--adam_beta1", None)):
        with pytest.raises(SystemExit):
            options.parse("Doc.", options.ModelArguments, DataArguments, options.RecipeArguments, args=[word])
        output = capsys.readouterr().out
        assert "Doc." in output and shown in output and (hidden is None or hidden not in output)


def test_options_that_are_gone_are_explained():
    for option, value, message in (
        ("--num_beams", "4", "--num_beams is no option any more: Answers are greedy."),
        ("--val_max_target_length", "4", "The length of answers is --max-new-tokens"),
        ("--evaluation_strategy", "steps", "It is called --eval-strategy"),
        ("--made_up", "1", "There is no option --made_up. --help and --help-all list the options"),
    ):
        with pytest.raises(SystemExit, match=message):
            sft.main(["--model_name_or_path", "x", option, value])
    parser = TrlParser([options.ModelArguments, DataArguments, options.RecipeArguments])
    known = {name for action in parser._actions for name in action.option_strings}
    assert not {f"--{name}" for name in options.GONE} & known
    with pytest.raises(SystemExit, match="Predictions are always generated"):
        sft.main(["--model_name_or_path", "x", "--predict_with_generate", "false"])


def test_prediction_without_references(start, tmp_path, capsys):
    """Answers are written; only rows that have a response are scored."""
    test = tmp_path / "test.json"
    command = [
        "--model_name_or_path",
        str(start),
        "--do_predict",
        "--test_file",
        str(test),
        "--max_new_tokens",
        "3",
        "--use_cpu",
    ]
    for rows, scored in (
        ([{"prompt": "a"}, {"prompt": "b"}], False),
        ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}], True),
    ):  # fmt: skip
        test.write_text(json.dumps(rows))
        sft.main([*command, "--output_dir", str(tmp_path / "out")])
        lines = [json.loads(line) for line in (tmp_path / "out/generated_predictions.txt").read_text().splitlines()]
        assert [set(line) for line in lines] == [{"predict"}, {"labels", "predict"} if scored else {"predict"}]
        results = json.loads((tmp_path / "out/predict_results.json").read_text())
        assert results["predict_samples"] == 2 and ("predict_bleu-4" in results) == scored
        assert f"{2 - scored} of 2 rows have no response and are not scored" in capsys.readouterr().out


def test_scores():
    """Perfect, empty, and in between, in percent."""
    assert predict.score(["今天天气很好"], ["今天天气很好"]) == pytest.approx(
        {"rouge-1": 100, "rouge-2": 100, "rouge-l": 100, "bleu-4": 100}, abs=1e-3
    )
    assert set(predict.score(["", "  "], ["好", "好"]).values()) == {0.0}
    half = predict.score(["今天天气很好", "一"], ["今天天气很好", "二"])
    assert half["rouge-1"] == half["rouge-l"] == pytest.approx(50, abs=1e-3) and 50 <= half["bleu-4"] < 60
    scores = predict.score(["今天天气非常不好"], ["今天天气非常好"])
    assert 0 < scores["rouge-2"] < scores["rouge-1"] < 100 and 0 < scores["bleu-4"] < 100


def test_a_run_ends_its_process_group(tmp_path):
    """With Gloo's threads left at exit, a finished process was aborted at times."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with output_folder(options.RecipeArguments(output_dir=str(tmp_path), use_cpu=True)):
            pass
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_processes_learn_as_one(engine, start, data, tmp_path):
    """
    The same curve as one process with twice the batch. Accelerate has no FSDP on CPUs, so that here it is Transformers' own.
    """
    options = ["--model_name_or_path", str(start), "--train_file", data["pairs"], *STEPS, "--max_grad_norm", "0"]
    if engine == "fsdp" and version.parse(transformers.__version__) < version.parse("5.23"):
        with pytest.raises(SystemExit, match="--fsdp-size needs Transformers 5.23 or newer, this is 5"):
            sft.main([*options, "--fsdp_size", "2"])
        return
    expected = run(sft, start, data, tmp_path / "one", "--per_device_train_batch_size", "8", "--max_grad_norm", "0")
    options += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "4"]
    if "zero" in engine:
        pytest.importorskip("deepspeed")
        config = ROOT / f"training/configs/accelerate/{engine}.yaml"
        launch = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
        launch += ["--mixed_precision", "no", "--main_process_port", str(free_port())]
        options.remove("--use_cpu")  # Accelerate gives DeepSpeed no process group on a CPU unless told of one
        options += ["--ddp_backend", "gloo"]
    else:
        launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        options += ["--fsdp_size", "2", "--save_strategy", "no"] if engine == "fsdp" else []
    result = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "training.sft", *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(log_of(tmp_path / "two")) == pytest.approx(losses(expected), rel=1e-3)
    saved = AutoModel.from_pretrained(tmp_path / "two", trust_remote_code=True).state_dict()
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape
        for name, value in AutoModel.from_pretrained(start, trust_remote_code=True).state_dict().items()
    }
