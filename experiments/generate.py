"""Write text with a trained model: python -m experiments.generate --model M --prompt TEXT [--num_samples N ...]

M is a workdir, a Hugging Face folder, a GGUF file or a hub name. A decoder-only model continues past its context by reading
the later half of what it has again; to an encoder-decoder, the prompt is the source.
"""

import time
from collections.abc import Sequence

from experiments import cli


def main(argv: Sequence[str]) -> int:
    """Generates; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="M", help="a workdir, a folder, a .gguf or a hub name")
    parser.add_argument("--step", type=int, help="which checkpoint of a workdir; the best, if not given")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to write")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="the most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy, 1 the model's own distribution")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="or among the likeliest that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    arguments = parser.parse(argv)
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed {arguments.seed} must be from 0 to 2**32 - 1")

    import numpy as np

    import gptjax
    from gptjax.data.objectives import decoder_start
    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling
    from gptjax.models import EncoderDecoder
    from gptjax.workdir import environment

    with cli.user_errors():
        model, params, tokenizer = gptjax.load(arguments.model, step=arguments.step)
        prompt, source = tokenizer.encode_with_specials(arguments.prompt).ids, None
        if isinstance(model, EncoderDecoder):
            prompt, source = np.array([decoder_start(tokenizer)]), prompt
        if not len(prompt):  # GPT-2's tokenizer puts nothing before a text
            prompt = np.array([tokenizer.eos_id])
        started = time.perf_counter()
        samples = generate(
            model,
            params,
            [prompt],
            max_new_tokens=arguments.max_new_tokens,
            eos_ids=[tokenizer.eos_id],
            sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
            num_samples=arguments.num_samples,
            seed=arguments.seed,
            sources=None if source is None else [source],
        )
    seconds = time.perf_counter() - started
    for index, ids in enumerate(samples):
        if arguments.num_samples > 1:
            print(f"--- sample {index + 1} ---")
        print(("" if source is not None else arguments.prompt) + tokenizer.decode(ids))
    num_tokens = sum(len(ids) for ids in samples)
    metrics = {"generation/tokens": num_tokens, "generation/seconds": seconds}
    cli.write_report(arguments.json, environment(), [arguments.seed], metrics)
    return 0


if __name__ == "__main__":
    cli.run(main)
