"""PyTorch's side of `benchmarks.train_step`; runs in .venv-referee, which has torch and transformers but not gptjax."""

import contextlib
import json
import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class PlainBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (y.view(heads).transpose(1, 2) for y in self.qkv(self.attention_norm(x)).split(width, 2))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes["embed_dim"]
        self.tokens = nn.Embedding(sizes["vocab_size"], width)
        self.positions = nn.Embedding(max(1024, sizes["seq_len"]), width)
        self.blocks = nn.ModuleList(PlainBlock(width, sizes["num_heads"]) for _ in range(sizes["num_layers"]))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs, targets):
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))


def hugging_face(sizes):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_positions=max(1024, sizes["seq_len"]),
        n_embd=sizes["embed_dim"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    # Labels are shifted inside; the row's last input has no target there, one part in T less work than ours.
    return model, lambda inputs, targets: model(input_ids=inputs, labels=inputs).loss


def main():
    system, sizes = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    model, loss_of = hugging_face(sizes) if system == "hf" else (lambda m: (m, m))(PlainGPT(sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, sizes["vocab_size"], (sizes["batch_size"], sizes["seq_len"] + 1))
    low = torch.autocast("cpu", torch.bfloat16) if sizes["dtype"] == "bfloat16" else contextlib.nullcontext()

    def step():
        with low:
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(2):
        step()
    for _ in sys.stdin:
        step()  # the first after a pause does not count, as on our side
        started = time.perf_counter()
        for _ in range(2):
            step()
        print(
            (time.perf_counter() - started) / 2, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True
        )


if __name__ == "__main__":
    main()
