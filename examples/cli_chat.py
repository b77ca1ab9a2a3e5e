"""
Chat in the terminal.

    python examples/cli_chat.py                         # with the small model that the repository comes with
    python examples/cli_chat.py --model THUDM/chatglm2-6b
    python examples/cli_chat.py --prompt "你好"          # answers once
    printf '你好\nWho are you?\n' | python examples/cli_chat.py

`clear` forgets the dialogue, `stop` ends. Ctrl-C stops an answer and keeps the dialogue.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging


TINY = Path(__file__).resolve().parent.parent / "checkpoints/tiny"
GREETING = "欢迎使用 ChatGLM2。输入内容即可对话，clear 清空对话历史，stop 结束。\nType to chat; `clear` forgets the dialogue, `stop` ends."


def stream_answer(model, tokenizer, query: str, history: list, past_key_values, **options):
    """Prints an answer as it is generated; returns the history and the cache for the next round."""
    shown = ""
    stream = model.stream_chat(
        tokenizer, query, history, past_key_values=past_key_values, return_past_key_values=True, **options
    )
    try:
        for response, history, past_key_values in stream:
            # What was shown stays: only what is added to it is printed.
            print(response[len(shown) :], end="", flush=True)
            shown = response
    except KeyboardInterrupt:
        print(" …", end="")
    finally:
        stream.close()
    print()
    return history, past_key_values


def chat(model, tokenizer, **options):
    """Reads queries, from a terminal or a pipe, until `stop` or the end."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history in input())

        print(GREETING)
    history, past_key_values = [], None
    while True:
        try:
            query = input("\n用户：" if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if query == "stop":
            break
        if query == "clear":
            history, past_key_values = [], None
            if interactive:
                os.system("cls" if os.name == "nt" else "clear")
                print(GREETING)
            continue
        if not query:
            continue
        print("\nChatGLM：" if interactive else "", end="")
        try:
            history, past_key_values = stream_answer(model, tokenizer, query, history, past_key_values, **options)
        except ValueError as error:  # a query that is too long, say: the dialogue goes on
            print(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="folder or Hub id (default: checkpoints/tiny)")
    parser.add_argument("--prompt", help="answer this once, and end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.8, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    args = parser.parse_args()

    logging.disable_progress_bar()
    if args.seed is not None:
        torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, device=args.device)
    if args.device == "cpu":
        model = model.float()  # CPUs compute slowly in float16
    model.eval()
    options = dict(do_sample=not args.greedy, top_p=args.top_p, temperature=args.temperature)
    if args.prompt is not None:
        stream_answer(model, tokenizer, args.prompt, [], None, **options)
    else:
        chat(model, tokenizer, **options)


if __name__ == "__main__":
    main()
