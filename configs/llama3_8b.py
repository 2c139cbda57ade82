"""Llama 3 8B (Grattafiori et al., 2024, arXiv:2407.21783): its shape, 8,030,261,248 parameters; for `experiments.plan`.

Command:   python -m experiments.train --config configs/llama3_8b.py --workdir runs/llama3_8b \
               --config.data.files='corpus/*.txt'
Hardware:  made for a slice such as v5e:16x16 or v5p:4x4x4; not run by this project.
Expected:  python -m experiments.plan --config configs/llama3_8b.py --topology v5e:16x16
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """32 layers, 4096 wide, 8 groups of 4 heads; rows of 2,048 tokens, 2 for each of 256 devices."""
    config = default.get_config()
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.embed_dim = 4096
    config.model.mlp_dim = 14336
    config.model.max_seq_len = 2048
    config.model.position = "rotary"
    config.model.rope_theta = 500_000.0
    config.model.norm = "rmsnorm"
    config.model.activation = "swiglu"
    config.model.use_bias = False
    config.model.tie_embeddings = False
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.scan_layers = True
    config.data.corpus = "text"
    config.data.vocab_size = 128256
    config.data.validation_fraction = 0.005
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.beta2 = 0.95
    config.train.num_train_steps = 100_000
    config.train.batch_size = 512
    config.eval.every_steps = 2000
    config.eval.max_batches = 100
    config.checkpoint.every_steps = 1000
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
