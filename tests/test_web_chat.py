"""
`make web` in a real browser: Chromium, where it and Playwright are installed (`apt-get install chromium`).

    WEB_CHAT_SCREENSHOT=docs/images/web_chat.png python -m pytest tests/test_web_chat.py -k dialogue

makes the picture in the documentation anew.
"""

import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModel, AutoTokenizer

from conftest import STORED


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

from common.http_guard import listen  # noqa: E402
from examples import web_chat  # noqa: E402
from examples.about import model_format, model_size  # noqa: E402


pytestmark = pytest.mark.xdist_group("web_chat")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def serve(model, tokenizer, **options) -> tuple:
    """Returns the page and its address."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    page = web_chat.build_page(model, tokenizer, **options)
    web_chat.launch_page(page, "127.0.0.1", port, prevent_thread_lock=True)
    return page, f"http://127.0.0.1:{port}"


class WordTokenizer:
    """Whose tokens are words"""

    def build_prompt(self, query: str) -> str:
        return query

    def __call__(self, text: str):
        return SimpleNamespace(input_ids=text.split(" "))


class ScriptedModel:
    """Answers what the test says, word by word, and notes what it was asked, and how it ended."""

    def __init__(self):
        self.asked, self.options, self.ended, self.running = [], [], [], 0
        self.text, self.pause = "", 0.0
        self.config = SimpleNamespace(context_length=32768)
        self.go = threading.Event()

    def stream_chat(self, tokenizer, query, history, past_key_values=None, return_past_key_values=True, **options):
        self.asked.append((query, history))
        self.options.append({**options, "cache": past_key_values})
        text = self.text or f"Answer {len(self.asked)} to {query}."
        words, shown = text.split(" "), ""
        self.running += 1
        try:
            for i, word in enumerate(words):
                shown += (" " if i else "") + word
                yield shown, [*history, (query, shown)], f"cache of {query}"
                time.sleep(self.pause)
            self.ended.append("complete")
        except GeneratorExit:
            self.ended.append("closed")
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def scripted_page():
    model = ScriptedModel()
    page, url = serve(model, WordTokenizer(), users=2, name="scripted · INT4, 3.9 GB")
    yield model, url
    page.close(verbose=False)


@pytest.fixture
def scripted(scripted_page):
    """The model and its page, as new."""
    model, url = scripted_page
    model.__init__()
    return model, url


class Tab:
    """A user's tab, in a browser profile of its own."""

    def __init__(self, browser, url: str, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = url
        self.page.goto(url)
        self.input = self.page.locator("[data-testid=textbox]").first
        self.input.wait_for()

    def ask(self, text: str, wait=True):
        before = self.answers().count()
        playwright.expect(self.input).to_be_enabled(timeout=20_000)
        self.input.fill(text)
        self.input.press("Enter")
        if wait:
            playwright.expect(self.answers()).to_have_count(before + 1, timeout=20_000)
            self.wait_for_end()

    def wait_for_end(self):
        self.page.locator("[data-testid=submit-button]").wait_for(timeout=20_000)
        playwright.expect(self.input).to_be_enabled(timeout=20_000)

    def answers(self):
        return self.page.locator("[data-testid=bot]")

    def texts(self, who: str = "bot") -> list[str]:
        return [text.strip() for text in self.page.locator(f"[data-testid={who}]").all_inner_texts()]

    def set_slider(self, name: str, value: str):
        slider = self.page.get_by_label(f"number input for {name}")
        if not slider.is_visible():
            self.page.get_by_role("button", name="设置 · Settings").click()
        slider.wait_for()
        for _ in range(20):  # the page may put the old value back while it unfolds
            slider.fill(value)
            slider.blur()
            time.sleep(0.2)
            if slider.input_value() == value:
                break

    def press(self, label: str):
        self.page.get_by_label(label, exact=True).last.click()


@pytest.fixture
def open_tab(browser):
    tabs = []

    def open(url, **options):
        tabs.append(Tab(browser, url, **options))
        return tabs[-1]

    yield open
    for tab in tabs:
        assert all(request.startswith((tab.url, "data:", "blob:")) for request in tab.requests)  # none from outside
        tab.context.close()


def until(condition, seconds: float = 10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_dialogue_with_the_small_model(open_tab):
    """What `stream_chat` answers, round after round, in Chinese and English."""
    tokenizer = AutoTokenizer.from_pretrained(STORED, trust_remote_code=True)
    model = AutoModel.from_pretrained(STORED, trust_remote_code=True).float().eval()
    page, url = serve(model, tokenizer, temperature=0, name=f"tiny · {model_format(model)}, {model_size(model)}")
    try:
        tab = open_tab(url, viewport={"width": 1000, "height": 900}, device_scale_factor=2)
        history, cache = [], None
        for query in ["你好", "Who are you?", "Thank you!"]:
            tab.ask(query)
            # With a cache too: the ids of earlier answers are those that were generated, which may differ from encoding them.
            options = {"do_sample": False, "past_key_values": cache, "return_past_key_values": True}
            *_, (_, history, cache) = model.stream_chat(tokenizer, query, history, **options)
        assert tab.texts() == [" ".join(response.split()) for _, response in history]
        assert tab.texts("user") == [query for query, _ in history]
        if "WEB_CHAT_SCREENSHOT" in os.environ:
            tab.page.mouse.move(0, 0)
            time.sleep(1)
            tab.page.screenshot(path=os.environ["WEB_CHAT_SCREENSHOT"])
    finally:
        page.close(verbose=False)


def test_streams_and_stops(scripted, open_tab):
    model, url = scripted
    model.text, model.pause = "word " * 1000, 0.05
    tab = open_tab(url)
    tab.ask("Tell me", wait=False)
    tab.answers().wait_for()
    first = len(tab.texts()[0])
    until(lambda: len(tab.texts()[0]) > first)  # it grows
    tab.page.locator(".stop-button").click()
    until(lambda: model.ended == ["closed"])
    tab.wait_for_end()
    shown = tab.texts()[0]
    assert 0 < len(shown) < 1000
    model.text, model.pause = "", 0  # the dialogue goes on from what was said
    tab.ask("Go on")
    query, history = model.asked[-1]
    assert query == "Go on" and [pair[0] for pair in history] == ["Tell me"] and history[0][1].startswith("word word")


def test_regenerate_edit_undo_clear_reload(scripted, open_tab):
    model, url = scripted
    tab = open_tab(url)
    tab.ask("one")
    tab.ask("two")
    assert model.options[0]["cache"] is None and model.options[1]["cache"] == "cache of one"
    rounds = [("one", "Answer 1 to one."), ("two", "Answer 2 to two.")]
    assert model.asked[1] == ("two", rounds[:1])
    tab.press("Retry")
    until(lambda: tab.texts() == ["Answer 1 to one.", "Answer 3 to two."])
    assert model.asked[2] == ("two", rounds[:1])
    tab.wait_for_end()
    tab.page.get_by_label("Edit", exact=True).first.click()
    tab.page.locator("[data-testid=user] textarea, .message textarea").first.fill("uno")
    tab.press("Submit")
    until(lambda: tab.texts() == ["Answer 4 to uno."])
    assert model.asked[3] == ("uno", [])
    tab.wait_for_end()
    tab.press("Clear")
    until(lambda: tab.texts() == [])
    tab.ask("three")
    assert model.asked[4] == ("three", [])
    tab.wait_for_end()
    tab.page.reload()  # which keeps the dialogue
    tab.input.wait_for()
    until(lambda: tab.texts() == ["Answer 5 to three."])
    tab.ask("four")
    assert model.asked[5] == ("four", [("three", "Answer 5 to three.")])


def test_users_have_their_own_dialogues(scripted, open_tab):
    """Two are answered at the same time, a third waits; none sees another's dialogue or cache."""
    model, url = scripted
    model.pause = 0.3
    tabs = [open_tab(url) for _ in range(3)]
    for i, tab in enumerate(tabs):
        tab.ask(f"I am {i} " + "and so on", wait=False)
    most = 0
    while len(model.ended) < 3:
        most = max(most, model.running)
        time.sleep(0.02)
    assert most == 2
    model.pause = 0
    for i, tab in enumerate(tabs):
        tab.wait_for_end()
        tab.ask("again")
        query, history = model.asked[-1]
        assert [pair[0] for pair in history] == [f"I am {i} and so on"]
        assert model.options[-1]["cache"] == f"cache of I am {i} and so on"


def test_closing_the_tab_ends_the_generation(scripted, open_tab):
    model, url = scripted
    model.text, model.pause = "word " * 1000, 0.05
    tab = open_tab(url)
    tab.ask("Tell me", wait=False)
    tab.answers().wait_for()
    tab.page.close()
    until(lambda: model.ended == ["closed"], 20)


def test_sliders(scripted, open_tab):
    """They have the first-party page's names, ranges and defaults, and what they say is what is done."""
    model, url = scripted
    tab = open_tab(url)
    tab.ask("one")
    assert model.options[0] == {"max_length": 8192, "top_p": 0.8, "temperature": 0.95, "cache": None}
    for name, value in [("max_length", "32768"), ("top_p", "0"), ("temperature", "0.5")]:
        tab.set_slider(name, value)
    assert tab.page.get_by_label("number input for max_length").get_attribute("max") == "32768"  # the context
    tab.ask("two")
    assert model.options[1] == {"max_length": 32768, "top_p": 0.01, "temperature": 0.5, "cache": "cache of one"}


def test_markdown_code_and_formulas(scripted, open_tab):
    model, url = scripted
    model.text = (
        "# 标题\n\n| a | b |\n|---|---|\n| 中文 | 1 |\n\n```python\nprint('<b>')\n```\n\n$$E = mc^2$$ and \\(x_1\\)\n\n"
        "<script>document.title = 'taken'</script> vector<int> a < b"
    )
    tab = open_tab(url)
    tab.ask("<img src=x onerror=\"document.title='taken'\"> 问")
    answer = tab.answers().first
    assert answer.locator("h1").inner_text() == "标题" and answer.locator("td").first.inner_text() == "中文"
    assert "print('<b>')" in answer.locator("pre code").inner_text()
    playwright.expect(answer.locator(".katex")).to_have_count(2)
    assert "vector<int> a < b" in answer.inner_text()
    assert tab.page.title() == "ChatGLM2"


@pytest.mark.parametrize(
    "locale, words",
    [("zh-CN", "问题有 8192 个 token，最多 8191 个"), ("en-US", "is 8192 tokens long; at most 8191 fit")],
)
def test_question_that_is_too_long_stays_in_the_input(scripted, open_tab, locale, words):
    """With a message in the language of the browser. Once max_length is raised, it is answered."""
    model, url = scripted
    tab = open_tab(url, locale=locale)
    model.text, question = "Yes.", " ".join(["w"] * 8192)
    tab.ask(question, wait=False)
    tab.page.get_by_text(words).wait_for(timeout=20_000)
    assert tab.input.input_value() == question and tab.texts("user") == [] and model.asked == []
    tab.set_slider("max_length", "9000")
    tab.ask(question)
    assert model.asked == [(question, [])]


@pytest.mark.parametrize(
    "locale, edit, submit, words",
    [
        ("zh-CN", "编辑", "发送", "问题有 8192 个 token，最多 8191 个"),
        ("en-US", "Edit", "Submit", "is 8192 tokens long; at most 8191 fit"),
    ],
)
def test_edited_question_that_is_too_long(scripted, open_tab, locale, edit, submit, words):
    """It is refused with the page's own message too, and the page goes on."""
    model, url = scripted
    tab = open_tab(url, locale=locale)
    tab.ask("one")
    tab.page.get_by_label(edit, exact=True).first.click()
    tab.page.locator("[data-testid=user] textarea, .message textarea").first.fill(" ".join(["w"] * 8192))
    tab.press(submit)
    tab.page.get_by_text(words).wait_for(timeout=20_000)
    assert len(model.asked) == 1
    tab.wait_for_end()
    tab.ask("two", wait=False)
    until(lambda: len(model.asked) == 2)
    assert model.asked[1] == ("two", [])


def test_page_says_what_it_is(scripted, open_tab):
    """The model, the speed of an answer, the browser's language and names for screen readers; lines are not too wide."""
    model, url = scripted
    model.text, model.pause = "word " * 200, 0.005
    tab = open_tab(url, locale="de-DE", viewport={"width": 1600, "height": 900})
    tab.page.get_by_text("scripted · INT4, 3.9 GB").wait_for()
    tab.ask("one")
    playwright.expect(tab.page.locator(".prose.status")).to_have_text(re.compile(r"^\s*\d+\.\d tokens/s\s*$"))
    assert tab.page.evaluate("document.documentElement.lang") == "de-DE"
    assert tab.page.get_by_label("问题 · Question").count() == 1 and tab.page.get_by_label("发送 · Send").count() == 1
    assert tab.answers().first.bounding_box()["width"] <= 820


def test_export(scripted, open_tab):
    model, url = scripted
    tab = open_tab(url)
    tab.ask("one")
    with tab.page.expect_download() as download:
        tab.page.get_by_text("Export").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text == "**用户 · User**\n\none\n\n**ChatGLM2**\n\nAnswer 1 to one.\n"


# Without a browser


def test_rounds():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert web_chat.to_rounds(messages) == [("a", "b")]
    assert web_chat.to_rounds([{"role": "assistant", "content": "greeting"}]) == []


def test_bad_options(monkeypatch, capsys):
    def fails(*args):
        monkeypatch.setattr(sys, "argv", ["web_chat", *args])
        with pytest.raises(SystemExit) as exit:
            web_chat.main()
        return str(exit.value) if exit.value.code != 2 else capsys.readouterr().err

    with listen("127.0.0.1", 0) as taken:
        assert "Address already in use" in fails("--port", str(taken.getsockname()[1]))
    assert "There is no folder ./nothing" in fails("--port", "0", "--model", "./nothing")
    assert "at least 1" in fails("--users", "0")
