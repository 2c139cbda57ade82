"""Every field there is, with its default and its meaning; the other configs change fields of this one."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A small GPT-2 on the running Python's standard library."""
    config = ConfigDict()
    config.seed = 0  # of initial parameters, order of rows, and dropout

    config.model = ConfigDict()
    config.model.family = "gpt"  # gpt
    config.model.num_layers = 4  # blocks
    config.model.num_heads = 4  # query heads
    config.model.num_kv_heads = 0  # key and value heads; 0: num_heads
    config.model.head_dim = 0  # width of a head; 0: embed_dim / num_heads
    config.model.embed_dim = 256  # width of the residual stream
    config.model.mlp_dim = 0  # width inside the MLP; 0: 4 * embed_dim
    config.model.max_seq_len = 256  # context in tokens, and the length of a row
    config.model.dropout = 0.0  # of embeddings and of what each block adds
    config.model.norm = "layernorm"  # layernorm, rmsnorm
    config.model.norm_epsilon = 1e-5  # added to the variance
    config.model.activation = "gelu"  # gelu (tanh form), gelu_exact, relu, relu2
    config.model.use_bias = True  # biases in projections, MLP and LayerNorm
    config.model.tie_embeddings = True  # the head shares the token embedding
    config.model.dtype = "float32"  # of the computation: float32, bfloat16; parameters are always float32
    config.model.scan_layers = False  # compile one block and scan over layers: compiles faster, runs slower on CPU
    config.model.remat = "none"  # what the backward pass computes again: none, dots (all but matrix products), full

    config.data = ConfigDict()
    config.data.corpus = "stdlib"  # stdlib, text, jsonl, tfds:NAME
    config.data.files = ""  # for text and jsonl: paths, folders and globs, comma-separated
    config.data.text_field = "text"  # for jsonl and tfds: the field that holds the text
    config.data.tokenizer = "bpe"  # byte, char, bpe (trained on the corpus), or the path of one
    config.data.vocab_size = 4096  # tokens of a bpe trained here
    config.data.validation_fraction = 0.05  # of the documents, or of the only document's end
    config.data.cross_document = False  # let attention and positions cross the documents packed in a row

    config.init = ConfigDict()
    config.init.scale = 1.0  # multiplies the initial deviation of kernels and embeddings

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw, muon (hidden matrices; adamw for the rest)
    config.optimizer.learning_rate = 1e-3  # the peak
    config.optimizer.warmup_steps = 100  # linear, from 0
    config.optimizer.schedule = "cosine"  # cosine, linear, wsd (stable, then linear over the last fifth), constant
    config.optimizer.final_fraction = 0.1  # of the peak, at the last step
    config.optimizer.weight_decay = 0.1  # of kernels and embeddings
    config.optimizer.beta1 = 0.9  # AdamW's decay of the mean gradient
    config.optimizer.beta2 = 0.99  # AdamW's decay of the mean squared gradient
    config.optimizer.momentum = 0.95  # Muon's
    config.optimizer.clip_norm = 1.0  # greatest global norm of the gradient; 0: no clipping

    config.train = ConfigDict()
    config.train.num_train_steps = 1000  # updates
    config.train.batch_size = 16  # rows an update, over all devices
    config.train.accumulation_steps = 1  # micro-batches an update
    config.train.log_every_steps = 10  # a line in metrics.jsonl
    config.train.max_minutes = 0.0  # save and stop after this long; 0: no limit
    config.train.z_loss = 0.0  # coefficient of logsumexp(logits)^2; 0: none
    config.train.ema_decay = 0.0  # moving average of the parameters, evaluated and loaded in their place; 0: none
    config.train.skip_spikes = 0.0  # skip updates whose loss is this many deviations above its mean; 0: never

    config.eval = ConfigDict()
    config.eval.every_steps = 250  # the last step always evaluates; 0: only then
    config.eval.max_batches = 0  # batches of the validation split; 0: all
    config.eval.num_samples = 3  # texts written to samples.txt at the end
    config.eval.sample_prompt = ""  # what they begin with
    config.eval.sample_tokens = 200  # their greatest length

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 250  # evaluations and the last step always save; 0: only they
    config.checkpoint.keep = 2  # the latest so many; the best is kept besides

    config.mesh = ConfigDict()
    config.mesh.platform = "any"  # any, cpu, gpu, tpu: anything but this is an error
    config.mesh.data = -1  # ways rows are split; -1: all devices that are left
    config.mesh.fsdp = 1  # ways rows, parameters and optimizer are split
    config.mesh.tensor = 1  # ways heads and MLP are split
    config.mesh.context = 1  # ways positions are split

    config.profile = ConfigDict()
    config.profile.steps = ""  # FIRST:LAST steps to trace into the workdir's profile/; empty: none
    return config
