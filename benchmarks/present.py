"""
Writes docs/benchmarks.md, with a table and a plot of each benchmark, and the table of speeds in README.md and README_zh.md.

    python -m benchmarks.present
"""

import json
import re
import sys
from pathlib import Path

from common.options import Parser
from common.package import ROOT


# Okabe and Ito's colours, which the colour-blind tell apart; lines have different markers too
OURS, PEER, OTHERS = "#0072b2", "#999999", ["#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"]
MARKERS = "osD^vP"
DPI = 200


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


PRECISION_NAMES = {"int4": "INT4", "int8": "INT8", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
SPEEDS = {"decode_tokens_s": "decoding", "prefill_tokens_s": "prompt of {prompt}"}


def decode_rows(figures: dict) -> list[tuple[str, dict]]:
    rows = [(name, figures[key]) for key, name in PRECISION_NAMES.items() if key in figures]
    return [(f"{name}, {r['layers']} layers" if r["layers"] != 28 else name, r) for name, r in rows]


def decode_text(figures: dict) -> str:
    """Tables of speeds, the worst ratio first, and of what limits them."""
    rows = []
    for name, result in decode_rows(figures):
        for peer, ratios in result["ratio"].items():
            for key, label in SPEEDS.items():
                speeds = [f"{result['this'][key]:.2f}", f"{peer} {result[peer][key]:.2f}"]
                rows.append([name, label.format(**figures), *speeds, f"{ratios[key]:.2f}"])
    rows.sort(key=lambda row: float(row[-1]))
    speed = table(["", "tokens per second", "this package", "compared with", "ratio"], rows)
    rows = [
        [
            name,
            f"{r['load_seconds']:.1f}",
            f"{r['weights_gb']:.1f}",
            f"{r['anonymous_gb']:.2f}",
            f"{r['share_of_stream']:.0%} of {r['stream_gb_s']:.0f} GB/s" if "stream_gb_s" in r else "",
            f"{r['share_outside_products']:.0%}",
            f"{r['four_rows']:.2f}" if "four_rows" in r else "",
        ]
        for name, r in decode_rows(figures)
    ]
    header = ["", "load, s", "weights, GB", "anonymous memory, GB", "memory bandwidth used"]
    header += ["time outside matmuls", "four sequences to one"]
    text = f"{speed}\n\n{table(header, rows)}\n\n"
    text += (
        "The 6B shape with random weights, run by `generate`. INT8 and INT4 store embedding and output layer in INT8, and are "
        "compared with Q8_0 and Q4_0 (output layer in Q6_K). `GlmForCausalLM` has the same weights and uses torch's matrix "
        "multiplication. Anonymous memory is the peak while loading and answering once: weights stay mapped from the file, "
        "unless they are cast. The bandwidth used in decoding is compared with that of a plain read of memory in the same "
        "rounds; more than 100 % means that the memory was faster during decoding. Time outside matmuls is the "
        "share of a decoding step that is not spent in matrix multiplication; below zero, it is less than the noise. They "
        "are timed by calling each layer from Python. Where a step is one call of C++ they take less than that, and the share is "
        "up to 5 percentage points larger. The last column is the time of the matrix multiplications of a step with four sequences, divided by that with one."
    )
    return text


def decode_plot(figures: dict, plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    rows = [(name, result) for name, result in decode_rows(figures) if result["layers"] == most_layers(figures)]
    systems = {"this package": "this", "llama.cpp": "llama.cpp", "ik_llama.cpp": "ik_llama.cpp"}
    systems["GlmForCausalLM (Transformers)"] = "GlmForCausalLM"
    colors = dict(zip(systems, (OURS, OTHERS[0], OTHERS[1], PEER)))
    for axis, key, title in zip(axes, SPEEDS, ("Decoding", f"Prompt of {figures['prompt']} tokens")):
        for i, (_, result) in enumerate(rows):
            present = [label for label, name in systems.items() if name in result]
            for j, label in enumerate(present):
                x, speed = i + 0.27 * (j - (len(present) - 1) / 2), result[systems[label]][key]
                shown = axis.get_legend_handles_labels()[1]
                axis.bar(x, speed, 0.25, color=colors[label], label=None if label in shown else label)
                if j:
                    ratio = result["ratio"][systems[label]][key]
                    axis.text(x, speed, f"{ratio:.2f}x", ha="center", va="bottom", fontsize="small")
        axis.set_xticks(range(len(rows)), [name for name, _ in rows])
        axis.set(title=title, ylabel="tokens per second")
        axis.margins(y=0.15)
    legend_above(figure, axes[0])
    return figure


def most_layers(figures: dict) -> int:
    return max(result["layers"] for _, result in decode_rows(figures))


def legend_above(figure, axis):
    """One legend for all axes, outside of them, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)


def attention_text(figures: dict) -> str:
    names = [name for name in figures["rows"][0] if isinstance(figures["rows"][0][name], dict)]
    rows = [
        [f"{row['positions']:,}", *(f"{row[name]['milliseconds_added_per_layer']:.1f}" for name in names)]
        for row in figures["rows"]
    ]
    text = "Milliseconds that attention adds to a decoding step in each layer:\n\n" + table(["positions", *names], rows)
    bytes_of = {name: figures["rows"][-1][name]["cache_bytes_per_layer_and_position"] for name in names}
    text += "\n\nBytes of KV cache for each position and layer: "
    text += ", ".join(f"{name} {size:,}" for name, size in bytes_of.items()) + "."
    base = list(figures["base_ms"])
    if len(base) > 1:
        rows = [
            [f"{row['positions']:,}"]
            + [f"{row[name]['decode_ms']:.0f} ({row[name]['attention_added']:+.1%})" for name in base]
            + [f"{row['decode_ratio']:.2f}"]
            for row in figures["rows"]
        ]
        text += "\n\nMilliseconds of a decoding step with 28 layers in INT4, computed from this, and the share that attention adds:\n\n"
        text += table(["positions", *base, "ratio to the fastest"], rows)
    return text


def attention_plot(figures: dict, plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    rows = figures["rows"]
    positions = [row["positions"] for row in rows]
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    for name, color, marker in zip(names, [OURS, *OTHERS], MARKERS):
        added = [max(row[name]["milliseconds_added_per_layer"], 0.05) for row in rows]  # noise can be negative
        axes[0].plot(positions, added, marker=marker, color=color, label=name)
        if name in figures["base_ms"]:
            speed = [1000 / row[name]["decode_ms"] for row in rows]
            axes[1].plot(positions, speed, marker=marker, color=color, label=name)
    axes[0].set(
        title="Time that attention adds to a decoding step", ylabel="milliseconds per layer (log scale)", yscale="log"
    )
    axes[1].set(title="Decoding, INT4, 28 layers", ylabel="tokens per second")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set(xlabel="tokens in the KV cache", xscale="log")
        axis.set_xticks(positions, [f"{n:,}" for n in positions])
        axis.minorticks_off()
    legend_above(figure, axes[0])
    return figure


def prompts_text(figures: dict) -> str:
    rows = []
    for row in figures["rows"]:
        cells = [f"{row['tokens']:,}"]
        for way in ("in chunks", "whole"):
            result = row.get(way)
            cells += (
                [f"{result['seconds']:.1f}", f"{result['peak_gb_above_weights_and_cache']:.2f}"] if result else ["", ""]
            )
        rows.append(cells)
    text = table(["tokens", "in chunks, s", "GB", "in one piece, s", "GB"], rows)
    return text + (
        f"\n\nSingle runs, {figures['layers']} layers of the 6B shape in INT4 with float32 activations. GB are the peak above "
        "weights and KV cache. More layers need more: the cache of each layer reserves up to a quarter of its size."
    )


def prompts_plot(figures: dict, plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for way, color, marker in (("in chunks", OURS, "o"), ("whole", OTHERS[0], "s")):
        rows = [row for row in figures["rows"] if way in row]
        tokens = [row["tokens"] for row in rows]
        label = {"in chunks": "in chunks of 1,024 tokens", "whole": "whole prompt at once"}[way]
        memory = [row[way]["peak_gb_above_weights_and_cache"] for row in rows]
        axes[0].plot(tokens, memory, marker=marker, color=color, label=label)
        speed = [row["tokens"] / row[way]["seconds"] for row in rows]
        axes[1].plot(tokens, speed, marker=marker, color=color)
        if len(rows) < len(figures["rows"]):
            end = (f"not run beyond\n{tokens[-1]:,} tokens:\nabout 10 GB", (tokens[-1], memory[-1]))
            axes[0].annotate(
                *end, xytext=(8, 4), textcoords="offset points", va="top", fontsize="small", color="#555555"
            )
    axes[0].set(title="Peak memory above weights and KV cache", ylabel="GB")
    axes[1].set(title="Prefill speed", ylabel="tokens per second")
    for axis in axes:
        axis.set(xlabel="tokens in the prompt")
        axis.set_ylim(bottom=0)
    legend_above(figure, axes[0])
    return figure


def rounds_text(figures: dict) -> str:
    rows = [
        [f"{r['history_tokens']:,}", f"{r['encoded_again_s']:.1f}", f"{r['with_cache_s']:.2f}", f"{r['ratio']:.0f}"]
        for r in figures["rows"]
    ]
    header = ["tokens of history", "history encoded again, s", "KV cache kept, s", "ratio"]
    return (
        f"Time to the first token of the next answer, {figures['layers']} layers, INT4 (without the cache: a single run):\n\n"
        + table(header, rows)
    )


def rounds_plot(figures: dict, plt):
    figure, axis = plt.subplots(figsize=(8, 4))
    rows = figures["rows"]
    for i, row in enumerate(rows):
        axis.bar(i - 0.2, row["encoded_again_s"], 0.4, color=PEER, label=None if i else "history encoded again")
        axis.bar(i + 0.2, row["with_cache_s"], 0.4, color=OURS, label=None if i else "KV cache kept")
        axis.text(i - 0.2, row["encoded_again_s"], f"{row['encoded_again_s']:.0f} s", ha="center", va="bottom")
        axis.text(i + 0.2, row["with_cache_s"], f"{row['with_cache_s']:.1f} s", ha="center", va="bottom")
    axis.set_xticks(range(len(rows)), [f"{row['history_tokens']:,}" for row in rows])
    axis.set(title="Time to the first token of an answer", xlabel="tokens of history", ylabel="seconds")
    axis.margins(y=0.15)
    legend_above(figure, axis)
    return figure


def batching_text(figures: dict) -> str:
    ways = list(figures["rows"][0]["tokens_s"])
    rows = [
        [r["requests"], *(f"{r['tokens_s'][way]:.1f} ({r['ratio'][way]:.2f})" for way in ways)] for r in figures["rows"]
    ]
    text = (
        f"Tokens per second of all requests together, prompts included, {figures['layers']} layers, INT4, single runs "
    )
    return text + "(and the ratio to one by one):\n\n" + table(["requests", *ways], rows)


def batching_plot(figures: dict, plt):
    figure, axis = plt.subplots(figsize=(8, 4))
    requests = [row["requests"] for row in figures["rows"]]
    for way, color, marker in zip(figures["rows"][0]["tokens_s"], [PEER, OTHERS[0], OURS], MARKERS):
        axis.plot(requests, [row["tokens_s"][way] for row in figures["rows"]], marker=marker, color=color, label=way)
    axis.set(title="Throughput of all requests together", xlabel="requests", ylabel="tokens per second", xscale="log")
    axis.set_xticks(requests, requests)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    legend_above(figure, axis)
    return figure


def serving_text(figures: dict) -> str:
    """The throughput of each server, the ratio of this package's faster mode to each peer, and the waiting times."""
    servers = [name for name in figures["rows"][0] if name != "clients"]
    ours = [name for name in servers if name in OUR_SERVERS]
    peers = [name for name in servers if name not in OUR_SERVERS]
    rows = []
    for row in figures["rows"]:
        best = max(row[name]["tokens_s"] for name in ours)
        speeds = [f"{row[name]['tokens_s']:.1f}" for name in servers]
        rows.append([row["clients"], *speeds, *(f"{best / row[name]['tokens_s']:.2f}" for name in peers)])
    header = ["clients", *servers, *(f"faster mode / {name}" for name in peers)]
    text = "Tokens per second of all answers together, prompts included:\n\n" + table(header, rows)
    rows = [
        [row["clients"], *(f"{row[name]['first_token_s']:.1f} / {row[name]['token_s']:.2f}" for name in servers)]
        for row in figures["rows"]
    ]
    text += "\n\nSeconds until the first token, and for each token after it:\n\n"
    text += table(["clients", *servers], rows)
    return text + (
        f"\n\n{figures['layers']} layers, prompts of {figures['words']} words on average, answers of {figures['tokens']} tokens, "
        "a different prompt for each client. INT4 (llama.cpp: Q4_0). All clients send their request at the same moment."
    )


def serving_plot(figures: dict, plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    rows = figures["rows"]
    clients = [row["clients"] for row in rows]
    servers = [name for name in rows[0] if name != "clients"]
    for name, color, marker in zip(servers, [PEER, OURS, *OTHERS], MARKERS):
        for axis, key in zip(axes, ("tokens_s", "first_token_s")):
            axis.plot(clients, [row[name][key] for row in rows], marker=marker, color=color, label=name)
    axes[0].set(title="Throughput of all clients together", ylabel="tokens per second")
    axes[1].set(title="Time to the first token", ylabel="seconds (log scale)", yscale="log")
    axes[0].set_ylim(bottom=0)
    for axis in axes:
        axis.set(xlabel="clients at once", xscale="log")
        axis.set_xticks(clients, clients)
        axis.minorticks_off()
    legend_above(figure, axes[0])
    return figure


def soak_text(figures: dict) -> str:
    expected = ("answered", "hung up", "refused")
    rows = []
    for way, result in figures["ways"].items():
        outcomes, memory = result["outcomes"], result["memory_mb"]
        errors = sum(n for name, n in outcomes.items() if name not in expected)
        waits = [f"{result[key]:.1f}" for key in ("median_s", "slowest_s")]
        rows.append(
            [way, *(outcomes.get(name, 0) for name in expected), errors, *waits, f"{memory[0]} to {memory[-1]}"]
        )
    header = [
        "",
        "answered",
        "disconnected",
        "refused",
        "errors",
        "median, s",
        "slowest, s",
        "memory, first to last minute, MB",
    ]
    return table(header, rows) + (
        f"\n\n{figures['clients']} clients send requests to the small model for {figures['minutes']:.0f} minutes. One stream in "
        "ten is disconnected by its client. Two more clients send requests that must be refused, and leave connections half open. "
        "Errors are all other outcomes, for example a greedy answer that differs from the one before."
    )


def soak_plot(figures: dict, plt):
    figure, axis = plt.subplots(figsize=(8, 4))
    for (way, result), color, marker in zip(figures["ways"].items(), [PEER, OURS], MARKERS):
        memory = result["memory_mb"]
        axis.plot(range(1, len(memory) + 1), memory, marker=marker, color=color, label=way)
    axis.set(title=f"Memory of the server with {figures['clients']} clients", xlabel="minutes", ylabel="MB")
    axis.set_ylim(bottom=0)
    legend_above(figure, axis)
    return figure


def training_text(figures: dict) -> str:
    rows = []
    for way, row in figures["ways"].items():
        this, peer, ratio = row["this"], row.get("GlmForCausalLM"), row.get("ratio")
        cells = [
            way,
            f"{this['tokens_s']:.0f}",
            *([f"{peer['tokens_s']:.0f}", f"{ratio['tokens_s']:.2f}"] if peer else ["", ""]),
        ]
        rows.append([*cells, f"{this['peak_gb']:.2f}", f"{peer['peak_gb']:.2f}" if peer else ""])
    shape = figures["shape"]
    header = ["", "this package, tokens/s", "GlmForCausalLM", "ratio", "this package, peak GB", "GlmForCausalLM"]
    return table(header, rows) + (
        f"\n\n{shape['num_layers']} layers of width {shape['hidden_size']}, float32, {figures['rows']} rows of "
        f"{figures['length']:,} tokens a step, both with the same weights and the same Trainer. QLoRA uses this package's INT4 "
        "here, and bitsandbytes' NF4 there. P-Tuning is compared with PEFT's prefix tuning with the same number of positions."
    )


def training_plot(figures: dict, plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, key, title in zip(axes, ("tokens_s", "peak_gb"), (("Speed", "tokens per second"), ("Peak memory", "GB"))):
        for i, row in enumerate(figures["ways"].values()):
            for offset, system, color in ((-0.2, "this", OURS), (0.2, "GlmForCausalLM", PEER)):
                if system in row:
                    label = {"this": "this package", "GlmForCausalLM": "GlmForCausalLM (Transformers)"}[system]
                    axis.bar(i + offset, row[system][key], 0.4, color=color, label=None if i else label)
        axis.set_xticks(range(len(figures["ways"])), figures["ways"])
        axis.set(title=title[0], ylabel=title[1])
    legend_above(figure, axes[0])
    return figure


def evaluation_text(figures: dict) -> str:
    rows = []
    for row in figures["rows"]:
        this, harness = row["seconds"]["this"], row["seconds"]["lm-evaluation-harness"]
        same = f"{row['same_scores']} of {row['questions']}"
        rows.append([row["task"], row["questions"], f"{this:.1f}", f"{harness:.1f}", f"{row['ratio']:.2f}", same])
    header = ["", "questions", "this package, s", "lm-evaluation-harness, s", "ratio", "same scores"]
    return table(header, rows) + (
        f"\n\nThe small model, batches of {figures['batch_size']}, with `evaluation.model` and with the harness's own "
        f"`HFLM`, on the same tasks and questions. All together: {figures['ratio']:.2f} times as fast. The gain is smallest for MMLU "
        "with the chat model: its answers are short, and its prompts share no examples."
    )


def evaluation_plot(figures: dict, plt):
    figure, axis = plt.subplots(figsize=(9, 4))
    rows = figures["rows"]
    for i, row in enumerate(rows):
        this, harness = row["seconds"]["this"], row["seconds"]["lm-evaluation-harness"]
        axis.barh(i - 0.2, harness, 0.4, color=PEER, label=None if i else "lm-evaluation-harness")
        axis.barh(i + 0.2, this, 0.4, color=OURS, label=None if i else "this package")
        axis.text(max(this, harness), i, f" {row['ratio']:.1f}x", va="center")
    axis.set_yticks(range(len(rows)), [row["task"].replace(" (", "\n(") for row in rows])
    axis.set(title="Time to evaluate", xlabel="seconds")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    legend_above(figure, axis)
    return figure


def tokenizer_text(figures: dict) -> str:
    rows = [
        [r["text"], r["task"], f"{r['slow']:.2f}", f"{r['this']:.2f}", f"{r['ratio']:.1f}"] for r in figures["rows"]
    ]
    text = "Compared with a tokenizer that works as the published one does: SentencePiece behind the library's Python class.\n\n"
    return text + table(["text", "", "as published, Mtokens/s", "this package, Mtokens/s", "ratio"], rows)


def tokenizer_plot(figures: dict, plt):
    figure, axis = plt.subplots(figsize=(8, 4))
    rows = figures["rows"]
    for i, row in enumerate(rows):
        axis.bar(i - 0.2, row["slow"], 0.4, color=PEER, label=None if i else "as published (SentencePiece in Python)")
        axis.bar(i + 0.2, row["this"], 0.4, color=OURS, label=None if i else "this package")
        axis.text(i, max(row["slow"], row["this"]), f"{row['ratio']:.1f}x", ha="center", va="bottom")
    axis.set_xticks(range(len(rows)), [f"{row['text']}\n{row['task']}".replace(", ", ",\n") for row in rows])
    axis.set(title="Tokenizer speed", ylabel="million tokens per second")
    axis.margins(y=0.15)
    legend_above(figure, axis)
    return figure


def quantization_quality_text(figures: dict) -> str:
    rows = [[name, f"{r['perplexity']:.2f}", f"{r['divergence']:.2g}"] for name, r in figures["results"].items()]
    text = (
        "`checkpoints/tiny`, dequantized to float32, on held-out text. The divergence (KL) is measured from that. The last rows "
        "quantize nothing, but keep keys and values in half precision:\n\n"
    )
    return text + table(["", "perplexity", "divergence"], rows)


def quantization_quality_plot(figures: dict, plt):
    figure, axis = plt.subplots(figsize=(8, 4))
    results = {name: r for name, r in figures["results"].items() if name != "not quantized"}
    colors = [PEER if "bitsandbytes" in name else OURS for name in results]
    axis.barh(list(results), [r["divergence"] for r in results.values()], color=colors)
    for i, result in enumerate(results.values()):
        axis.text(result["divergence"], i, f" perplexity {result['perplexity']:.2f}", va="center")
    exact = figures["results"]["not quantized"]["perplexity"]
    axis.set(
        title=f"What quantization costs (perplexity of the float32 model: {exact:.2f})",
        xlabel="KL divergence from the float32 model, nats per token",
    )
    axis.margins(x=0.35)
    axis.invert_yaxis()
    return figure


OUR_SERVERS = ("one by one", "continuous batching")
SIZES = "the 6B shape, random weights"
# What each plot is of
MODELS = {
    "decode": lambda figures: f"{most_layers(figures)} layers of {SIZES}",
    "attention": lambda figures: (
        f"attention in {figures['layers']} layers of {SIZES}; INT4 speed computed for 28 layers"
    ),
    "prompts": lambda figures: f"{figures['layers']} of 28 layers of {SIZES}, INT4, single runs",
    "rounds": lambda figures: f"{figures['layers']} layers of {SIZES}, INT4",
    "batching": lambda figures: f"{figures['layers']} layers of {SIZES}, INT4, single runs",
    "serving": lambda figures: f"{figures['layers']} layers of {SIZES}, INT4",
    "soak": lambda figures: "the small model",
    "training": lambda figures: "{num_layers} layers of width {hidden_size}, random weights, float32".format(
        **figures["shape"]
    ),
    "evaluation": lambda figures: "the small model",
    "tokenizer": lambda figures: "tokenizer of ChatGLM2-6B",
    "quantization_quality": lambda figures: "checkpoints/tiny, held-out text",
}

# Of each benchmark: the heading, the table, the plot
SECTIONS = {
    "decode": ("Loading, prompts and decoding", decode_text, decode_plot),
    "attention": ("Attention as the context grows", attention_text, attention_plot),
    "prompts": ("Long prompts", prompts_text, prompts_plot),
    "rounds": ("Rounds of a dialogue", rounds_text, rounds_plot),
    "batching": ("Several requests", batching_text, batching_plot),
    "serving": ("Servers", serving_text, serving_plot),
    "soak": ("Servers, for ten minutes", soak_text, soak_plot),
    "training": ("Training", training_text, training_plot),
    "evaluation": ("Evaluation", evaluation_text, evaluation_plot),
    "tokenizer": ("Tokenizer", tokenizer_text, tokenizer_plot),
    "quantization_quality": ("What quantization costs", quantization_quality_text, quantization_quality_plot),
}


def compared(machines: list[dict[str, dict]]) -> list[tuple]:
    """`(ratio, precision, label, speed, peer, figures)` of each CPU beside the fastest peer, the lowest ratio first."""
    rows = []
    for figures in machines:
        decode = figures.get("decode", {})
        for name, result in decode_rows(decode):
            for key, label in SPEEDS.items():
                if result["ratio"]:
                    peer = min(result["ratio"], key=lambda peer: result["ratio"][peer][key])
                    speed = f"{result['this'][key]:.1f} tokens/s"
                    label = label.format(**decode)
                    precision = name.split(",")[0]
                    rows.append((result["ratio"][peer][key], precision, f"{name}, {label}", speed, peer, decode))
        for row in figures.get("attention", {}).get("rows", []):
            if row["positions"] > 8000 and "decode_ratio" in row:
                label = f"INT4, decoding at {row['positions']:,} positions (computed from 2 layers)"
                speed = f"{1000 / row['this']['decode_ms']:.1f} tokens/s"
                peers = {name: row[name]["decode_ms"] for name in figures["attention"]["base_ms"] if name != "this"}
                peer = min(peers, key=peers.get)
                rows.append((row["decode_ratio"], "long", label, speed, peer, figures["attention"]))
        if "rounds" in figures:
            last = figures["rounds"]["rows"][-1]
            label = f"first token of the next round after {last['history_tokens']:,} tokens"
            rows.append(
                (last["ratio"], "rounds", label, f"{last['with_cache_s']:.1f} s", "no cache", figures["rounds"])
            )
    return sorted(rows, key=lambda row: row[0])


def summary(machines: list[dict[str, dict]], worst_only: bool = False) -> str:
    """
    A table of all comparisons (docs/benchmarks.md), or of the lowest ratio of each precision, for prompts and for decoding
    (README.md). The lowest ratio comes first.
    """
    rows, seen = [], set()
    for ratio, precision, label, speed, peer, figures in compared(machines):
        kind = (precision, label.rpartition(", ")[2])
        if worst_only and (kind in seen or precision in ("long", "rounds")):
            continue
        seen.add(kind)
        rows.append([label, speed, f"{ratio:.2f} times {peer}", where(figures)])
    return table(["6B shape", "this package", "speed ratio", "measured on"], rows)


def where(figures: dict) -> str:
    return f"{figures['machine']['cpu']}, {figures['machine']['threads']} threads"


def machine(figures: dict) -> str:
    m = figures["machine"]
    text = f"{m['threads']} threads of an {m['cpu']} ({m['capability']}), torch {m['torch']}, transformers {m['transformers']}"
    return text + "".join(f", {name} {version}" for name, version in m.get("peers", {}).items())


INTRODUCTION = """\
Measure speed and memory on your machine, compare them with other programs, and write this page again:

```shell
make bench                     # an hour; 40 GB of disk and 16 GB of memory for the 6B shape
source .venv-bench/bin/activate
python -m benchmarks --quick   # a smoke test in 3 minutes, with nothing to compare
python -m benchmarks.gpu       # on a GPU
```

Programs that are compared take turns in one run. Figures are medians, unless they are marked as single runs. Compare the ratios:
the speeds depend on the machine. Programs that are not installed (extra `bench`) are left out.

## Summary

The 6B shape with random weights, on two cores of each CPU, compared with the fastest other program in the same benchmark. Ratios
above 1 mean that this package is faster; the lowest comes first. The figures of the Intel CPU are of an earlier version of this
package."""


def main():
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("matplotlib is not installed: plots are left as they are.", file=sys.stderr)
        plt = None

    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    machines = {folder.name: read_figures(folder) for folder in sorted(args.results.iterdir()) if folder.is_dir()}
    page = ["# Benchmarks", ""]
    page += [INTRODUCTION, "", summary(list(machines.values()))]
    for name, (title, text, plot) in SECTIONS.items():
        measured = {folder: figures[name] for folder, figures in machines.items() if name in figures}
        if measured:
            page += ["", f"## {title}"]
        for folder, result in measured.items():
            image = f"images/{name}-{folder}.png"
            page += ["", f"### {where(result)}", "", text(result), "", f"![{title}]({image})", ""]
            page += [f"`benchmarks/{name}.py`, {machine(result)}."]
            if plt is not None:
                figure = plot(result, plt)
                figure.set_layout_engine("constrained")
                figure.supxlabel(f"{MODELS[name](result)} · {where(result)}", fontsize="small", color="#555555")
                figure.savefig(args.docs / image, dpi=DPI)
                plt.close(figure)
    (args.docs / "benchmarks.md").write_text("\n".join(page) + "\n")

    if args.docs == ROOT / "docs":
        text = f"<!-- benchmarks -->\n{summary(list(machines.values()), worst_only=True)}\n<!-- /benchmarks -->"
        for path in (ROOT / "README.md", ROOT / "README_zh.md"):
            page = re.sub(
                "<!-- benchmarks -->.*<!-- /benchmarks -->", lambda _: text, path.read_text("utf-8"), flags=re.S
            )
            path.write_text(page, "utf-8")


def read_figures(folder: Path) -> dict[str, dict]:
    """Returns the figures of a CPU by the benchmark's name."""
    paths = {name: folder / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    main()
