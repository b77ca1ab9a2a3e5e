"""Tokens to text, as they come."""

from collections.abc import Sequence

from .shapes import Token


class TextBuilder:
    """
    Decodes tokens one by one, up to the first of the `stops`. Text that can still change is held back: an incomplete
    character, and what may be the beginning of a stop.

    Args:
        before: Ids that precede the text. A space at the beginning of the first token is kept only after some.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(before[-8:])  # enough to see whether a space begins a word
        self.start, self.end = 0, len(self.ids)  # a window that ends where the text decoded so far does
        self.text, self.tokens = "", []  # held back
        self.is_stopped = False

    def add(self, token: Token) -> tuple[str, list[Token]]:
        """Returns the text that is certain now, and its tokens."""
        self.ids.append(token.id)
        self.tokens.append(token)
        text = self.decode(self.start, len(self.ids))
        if text.endswith("\ufffd"):  # the rest of a character may follow
            return "", []
        new = text[len(self.decode(self.start, self.end)) :]
        self.text += new
        # A window of tokens without text would lose the space that the next one begins with.
        self.start, self.end = self.end if new else self.start, len(self.ids)
        found = min((self.text.index(stop) for stop in self.stops if stop in self.text), default=None)
        if found is not None:
            self.is_stopped = True
            return self.release(found)
        return self.release(len(self.text) - self.length_of_stop_at_end())

    def finish(self) -> tuple[str, list[Token]]:
        """Returns what was held back."""
        if not self.is_stopped:
            self.text += self.decode(self.start, len(self.ids))[len(self.decode(self.start, self.end)) :]
        return self.release(0 if self.is_stopped else len(self.text))

    def decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)

    def length_of_stop_at_end(self) -> int:
        """How many characters at the end may be the beginning of a stop."""
        for length in range(min(len(self.text), max(map(len, self.stops), default=1) - 1), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return length
        return 0

    def release(self, length: int) -> tuple[str, list[Token]]:
        text, self.text = self.text[:length], self.text[length:]
        if not text and not self.is_stopped and self.text:
            return "", []
        tokens, self.tokens = self.tokens, []
        return text, tokens


def token_bytes(tokenizer, id: int) -> bytes:
    """Returns the bytes that a token stands for, with the space that it may begin with."""
    piece = tokenizer.convert_ids_to_tokens(id)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
