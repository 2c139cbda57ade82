"""Transformers' side of `benchmarks.finetune`; runs in .venv-referee, which has torch, transformers and peft.

Each line on stdin is answered by one: an object starts a run, [first, last] trains those steps, a path saves the model.
"""

import json
import sys
import time

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers.utils import logging


class Run:
    def __init__(self, objective, request):
        torch.manual_seed(request["seed"])
        kinds = {
            "classification": AutoModelForSequenceClassification,
            "question_answering": AutoModelForQuestionAnswering,
        }
        rate = request["dropout"]
        model = kinds[objective].from_pretrained(
            request["folder"], hidden_dropout_prob=rate, classifier_dropout=rate, attention_probs_dropout_prob=0.0
        )
        if request["adapter"]:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, request["adapter"], is_trainable=True)
        self.model, self.request, self.is_span = model.train(), request, objective == "question_answering"
        with open(request["batches"]) as file:
            self.batches = json.load(file)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [name for name, p in trained.items() if p.ndim == 2 and "lora_" not in name]
        groups = [
            {"params": [trained[name] for name in decayed], "weight_decay": request["weight_decay"]},
            {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
        ]
        self.trained = list(trained.values())
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=request["betas"], fused=True)

    def inputs(self, batch):
        ids, types, asked = zip(*batch, strict=True)
        length = max(map(len, ids))
        inputs = {
            "input_ids": torch.tensor([x + [0] * (length - len(x)) for x in ids]),
            "token_type_ids": torch.tensor([x + [0] * (length - len(x)) for x in types]),
            "attention_mask": torch.tensor([[1] * len(x) + [0] * (length - len(x)) for x in ids]),
        }
        asked = torch.tensor(asked)
        return inputs, asked

    def loss(self, batch):
        inputs, asked = self.inputs(batch)
        if not self.is_span:
            return self.model(**inputs, labels=asked[:, 0]).loss
        # Its own loss lets an answer begin in the padding.
        outputs, is_padding = self.model(**inputs), inputs["attention_mask"] == 0
        ends = (outputs.start_logits, outputs.end_logits)
        return sum(cross_entropy(x.masked_fill(is_padding, -1e9), asked[:, i]) for i, x in enumerate(ends)) / 2

    def train(self, first, last):
        started, losses = time.perf_counter(), []
        for step in range(first, last):
            loss = self.loss(self.batches[step])
            loss.backward()
            if self.request["clip_norm"]:
                clip_grad_norm_(self.trained, self.request["clip_norm"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.request["rates"][step]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses, time.perf_counter() - started

    def save(self, folder):
        (self.model.merge_and_unload() if self.request["adapter"] else self.model).save_pretrained(folder)


logging.disable_progress_bar()
logging.set_verbosity_error()
run = None
for line in sys.stdin:
    request, answer = json.loads(line), True
    if isinstance(request, dict):
        run = Run(sys.argv[1], request)
    elif isinstance(request, list):
        answer = run.train(*request)
    else:
        run.save(request)
    print(json.dumps(answer), flush=True)
