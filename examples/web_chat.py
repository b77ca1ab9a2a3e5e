"""
Chat in the browser.

    python -m examples.web_chat                         # the small model, at http://127.0.0.1:7860
    python -m examples.web_chat --model THUDM/chatglm2-6b --quantization int4 --users 4

You can stop an answer, edit a question and regenerate an answer. All users share the model. Each user has a separate dialogue
and KV cache. The page loads nothing from other sites.
"""

from common.options import Parser, add_model_options, at_least


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 allows other machines (default: this machine only)",
    )
    parser.add_argument(
        "--port",
        type=at_least(0, maximum=65535, number=int),
        default=7860,
        help="port; 0 means any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--users",
        type=at_least(1, number=int),
        default=2,
        help="number of answers that are generated at the same time; default: 2",
    )
    parser.add_argument(
        "--top-p", type=at_least(0, maximum=1), default=0.8, help="initial value of the slider; default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=at_least(0, maximum=1),
        default=0.95,
        help="initial value of the slider; default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import html
import os
import sys
import time
from contextlib import aclosing


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere

import gradio as gr

from common.http_guard import listen
from common.load_model import iterate_in_threads, load_model
from examples.about import model_format, model_name, model_size


DELIMITERS = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False)]
EXAMPLES = ["你好", "Who are you?", "你是谁？", "What is artificial intelligence?"]
CSS = """
footer {display: none !important}
.gradio-container main.contain, .gradio-container main.app {width: 100% !important; max-width: 860px !important; margin: 0 auto !important}
.message {line-height: 1.6}
.example {border: 1px solid var(--border-color-primary) !important; border-radius: 8px !important}
.header {display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px; padding: 4px 8px}
.header h1 {font-size: 1.25rem; font-weight: 600; margin: 0}
.header span, .status {color: var(--body-text-color-subdued); font-size: 0.85rem}
.status {padding: 0 8px; min-height: 1.3em}
.bubble-wrap {background: transparent !important; border: none !important}
.bot.message, .bot .message {border: none !important; box-shadow: none !important; background: transparent !important}
.input-container textarea {background: transparent !important; border: none !important; box-shadow: none !important}
.dark .message pre {background: var(--body-background-fill) !important}
@media (max-width: 600px) {
  .gradio-container .fillable {padding: 8px !important}
  .header h1 {font-size: 1rem}
}
"""
# The language that the browser speaks, for screen readers, and names for what has none
ON_LOAD = """() => {
  document.documentElement.lang = navigator.language;
  const name = () => {
    const names = {".input-container textarea": "问题 · Question", ".submit-button": "发送 · Send", ".stop-button": "停止 · Stop"};
    for (const [selector, text] of Object.entries(names)) {
      for (const element of document.querySelectorAll(selector)) {
        if (element.getAttribute("aria-label") !== text) element.setAttribute("aria-label", text);
      }
    }
  };
  name();
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
}"""
# The empty dialogue that the page begins with is not saved over the one that is to be restored.
SAVE = "(messages, saved) => [window.dialogueIsRestored ? messages : saved]"
EXPORT = r"""(messages) => {
  const text = (content) => typeof content === "string" ? content : [content].flat().map((part) => part.text ?? "").join("");
  const names = {user: "用户 · User", assistant: "ChatGLM2"};
  const parts = messages.map((message) => `**${names[message.role]}**\n\n${text(message.content)}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([parts.join("\n")], {type: "text/markdown"}));
  link.download = "chatglm2.md";
  link.click();
  URL.revokeObjectURL(link.href);
}"""
TOO_LONG = {
    "zh": "问题有 {length} 个 token，最多 {limit} 个（max_length 为 {max_length}，上下文为 {context}）。请缩短问题{remedy}。",
    "en": "The question is {length} tokens long; at most {limit} fit (max_length is {max_length}, the context {context}). "
    "Shorten it{remedy}.",
}
RAISE = {"zh": "，或在设置中增大 max_length", "en": ", or raise max_length in the settings"}
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


def too_long(model, tokenizer, query: str, max_length: int, language: str) -> str | None:
    """Returns a message, in Chinese or English, if a question is too long, else None."""
    context = model.config.context_length
    limit = min(max_length, context) - 1
    length = len(tokenizer(tokenizer.build_prompt(query)).input_ids)
    if length <= limit:
        return None
    key = "zh" if language.lower().startswith("zh") else "en"
    remedy = RAISE[key] if max_length < context else ""
    return TOO_LONG[key].format(length=length, limit=limit, max_length=max_length, context=context, remedy=remedy)


