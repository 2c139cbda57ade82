"""Texts that must fit a JSON schema or a regular expression; llguidance has the automaton, and this its mask."""

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np


class Automaton:
    """A `Constraint` of one text, see `engine`.

    Attributes:
      error: what went wrong, empty if nothing: then only the end is allowed.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self.error = ""
        self._note_error()

    def allowed(self) -> np.ndarray:
        """bool [V], the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._note_error()
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def advance(self, token: int) -> None:
        """Takes note of the token that came."""
        self._matcher.consume_token(token)
        self._note_error()

    def _note_error(self) -> None:
        """Another thread may ask for the error, but not of the matcher while it computes."""
        self.error = " ".join(self._matcher.get_error().split())

    def copy(self) -> "Automaton":
        """Another that is as far, for another text."""
        return Automaton(self._matcher.deep_copy(), self._vocab_size)


class Vocabulary:
    """What tokens are made of.

    Args:
      tokenizer_json: the content of a tokenizer.json.
      vocab_size: V, of the model.
      eos_ids: ids that end a text.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_ids))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self._tokenizer.decode_bytes([token])

    def json_schema(self, schema: dict[str, Any] | bool) -> Automaton:
        """Lets through the JSON that fits a schema, with at most one space or line break between its parts.

        Raises:
          ValueError: the schema is wrong, or uses what is not supported.
        """
        # Without a limit on white space, a small model may write nothing else for ever.
        overrides: Any = {"whitespace_pattern": "[ \\n]?"}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the JSON schema cannot be used: {error}") from error
        return self._compile("JSON schema", grammar)

    def regex(self, pattern: str) -> Automaton:
        """Lets through the texts that a regular expression (Rust's syntax, no look-around) matches as a whole.

        Raises:
          ValueError: it is not one.
        """
        return self._compile("regular expression", llguidance.LLMatcher.grammar_from_regex(pattern))

    def _compile(self, what: str, grammar: str) -> Automaton:
        automaton = Automaton(llguidance.LLMatcher(self._tokenizer, grammar, log_level=0), self._vocab_size)
        if automaton.error:
            raise ValueError(f"the {what} cannot be used: {automaton.error[:500]}")
        return automaton
