"""Transformers' side of `benchmarks.real_weights`; runs in .venv-referee with accelerate and gguf on the path.

It reads the packages' files by itself, the GGUF file included, and writes what it computes to an npz.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

request = json.loads(sys.argv[1])
logging.disable_progress_bar()
outputs = {}

if "minilm" in request:
    tokenizer, model = (kind.from_pretrained(request["minilm"]) for kind in (AutoTokenizer, AutoModel))
    inputs = tokenizer(request["sentences"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    outputs["vectors"] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    outputs["sentence_ids"] = inputs["input_ids"].numpy()

file = pathlib.Path(request["smollm2"])
tokenizer, model = (
    kind.from_pretrained(file.parent, gguf_file=file.name, **arguments)
    for kind, arguments in ((AutoTokenizer, {}), (AutoModelForCausalLM, {"dtype": torch.float32}))
)
if "prompts" in request:
    for i, ids in enumerate(request["prompts"]):
        prompt = torch.tensor(ids)[None]
        settings = {"do_sample": False, "max_new_tokens": request["new_tokens"], "eos_token_id": request["eos_id"]}
        settings |= {"stop_strings": request["stop"], "tokenizer": tokenizer}
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        outputs[str(i)] = written[0, len(ids) :].numpy()
    np.savez(request["output"], **outputs)
    sys.exit()
text = pathlib.Path(request["text"]).read_text()
outputs["text_ids"] = np.array(tokenizer(text[: request["characters"]], add_special_tokens=False)["input_ids"])
windows = torch.tensor(request["windows"])
losses = []
with torch.no_grad():
    for window in windows:
        logits = model(window[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").numpy())
    outputs["losses"] = np.stack(losses)
    prompt = torch.tensor(request["prompt"])[None]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=request["new_tokens"]
    )
outputs["greedy"] = ids[0, prompt.shape[1] :].numpy()
np.savez(request["output"], **outputs)
