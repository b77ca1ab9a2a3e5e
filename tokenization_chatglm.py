"""ChatGLM2 tokenizer: text <-> ids, and the prompt format.

`tokenizer.model` is a SentencePiece BPE model. Encoding runs on the Rust backend of `tokenizers`, built from it so that
ids are exactly SentencePiece's (and offsets, batches and streaming come for free); decoding runs on SentencePiece
itself, which alone handles invalid UTF-8 the same way.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache

import sentencepiece
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import BatchEncoding, TokenizersBackend
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, logging


logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}

# GLM's blank and sequence markers (Du et al. 2022, arXiv 2103.10360). They follow the SentencePiece pieces.
GLM_SPECIAL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]

# 问 asks, 答 answers. Round numbers start at 1.
QUESTION = "[Round {}]\n\n问：{}\n\n答："

# How a chat that the chat template rendered to text begins, and what precedes an answer in it.
RENDERED_PREFIX = "[gMASK]sop"
RENDERED_CHAT = RENDERED_PREFIX + "[Round 1]\n\n问："
ANSWER = "\n\n答："


class SPTokenizer:
    """
    The SentencePiece model behind the tokenizer, for software that reads `tokenizer.tokenizer.sp_model`.

    Args:
        model_path (`str`): Path of the published `tokenizer.model`.

    Raises:
        ValueError: if the file is missing, truncated, or not a ChatGLM2 tokenizer.
    """

    def __init__(self, model_path: str | os.PathLike):
        if model_path is None or not os.path.isfile(model_path):
            raise ValueError(
                f"tokenizer.model not found (vocab_file={model_path!r}). It is published beside the weights of "
                "THUDM/chatglm2-6b: download it into the folder of the checkpoint."
            )
        with open(model_path, "rb") as file:
            proto = file.read()
        remedy = (
            f"Download tokenizer.model of THUDM/chatglm2-6b again (1,018,370 bytes; {model_path} has {len(proto):,})."
        )
        if proto.startswith(b"version https://git-lfs"):
            raise ValueError(f"{model_path} is a Git LFS pointer, not the model: run `git lfs pull`.")
        self.sp_model = sentencepiece.SentencePieceProcessor()
        try:
            self.sp_model.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise ValueError(f"{model_path} is no SentencePiece model, or is truncated. {remedy}") from error
        if not (self.sp_model.unk_id() == 0 and self.sp_model.eos_id() == 2 and self.sp_model.is_byte(3)):
            raise ValueError(f"{model_path} is not the tokenizer of ChatGLM2, or is truncated. {remedy}")

        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.unk_id()
        self.special_tokens = {t: self.sp_model.vocab_size() + i for i, t in enumerate(GLM_SPECIAL_TOKENS)}
        self.n_words = self.sp_model.vocab_size() + len(GLM_SPECIAL_TOKENS)

    def to_rust(self) -> Tokenizer:
        """Builds the equivalent `tokenizers.Tokenizer`: the same ids for any text."""
        sp = self.sp_model
        pieces = sp.id_to_piece(list(range(sp.vocab_size())))
        normal = {
            piece: i
            for i, piece in enumerate(pieces)
            if not (sp.is_unknown(i) or sp.is_control(i) or sp.is_byte(i) or sp.is_unused(i))
        }
        # SentencePiece merges the adjacent pair whose union has the best score, whichever pieces it is made of: so
        # each piece is the merge of all its splits, ranked by its score. Ids are in the order of scores.
        ranked = sorted(normal, key=lambda piece: -sp.get_score(normal[piece]))
        merges = [
            (piece[:i], piece[i:])
            for piece in ranked
            for i in range(1, len(piece))
            if piece[:i] in normal and piece[i:] in normal
        ]
        rust = Tokenizer(
            BPE(
                vocab={piece: i for i, piece in enumerate(pieces)},
                merges=merges,
                unk_token=pieces[0],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # No piece has a "▁" after another character, so none crosses these boundaries; words are faster than texts.
        if not any("▁" in piece.lstrip("▁") for piece in normal):
            rust.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
        rust.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        rust.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in GLM_SPECIAL_TOKENS])
        return rust


class ChatGLMTokenizer(TokenizersBackend):
    r"""
    Tokenizer of ChatGLM2. Encodes `text` as `[gMASK] sop text`, a pair as `[gMASK] sop text pair </s>`.

    Special tokens are never read from text: `tokenizer("[gMASK]")` gives the pieces of those seven characters, and
    nothing that users type into a chat becomes a special token. The one exception is a text that as a whole is a chat
    rendered by the chat template (it begins with `[gMASK]sop[Round 1]\n\n问：`): its prefix, and `</s>` after its last
    answer, become the tokens that they stand for, once, whatever `add_special_tokens` is. Tokens that a program adds
    (`add_tokens`, `add_special_tokens`) are read from text, except those that it names `eos_token`, `pad_token` and so on.

    Args:
        vocab_file (`str`): Path of `tokenizer.model`.
        padding_side (`str`): "left" (default, what generation needs) or "right".

    Raises:
        ValueError: if `tokenizer.model` is missing, truncated or of another model.

    Example:

    ```python
    >>> tokenizer("你好")
    {'input_ids': [64790, 64792, 36474, 54591], 'attention_mask': [1, 1, 1, 1], 'position_ids': [0, 1, 2, 3]}
    >>> tokenizer.build_prompt("你好")
    '[Round 1]\n\n问：你好\n\n答：'
    ```
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(
        self,
        vocab_file=None,
        padding_side="left",
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<unk>",
        split_special_tokens=True,
        **kwargs,
    ):
        self.name = "GLMTokenizer"
        self.tokenizer = SPTokenizer(vocab_file)
        self._tokenizer = self.tokenizer.to_rust()
        # tokenizer.model is the one source. A tokenizer.json beside it is for other programs; of it only tokens that
        # a user added are read (by the library, into `added_tokens_decoder`).
        kwargs.pop("tokenizer_file", None)
        extra_special_tokens = list(GLM_SPECIAL_TOKENS)
        extra_special_tokens += [t for t in kwargs.pop("extra_special_tokens", ()) if str(t) not in GLM_SPECIAL_TOKENS]
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            vocab_file=vocab_file,
            padding_side=padding_side,
            unk_token=unk_token,
            eos_token=eos_token,
            pad_token=pad_token,
            split_special_tokens=split_special_tokens,
            extra_special_tokens=extra_special_tokens,
            **kwargs,
        )
        self._check_against_sentencepiece()

    def _check_against_sentencepiece(self):
        probe = "ChatGLM2 你好，world 123\n\té😀"
        if self._tokenizer.encode(probe, add_special_tokens=False).ids != self.tokenizer.sp_model.encode(probe):
            raise ValueError(
                f"{self.vocab_file} is no BPE model with byte fallback and a dummy prefix, as ChatGLM2's is: it belongs "
                "to another model, or is truncated. Download tokenizer.model of THUDM/chatglm2-6b again."
            )

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        # The library would extract vocabulary and merges by rules that are not quite SentencePiece's.
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def update_post_processor(self):
        """Makes the backend add the prefix, and after a pair `</s>`."""
        if self.bos_token is None:  # as the library has it: nothing to add
            object.__setattr__(self, "_add_bos_token", False)
        gmask, sop = self.get_prefix_tokens()
        special_tokens = [("[gMASK]", gmask), ("sop", sop), ("</s>", self.get_command("<eos>"))]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="[gMASK] sop $A", pair="[gMASK] sop $A $B </s>", special_tokens=special_tokens
        )

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        # Tokens that a program adds are for it to use, and are read from text. The backend skips special ones there, so
        # for it only the model's own and named ones (eos_token, ...) are special; the library keeps its own list.
        unread = {*GLM_SPECIAL_TOKENS, *map(str, self._special_tokens_map.values())}
        tokens = []
        for token in new_tokens:
            # The backend would look for a normalized token, "▁<new>", in the normalized text: at its beginning only.
            options = {"normalized": False} if isinstance(token, str) else token.__getstate__()
            options.update(content=str(token), special=str(token) in unread)
            tokens.append(AddedToken(**options))
        return super()._add_tokens(tokens, special_tokens=False)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces and GLM's special tokens, as published (64,794); the model has `padded_vocab_size` rows."""
        return self.tokenizer.n_words

    def get_command(self, token: str) -> int:
        """
        Id of a special token: `<bos>`, `<eos>`, `<pad>`, `[MASK]`, `[gMASK]`, `[sMASK]`, `sop` or `eop`.

        Raises:
            ValueError: if `token` is none of them.
        """
        commands = {
            "<bos>": self.tokenizer.bos_id,
            "<eos>": self.tokenizer.eos_id,
            "<pad>": self.tokenizer.pad_id,
            **self.tokenizer.special_tokens,
        }
        if token not in commands:
            raise ValueError(f"{token!r} is not a special token of ChatGLM2; there are {', '.join(commands)}.")
        return commands[token]

    def _convert_id_to_token(self, index: int) -> str:
        # Converters ask for every row of the embedding; the padding rows after the vocabulary have no token.
        index = int(index)
        return (self._tokenizer.id_to_token(index) if index >= 0 else None) or ""

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._convert_id_to_token(i) for i in ids if int(i) not in skipped]

    # Text to ids

    def get_prefix_tokens(self) -> list[int]:
        """Ids that every input begins with: `[gMASK] sop`."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one sequence, or of a pair, with the prefix (and after a pair `</s>`)."""
        if token_ids_1 is None:
            return self.get_prefix_tokens() + token_ids_0
        return self.get_prefix_tokens() + token_ids_0 + token_ids_1 + [self.get_command("<eos>")]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """
        Text of a dialogue up to the place of the next answer.

        Args:
            query (`str`): What the user says now.
            history (`list[tuple[str, str]]`, *optional*): Earlier rounds, (query, response).

        Raises:
            ValueError: if the query is no string, or the history no sequence of pairs of strings.
        """
        if not isinstance(query, str):
            raise ValueError(f"query must be a string, got {type(query).__name__}: {query!r}")
        prompt = ""
        for i, (old_query, response) in enumerate(check_history(history), start=1):
            prompt += QUESTION.format(i, old_query) + response + "\n\n"
        return prompt + QUESTION.format(len(history or ()) + 1, query)

    def _encode_plus(
        self,
        text,
        text_pair=None,
        add_special_tokens=True,
        is_split_into_words=False,
        return_tensors=None,
        return_overflowing_tokens=False,
        closed=None,
        **kwargs,
    ) -> BatchEncoding:
        """`closed`: for each rendered chat, whether it ends in an answer and `</s>`. By default its text tells."""
        # The library's marking of control tokens that users typed is not needed: they are never read as such.
        kwargs.pop("sanitize_control_tokens", None)
        if is_split_into_words:
            is_batched = isinstance(text, (list, tuple)) and bool(text) and isinstance(text[0], (list, tuple))
        else:
            is_batched = isinstance(text, (list, tuple))
        if is_batched and not text:
            return BatchEncoding({name: [] for name in self.model_input_names}, [], tensor_type=return_tensors)
        if not is_batched:
            text, text_pair = [text], [text_pair] if text_pair else None

        is_plain = text_pair is None and not is_split_into_words
        rendered = [is_plain and isinstance(t, str) and t.startswith(RENDERED_CHAT) for t in text]
        try:
            if any(rendered):
                encodings = self._encode_rendered(text, rendered, closed, add_special_tokens, **kwargs)
                encoded = self._to_batch_encoding(encodings, return_overflowing_tokens, **kwargs)
            elif is_split_into_words or return_overflowing_tokens or self._has_options(**kwargs):
                encoded = super()._encode_plus(
                    text,
                    text_pair=text_pair,
                    add_special_tokens=add_special_tokens,
                    is_split_into_words=is_split_into_words,
                    return_overflowing_tokens=return_overflowing_tokens,
                    **kwargs,
                )
            else:
                # Without options the library's handling of them takes as long as encoding a short text.
                texts = text if text_pair is None else list(zip(text, text_pair, strict=True))
                encodings = self._encode_raw(texts, add_special_tokens)
                encoded = BatchEncoding(
                    {"input_ids": [e.ids for e in encodings], "attention_mask": [e.attention_mask for e in encodings]},
                    encodings,
                )
                for ids in encoded["input_ids"]:
                    self._eventual_warn_about_too_long_sequence(ids, None, kwargs.get("verbose", True))
        except TypeError as error:
            check_surrogates((text, text_pair))
            raise error
        if "position_ids" in self.model_input_names:
            encoded["position_ids"] = [positions_from_mask(e.attention_mask) for e in encoded.encodings]
        if return_tensors is not None:
            encoded.convert_to_tensors(return_tensors)
        elif not is_batched and not return_overflowing_tokens:
            encoded = BatchEncoding({name: value[0] for name, value in encoded.items()}, encoded.encodings)
        return encoded

    def _encode_raw(self, texts: list, add_special_tokens: bool) -> list[Encoding]:
        """The backend's encodings, without the padding and truncation that an earlier call may have left set."""
        if self._tokenizer.truncation is not None:
            self._tokenizer.no_truncation()
        if self._tokenizer.padding is not None:
            self._tokenizer.no_padding()
        if not self._tokenizer.encode_special_tokens:
            self._tokenizer.encode_special_tokens = self.split_special_tokens
        if len(texts) == 1:  # without the backend's threads, which take as long to wake as a short text to encode
            text, pair = texts[0] if isinstance(texts[0], tuple) else (texts[0], None)
            return [self._tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)]
        return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    def _encode_rendered(
        self,
        texts: list[str],
        rendered: list[bool],
        closed: list[bool] | None,
        add_special_tokens: bool,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **kwargs,
    ) -> list[Encoding]:
        """
        Encodes texts of which some are `rendered` chats: their prefix and closing token apart from what is between, which
        is plain text. Offsets are into the whole text. Truncation keeps the prefix.
        """
        encodings = []
        limit = max_length if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE else None
        for i, text in enumerate(texts):
            is_closed, eos = False, self.eos_token or ""
            if rendered[i]:
                is_closed = bool(eos) and text.endswith(eos) and (closed[i] if closed is not None else ANSWER in text)
            head = RENDERED_PREFIX if rendered[i] else ""
            body = text[len(head) : len(text) - len(eos) if is_closed else None]
            (encoding,) = self._encode_raw([body], add_special_tokens=False)
            if is_closed:
                encoding = Encoding.merge([encoding, encode_special(((eos, self.eos_token_id),))], True)
            prefix = tuple(zip(("[gMASK]", "sop"), self.get_prefix_tokens()))
            if limit is not None:
                room = limit - (len(prefix) if head or add_special_tokens else 0)
                encoding.truncate(max(room, 0), stride=stride, direction=self.truncation_side)
            if head:
                encoding = Encoding.merge([encode_special(prefix), encoding], True)
                encoding.set_sequence_id(0)  # one text, for char_to_token
            elif add_special_tokens:
                encoding = self._tokenizer.post_process(encoding)
            encodings.append(encoding)

        length = None
        if padding_strategy == PaddingStrategy.LONGEST:
            length = max(len(e) for e in encodings)
        elif padding_strategy == PaddingStrategy.MAX_LENGTH:
            length = max_length
        if length is not None:
            length += -length % (pad_to_multiple_of or 1)
            for encoding in encodings:
                encoding.pad(
                    length,
                    direction=padding_side or self.padding_side,
                    pad_id=self.pad_token_id,
                    pad_token=self.pad_token,
                )
        return encodings

    def _to_batch_encoding(self, encodings: list[Encoding], return_overflowing_tokens: bool, **kwargs) -> BatchEncoding:
        names = "token_type_ids attention_mask special_tokens_mask offsets_mapping length".split()
        options = {f"return_{name}": kwargs[f"return_{name}"] for name in names if f"return_{name}" in kwargs}
        data, all_encodings = {}, []
        for i, encoding in enumerate(encodings):
            row, parts = self._convert_encoding(
                encoding, return_overflowing_tokens=return_overflowing_tokens, **options
            )
            all_encodings += parts
            if return_overflowing_tokens:
                row["overflow_to_sample_mapping"] = [i] * len(parts)
            for name, values in row.items():
                data.setdefault(name, []).extend(values)
        return BatchEncoding(data, all_encodings)

    @staticmethod
    def _has_options(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.DO_NOT_TRUNCATE,
        return_attention_mask=None,
        split_special_tokens=None,
        verbose=True,
        **options,
    ) -> bool:
        return (
            padding_strategy != PaddingStrategy.DO_NOT_PAD
            or truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
            or return_attention_mask is False
            or split_special_tokens is False
            or any(options.values())
        )

    def _pad(self, encoded_inputs, *args, padding_side=None, **kwargs) -> dict:
        length = len(encoded_inputs["input_ids"])
        encoded_inputs = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        if "position_ids" in self.model_input_names:
            padding = [0] * (len(encoded_inputs["input_ids"]) - length)
            position_ids = encoded_inputs.get("position_ids")
            if position_ids is None:
                position_ids = positions_from_mask(encoded_inputs.get("attention_mask", [1] * length + padding))
            if len(position_ids) == length:
                left = (padding_side or self.padding_side) == "left"
                position_ids = padding + list(position_ids) if left else list(position_ids) + padding
            encoded_inputs["position_ids"] = position_ids
        return encoded_inputs

    def apply_chat_template(self, conversation, *args, continue_final_message=False, tokenizer_kwargs=None, **kwargs):
        """
        The library's method. A system message is prepended to the first query, as ChatGLM2 has no place of its own for
        it. Only the last answer counts as generated (`return_assistant_tokens_mask`): answers in the history are
        followed by the next round, not by `</s>`, and the model must not learn to write that.
        """
        is_batched = bool(conversation) and (
            isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        )
        chats = [getattr(chat, "messages", chat) for chat in (conversation if is_batched else [conversation])]
        # Where the template writes </s>: not where the last message, a query or a beginning of an answer, ends in it.
        last = [chat[-1] if chat and isinstance(chat[-1], dict) else {} for chat in chats]
        closed = [message.get("role") == "assistant" and not continue_final_message for message in last]
        return super().apply_chat_template(
            conversation,
            *args,
            continue_final_message=continue_final_message,
            tokenizer_kwargs={**(tokenizer_kwargs or {}), "closed": closed},
            **kwargs,
        )

    def _mark_chat_inputs(self, chat_template, conversations, tools, documents, template_kwargs, *args):
        # Rounds that contain the text of special tokens are encoded as text anyway; marks would change their ids.
        return conversations, tools, documents, template_kwargs

    # Ids to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(list(tokens)))

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        special = {*self.all_special_ids, *self.tokenizer.special_tokens.values()}
        pieces = self.tokenizer.sp_model.vocab_size()
        text, run = "", []
        for i in token_ids:
            # Between special tokens SentencePiece decodes whole runs, as bytes of one character may span tokens.
            is_shown = not skip_special_tokens or i not in special
            if i >= self.vocab_size or (i in special and is_shown):
                text += self.tokenizer.sp_model.decode(run) + (self._convert_id_to_token(i) if is_shown else "")
                run = []
            elif 0 <= i < pieces and i not in special:
                run.append(i)
        return text + self.tokenizer.sp_model.decode(run)

    # Files

    def train_new_from_iterator(self, *args, **kwargs):
        """Not supported: the model of a new tokenizer has to be SentencePiece's."""
        raise NotImplementedError(
            "Train a tokenizer.model with SentencePiece (training/tiny.py has the settings), and load that."
        )

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies `tokenizer.model` into `save_directory`; returns its path there."""
        name = (filename_prefix + "-" if filename_prefix else "") + VOCAB_FILES_NAMES["vocab_file"]
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None) -> tuple[str, ...]:
        # The library writes tokenizer.json alone; the published code and llama.cpp read tokenizer.model.
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self.save_vocabulary(save_directory, filename_prefix)


@lru_cache(maxsize=8)
def encode_special(tokens: tuple[tuple[str, int], ...]) -> Encoding:
    """The encoding of special tokens, (token, id), written one after the other."""
    backend = Tokenizer(WordLevel(dict(tokens)))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, _ in tokens])
    return backend.encode("".join(token for token, _ in tokens))


def check_history(history: Sequence[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """Returns a copy of `history` as a list of pairs; raises `ValueError` if it is not a sequence of pairs of strings."""
    if history is None:
        return []
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise ValueError(f"history must be a list of (query, response) pairs, got {type(history).__name__}.")
    for i, pair in enumerate(history):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(
                f"history[{i}] must be a (query, response) pair of strings, got {pair!r}. Messages with roles go "
                "through tokenizer.apply_chat_template."
            )
    return [tuple(pair) for pair in history]


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


def positions_from_mask(attention_mask: list[int]) -> list[int]:
    """Positions of a padded row: 0, 1, ... over what is attended to, 0 over the padding."""
    length = sum(attention_mask)
    start = attention_mask.index(1) if length else 0
    return [0] * start + list(range(length)) + [0] * (len(attention_mask) - start - length)


__all__ = ["ChatGLMTokenizer"]
