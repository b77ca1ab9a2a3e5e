"""SentencePiece's model as a backend of `tokenizers`, with the same ids for any text, and the backend's file."""

import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def load_sentencepiece(path: str | os.PathLike | None) -> SentencePieceProcessor:
    """
    Raises:
        ValueError: if the file is missing, truncated, or not ChatGLM2's `tokenizer.model`.
    """
    if path is None or not os.path.isfile(path):
        raise ValueError(
            f"tokenizer.model not found (vocab_file={path!r}). It is published beside the weights of "
            "THUDM/chatglm2-6b: download it into the folder of the checkpoint."
        )
    with open(path, "rb") as file:
        proto = file.read()
    if proto.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the model: run `git lfs pull`.")
    remedy = f"Download tokenizer.model of THUDM/chatglm2-6b again (1,018,370 bytes; {path} has {len(proto):,})."
    sp_model = SentencePieceProcessor()
    try:
        sp_model.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model, or is truncated. {remedy}") from error
    if not (sp_model.unk_id() == 0 and sp_model.eos_id() == 2 and sp_model.is_byte(3)):
        raise ValueError(f"{path} is not the tokenizer of ChatGLM2, or is truncated. {remedy}")
    return sp_model


def build_backend(sp_model: SentencePieceProcessor, special_tokens: Sequence[str]) -> Tokenizer:
    """
    Builds the equivalent backend. The special tokens follow the pieces, and are not read from text.

    Raises:
        ValueError: if the model is no BPE model with byte fallback and a dummy prefix, as ChatGLM2's is.
    """
    pieces = sp_model.id_to_piece(list(range(sp_model.vocab_size())))
    kinds = (sp_model.is_unknown, sp_model.is_control, sp_model.is_byte, sp_model.is_unused)
    normal = {piece: i for i, piece in enumerate(pieces) if not any(is_kind(i) for is_kind in kinds)}
    # SentencePiece merges the adjacent pair whose union has the best score, whichever pieces it is made of: so each piece
    # is the merge of all its splits, ranked by its score.
    ranked = sorted(normal, key=lambda piece: -sp_model.get_score(normal[piece]))
    merges = [
        (piece[:i], piece[i:])
        for piece in ranked
        for i in range(1, len(piece))
        if piece[:i] in normal and piece[i:] in normal
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(BPE(vocab, merges, unk_token=pieces[0], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # No piece has a "▁" after another character, so none crosses these boundaries; words are faster than texts.
    if not any("▁" in piece.lstrip("▁") for piece in normal):
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special_tokens])
    backend.encode_special_tokens = True
    probe = "ChatGLM2 你好，world 123\n\té😀"
    if backend.encode(probe).ids != sp_model.encode(probe):
        raise ValueError(
            "tokenizer.model is no BPE model with byte fallback and a dummy prefix, as ChatGLM2's is: it belongs to another "
            "model, or is truncated. Download that of THUDM/chatglm2-6b."
        )
    return backend


def copy_backend(backend: Tokenizer) -> Tokenizer:
    """A backend with the same model, to set truncation in. It takes some 0.1 ms, as the model is shared."""
    copied = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(backend, part) is not None:
            setattr(copied, part, getattr(backend, part))
    copied.add_tokens(list(backend.get_added_tokens_decoder().values()))
    copied.encode_special_tokens = True
    return copied


class CallBackend:
    """
    The backend for one call of the library's encoding method, with the padding and truncation that the method sets in it.
    It reads rendered chats: of a text that begins with `prefix`, that and an `eos` at the end become tokens.

    Args:
        backend (`tokenizers.Tokenizer`): What encodes. It stays as it is.
        prefix (`list[tuple[str, int]]`): Texts and ids of the tokens that a rendered chat begins with.
        eos (`tuple[str, int]`, *optional*): Text and id of the token that ends a finished answer.
    """

    padding = truncation = None
    encode_special_tokens = True

    def __init__(self, backend: Tokenizer, prefix: list[tuple[str, int]], eos: tuple[str, int] | None):
        # As with the library, a call's options replace what a program has set in the backend.
        self.backend = copy_backend(backend) if backend.padding or backend.truncation else backend
        self.prefix, self.prefix_text, self.eos = prefix, "".join(text for text, _ in prefix), eos
        self.token_to_id = backend.token_to_id

    def enable_padding(self, **settings):
        self.padding = settings

    def enable_truncation(self, **settings):
        self.truncation = settings

    def encode_batch(self, rows: list, add_special_tokens: bool, is_pretokenized: bool) -> list[Encoding]:
        backend = self.backend
        if self.truncation:
            backend = copy_backend(backend)
            backend.enable_truncation(**self.truncation)
        rendered = [isinstance(row, str) and row.startswith(self.prefix_text) for row in rows]
        plain = [row for row, is_rendered in zip(rows, rendered) if not is_rendered]
        for row in plain:
            self.warn_of_typed_eos(row[-1] if isinstance(row, tuple) else row)
        plain = iter(backend.encode_batch(plain, is_pretokenized, add_special_tokens))
        encodings = [
            self.encode_rendered(row) if is_rendered else next(plain) for row, is_rendered in zip(rows, rendered)
        ]
        if self.truncation:
            for encoding in encodings:
                encoding.truncate(self.truncation["max_length"])  # the backend never cuts special tokens
        if self.padding:
            length = self.padding["length"] or max(map(len, encodings))
            length += -length % (self.padding["pad_to_multiple_of"] or 1)
            options = {name: self.padding[name] for name in ("direction", "pad_id", "pad_token", "pad_type_id")}
            for encoding in encodings:
                encoding.pad(length, **options)
        return encodings

    def encode_rendered(self, text: str) -> Encoding:
        """Encodes a rendered chat, with offsets into the whole text. Truncation keeps the prefix."""
        body, closing = text.removeprefix(self.prefix_text), []
        if self.eos and body.endswith(self.eos[0]):
            body, closing = body.removesuffix(self.eos[0]), [encode_special(*self.eos)]
        self.warn_of_typed_eos(body)
        encoding = Encoding.merge([self.backend.encode(body, add_special_tokens=False), *closing], True)
        if self.truncation:
            room = max(self.truncation["max_length"] - len(self.prefix), 0)
            encoding.truncate(room, self.truncation["stride"], self.truncation["direction"])
        encoding = Encoding.merge([*(encode_special(*token) for token in self.prefix), encoding], True)
        encoding.set_sequence_id(0)  # one text, for char_to_token
        return encoding

    def warn_of_typed_eos(self, text):
        if self.eos and isinstance(text, str) and text.endswith(self.eos[0]):
            logger.warning_once(
                f"A text ends in the characters {self.eos[0]!r}. They are encoded as text, not as the token that ends an "
                "answer: a model that is trained on them does not learn to stop. Train on messages, which the chat template "
                "ends, or append tokenizer.eos_token_id to the ids."
            )


@lru_cache(maxsize=8)
def encode_special(token: str, token_id: int) -> Encoding:
    """The encoding of a special token."""
    return Tokenizer(WordLevel({token: token_id}, unk_token=token)).encode(token)


def check_surrogates(text):
    """Raises `ValueError` for a lone surrogate, which no UTF-8 text can hold, anywhere in (nested lists of) `text`."""
    if isinstance(text, str):
        for i, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                raise ValueError(
                    f"The text has a lone surrogate (U+{ord(character):04X}) at index {i} and is no valid Unicode. To "
                    "replace it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
                )
    elif isinstance(text, (list, tuple)):
        for item in text:
            check_surrogates(item)


# tokenizer.json, for other programs


def save_backend(backend: Tokenizer, path: str | os.PathLike):
    """
    Writes tokenizer.json. Programs that load it read all its `added_tokens` from text ("sop" and "eop" in "people
    philosophy"). So those that are not read from text here are written as entries of the vocabulary: no text merges into
    them, and the decoder leaves them out.
    """
    state = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    tokens = state["added_tokens"]
    state["model"]["vocab"].update({token["content"]: token["id"] for token in tokens})
    state["added_tokens"] = [token for token in tokens if not token["special"]]
    unread = [token for token, i in state["model"]["vocab"].items() if i < 3]  # <unk>, <s>, </s>
    unread += [token["content"] for token in tokens if token["special"]]
    unread = "|".join(map(re.escape, unread))
    state["decoder"]["decoders"].insert(0, {"type": "Replace", "pattern": {"Regex": rf"\A({unread})\z"}, "content": ""})
    with open(path, "w", encoding="utf-8") as file:
        json.dump(state, file, ensure_ascii=False)


def restore_added_tokens(backend: Tokenizer, path: str | os.PathLike):
    """Adds the tokens of a tokenizer.json that `backend` does not have, in the order of their ids there."""
    with open(path, encoding="utf-8") as file:
        state = json.load(file)
    read = {token["content"]: token for token in state["added_tokens"]}
    vocab = dict(state["model"]["vocab"]) | {content: token["id"] for content, token in read.items()}
    for content in sorted(vocab, key=vocab.get)[backend.get_vocab_size() :]:
        options = {**read.get(content, {"normalized": False, "special": True}), "content": content}
        options.pop("id", None)
        backend.add_tokens([AddedToken(**options)])
        if backend.token_to_id(content) != vocab[content]:
            raise ValueError(
                f"{path} is not of this tokenizer: its token {content!r} has the id {vocab[content]}. Remove the file."
            )
