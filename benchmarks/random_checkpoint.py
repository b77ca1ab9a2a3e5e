"""Models and checkpoints of the ChatGLM2-6B shape with random weights, for measuring: ours, and llama.cpp's of the same."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from common.package import ROOT, TINY, code_files, module_of, product


def write_checkpoint(
    folder: Path,
    bits: int | None = None,
    dtype=torch.bfloat16,
    quantization: dict | None = None,
    **sizes,
):
    """
    Writes a checkpoint of the 6B shape, layer by layer.

    Args:
        bits: 4 or 8, or None for weights in `dtype`.
        quantization: Other options of `ChatGLMQuantizationConfig`.
        sizes: Fields of config.json that are to be others.
    """
    folder.mkdir(parents=True)
    link_code(folder)
    (folder / "tokenizer.model").symlink_to(TINY / "tokenizer.model")
    config = {**json.loads((ROOT / "config.json").read_text()), **sizes}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(config))

    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(model_config, trust_remote_code=True, dtype=dtype)
        if bits is not None:
            formats = module_of(model, "quantization")
            options = {"bits": bits, **(quantization or {})}
            config["quantization_config"] = {"quant_method": "chatglm", **options}
            options = formats.ChatGLMQuantizationConfig(**options)
            for name, layer in formats.empty_layers(model, options).items():
                model.set_submodule(name, layer)
    config_path.write_text(json.dumps(config))

    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        shards.setdefault(parts[3] if "layers" in parts else "rest", {})[name] = tensor
    weight_map, total = {}, 0
    for i, (shard, tensors) in enumerate(shards.items()):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        data = {name: random_tensor(name, tensor, bits, generator) for name, tensor in tensors.items()}
        save_file(data, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(data, file))
        total += sum(tensor.nbytes for tensor in data.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link_code(folder: Path):
    """Links this package's code into a folder, in which there may be links of an earlier run."""
    for path in code_files():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)


def random_tensor(name: str, like: torch.Tensor, bits: int | None, generator: torch.Generator) -> torch.Tensor:
    """Returns what makes hidden states of moderate size, so that nothing overflows."""
    if like.dtype == torch.int8:
        if bits == 8 or "layers" not in name:
            return torch.randint(-127, 128, like.shape, dtype=torch.int8, generator=generator)
        return torch.randint(-128, 128, like.shape, dtype=torch.int8, generator=generator) & ~0x11  # no -8 in a half
    if name.endswith("weight_scale"):
        return torch.full(like.shape, 0.02 / (4 if bits == 4 and "layers" in name else 73), dtype=like.dtype)
    if like.ndim == 1:
        return torch.full(like.shape, 1.0 if "norm" in name else 0.0, dtype=like.dtype)
    tensor = torch.empty(like.shape, dtype=torch.float32)
    return tensor.normal_(0, 0.02, generator=generator).to(like.dtype)


def load(folder: Path, **kwargs):
    link_code(folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()
    model.generation_config.eos_token_id = None  # random weights are to go on to the limit
    return model


def random_model(device: torch.device, bits: int | None = None, dtype=torch.bfloat16, **sizes):
    """
    A model that is made on its device, without files.

    Args:
        bits: 4 or 8, to which it is quantized, embeddings included, or None.
        sizes: Fields of config.json that are to be others.
    """
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **sizes)
    torch.manual_seed(0)
    with device:
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=dtype).eval()
    if bits is not None:
        model.quantize(bits, quantize_embeddings=True)
    model.generation_config.eos_token_id = None
    return model


def write_gguf(path: Path, layers: int = 28, kind: str = "Q4_0", **sizes):
    """
    Writes llama.cpp's file of the same shape. Needs `gguf`.

    Args:
        kind: Q4_0, which has its head in Q6_K, as llama.cpp's tools write it, Q8_0, F16 or BF16.
        sizes: Fields of config.json that are to be others.
    """
    import gguf
    import numpy as np

    from common.gguf_architecture import write_architecture

    config = {**json.loads((ROOT / "config.json").read_text()), **sizes}
    hidden, ffn, heads = config["hidden_size"], config["ffn_hidden_size"], config["num_attention_heads"]
    groups, vocabulary, head_dim = config["multi_query_group_num"], config["padded_vocab_size"], config["kv_channels"]
    body = gguf.GGMLQuantizationType[kind]
    head = gguf.GGMLQuantizationType.Q6_K if kind == "Q4_0" else body

    writer = gguf.GGUFWriter(path, "chatglm", use_temp_file=True)
    fields = {**config, "num_layers": layers}
    write_architecture(writer, product("configuration_chatglm.ChatGLMConfig").from_dict(fields))
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(vocabulary)

    rng = np.random.default_rng(0)
    # Where in a block the scale is, and a value for it
    scales = {"Q4_0": (slice(0, 2), 0.005), "Q8_0": (slice(0, 2), 0.0003), "Q6_K": (slice(-2, None), 1e-5)}

    def matrix(name: str, rows: int, columns: int, kind):
        if kind.name not in scales:
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
            data = torch.empty(rows, columns, dtype=dtype).normal_(0, 0.02)
            writer.add_tensor(name, data.view(torch.uint8).numpy(), raw_dtype=kind)
            return
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (rows, columns // block_size, block_bytes), dtype=np.uint8)
        where, scale = scales[kind.name]
        data[..., where] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kind)

    def full(name: str, size: int, value: float):
        writer.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd.weight", vocabulary, hidden, head)
    matrix("output.weight", vocabulary, hidden, head)
    full("output_norm.weight", hidden, 1)
    for i in range(layers):
        full(f"blk.{i}.attn_norm.weight", hidden, 1)
        full(f"blk.{i}.ffn_norm.weight", hidden, 1)
        full(f"blk.{i}.attn_qkv.bias", (heads + 2 * groups) * head_dim, 0)
        matrix(f"blk.{i}.attn_qkv.weight", (heads + 2 * groups) * head_dim, hidden, body)
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head_dim, body)
        matrix(f"blk.{i}.ffn_up.weight", 2 * ffn, hidden, body)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ffn, body)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
