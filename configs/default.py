"""Every field there is, with its default and its meaning; the other configs change fields of this one."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A small GPT-2 on the running Python's standard library."""
    config = ConfigDict()
    config.seed = 0  # of initial parameters, order of rows, and dropout

    config.model = ConfigDict()
    config.model.family = "gpt"  # gpt, bert, encoder_decoder
    config.model.num_layers = 4  # blocks; of an encoder-decoder, the decoder's
    config.model.num_encoder_layers = 0  # blocks of an encoder-decoder's encoder
    config.model.num_heads = 4  # query heads
    config.model.num_kv_heads = 0  # key and value heads; 0: num_heads
    config.model.head_dim = 0  # width of a head; 0: embed_dim / num_heads
    config.model.embed_dim = 256  # width of the residual stream
    config.model.mlp_dim = 0  # width inside the MLP; 0: 4 * embed_dim
    config.model.max_seq_len = 256  # context in tokens, and the length of a row
    config.model.dropout = 0.0  # of embeddings and of what each block adds
    config.model.position = "learned"  # learned, sinusoidal, rotary, alibi, relative (T5's buckets), none
    config.model.rope_theta = 10000.0  # rotary: the longest wavelength is 2 pi times this
    config.model.rope_scaling = "none"  # rotary: none, linear, llama3, yarn
    config.model.rope_factor = 1.0  # rotary: how many times longer the context is made
    config.model.rope_original_len = 0  # rotary: the context of pretraining, for llama3 and yarn
    config.model.rope_low = 1.0  # rotary: llama3's low_freq_factor, yarn's beta_slow
    config.model.rope_high = 4.0  # rotary: llama3's high_freq_factor, yarn's beta_fast
    config.model.relative_buckets = 32  # relative: learned distances
    config.model.relative_max_distance = 128  # relative: from here on all distances share a bucket
    config.model.prefix_lm = False  # tokens of a row's prefix see each other both ways; set with data.objective=prefix
    config.model.window = 0  # positions a token sees back; 0: all
    config.model.window_pattern = "W"  # layers in turn: W sees the window, G sees all; WG alternates
    config.model.attention = "auto"  # plain, xla, jax (cuDNN on GPU), blockwise (memory linear in T), splash (TPU)
    config.model.attention_scale = 0.0  # of query times key; 0: 1 / sqrt(head_dim)
    config.model.attention_softcap = 0.0  # cap * tanh(scores / cap); 0: none
    config.model.attention_sinks = False  # a learned score a head that takes a share of the softmax and gives nothing
    config.model.attention_dropout = False  # model.dropout also for the attention weights
    config.model.qk_norm = False  # RMSNorm of queries and keys within a head
    config.model.value_embeddings = False  # a second embedding of the tokens in each layer's values
    config.model.norm = "layernorm"  # layernorm, rmsnorm
    config.model.norm_position = "pre"  # pre: of what a sublayer reads; post: of the sum after it
    config.model.norm_epsilon = 1e-5  # added to the variance
    config.model.embed_norm = False  # a norm after the embeddings
    config.model.embed_scale = 1.0  # multiplies the token embedding; 0: sqrt(embed_dim)
    config.model.activation = "gelu"  # gelu (tanh form), gelu_exact, relu, relu2, swiglu, geglu
    config.model.num_experts = 0  # a mixture of experts in place of the MLP; 0: none
    config.model.experts_per_token = 2  # experts that each token goes to
    config.model.balance_loss = 0.01  # coefficient of the mixture's load-balancing loss
    config.model.router_z_loss = 0.001  # coefficient of the mixture's z-loss
    config.model.use_bias = True  # biases in projections, MLP and LayerNorm
    config.model.qkv_bias = False  # biases in query, key and value even without use_bias
    config.model.residual_scales = False  # each block mixes in the embedded tokens, by learned scales
    config.model.residual_init = "scaled"  # scaled: what a block adds starts small; zero: it starts at zero
    config.model.token_types = 0  # bert: kinds of tokens, 2 for pairs of texts
    config.model.pooler = False  # bert: a dense layer with tanh over the first token
    config.model.tie_embeddings = True  # the head shares the token embedding
    config.model.scale_logits = False  # divide by sqrt(embed_dim) before a tied head, as T5 1.0
    config.model.logit_softcap = 0.0  # cap * tanh(logits / cap); 0: none
    config.model.head = "language_model"  # masked_lm, {sequence,token}_classification, span, embedding, none
    config.model.num_labels = 2  # of a classification head; 1: regression
    config.model.pooling = "first"  # what speaks for a text in sequence_classification and embedding: first, last, mean
    config.model.mup = False  # maximal update parametrisation: what is best for a narrow model is best for a wide one
    config.model.mup_base_dim = 256  # mup: the embed_dim at which it is like the standard one
    config.model.dtype = "float32"  # of the computation: float32, bfloat16; parameters are always float32
    config.model.scan_layers = False  # compile one block and scan over layers: compiles faster, runs slower on CPU
    config.model.remat = "none"  # what the backward pass computes again: none, dots (all but matrix products), full

    config.data = ConfigDict()
    config.data.corpus = "stdlib"  # stdlib, text, jsonl, json, csv, tsv, lines (two files, in parallel), tfds:NAME
    config.data.files = ""  # not for stdlib and tfds: files, folders, globs, by commas; named twice, read twice
    config.data.validation_files = ""  # the same for validation; empty: validation_fraction of the others
    config.data.text_field = "text"  # of records: the field that holds the text; of seq2seq, the source
    config.data.target_field = "target"  # seq2seq: the field that holds the target
    # causal, prefix, fim (gpt); masked (bert); span, seq2seq (encoder_decoder); of records known by the names of their
    # fields, see gptjax/data/examples.py: sft, dpo (gpt), classification, question_answering (bert, gpt)
    config.data.objective = "causal"  # what a row asks of the model
    config.data.seq_len = 0  # tokens of a row; 0: model.max_seq_len
    config.data.too_long = "error"  # pairs and records longer than a row, which are counted: error, drop, truncate
    config.data.mask_rate = 0.15  # masked and span: the share of tokens to restore
    config.data.whole_word = False  # masked: hide whole words
    config.data.span_length = 3.0  # span: tokens of a span, on average
    config.data.fim_rate = 0.5  # fim: the share of documents whose middle moves to the end
    config.data.tokenizer = "bpe"  # byte, char, bpe (trained on the corpus), or the path of one
    config.data.vocab_size = 4096  # tokens of a bpe trained here; with init.model, the model's
    config.data.validation_fraction = 0.05  # of the documents, or of the only document's end
    config.data.cross_document = False  # causal: let attention and positions cross the documents packed in a row

    config.init = ConfigDict()
    config.init.scale = 1.0  # multiplies the initial deviation of kernels and embeddings
    # With a model to start from, its tokenizer counts and its fields of `model` do; the config's stay at their defaults,
    # but for the head (head, num_labels, pooling), which may be a new one, for dropout, and for how it is computed
    # (attention, attention_dropout, dtype, scan_layers, remat, balance_loss, router_z_loss).
    config.init.model = ""  # a workdir, a Hugging Face folder or hub name, a .gguf; empty: from scratch

    config.lora = ConfigDict()
    config.lora.rank = 0  # adapters beside projections, the rest frozen but for a classification or span head; 0: none
    config.lora.alpha = 16.0  # adapters are multiplied by alpha / rank
    config.lora.dropout = 0.0  # of what adapters read
    config.lora.projections = "attention/(query|key|value|out)$|mlp/"  # regex on the paths of projections

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw, muon (hidden matrices; adamw for the rest)
    config.optimizer.learning_rate = 1e-3  # the peak
    config.optimizer.warmup_steps = 100  # linear, from 0
    config.optimizer.schedule = "cosine"  # cosine, linear, wsd (linear over the last fifth), rsqrt, constant
    config.optimizer.final_fraction = 0.1  # of the peak, at the last step
    config.optimizer.weight_decay = 0.1  # of what `decayed` finds
    config.optimizer.decayed = r"(kernel|embedding)$"  # regex on the paths of parameters
    config.optimizer.factors = ()  # ((regex, factor), ...) on learning rates; the first that fits counts; 0: frozen
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
    config.train.label_smoothing = 0.0  # the share of a target's probability that is spread over all tokens
    config.train.dpo_beta = 0.1  # dpo: how dear it is to leave the model that training began with
    config.train.z_loss = 0.0  # coefficient of logsumexp(logits)^2; 0: none
    config.train.ema_decay = 0.0  # moving average of the parameters, evaluated and loaded in their place; 0: none
    config.train.skip_spikes = 0.0  # skip updates whose loss is this many deviations above its mean; 0: never

    config.eval = ConfigDict()
    config.eval.every_steps = 250  # the last step always evaluates; 0: only then
    config.eval.max_batches = 0  # batches of the validation split; 0: all
    config.eval.num_samples = 3  # in samples.txt at the end: texts, or what becomes of validation rows
    config.eval.sample_prompt = ""  # what the texts of a gpt begin with
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
    config.mesh.expert = 1  # ways rows, and the experts of a mixture, are split

    config.profile = ConfigDict()
    config.profile.steps = ""  # FIRST:LAST steps to trace into the workdir's profile/; empty: none
    return config