def build_page(
    model, tokenizer, users: int = 1, temperature: float = 0.95, top_p: float = 0.8, name: str = "ChatGLM2"
) -> gr.Blocks:
    """
    Args:
        users: How many answers are generated at the same time. Others wait.
        name: Of the model, and what else the page says of it.
    """
    context = model.config.context_length
    max_lengths = {}  # of the sessions that changed it, for `check`, which is given the question alone

    def error_of(message: str, max_length: int, request: gr.Request) -> str | None:
        return too_long(model, tokenizer, message, max_length, request.headers.get("accept-language", ""))

    def check(message: str, request: gr.Request):
        error = error_of(message, max_lengths.get(request.session_hash, min(8192, context)), request)
        return gr.validate(error is None, error or "")

    def note_max_length(value: float, request: gr.Request):
        max_lengths[request.session_hash] = int(value)

    def forget(request: gr.Request):
        max_lengths.pop(request.session_hash, None)

    async def answer(
        message: str,
        messages: list[dict],
        max_length: int,
        top_p: float,
        temperature: float,
        session: dict,
        request: gr.Request,
    ):
        """Yields the answer as it grows, and its speed. `session` belongs to the user and keeps the KV cache."""
        if error := error_of(message, int(max_length), request):  # of an edited question, which is not given to `check`
            gr.Warning(error)  # an error would leave the page waiting
            return
        # Where it is stopped, or the page closed, generation ends, and its cache is freed.
        stream = model.stream_chat(
            tokenizer,
            message,
            to_rounds(messages),
            past_key_values=session.pop("cache", None),
            return_past_key_values=True,
            max_length=int(max_length),
            top_p=max(top_p, 0.01),  # 0 on the slider: the likeliest token
            temperature=temperature,
        )
        steps, began = 0, None
        try:
            async with aclosing(iterate_in_threads(stream)) as answers:
                async for response, _, cache in answers:
                    began = began or time.monotonic()  # after the prompt
                    seconds = time.monotonic() - began
                    yield response, f"{steps / seconds:.1f} tokens/s" if seconds > 0.2 else ""
                    steps += 1
            session["cache"] = cache
        except ValueError as error:
            gr.Warning(str(error))

    chatbot = gr.Chatbot(
        label="对话 · Dialogue",
        show_label=False,
        height="66vh",
        latex_delimiters=[dict(left=left, right=right, display=display) for left, right, display in DELIMITERS],
        buttons=["copy"],
        placeholder="输入问题，开始对话。 Ask something.",
    )
    textbox = gr.Textbox(
        placeholder="输入问题 · Ask something",
        show_label=False,
        label="问题 · Question",
        submit_btn=True,
        stop_btn=True,
        max_length=100_000,
        scale=7,
    )
    session = gr.State({}, time_to_live=FORGOTTEN_AFTER)
    with gr.Blocks(title="ChatGLM2", fill_height=True, analytics_enabled=False) as page:
        saved = gr.BrowserState([], storage_key=f"chatglm2 {name}", secret="kept where it is read")
        gr.HTML(f'<div class="header"><h1>ChatGLM2</h1><span>{html.escape(name)}</span></div>')
        status = gr.HTML(elem_classes="status", render=False)
        sliders = [
            gr.Slider(
                1,
                context,
                min(8192, context),
                step=1,
                label="max_length",
                info="问答总长度上限 · tokens of dialogue and answer",
                render=False,
            ),
            gr.Slider(0, 1, top_p, step=0.01, label="top_p", info="越小越保守 · the smaller, the safer", render=False),
            gr.Slider(
                0,
                1,
                temperature,
                step=0.01,
                label="temperature",
                info="0：总选最可能的词 · 0: always the likeliest",
                render=False,
            ),
        ]
        chat = gr.ChatInterface(
            answer,
            chatbot=chatbot,
            textbox=textbox,
            editable=True,
            examples=[[example, None, None, None, None] for example in EXAMPLES],
            additional_inputs=[*sliders, session],
            additional_inputs_accordion=gr.Accordion("设置 · Settings", open=False, render=False),
            additional_outputs=[status],
            concurrency_limit=users,
            api_visibility="private",
            validator=check,
            fill_height=True,
        )
        with gr.Row(equal_height=True):
            status.render()
            export = gr.Button("导出对话 · Export", size="sm", min_width=140, scale=0)
        # A list that JavaScript returns is one of outputs.
        export.click(None, [chat.chatbot], None, js=EXPORT)
        chat.chatbot.change(None, [chat.chatbot, saved], [saved], js=SAVE)
        sliders[0].change(note_max_length, sliders[:1], None, api_visibility="private", queue=False)
        page.unload(forget)
        restored = page.load(
            lambda messages: (messages, messages), [saved], [chat.chatbot, chat.chatbot_state], api_visibility="private"
        )
        restored.then(None, js="() => { window.dialogueIsRestored = true }")
        page.load(None, js=ON_LOAD)
    return page.queue(max_size=64)  # more wait for nothing


def launch_page(page: gr.Blocks, host: str, port: int, **options):
    # The system's fonts, as gradio's would come from outside
    fonts = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host, server_port=port, theme=theme, css=CSS, footer_links=[], quiet=True, max_file_size=1, **options
    )  # fmt: skip


def main():
    args = options().parse_args()

    with listen(args.host, args.port) as listener:  # whether it is free, before the model is loaded
        port = listener.getsockname()[1]
    model, tokenizer = load_model(args)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Anyone who can reach {args.host} can use this page.", file=sys.stderr)
    name = f"{model_name(args.model)} · {model_format(model)}, {model_size(model)}"
    page = build_page(model, tokenizer, args.users, args.temperature, args.top_p, name)
    print(f"ChatGLM2 at http://{args.host}:{port}", flush=True)
    launch_page(page, args.host, port)


if __name__ == "__main__":
    main()
