"""Objectives: what a packed row asks of a model. Each is a function of one row and a random generator."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.data.tokenizers import Tokenizer

# Those of fine-tuning, whose documents are records, see `examples`.
SUPERVISED = ("sft", "dpo", "classification", "question_answering")
OBJECTIVES = ("causal", "prefix", "fim", "masked", "span", "seq2seq", *SUPERVISED)
# Those whose targets are a text, read in order (for 'fim' its three parts): bits per byte means something.
TEXT_IN_ORDER = ("causal", "prefix", "fim", "seq2seq", "sft")
NUM_SENTINELS = 100  # T5's
_ASKED = {"classification": 1, "question_answering": 2}  # of each text: a label; an answer's first and last token
_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

Example = dict[str, np.ndarray]
ObjectiveFn = Callable[[np.ndarray, np.random.Generator], Example]


class Objective(NamedTuple):
    """An objective and its numbers.

    Attributes:
      name: one of `OBJECTIVES`.
      mask_rate: of 'masked' and 'span', the share of tokens to restore.
      whole_word: of 'masked', choose words instead of tokens.
      span_length: of 'span', the mean length of a span in tokens.
      fim_rate: of 'fim', the share of documents that are rearranged.
    """

    name: str = "causal"
    mask_rate: float = 0.15
    whole_word: bool = False
    span_length: float = 3.0
    fim_rate: float = 0.5

    def frame(self) -> dict[str, bool]:
        """Whether the end token opens and closes what a model is given: a document, or the source of an encoder-decoder."""
        is_source, is_whole = self.name in ("span", "seq2seq"), self.name in _ASKED
        opens = not is_source and self.name not in ("sft", "dpo")
        return {"opens": opens, "closes": is_source or is_whole or self.name == "masked"}

    @property
    def num_fields(self) -> int:
        """How many a packed row has."""
        return 7 if self.name == "seq2seq" else 5 if self.name in SUPERVISED else 4


def loss_unit(name: str) -> str:
    """What the loss of an objective is an average over, in a word."""
    return {"dpo": "pair", "classification": "label", "question_answering": "end"}.get(name, "token")


def special_tokens(name: str) -> tuple[str, ...]:
    """The special tokens that an objective needs besides the end of a document, by their names in our tokenizers."""
    if name == "span":
        return tuple(f"<|sentinel_{i}|>" for i in range(NUM_SENTINELS))
    return {"masked": ("<|mask|>",), "fim": _FIM}.get(name, ())


def decoder_start(tokenizer: Tokenizer) -> int:
    """The token that an encoder-decoder's target begins with: padding, as T5 has it, or without one the end of text."""
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def opening(tokenizer: Tokenizer) -> np.ndarray:
    """The special tokens that the tokenizer itself puts before a text, int32 [n]."""
    encoded = tokenizer.encode_with_specials("a")
    return encoded.ids[: int(np.argmax(encoded.sequence == 0))]


