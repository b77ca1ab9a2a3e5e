"""ChatGLM2 tokenizer: text <-> ids, and the prompt format.

`tokenizer.model` is a SentencePiece BPE model. Encoding runs on the Rust backend of `tokenizers`, built from it so that
ids are exactly SentencePiece's (and offsets, batches and streaming come for free); decoding runs on SentencePiece
itself, which alone handles invalid UTF-8 the same way.
"""

import os
import shutil
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, processors
from transformers import BatchEncoding, TokenizersBackend
from transformers.utils import to_py_obj

from .sentencepiece_chatglm import (
    CallBackend,
    build_backend,
    check_surrogates,
    load_sentencepiece,
    restore_added_tokens,
    save_backend,
)


VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}

# GLM's blank and sequence markers (Du et al. 2022, arXiv 2103.10360). They follow the SentencePiece pieces.
GLM_SPECIAL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
# What every input begins with. A text that begins with these characters is a rendered chat.
PREFIX_TOKENS = ["[gMASK]", "sop"]

# 问 asks, 答 answers. Round numbers start at 1.
QUESTION = "[Round {}]\n\n问：{}\n\n答："


class ChatGLMTokenizer(TokenizersBackend):
    r"""
    Tokenizer of ChatGLM2. Encodes `text` as `[gMASK] sop text`, a pair as `[gMASK] sop text pair </s>`.

    Text never becomes a special token: `tokenizer("[gMASK]")` encodes those seven characters. There is one exception: a
    text that begins with `[gMASK]sop` is taken as a rendered chat. That prefix, and an `eos_token` at its very end,
    become special tokens, whatever `add_special_tokens` is; the rest of it stays text. So nothing that users type into
    a chat becomes a special token. Pairs of texts and split words are never taken as rendered chats.

    Added tokens (`add_tokens`, `add_special_tokens`) are found in text, unless they are set as `eos_token`, `pad_token`
    and so on. Threads can share a tokenizer.

    Args:
        vocab_file (`str`): Path of `tokenizer.model`, the source of the vocabulary.
        tokenizer_file (`str`, *optional*): Path of a saved `tokenizer.json`. Only added tokens are read from it.
        padding_side (`str`): "left" (default, as generation needs it) or "right".

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
        tokenizer_file=None,
        padding_side="left",
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<unk>",
        **kwargs,
    ):
        self.name = "GLMTokenizer"
        self.sp_model = load_sentencepiece(vocab_file)
        self.special_tokens = {t: self.sp_model.vocab_size() + i for i, t in enumerate(GLM_SPECIAL_TOKENS)}
        self._tokenizer = build_backend(self.sp_model, GLM_SPECIAL_TOKENS)
        if tokenizer_file:
            restore_added_tokens(self._tokenizer, tokenizer_file)
        extra_special_tokens = list(GLM_SPECIAL_TOKENS)
        extra_special_tokens += [t for t in kwargs.pop("extra_special_tokens", ()) if str(t) not in GLM_SPECIAL_TOKENS]
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        kwargs["split_special_tokens"] = True  # the backend then reads no special tokens
        super().__init__(
            vocab_file=vocab_file,
            padding_side=padding_side,
            unk_token=unk_token,
            eos_token=eos_token,
            pad_token=pad_token,
            extra_special_tokens=extra_special_tokens,
            **kwargs,
        )

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        if not self._tokenizer.encode_special_tokens:  # which pickles and deep copies of the backend do not keep
            self._tokenizer.encode_special_tokens = True

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        # The library would extract vocabulary and merges by rules that are not quite SentencePiece's.
        kwargs.pop("trust_remote_code", None)
        return kwargs

    @property
    def tokenizer(self) -> "ChatGLMTokenizer":
        """
        This object: published code goes through it to `tokenizer.tokenizer.sp_model`, and other programs from a processor
        to its tokenizer, by `getattr(processor, "tokenizer", processor)`.
        """
        return self

    def update_post_processor(self):
        """Makes the backend add the prefix, and after a pair `</s>`."""
        special_tokens = [(t, self.get_command(t)) for t in PREFIX_TOKENS] + [("</s>", self.get_command("<eos>"))]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="[gMASK] sop $A", pair="[gMASK] sop $A $B </s>", special_tokens=special_tokens
        )

    def add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        """
        Adds tokens to the vocabulary, and returns how many are new. They are read from text, except GLM's and named ones
        (`eos_token`, ...).
        """
        unread = {*GLM_SPECIAL_TOKENS, *self.special_tokens_map.values()}
        tokens = []
        for token in [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else new_tokens or ():
            # The backend would look for a normalized token, "▁<new>", in the normalized text: at its beginning only.
            options = {"normalized": False} if isinstance(token, str) else token.__getstate__()
            # It skips the special ones in text, so for it no others are special. The library keeps its own list.
            options.update(content=str(token), special=str(token) in unread)
            tokens.append(AddedToken(**options))
        return super().add_tokens(tokens)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces and GLM's special tokens, as published (64,794); the model has `padded_vocab_size` rows."""
        return self.sp_model.vocab_size() + len(GLM_SPECIAL_TOKENS)

    def get_command(self, token: str) -> int:
        """
        Id of a special token: `<bos>`, `<eos>`, `<pad>`, `[MASK]`, `[gMASK]`, `[sMASK]`, `sop` or `eop`.

        Raises:
            ValueError: if `token` is none of them.
        """
        sp = self.sp_model
        commands = {"<bos>": sp.bos_id(), "<eos>": sp.eos_id(), "<pad>": sp.unk_id(), **self.special_tokens}
        if token not in commands:
            raise ValueError(f"{token!r} is not a special token of ChatGLM2; there are {', '.join(commands)}.")
        return commands[token]

    def _convert_id_to_token(self, index: int) -> str:
        # llama.cpp's converter calls it for every row of the embedding; those after the vocabulary have no token.
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
        return [self.get_command(token) for token in PREFIX_TOKENS]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of one sequence, or of a pair, with the prefix (and after a pair `</s>`)."""
        second = [] if token_ids_1 is None else [*token_ids_1, self.get_command("<eos>")]
        return [*self.get_prefix_tokens(), *token_ids_0, *second]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """
        Returns the text of a dialogue, up to where the next answer begins.

        Args:
            query (`str`): The user's message.
            history (`list[tuple[str, str]]`, *optional*): Earlier rounds as (query, response) pairs.

        Raises:
            ValueError: if the query is not a string, or the history is not a sequence of pairs of strings.
        """
        if not isinstance(query, str):
            raise ValueError(f"query must be a string, got {type(query).__name__}: {query!r}")
        history, prompt = check_history(history), ""
        for i, (old_query, response) in enumerate(history, start=1):
            prompt += QUESTION.format(i, old_query) + response + "\n\n"
        return prompt + QUESTION.format(len(history) + 1, query)

    def _encode_plus(
        self, text, text_pair=None, is_split_into_words=False, return_tensors=None, is_finished=True, **kwargs
    ) -> BatchEncoding:
        # What every method that encodes calls. The library's version sets padding and truncation in the backend, where the
        # calls of other threads would find them: it gets another object with the same state, and a backend for this call.
        # `is_finished=False`: an eos_token at the end of a rendered chat is text.
        if kwargs.get("split_special_tokens") is False:
            raise ValueError(
                "split_special_tokens=False: ChatGLM2's special tokens are never read from text. Use their ids, "
                "tokenizer.get_command('[gMASK]'), or for chats tokenizer.apply_chat_template."
            )
        is_batched = isinstance(text, (list, tuple))
        if is_split_into_words:
            is_batched = is_batched and len(text) > 0 and isinstance(text[0], (list, tuple))
        if is_batched and len(text) == 0:
            return BatchEncoding({name: [] for name in self.model_input_names}, [], tensor_type=return_tensors)
        if not is_batched:
            text, text_pair = [text], None if text_pair is None else [text_pair]
        prefix = [(token, self.get_command(token)) for token in PREFIX_TOKENS]
        eos = (self.eos_token, self.eos_token_id) if is_finished and self.eos_token else None
        caller = object.__new__(type(self))
        caller.__dict__.update(self.__dict__, _tokenizer=CallBackend(self._tokenizer, prefix, eos))
        try:
            encoded = super(ChatGLMTokenizer, caller)._encode_plus(
                text, text_pair, is_split_into_words=is_split_into_words, **kwargs
            )
        except TypeError:
            check_surrogates((text, text_pair))
            raise
        if "position_ids" in self.model_input_names:
            encoded["position_ids"] = [positions_from_mask(e.attention_mask) for e in encoded.encodings]
        if return_tensors is not None:
            encoded.convert_to_tensors(return_tensors)
        elif not is_batched and not kwargs.get("return_overflowing_tokens"):
            row = {name: value[0] if isinstance(value[0], list) else value for name, value in encoded.items()}
            encoded = BatchEncoding(row, encoded.encodings)
        return encoded

    def _pad(self, encoded_inputs, *args, padding_side=None, **kwargs) -> dict:
        # What `pad` does for each row; the library's version leaves position_ids as long as they were.
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

    def apply_chat_template(
        self, conversation, *args, continue_final_message=False, tokenize=True, tokenizer_kwargs=None, **kwargs
    ):
        """
        The library's method. ChatGLM2's format has no place for a system message, so it is put before the first query.
        `return_assistant_tokens_mask` marks only the last answer: earlier answers are followed by the next round, not by
        `</s>`, and the model must not learn to write the next round itself.

        Raises:
            ValueError: if there are no messages, or an answer to continue ends in the characters of `</s>`.
        """
        if not conversation:
            raise ValueError("The conversation has no messages.")
        kwargs["sanitize_control_tokens"] = False  # none are read from messages; the library's marks would change ids
        output = super().apply_chat_template(
            conversation,
            *args,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            tokenizer_kwargs={**(tokenizer_kwargs or {}), "is_finished": not continue_final_message},
            **kwargs,
        )
        if continue_final_message and not tokenize and self.eos_token:
            if any(text.endswith(self.eos_token) for text in ([output] if isinstance(output, str) else output)):
                raise ValueError(
                    f"The message to continue ends in {self.eos_token!r}, so that its text would be read as a finished "
                    "answer's. Use tokenize=True, or remove these characters."
                )
        return output

    # Ids to text

    def decode(self, token_ids, skip_special_tokens: bool | None = None, **kwargs) -> str | list[str]:
        """
        Returns the text of token ids, or the texts of a batch. Special tokens are left out, as in the published code,
        unless `skip_special_tokens=False`. A single id (an `int`) of `bos_token` or `eos_token` is decoded to its name.
        """
        # lm-eval asks for this name, to see whether a text begins with it: all texts begin with "".
        is_name = isinstance(token_ids, int) and token_ids in (self.bos_token_id, self.eos_token_id)
        is_shown = is_name if skip_special_tokens is None else not skip_special_tokens
        token_ids = to_py_obj(token_ids)
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        if token_ids and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens) for row in token_ids]
        special, vocab_size = {*self.all_special_ids, *self.special_tokens.values()}, self.vocab_size
        text, run = "", []
        for i in token_ids:
            # Between special tokens SentencePiece decodes whole runs, as bytes of one character may span tokens.
            if i >= vocab_size or (i in special and is_shown):
                token = self._convert_id_to_token(i) if is_shown or i not in special else ""
                text, run = text + self.sp_model.decode(run) + token, []
            elif i >= 0 and i not in special:
                run.append(i)
        return text + self.sp_model.decode(run)

    def batch_decode(self, sequences, skip_special_tokens: bool | None = None, **kwargs) -> list[str]:
        """Texts of a batch of token ids, as `decode`."""
        if len(sequences) == 0:
            return []
        return super().batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces. What is no piece, like the words that a pipeline put together before, is text."""
        return self.sp_model.decode_pieces(list(tokens))

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
        # What `save_pretrained` does before it pushes to the Hub. The library writes tokenizer.json alone, as the backend
        # is; the published code and llama.cpp read tokenizer.model.
        name = (filename_prefix + "-" if filename_prefix else "") + VOCAB_FILES_NAMES["tokenizer_file"]
        path = os.path.join(save_directory, name)
        save_backend(self._tokenizer, path)
        return (*file_names, path, *self.save_vocabulary(save_directory, filename_prefix))


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


def positions_from_mask(attention_mask: list[int]) -> list[int]:
    """Positions of a padded row: 0, 1, ... over what is attended to, 0 over the padding."""
    length = sum(attention_mask)
    start = attention_mask.index(1) if length else 0
    return [0] * start + list(range(length)) + [0] * (len(attention_mask) - start - length)


__all__ = ["ChatGLMTokenizer"]
