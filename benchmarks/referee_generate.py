"""Hugging Face's side of `benchmarks.generate`; runs in .venv-referee, which has torch and transformers but not gptjax."""

import json
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main(dtype, sizes):
    """Answers each line [batch, context, new] with the seconds that `generate` takes."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_positions=sizes["max_seq_len"],
        n_embd=sizes["embed_dim"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
    )
    model = GPT2LMHeadModel(config).to(getattr(torch, dtype)).eval()
    for line in sys.stdin:
        question = json.loads(line)
        if question == ["ready"]:
            print(0.0, flush=True)
            continue
        batch, context, new = question
        prompts = torch.randint(0, sizes["vocab_size"], (batch, context))
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
