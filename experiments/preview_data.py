"""Look at what training reads: python -m experiments.preview_data --config configs/NAME.py [--num_examples 3]

Prints the first examples as the model reads them, what it has to predict in colour (between ⟦ and ⟧ where there is no
terminal), and statistics of their lengths.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments import build, cli


def main(argv: Sequence[str]) -> int:
    """Prints the preview; returns the exit code."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--num_examples", type=int, default=3, help="how many to print")
    arguments = parser.parse(argv)
    config = arguments.config
    build.check(config)

    from gptjax.data.objectives import texts_per_row
    from gptjax.data.pipeline import eval_batches

    with cli.user_errors():
        config, tokenizer, _ = build.initial_model(config)
        data = build.prepare_data(config, tokenizer)
    before, after = ("\033[92m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    lengths: list[int] = []
    num_targets = 0
    for batch in eval_batches(data, "train", batch_size=64):
        for tokens, is_target, targets in examples(batch, texts_per_row(data.objective.name, data.seq_len)):
            if len(lengths) < arguments.num_examples:
                print(f"--- example {len(lengths) + 1}, {len(tokens)} tokens, {targets} ---")
                print(marked(data.tokenizer, tokens, is_target, before, after))
            lengths.append(len(tokens))
            num_targets += int(is_target.sum())
    rows = data.num_rows["train"]
    low, median, high = np.percentile(lengths, (5, 50, 95))
    print(
        f"--- {len(lengths):,} examples in {rows:,} rows of {data.seq_len} tokens ---\n"
        f"tokens an example: mean {np.mean(lengths):.1f}, least {min(lengths)}, 5 % {low:.0f}, median {median:.0f}, "
        f"95 % {high:.0f}, most {max(lengths)}\n"
        f"{num_targets / sum(lengths):.1%} of tokens are predicted; rows are {sum(lengths) / rows / data.seq_len:.1%} full"
    )
    return 0


def examples(
    batch: dict[str, np.ndarray], num_texts: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Yields each document of a batch: its tokens, a source's before its target's; which are predicted; that in words.

    `num_texts` is what rows have room for where something is asked of whole texts.
    """
    for row in range(len(batch["inputs"])):
        segments = batch["segment_ids"][row]
        for number in range(1, 1 + int(segments.max())):
            here = segments == number
            tokens, wanted = batch["inputs"][row][here], batch["targets"][row]
            weights = batch["loss_weights"][row]
            if num_texts:  # one thing, or two, of the whole
                asked = wanted.reshape(num_texts, -1)[number - 1]
                is_target = np.zeros(len(tokens), bool)
                if len(asked) == 2:
                    asked = asked - np.argmax(here)
                    is_target[asked[0] : asked[1] + 1] = True
                yield tokens, is_target, f"{'label' if len(asked) == 1 else 'answer at'} {' to '.join(map(str, asked))}"
                continue
            is_target = weights[here] > 0
            if (tokens[1:] == wanted[here][:-1]).all():  # the next token, which the last target adds
                tokens, is_target = np.append(tokens, wanted[here][-1:]), np.append(False, is_target)
            if "encoder_tokens" in batch:
                source = batch["encoder_tokens"][row][batch["encoder_segment_ids"][row] == number]
                tokens, is_target = np.append(source, tokens), np.append(np.zeros(len(source), bool), is_target)
            yield tokens, is_target, f"{is_target.sum()} predicted"


def marked(tokenizer: Any, tokens: np.ndarray, is_target: np.ndarray, before: str, after: str) -> str:
    """The text of `tokens`, with marks around runs of targets."""
    bounds = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(tokens)]
    texts = []
    for start, end in itertools.pairwise(bounds):
        text = tokenizer.decode(tokens[start:end], skip_special_tokens=False)
        texts.append(f"{before}{text}{after}" if is_target[start] else text)
    return "".join(texts)


if __name__ == "__main__":
    cli.run(main)
