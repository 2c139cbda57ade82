"""Token ids to text as they come, a whole character at a time, up to a stop string."""

from collections.abc import Callable, Sequence

_UNFINISHED = 3  # bytes that may be the beginning of one character
_PENDING = 32  # tokens after which such bytes are taken for what they are


class TextStream:
    """The text of ids that arrive one after the other.

    What it gives, put together, is `decode` of all ids up to the first stop string to be complete, however the ids arrive.
    It never gives half of a character, nor the beginning of what may become a stop string.

    Args:
      decode: the text of ids, with U+FFFD for bytes that are not UTF-8.
      stop: texts that end the text and are not part of it.
      context: ids before the first, which decide how that is spelled, as of a space that it begins with.

    Attributes:
      stopped: whether a stop string was found; nothing more comes.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._decode, self._stop = decode, stop
        self._ids = list(context)  # since the last but one place where no character was open
        self._settled = len(self._ids)  # of those, up to the last
        self._sent = len(decode(self._ids)) if self._ids else 0  # characters of their text
        self._held = ""  # may become a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        unfinished = min(_UNFINISHED, len(text) - len(text.rstrip("\ufffd")))
        pending = len(self._ids) - self._settled
        if pending > _PENDING:
            unfinished = 0
        # Where bytes are tokens, one that is open spoils the characters before it too, until it is complete.
        new = text[self._sent : self._sent if unfinished and pending <= _UNFINISHED else len(text) - unfinished]
        self._sent += len(new)
        if not unfinished:
            self._ids = self._ids[self._settled :]
            self._settled, self._sent = len(self._ids), len(self._decode(self._ids))
        return self._release(new, is_end=False)

    def end(self) -> str:
        """The rest, when no more ids come."""
        return self._release(self._decode(self._ids)[self._sent :] if self._ids else "", is_end=True)

    def _release(self, new: str, *, is_end: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        longest = 0
        if not is_end:
            lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            longest = max(lengths, default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]
