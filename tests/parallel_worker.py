"""One of two processes: loads a checkpoint split between them by our plans, and compares it with the whole."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModel


def main(mode: str, path: str):
    dist.init_process_group("gloo")
    if mode == "tp":
        kwargs = {"tp_plan": "auto"}
    else:
        from transformers.distributed import DistributedConfig

        kwargs = {"distributed_config": DistributedConfig(**{f"{mode}_size": 2})}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    whole = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    split = AutoModel.from_pretrained(path, trust_remote_code=True, **kwargs).eval()
    weight = split.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight
    assert weight.to_local().numel() * 2 == weight.numel()
    with torch.no_grad():
        difference = (split(ids).logits - whole(ids).logits).abs().max()
    assert difference < 1e-4, difference
    options = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(split.generate(ids, **options), whole.generate(ids, **options))
    dist.barrier()
    print(f"rank {dist.get_rank()}: equal")
    dist.destroy_process_group()


main(*sys.argv[1:])
