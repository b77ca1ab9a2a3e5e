"""Streaming: the steps of `generate` as an iterator, and lines of text that keep their indentation."""

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from transformers.generation.streamers import BaseStreamer, TextStreamer


def capture_torch_context() -> Callable[[], ExitStack]:
    """Captures inference mode, autocast and the CUDA device. Returns a function that restores them in another thread."""
    is_inference = torch.is_inference_mode_enabled()
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    autocast = [(t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t)) for t in device_types]
    cuda_device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(is_inference))
        for device_type, dtype, enabled in autocast:
            stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
        if cuda_device is not None:
            stack.enter_context(torch.cuda.device(cuda_device))
        return stack

    return enter


class TokenStreamer(BaseStreamer):
    """
    Passes the tokens of each step of `generate`, which runs in a thread of its own, to an iterating consumer.

    Generation waits until the consumer asks for more. So the cache and the random state do not change between two steps,
    and when the consumer stops iterating, generation has stopped too.
    """

    class Stopped(Exception):
        pass

    def __init__(self):
        self._items = queue.SimpleQueue()
        self._resume = threading.Semaphore(0)
        self._stopped = False
        self._prompt_is_next = True

    def put(self, value: torch.Tensor):
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._items.put(value)
        self._resume.acquire()
        if self._stopped:
            raise self.Stopped

    def end(self):
        pass  # `run` notices that `generate` returns

    def run(self, generate: Callable) -> Iterator[torch.Tensor]:
        """Calls `generate(streamer=self)` and yields what it puts. Exceptions in it are raised here."""
        enter_context = capture_torch_context()

        def target():
            try:
                with enter_context():
                    generate(streamer=self)
            except self.Stopped:
                pass
            except BaseException as error:
                self._items.put(error)
            else:
                self._items.put(None)

        thread = threading.Thread(target=target, daemon=True)
        try:
            thread.start()
            while (item := self._items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
                self._resume.release()
        finally:
            self._stopped = True
            self._resume.release()
            if thread.ident is not None:  # a signal can come before it has started
                thread.join()


class LineTokenizer:
    """
    Decodes for the library's `TextStreamer`, which decodes each line of a text by itself: SentencePiece drops the first
    space of what it decodes, and so lines would lose the first space of their indentation.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.newline = tokenizer.convert_tokens_to_ids("<0x0A>")
        self.is_after_newline = False

    def decode(self, token_ids: Sequence[int], **kwargs) -> str:
        if self.is_after_newline:
            text = self.tokenizer.decode([self.newline, *token_ids], **kwargs)[1:]
        else:
            text = self.tokenizer.decode(token_ids, **kwargs)
        self.is_after_newline = self.is_after_newline or text.endswith("\n")
        return text

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


def keep_indentation(streamer: TextStreamer) -> TextStreamer:
    """Returns a copy of a streamer that decodes by a `LineTokenizer`."""
    streamer = copy.copy(streamer)
    streamer.tokenizer = LineTokenizer(streamer.tokenizer)
    return streamer
