"""
Chat in the terminal.

    python -m examples.cli_chat                         # the small model in the repository
    python -m examples.cli_chat --model THUDM/chatglm2-6b --quantization int4
    python -m examples.cli_chat --prompt "你好"          # answers once
    printf '你好\\nWho are you?\\n' | python -m examples.cli_chat

`/help` lists the commands. Ctrl-C stops an answer and keeps the dialogue. A terminal shows answers as Markdown if rich is
installed; pipes and files get plain text. Input from a pipe must be in the encoding of the locale, usually UTF-8.
"""

import codecs
import locale
import os
import sys
from collections.abc import Iterator

from common.errors import plain_errors
from common.options import Parser, add_model_options, at_least
from examples.terminal import display_for_output


HELP = """\
/help          命令 · this list
/clear         清空对话 · forget it all
/exit, Ctrl-D  结束 · end
Ctrl-C         停止回答 · stop an answer
\"\"\" … \"\"\"    多行输入 · several lines"""
# `clear` and `stop` are the published demo's.
CLEAR, EXIT = {"/clear", "clear"}, {"/exit", "exit", "stop"}
QUOTES = '"""'


def stream_answer(model, tokenizer, query: str, history: list, past_key_values, **options):
    """Shows an answer as it is generated; returns the history and the cache for the next round."""
    stream = model.stream_chat(
        tokenizer, query, history, past_key_values=past_key_values, return_past_key_values=True, **options
    )
    with display_for_output() as display:
        try:
            for response, history, past_key_values in stream:
                display.show(response)
        except KeyboardInterrupt:
            display.interrupted()
        finally:
            stream.close()
    return history, past_key_values


def piped_queries() -> Iterator[str]:
    """
    Yields the lines of a pipe or file.

    Raises:
        ValueError: at the end, if lines in another encoding were left out. Each of them was reported.
    """
    encoding, left_out = sys.stdin.encoding, 0
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if number == 1 and encoding.lower() == "utf-8":
            line = line.removeprefix(codecs.BOM_UTF8)  # which editors on Windows write
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError:
            left_out += 1
            print(f"Line {number} of the input is not {encoding.upper()}, and is not answered.", file=sys.stderr)
    if left_out:
        raise ValueError(
            f"{left_out} lines of the input are not {encoding.upper()}. Convert them, for example by iconv -f GB18030 -t UTF-8."
        )


def typed_queries() -> Iterator[str]:
    """Yields what the user types in a terminal, until the end of input or Ctrl-C."""
    try:
        # For the line editor, too: in the locale C it would read the bytes of Chinese characters as keys.
        if locale.nl_langinfo(locale.CODESET).upper() != "UTF-8" and sys.stdin.encoding.lower() == "utf-8":
            os.environ["LC_ALL"] = "C.UTF-8"
            locale.setlocale(locale.LC_CTYPE, "")
        import readline  # line editing and history in input()

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines that are pasted are one query
    except (
        AttributeError,
        ImportError,
        locale.Error,
    ):  # Windows has its own; a system without that locale does without
        pass
    while True:
        try:
            print()
            yield read_query()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"That is not {error.encoding}: set the encoding of the terminal.")


def read_query() -> str:
    """Returns a line, or the lines between two triple quotes. Ctrl-C between them discards the lines."""
    query = input("用户：")
    if not query.lstrip().startswith(QUOTES):
        return query
    query = query.lstrip().removeprefix(QUOTES)
    try:
        while QUOTES not in query:
            query += "\n" + input("  … ")
    except KeyboardInterrupt:
        print()
        return ""
    return query.partition(QUOTES)[0]


def chat(model, tokenizer, greeting: str, **options):
    """Answers queries from a terminal or a pipe, until `exit` or the end of input."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{greeting}\n\n{HELP}")
    history, past_key_values = [], None
    for query in map(str.strip, typed_queries() if interactive else piped_queries()):
        if query in EXIT:
            break
        if query in CLEAR:
            history, past_key_values = [], None
            if interactive:
                print("对话历史已清空。 The dialogue is forgotten.")
            continue
        if interactive and query == "/help":
            print(HELP)
            continue
        if not query:
            continue
        if interactive:
            print("\nChatGLM：")
        try:
            history, past_key_values = stream_answer(model, tokenizer, query, history, past_key_values, **options)
        except ValueError as error:  # for example a query that is too long: the dialogue continues
            print(error)


def main():
    parser = Parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--prompt", help="answer this query and exit")
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--top-p", type=at_least(0, above=True, maximum=1), default=0.8, help="default: %(default)s")
    parser.add_argument("--temperature", type=at_least(0), default=0.8, help="0 is greedy; default: %(default)s")
    parser.add_argument(
        "--max-length",
        type=at_least(1, number=int),
        default=8192,
        help="limit of dialogue and answer together, in tokens; default: 8192",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0, maximum=2**63 - 1, number=int),
        help="random seed: the same seed gives the same answers",
    )
    args = parser.parse_args()

    if sys.stdout is None:
        raise SystemExit("The standard output is closed, so answers cannot be shown.")
    if sys.stdin is None and args.prompt is None:
        raise SystemExit("The standard input is closed. Pass the query with --prompt.")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # old Windows cannot show all characters
    # Imported late: it takes seconds, which --help does not need, and Ctrl-C should end it silently.
    import torch

    from common.load_model import load_model
    from examples.about import model_format, model_name, model_size

    if args.seed is not None:
        torch.manual_seed(args.seed)
    model, tokenizer = load_model(args)
    options = dict(
        do_sample=not args.greedy, top_p=args.top_p, temperature=args.temperature, max_length=args.max_length
    )
    if args.prompt is None:
        greeting = (
            f"ChatGLM2 · {model_name(args.model)} · {model_format(model)}, {model_size(model)}, {model.device} · "
            f"{model.config.context_length:,} tokens"
        )
        chat(model, tokenizer, greeting, **options)
        return
    try:
        stream_answer(model, tokenizer, args.prompt, [], None, **options)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def run():
    """Runs `main`. Exits silently if the reader of a pipe has left, and with one line if answers cannot be written."""
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        # What is still to be written would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise


if __name__ == "__main__":
    with plain_errors("chat"):
        run()