def document_start(tokenizer: Tokenizer) -> np.ndarray:
    """What a text that follows nothing is given after: `opening`, or the token that begins or ends a document."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return opening(tokenizer) if len(opening(tokenizer)) else np.array([first], np.int32)


def texts_per_row(name: str, seq_len: int) -> int | None:
    """The most texts in a row of the objectives that ask one thing or two of each text; None for the others."""
    shortest = {"classification": 8, "question_answering": 64}.get(name)  # tokens of a text, or more would have room
    return shortest and -(-seq_len // shortest)


def target_len(objective: Objective, seq_len: int) -> int:
    """T, the length of `targets`: for 'span' not that of a row, nor for those that ask one thing or two of each text.

    A span costs its tokens and a sentinel, a document an end. There is room for a document every 16 tokens.
    """
    if objective.name != "span":
        num_texts = texts_per_row(objective.name, seq_len)
        return num_texts * _ASKED[objective.name] if num_texts else seq_len
    needed = seq_len * objective.mask_rate * (1 + 1 / objective.span_length) + seq_len / 16
    return min(seq_len, 8 * -(-round(needed) // 8))


def make_objective(
    objective: Objective, tokenizer: Tokenizer, seq_len: int, *, cross_document: bool = False
) -> ObjectiveFn:
    """Builds the function `(row, rng) -> example`.

    A row is int32 [4, S]: inputs, targets, segment_ids and positions, as `packing.pack` gives them, or [7, S] of
    `packing.pack_pairs` for 'seq2seq', or [5, S] of `packing.pack_whole` for those of `SUPERVISED`. An example is a dict of
    int32 [T] `inputs`, `targets`, `segment_ids` and `positions`, and float32 [T] `loss_weights`, 1 for a token to predict;
    some objectives add fields, and two have another T for what is predicted. Shapes never change, and a row of zeros gives
    zeros. Unless `cross_document` says so, nothing looks beyond its document.

    Args:
      objective: name and numbers.
      tokenizer: has the objective's `special_tokens`.
      seq_len: S, the length of a row.
      cross_document: of 'causal', let attention and positions run over the whole row.
    """
    if objective.name == "causal":
        return functools.partial(causal, cross_document=cross_document)
    if objective.name == "prefix":
        return prefix
    if objective.name == "seq2seq":
        return seq2seq
    if objective.name in ("sft", "dpo"):
        return sft
    if objective.name in _ASKED:
        shape = (target_len(objective, seq_len) // _ASKED[objective.name], _ASKED[objective.name])
        return functools.partial(of_the_whole, shape=shape)
    ids = np.array([tokenizer.special_id(name) for name in special_tokens(objective.name)], np.int32)
    if objective.name == "fim":
        return functools.partial(fim, rate=objective.fim_rate, fim_ids=ids, tokenizer=tokenizer)
    if objective.name == "masked":
        return functools.partial(
            masked,
            rate=objective.mask_rate,
            mask_id=int(ids[0]) if tokenizer.mask_id is None else tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            cls_id=tokenizer.cls_id,
            is_special=tokenizer.is_special,
            ordinary_ids=np.flatnonzero(~tokenizer.is_special).astype(np.int32),
            word_edges=tokenizer.word_edges if objective.whole_word else None,
        )
    if objective.name == "span":
        return functools.partial(
            span,
            rate=objective.mask_rate,
            span_length=objective.span_length,
            sentinel_ids=ids,
            eos_id=tokenizer.eos_id,
            start_id=decoder_start(tokenizer),
            target_len=target_len(objective, seq_len),
        )
    raise ValueError(f"data.objective {objective.name!r} is not one of {', '.join(OBJECTIVES)}")


def causal(row: np.ndarray, rng: np.random.Generator, *, cross_document: bool = False) -> Example:
    """Predicts every next token."""
    inputs, targets, segment_ids, positions = row
    is_real = segment_ids > 0
    if cross_document:
        segment_ids = is_real.astype(np.int32)
        positions = np.where(is_real, np.arange(len(inputs), dtype=np.int32), 0)
    return _example(inputs, targets, segment_ids, positions, is_real)


def prefix(row: np.ndarray, rng: np.random.Generator) -> Example:
    """Predicts what follows a random prefix of each document piece (Raffel et al., 2020, arXiv:1910.10683, section 3.2.3).

    The prefix has from one to all of the piece's inputs, equally likely; bool `prefix` [T] marks it, for attention in
    both directions. Its own tokens are no targets, except that the last of them predicts the first token after it.
    """
    inputs, targets, segment_ids, positions = row
    is_real = segment_ids > 0
    sizes = np.bincount(segment_ids)
    prefix_len = (1 + np.floor(rng.random(len(sizes)) * sizes).astype(np.int32))[segment_ids]
    example = _example(inputs, targets, segment_ids, positions, is_real & (positions >= prefix_len - 1))
    return example | {"prefix": is_real & (positions < prefix_len)}


def infill_ids(tokenizer: Tokenizer, prefix: str, suffix: str, *, suffix_first: bool = False) -> np.ndarray:
    """The ids, int32 [T], that ask a model trained with `fim` for what is between two texts.

    With `suffix_first` in the order SPM, where the middle goes on right behind the prefix: small models do better so, and
    others may know PSM alone.

    Raises:
      ValueError: the tokenizer has no tokens for that.
    """
    marks = [tokenizer.special_id(name) for name in _FIM]
    if None in marks:
        raise ValueError("the tokenizer has no tokens for filling in the middle, so no suffix can be given")
    before, after = tokenizer.encode_batch([prefix, suffix])
    parts = ([marks[1]], after, [marks[2]], before) if suffix_first else (before, [marks[1]], after, [marks[2]])
    return np.concatenate([[marks[0]], *parts]).astype(np.int32)


def fim(
    row: np.ndarray, rng: np.random.Generator, *, rate: float, fim_ids: np.ndarray, tokenizer: Tokenizer
) -> Example:
    """Predicts document pieces of which some have the middle moved to the end (Bavarian et al., 2022, arXiv:2207.14255).

    A rearranged piece is cut at two random characters, its three parts are encoded by themselves, as a prompt's are, and
    written, one way as likely as the other, as

        PSM   <prefix> prefix <suffix> suffix <middle> middle eos
        SPM   <prefix> <suffix> suffix <middle> prefix middle eos       (the paper's SPMv2)

    behind the eos that opens a document, where the piece has that. To keep the row's length, a piece loses the last three
    tokens of its text, one that the row's end cuts off its last target too, for the eos, and whatever more the cuts make
    of it: the end of the suffix, then the start of the prefix, then the end of the middle, which ends the text by then.
    What is short of the length is not predicted. Pieces of three tokens or less stay as they are.

    Args:
      rate: the share of pieces to rearrange.
      fim_ids: of <prefix>, <suffix> and <middle>.
      tokenizer: of the row.
    """
    inputs, targets, segment_ids, positions = row.copy()
    is_predicted = segment_ids > 0
    pre, suf, mid = fim_ids
    bounds = list(_pieces(segment_ids))
    for (start, end), (chance, order, *cuts) in zip(bounds, rng.random((len(bounds), 4)), strict=True):
        first = start + (inputs[start] == tokenizer.eos_id)
        room = end - first - 3
        if chance >= rate or room < 1:
            continue
        # Without the halves of characters that the ends of a row leave.
        text = tokenizer.decode(inputs[first : first + room], skip_special_tokens=False).strip("\ufffd")
        a, b = sorted(int(cut * (len(text) + 1)) for cut in cuts)
        prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:a], text[a:b], text[b:]))
        middle = middle[:room]
        prefix = prefix[max(0, len(prefix) + len(middle) - room) :]
        suffix = suffix[: room - len(middle) - len(prefix)]
        parts = (prefix, [suf], suffix, [mid]) if order < 0.5 else ([suf], suffix, [mid], prefix)
        written = np.concatenate([[pre], *parts, middle])
        inputs[first:end] = tokenizer.eos_id
        inputs[first : first + len(written)] = written
        targets[start:end] = np.append(inputs[start + 1 : end], tokenizer.eos_id)
        is_predicted[first + len(written) : end] = False
    return _example(inputs, targets, segment_ids, positions, is_predicted)


def masked(
    row: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float,
    mask_id: int,
    eos_id: int,
    cls_id: int | None,
    is_special: np.ndarray,
    ordinary_ids: np.ndarray,
    word_edges: np.ndarray | None,
) -> Example:
    """Predicts hidden tokens from both sides (Devlin et al., 2018, arXiv:1810.04805, section 3.1).

    Each token, or each word with all its tokens, is chosen with probability `rate`; of the chosen tokens 80 % become the
    mask, 10 % a random token, 10 % stay. `targets` are the tokens themselves, not the next ones. A document opens with
    [CLS] where the tokenizer has one, else with the token that ends documents; special tokens are never chosen. The row's
    last target, which is the next row's first input, has no place here.

    Args:
      rate: the share of tokens to choose.
      mask_id, eos_id, cls_id: ids of the mask, the end of a document, and [CLS] or None.
      is_special: bool [V].
      ordinary_ids: [N], what random tokens are drawn from.
      word_edges: uint8 [2, V], see `Tokenizer.word_edges`, to choose whole words; None to choose tokens.
    """
    tokens, _, segment_ids, positions = row
    is_real = segment_ids > 0
    if cls_id is not None:
        tokens = np.where(is_real & (positions == 0) & (tokens == eos_id), np.int32(cls_id), tokens)
    choice, kind = rng.random((2, len(tokens)), np.float32)
    replacement = ordinary_ids[rng.integers(len(ordinary_ids), size=len(tokens))]
    if word_edges is not None:
        choice = choice[_words(tokens, positions, word_edges)]
    chosen = is_real & ~is_special[tokens] & (choice < rate)
    hidden = np.where(kind < 0.8, np.int32(mask_id), np.where(kind < 0.9, replacement, tokens))
    return _example(np.where(chosen, hidden, tokens), tokens, segment_ids, positions, chosen)


def span(
    row: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float,
    span_length: float,
    sentinel_ids: np.ndarray,
    eos_id: int,
    start_id: int,
    target_len: int,
) -> Example:
    """Predicts spans cut out of each document piece, for an encoder-decoder (Raffel et al., 2020, arXiv:1910.10683, 3.1.4).

    As in the paper's code, a piece of n tokens loses round(`rate` * n) of them in spans of `span_length` on average,
    random in place and length. The encoder reads the rest with a sentinel for each span and eos after it; the target is
    each sentinel with its span, and eos. Sentinels start again in every piece; where they do not suffice, spans get longer.

    Adds int32 [S] `encoder_tokens`, `encoder_segment_ids` and `encoder_positions`; the other fields have the length
    `target_len`. A piece of one token, and one that the target or the encoder has no room left for (many tiny documents in
    a row), is dropped.

    Args:
      rate, span_length: as above.
      sentinel_ids: in the order of use.
      eos_id, start_id: what texts end with, and what the decoder's input begins with.
      target_len: T.
    """
    _, row_targets, row_segments, _ = row
    encoder = np.zeros((3, len(row_targets)), np.int32)  # tokens, segment_ids, positions
    decoder = np.zeros((4, target_len), np.int32)  # inputs, targets, segment_ids, positions
    encoder_used = decoder_used = number = 0
    for start, end in _pieces(row_segments):
        text = row_targets[start:end]
        if text[-1] == eos_id:
            text = text[:-1]
        if len(text) < 2:
            continue
        is_noise = _noise_spans(len(text), rng, rate, span_length, len(sentinel_ids))
        opens = is_noise & ~np.append(False, is_noise[:-1])
        sentinels = sentinel_ids[np.cumsum(opens) - 1]
        source = np.append(np.where(opens, sentinels, text)[~is_noise | opens], eos_id)
        target = np.append(np.insert(text[is_noise], np.flatnonzero(opens[is_noise]), sentinels[opens]), eos_id)
        encoder_end, decoder_end = encoder_used + len(source), decoder_used + len(target)
        if encoder_end > encoder.shape[1] or decoder_end > target_len:
            continue
        number += 1
        encoder[:, encoder_used:encoder_end] = source, np.full(len(source), number), np.arange(len(source))
        shifted = np.append(start_id, target[:-1])
        decoder[:, decoder_used:decoder_end] = shifted, target, np.full(len(target), number), np.arange(len(target))
        encoder_used, decoder_used = encoder_end, decoder_end
    return _encoder_decoder(decoder, encoder)


def seq2seq(row: np.ndarray, rng: np.random.Generator) -> Example:
    """Predicts target texts from source texts; adds what `span` adds."""
    return _encoder_decoder(row[:4], row[4:])


def sft(row: np.ndarray, rng: np.random.Generator) -> Example:
    """Predicts the next tokens that the row marks; of 'dpo' segments 2k - 1 and 2k are the answers to compare."""
    inputs, targets, segment_ids, positions, is_target = row
    return _example(inputs, targets, segment_ids, positions, is_target)


def of_the_whole(row: np.ndarray, rng: np.random.Generator, *, shape: tuple[int, int]) -> Example:
    """Predicts of each text its label, or where in the row its answer begins and ends.

    `targets` and `loss_weights` are [N * A] for `shape` (N, A): those of the first text, the second, ..., and zeros. Adds
    int32 [S] `token_types`.
    """
    inputs, targets, segment_ids, positions, token_types = row
    starts = np.flatnonzero((positions == 0) & (segment_ids > 0))
    asked, weights = np.zeros(shape, np.int32), np.zeros(shape, bool)
    asked[: len(starts)] = targets[starts[:, None] + np.arange(shape[1])]
    if shape[1] == 2:
        asked[: len(starts)] += starts[:, None].astype(np.int32)
    weights[: len(starts)] = True
    example = _example(inputs, asked.ravel(), segment_ids, positions, weights.ravel())
    return example | {"token_types": token_types}


def _encoder_decoder(decoder: np.ndarray, encoder: np.ndarray) -> Example:
    names = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")
    inputs, targets, segment_ids, positions = decoder
    return _example(inputs, targets, segment_ids, positions, segment_ids > 0) | dict(zip(names, encoder, strict=True))


def _example(
    inputs: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, is_target: np.ndarray
) -> Example:
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": is_target.astype(np.float32),
    }


def _pieces(segment_ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields where each document's part of a row begins and ends."""
    starts = np.flatnonzero(np.diff(segment_ids, prepend=0) > 0).tolist()
    return zip(starts, [*starts[1:], int(np.count_nonzero(segment_ids))], strict=False)  # a row of padding has no start


def _words(tokens: np.ndarray, positions: np.ndarray, word_edges: np.ndarray) -> np.ndarray:
    """Numbers the words of a row: [T], equal for the tokens of one word, see `Tokenizer.word_edges`."""
    first, last = word_edges[:, tokens]
    goes_on = (first == 0) | ((first > 2) & (first == np.append(np.uint8(0), last[:-1])))
    return np.cumsum(~goes_on | (positions == 0)) - 1


def _noise_spans(length: int, rng: np.random.Generator, rate: float, span_length: float, most_spans: int) -> np.ndarray:
    """Chooses the spans of `span`: bool [length], kept tokens first."""
    num_noise = min(max(round(length * rate), 1), length - 1)
    num_spans = min(max(round(num_noise / span_length), 1), num_noise, length - num_noise, most_spans)
    lengths = np.empty((num_spans, 2), np.int64)
    for column, total in enumerate((length - num_noise, num_noise)):
        cuts = np.sort(rng.choice(total - 1, num_spans - 1, replace=False)) + 1
        lengths[:, column] = np.diff(cuts, prepend=0, append=total)
    return np.repeat(np.tile([False, True], num_spans), lengths.ravel())
