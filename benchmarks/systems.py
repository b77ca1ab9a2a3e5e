"""What is measured: this package, and its peers. Each runs a prompt and goes on from it, greedily."""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import ContinuousBatchingConfig, GlmConfig, GlmForCausalLM

from .measure import Clock, PeakMemory
from .random_checkpoint import load, write_checkpoint, write_gguf


def random_prompt(tokens: int, seed: int = 0, vocabulary: int = 60000) -> list[int]:
    return torch.randint(100, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class Ours:
    """This package, through `generate`: a checkpoint of the 6B shape with random weights."""

    def __init__(self, work: Path, layers: int, bits: int | None, dtype=torch.float32):
        folder = work / f"{f'int{bits}' if bits else 'bf16'}-{layers}"
        quantization = {"quantize_embeddings": True} if bits else None
        prepared(folder, write_checkpoint, bits=bits, quantization=quantization, num_layers=layers)
        with PeakMemory() as memory:
            start = time.perf_counter()
            self.model = load(folder, dtype=dtype)
            self.load_seconds = time.perf_counter() - start
            self.run(random_prompt(16), 4)  # weights are mapped from the file, and read at first use
        self.memory = memory.gb

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Returns the seconds to the first token, and the median seconds of the next ones."""
        return run_generate(self.model, prompt, tokens)


class Glm:
    """`GlmForCausalLM` of Transformers, with the very weights of a model of this package: it takes no memory of its own."""

    def __init__(self, model):
        c = model.config
        config = GlmConfig(
            vocab_size=c.padded_vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_attention_heads, attention_bias=True,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.kv_channels, rms_norm_eps=c.layernorm_epsilon,
            max_position_embeddings=c.seq_length, tie_word_embeddings=False, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        with init_empty_weights(include_buffers=False):
            self.model = GlmForCausalLM(config).eval()
        names = {
            "transformer.": "",
            "embedding.word_embeddings": "model.embed_tokens",
            "encoder.final_layernorm": "model.norm",
            "output_layer": "lm_head",
            "encoder.layers": "model.layers",
            "self_attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.gate_up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        }
        rows = [n * c.kv_channels for n in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)]
        weights = {}
        for name, tensor in model.state_dict().items():
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            if "query_key_value" in name:
                for letter, part in zip("qkv", tensor.split(rows)):
                    weights[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
            else:
                weights[name] = tensor
        self.model.load_state_dict(weights, assign=True)
        self.model.to(model.device)  # the buffers
        self.model.generation_config.eos_token_id = None
        self.run(random_prompt(16), 4)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        return run_generate(self.model, prompt, tokens)


def gguf_file(work: Path, layers: int, kind: str, **sizes) -> Path:
    """llama.cpp's file of the 6B shape, in Q4_0, Q8_0, F16 or BF16; written if it is not there yet."""
    name = "-".join(map(str, [kind, layers, *sizes.values()]))
    return prepared(work / f"{name}.gguf", write_gguf, layers=layers, kind=kind, **sizes)


class LlamaCpp:
    """llama.cpp, through llama-cpp-python's `eval`, without sampling."""

    def __init__(self, path: Path, context: int, flash_attention: bool = False):
        import llama_cpp

        threads = torch.get_num_threads()
        self.model = llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
            flash_attn=flash_attention, verbose=False,
        )  # fmt: skip
        self.run(random_prompt(16, vocabulary=1000), 4)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        self.model.reset()  # forgets the cache
        start = time.perf_counter()
        self.model.eval(prompt)
        return time.perf_counter() - start, self.step_seconds(tokens - 1)

    def step_seconds(self, tokens: int) -> float:
        """Median seconds of the next tokens, from where it is."""
        times = []
        for i in range(tokens):
            start = time.perf_counter()
            self.model.eval([i + 100])
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class IkLlamaCpp:
    """ik_llama.cpp, a fork of llama.cpp, through its `llama-bench`: weights repacked for the CPU, flash attention."""

    def __init__(self, program: Path, path: Path):
        self.command = [str(program), "-m", str(path), "-t", str(torch.get_num_threads()), "-o", "json"]
        self.command += ["-rtr", "1", "-fa", "1", "-r", "1", "-n", "0"]

    def bench(self, *arguments: str) -> list[dict]:
        return json.loads(subprocess.run([*self.command, *arguments], stdout=subprocess.PIPE, check=True).stdout)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Returns what `Ours.run` does. The mean of the next tokens, as llama-bench gives no median."""
        n = len(prompt)
        prefill, decode = self.bench("-p", str(n), "-gp", f"{n},{tokens}")
        return n / prefill["avg_ts"], 1 / decode["avg_ts"]


def add_ik(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--ik", type=existing_file, metavar="PATH", help="ik_llama.cpp's llama-bench, to measure it too"
    )


def existing_file(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no {path}. Pass the path of ik_llama.cpp's llama-bench.")
    return Path(path)


def paged_cache(prompts: list[list[int]], tokens: int) -> ContinuousBatchingConfig:
    """A cache with room for these prompts and so many more tokens: the library's default takes most of the memory."""
    block = 256  # tokens, of the library
    return ContinuousBatchingConfig(
        num_blocks=sum(-(-(len(prompt) + tokens) // block) for prompt in prompts), max_batch_tokens=512
    )


def run_generate(model, prompt: list[int], tokens: int) -> tuple[float, float]:
    clock, start = Clock(), time.perf_counter()
    ids = torch.tensor([prompt], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock)
    return clock.times[1] - start, clock.step_seconds()  # the first is the prompt


def is_installed(module: str) -> bool:
    """Whether a peer is; says so if not."""
    if importlib.util.find_spec(module) is not None:
        return True
    print(f"{module} is not installed, and is left out.", file=sys.stderr)
    return False


def prepared(path: Path, write, **kwargs) -> Path:
    """Returns `path`, written by `write(path, ...)` if it was not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", file=sys.stderr)
        unfinished = path.with_name(path.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was interrupted
        write(unfinished, **kwargs)
        os.replace(unfinished, path)
    return path
