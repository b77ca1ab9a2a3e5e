"""
Writes docs/arguments.md from the docstrings:

    python -m docs.arguments
"""

import ast
import json
import re
import textwrap
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/arguments.md"
HEAD = """\
# Arguments

Look up the arguments of the methods and classes that users call. This page is made from the docstrings:

```shell
source .venv/bin/activate
python -m docs.arguments     # writes this page
```
"""
# Heading, file, class and method (None: the class itself)
SHOWN = [
    ("model.chat", "generation_chatglm.py", "ChatGLMGenerationMixin", "chat"),
    ("model.stream_chat", "generation_chatglm.py", "ChatGLMGenerationMixin", "stream_chat"),
    ("model.stream_generate", "generation_chatglm.py", "ChatGLMGenerationMixin", "stream_generate"),
    ("model.quantize", "loading_chatglm.py", None, "quantize"),
    ("quantization_config", "quantization.py", "ChatGLMQuantizationConfig", None),
    ("tokenizer", "tokenization_chatglm.py", "ChatGLMTokenizer", None),
    ("tokenizer.build_prompt", "tokenization_chatglm.py", "ChatGLMTokenizer", "build_prompt"),
    ("tokenizer.apply_chat_template", "tokenization_chatglm.py", "ChatGLMTokenizer", "apply_chat_template"),
    ("tokenizer.decode", "tokenization_chatglm.py", "ChatGLMTokenizer", "decode"),
    ("config", "configuration_chatglm.py", "ChatGLMConfig", None),
]


def find(tree: ast.AST, cls: str | None, method: str | None) -> ast.AST:
    """Returns the definition of a class, or of a method (of any class if `cls` is None)."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and (cls is None or n.name == cls)]
    if method is None:
        return nodes[0]
    return next(n for node in nodes for n in node.body if isinstance(n, ast.FunctionDef) and n.name == method)


def section(title: str, node: ast.AST, published: dict) -> str:
    """Returns the Markdown of one docstring: text, a table of the arguments, what is returned and raised."""
    defaults = {}
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.value is not None]
        defaults = {field.target.id: ast.unparse(field.value) for field in fields}
    text = ast.get_docstring(node).partition("\nExample:\n")[0]
    parts = re.split(r"^(Args|Returns|Raises):\n", text, flags=re.M)
    lines = [f"## {title}", "", parts[0].strip()]
    for name, text in zip(parts[1::2], parts[2::2]):
        # What follows without indentation is about the class again.
        text, _, rest = re.sub(r"\n(?=\S)", "\0", text, count=1).partition("\0")
        text = textwrap.dedent(text).strip()
        if name == "Args":
            lines += ["", *table(text, defaults, published)]
        elif name == "Raises":
            lines += ["", "Errors:", "", *("- " + " ".join(e.split()) for e in re.split(r"\n(?=\S)", text))]
        elif name == "Returns":
            lines += ["", f"Returns: {' '.join(text.split())}"]
        lines += ["", rest.strip()] if rest.strip() else []
    return "\n".join(lines) + "\n"


def table(text: str, defaults: dict, published: dict) -> list[str]:
    """Returns the rows for `name, name (type): meaning`; of a configuration with the defaults and ChatGLM2-6B's values."""
    header = ["argument", "type", *(["default", "ChatGLM2-6B"] if defaults else []), "meaning"]
    rows = [header, ["---"] * len(header)]
    for entry in re.split(r"\n(?=\S)", text):
        names, kind, meaning = re.fullmatch(r"([\w, ]+?)(?: \((.*?)\))?: (.*)", entry, flags=re.S).groups()
        names = names.split(", ")
        values = [", ".join(dict.fromkeys(f"`{defaults[name]}`" for name in names))] if defaults else []
        if defaults:
            values += [", ".join(dict.fromkeys(f"`{published[name]}`" for name in names if name in published))]
        named = ", ".join(f"`{name}`" for name in names)
        rows.append([named, kind or "", *values, " ".join(meaning.split())])
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]


def page() -> str:
    published = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    sections = []
    for title, file, cls, method in SHOWN:
        node = find(ast.parse((ROOT / file).read_text(encoding="utf-8")), cls, method)
        sections.append(section(title, node, published))
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
