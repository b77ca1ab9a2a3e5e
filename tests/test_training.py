"""The recipes, run on a small model: what they learn, save, resume, refuse, and how they fail."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_parallel import free_port
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, SMALL, TINY
from training import lora, predict, pretrain, ptuning, sft
from training.data import DataArguments, encode_dialogue, encode_response
from training.trainer import RecipeTrainer, last_checkpoint


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
    with pytest.raises(ValueError, match="no settings.json that says how they were made"):
        run(sft, start, data, tmp_path)


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
    with pytest.raises(ValueError, match=r"\(6, 64\).*takes.*\(7, 64\).*give the --pre_seq_len"):
        ptuning.main([*checkpoint, "7", *task, "--use_cpu"])
    with pytest.raises(ValueError, match="There is no pytorch_model.bin in"):
        ptuning.load_prefix(model, str(start))


@pytest.mark.parametrize("recipe", [lora, ptuning])
def test_quantized_weights_stay_as_they_are(recipe, start, data, tmp_path):
    log = run(
        recipe, start, data, tmp_path, "--quantization_bit", "4", "--learning_rate", "3e-2", "--gradient_checkpointing"
    )
    assert losses(log)[-1] < losses(log)[0]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        run(sft, start, data, tmp_path / "sft", "--quantization_bit", "4")


def test_qlora_on_bitsandbytes(start, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    log = run(lora, start, data, tmp_path, "--load_in_4bit", "--learning_rate", "3e-2")
    assert losses(log)[-1] < losses(log)[0]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_trl_learns_answers_only(start, data, tmp_path):
    """TRL's own trainer, by the chat template: what it predicts are the ids that the recipes predict."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    messages = [{"role": "user", "content": "Say red"}, {"role": "assistant", "content": "red blue"}]
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=True)
    args = SFTConfig(tmp_path, assistant_only_loss=True, max_steps=2, use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"messages": messages}] * 8)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = encode_dialogue(tokenizer, messages, DataArguments())
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


def test_prefix_in_mixed_precision(start, data, tmp_path):
    """On weights in float16, which the published ones are."""
    plain = losses(run(ptuning, start, data, tmp_path / "a", "--pre_seq_len", "6"))
    mixed = losses(run(ptuning, start, data, tmp_path / "b", "--pre_seq_len", "6", "--bf16", "--dtype", "float16"))
    assert mixed == pytest.approx(plain, rel=5e-2)


def test_wrong_tests_are_refused_before_training(start, data, tmp_path):
    test = tmp_path / "test.json"
    test.write_text('[{"question": "a", "answer": "b"}]')
    with pytest.raises(ValueError, match="no column prompt, response"):
        run(sft, start, data, tmp_path / "out", "--do_predict", "--test_file", str(test))
    assert not (tmp_path / "out").exists()
    model = ["--model_name_or_path", str(start), "--do_predict", "--test_file", data["pairs"], "--use_cpu"]
    for recipe in (lora, ptuning):
        with pytest.raises(ValueError, match="Nothing is trained that could answer"):
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
    for options, message in (
        (["--config", str(config)], "no_such_option"),
        (["--config", "missing.yaml"], "There is no file 'missing.yaml'"),
        (["--config=missing.yaml"], "There is no file 'missing.yaml'"),
        (["--train_file", "x.json", "--config"], "There is no file ''"),
        (["--config", str(broken)], "while scanning|while parsing"),
        (["--train_file", "x.json"], "Give either --model_name_or_path or"),
        (["--model_name_or_path", "x", "--quantization_bit", "3"], "quantization_bit must be 4 or 8, got 3"),
        (["--model_name_or_path", "x", "--quantization_bit", "4", "--load_in_4bit"], "exclude each other"),
    ):
        with pytest.raises(SystemExit, match=message):
            sft.main(options)


@pytest.mark.parametrize("path", sorted((ROOT / "training/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_understood(path, tmp_path, monkeypatch):
    """Each is read by its recipe, which then looks for its model."""
    recipe = {"pretrain": pretrain, "sft": sft, "lora": lora, "qlora": lora, "ptuning": ptuning}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="."):
        recipe[path.stem.removeprefix("tiny_")].main(["--config", str(path), "--bf16", "false", "--use_cpu"])


def test_scores():
    """Perfect, empty, and in between, in percent."""
    assert predict.score(["今天天气很好"], ["今天天气很好"]) == pytest.approx(
        {"rouge-1": 100, "rouge-2": 100, "rouge-l": 100, "bleu-4": 100}, abs=1e-3
    )
    assert set(predict.score(["", "  "], ["好", "好"]).values()) == {0.0}
    scores = predict.score(["今天天气非常不好"], ["今天天气非常好"])
    assert 0 < scores["rouge-2"] < scores["rouge-1"] < 100 and 0 < scores["bleu-4"] < 100


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_processes_learn_as_one(engine, start, data, tmp_path):
    """
    The same curve as one process with twice the batch. Accelerate has no FSDP on CPUs, so that here it is Transformers' own.
    """
    options = ["--model_name_or_path", str(start), "--train_file", data["pairs"], *STEPS, "--max_grad_norm", "0"]
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
