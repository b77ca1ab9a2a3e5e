"""
Chat in the browser.

    python -m examples.web_chat                         # the small model, at http://127.0.0.1:7860
    python -m examples.web_chat --model THUDM/chatglm2-6b --quantization int4 --users 4

Answers are streamed, and can be stopped; questions can be edited, and answers had anew. All users share the model; each has a
dialogue and a cache of their own. The page needs nothing from outside.
"""

import argparse
import os
import sys
from contextlib import aclosing


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere

import gradio as gr

from common.http_guard import listen
from common.load_model import add_model_options, at_least, iterate_in_threads, load_model


DELIMITERS = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False)]
EXAMPLES = ["你好", "Who are you?", "你是谁？", "What is artificial intelligence?"]
CSS = """
footer {display: none !important}
.message {line-height: 1.6}
.example {border: 1px solid var(--border-color-primary) !important; border-radius: 8px !important}
"""
FORGOTTEN_AFTER = 3600  # seconds without a word: then a cache is no longer kept for a user


def to_rounds(messages: list[dict]) -> list[tuple[str, str]]:
    """Returns gradio's messages as (query, response) pairs, without queries that were not answered."""
    rounds = []
    for message in messages:
        parts = [message["content"]] if isinstance(message["content"], str) else message["content"]
        text = "".join(part if isinstance(part, str) else part["text"] for part in parts)
        if message["role"] == "user":
            rounds.append((text, ""))
        elif rounds:
            rounds[-1] = (rounds[-1][0], rounds[-1][1] + text)
    return [(query, response) for query, response in rounds if response]


def build_page(model, tokenizer, users: int = 1, temperature: float = 0.95, top_p: float = 0.8) -> gr.ChatInterface:
    """
    Args:
        users: How many answers are generated at the same time. Others wait.
    """

    async def answer(
        message: str, messages: list[dict], max_length: int, top_p: float, temperature: float, session: dict
    ):
        """Yields the answer as it grows. `session` is the user's own, and keeps their cache."""
        # Where it is stopped, or the page closed, generation ends, and its cache is freed.
        stream = model.stream_chat(
            tokenizer,
            message,
            to_rounds(messages),
            past_key_values=session.pop("cache", None),
            return_past_key_values=True,
            max_length=max(int(max_length), 1),
            top_p=max(top_p, 0.01),  # 0 on the slider: the likeliest token
            temperature=temperature,
        )
        try:
            async with aclosing(iterate_in_threads(stream)) as answers:
                async for response, _, cache in answers:
                    yield response
            session["cache"] = cache
        except ValueError as error:  # a question that is too long, say
            gr.Warning(str(error))  # an error would leave the page waiting

    chatbot = gr.Chatbot(
        label="ChatGLM2",
        show_label=False,
        height="66vh",
        latex_delimiters=[dict(left=left, right=right, display=display) for left, right, display in DELIMITERS],
        buttons=["copy"],
        placeholder="输入问题，开始对话。 Ask something.",
    )
    page = gr.ChatInterface(
        answer,
        title="ChatGLM2",
        chatbot=chatbot,
        textbox=gr.Textbox(
            placeholder="输入问题 · Shift+Enter 换行　 Ask something · Shift+Enter for a new line",
            show_label=False,
            submit_btn=True,
            stop_btn=True,
            max_length=100_000,
            scale=7,
        ),
        editable=True,
        examples=[[example, None, None, None, None] for example in EXAMPLES],
        additional_inputs=[
            gr.Slider(
                0, 32768, 8192, step=1, label="max_length", info="问答总长度上限 · tokens of dialogue and answer"
            ),
            gr.Slider(0, 1, top_p, step=0.01, label="top_p", info="越小越保守 · the smaller, the safer"),
            gr.Slider(
                0, 1, temperature, step=0.01, label="temperature", info="0：总选最可能的词 · 0: always the likeliest"
            ),
            gr.State({}, time_to_live=FORGOTTEN_AFTER),
        ],
        additional_inputs_accordion=gr.Accordion("设置 · Settings", open=False),
        concurrency_limit=users,
        analytics_enabled=False,
        api_visibility="private",
    )
    return page.queue(max_size=64)  # more wait for nothing


def launch_page(page: gr.Blocks, host: str, port: int, **options):
    # The system's fonts, as gradio's would come from outside
    fonts = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host, server_port=port, theme=theme, css=CSS, footer_links=[], quiet=True, max_file_size=1, **options
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines too (default: this one only)")
    parser.add_argument("--port", type=at_least(0, maximum=65535, number=int), default=7860, help="0: any free one")
    parser.add_argument("--users", type=at_least(1, number=int), default=2, help="answers at the same time; default: 2")
    parser.add_argument("--top-p", type=at_least(0, maximum=1), default=0.8, help="the slider's; default: %(default)s")
    parser.add_argument(
        "--temperature", type=at_least(0, maximum=1), default=0.95, help="the slider's; default: %(default)s"
    )
    args = parser.parse_args()

    with listen(args.host, args.port) as listener:  # whether it is free, before the model is loaded
        port = listener.getsockname()[1]
    model, tokenizer = load_model(args)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Anyone who can reach {args.host} can use this page.", file=sys.stderr)
    page = build_page(model, tokenizer, args.users, args.temperature, args.top_p)
    print(f"ChatGLM2 at http://{args.host}:{port}", flush=True)
    launch_page(page, args.host, port)


if __name__ == "__main__":
    main()
