"""What the documentation site has beside ``docs/``: a hook of mkdocs, and an extension of griffe, which reads docstrings.

``make docs`` uses both (``mkdocs.yml``). The hook makes the pages of commands, config keys and notebooks at build time, and
leads links to files outside ``docs/`` to pages or copies of them. The extension makes references in docstrings links, and
shows the registries' contracts.
"""

import argparse
import ast
import base64
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "projects/SAMDETR/samdetr"
# Files outside docs/ that are pages of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    f"{PACKAGE}/cli/__init__.py": "commands.md",
    f"{PACKAGE}/config.py": "keys.md",
}


def on_files(files, config):
    """Add the pages that are made at build time. mkdocs calls this."""
    made = {"commands.md": commands_page(), "keys.md": keys_page()}
    made |= {PAGES[name]: (ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for notebook in sorted((ROOT / "docs").rglob("*.ipynb")):
        made |= notebook_page(notebook, notebook.relative_to(ROOT / "docs").as_posix())
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead the links of a page to where their targets are on the site. mkdocs calls this."""
    sources = {site: source for source, site in PAGES.items()}
    folder = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def on_the_site(link: re.Match) -> str:
        path = os.path.normpath(folder / link[1])
        if path in PAGES:
            target = PAGES[path]
        elif path.startswith("docs/"):
            target = re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
        elif (ROOT / path).is_file() and not path.endswith(".md"):  # of a page that is missing here, mkdocs complains
            target = f"repository/{path}"
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        else:
            return link[0]
        return f"]({os.path.relpath(target, os.path.dirname(page.file.src_uri) or '.')}{link[2]})"

    return re.sub(r"\]\(([^)#:\s]+)((?:#[^)]*)?)\)", on_the_site, markdown)


def table(header: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns in Markdown."""
    return "\n".join([header, "| --- | --- |", *(f"| {left} | {right} |" for left, right in rows)])


def commands_page() -> str:
    """Return the page of all commands, made from their parsers."""
    from samdetr.cli import COMMANDS, make_parser

    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = ["# Commands", "What `samdetr COMMAND --help` prints, for every command. They work from any directory."]
    parts.append(
        table("| command | |", ((f"[`samdetr {name}`](#samdetr-{name})", COMMANDS[name]) for name in COMMANDS))
    )
    for name, command in commands.choices.items():
        options = (describe_option(action) for action in command._actions if action.dest != "help")
        parts += [f"## samdetr {name}", inspect.cleandoc(command.description), table("| option | |", options)]
    return "\n\n".join(parts)


def describe_option(action: argparse.Action) -> tuple[str, str]:
    """Return how an option is written, and what it does."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    words = [", ".join(action.option_strings)]
    if action.nargs != 0:
        words.append(" ".join(value) if isinstance(value, tuple) else value)
    if action.nargs == "+":
        words.append("...")
    text = (action.help or "") % vars(action)
    if action.option_strings and action.required:
        text += " (required)"
    elif action.option_strings and action.nargs != 0 and action.default not in (None, "") and "default" not in text:
        default = " ".join(map(str, action.default)) if isinstance(action.default, tuple | list) else action.default
        text += f" (default: {default})"
    return f"`{' '.join(filter(None, words))}`", text.strip().replace("|", "\\|")


def read_keys(source: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every comment of ``add_samdetr_config`` with the keys that it explains, from the source of config.py.

    A comment explains the keys below it, up to the next comment or empty line.
    """
    nodes = {"cfg": ""}
    comment: list[str] = []
    keys: list[str] = []
    for line in [*source[source.index("\ndef add_samdetr_config") :].splitlines(), ""]:
        line = line.strip()
        if keys and (not line or line.startswith("#")):
            yield " ".join(comment), keys
            comment, keys = [], []
        if line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif node := re.match(r"(\w+) = cfg\.([\w.]+) = CfgNode\(\)", line):
            nodes[node[1]] = f"{node[2]}."
        elif (key := re.match(r"(\w+)\.([\w.]+) = (?!CfgNode)", line)) and key[1] in nodes:
            keys.append(nodes[key[1]] + key[2])


def keys_page() -> str:
    """Return the page of all config keys, made from config.py's comments, the defaults, and limits.py."""
    from samdetr import limits, load_config

    defaults = load_config(None)
    ranges = {**limits.SET_DETECTOR_RANGES, **limits.COMMON_RANGES, **limits.TRAINING_RANGES}
    choices = {**limits.COMMON_CHOICES, **limits.RUN_CHOICES}
    sections: dict[str, list[str]] = {}
    for comment, keys in read_keys((ROOT / PACKAGE / "config.py").read_text("utf-8")):
        lines = sections.setdefault(section_of(keys[0]), [])
        for key in keys:
            allowed = f", {ranges[key]}" if key in ranges else ""
            allowed += ", or ".join(
                ["", *(f"`{c!r}`" for c in choices.get(key, ()) if c != limits.value_of(defaults, key))]
            )
            lines.append(f"`{key}`{{#{key}}} = `{limits.value_of(defaults, key)!r}`{allowed}")
        lines.append(":   " + re.sub(r"([*_<])", r"\\\1", comment) + "\n")
    text = (
        "Keys that this project adds to [detectron2's](https://detectron2.readthedocs.io/en/latest/modules/config.html), each "
        "with its default and what else it may be."
    )
    return "\n".join(
        ["# Config keys", text, *(line for name in sections for line in (f"\n## {name}\n", *sections[name]))]
    )


def section_of(key: str) -> str:
    """Return the node whose keys stand in one section, such as "MODEL.SAMDETR"."""
    parts = key.split(".")
    return ".".join(parts[: 2 if parts[0] == "MODEL" else 1])


def notebook_page(path: Path, name: str) -> dict[str, str | bytes]:
    """Return a notebook as a page in Markdown, and the pictures in its outputs, by their names on the site."""
    made: dict[str, str | bytes] = {}
    base = name.removesuffix(".ipynb")
    download = os.path.basename(name)
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            kind = next(kind for kind in ("image/jpeg", "image/png", "text/plain") if kind in data)
            if kind == "text/plain":
                parts.append(f"```text\n{''.join(data[kind]).rstrip()}\n```")
            else:
                picture = f"{base}-{len(made) + 1}.{kind.removeprefix('image/')}"
                made[picture] = base64.b64decode("".join(data[kind]))
                parts.append(f"![output]({os.path.basename(picture)})")
    parts.insert(1, f'(The notebook itself: <a href="{download}" download>{download}</a>.)')
    return {**made, f"{base}.md": "\n\n".join(parts)}


class ReadableDocstrings(griffe.Extension):
    """Make Sphinx's references in docstrings links, and give registries the docstrings that are assigned to them."""

    def on_module_members(self, *, node, mod, agent, **kwargs) -> None:
        for statement in getattr(node, "body", ()):
            match statement:
                case ast.Assign(
                    targets=[ast.Attribute(value=ast.Name(id=name), attr="__doc__")], value=ast.Constant(value=text)
                ):
                    mod.members[name].docstring = griffe.Docstring(inspect.cleandoc(text), parent=mod.members[name])

    def on_object(self, *, obj, loader, **kwargs) -> None:
        if obj.docstring:
            pattern = r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`"
            text = re.sub(pattern, lambda match: reference(obj, match[1]), obj.docstring.value)
            # griffe takes the second of two attributes that are described together for the type of the first.
            obj.docstring.value = re.sub(r"^(\s+\w+), (?=\w+: )", "\\1,\N{NO-BREAK SPACE}", text, flags=re.MULTILINE)


def reference(obj: griffe.Object, name: str) -> str:
    """Return a link to what ``name`` is in the scope of ``obj``; plain code if the site does not show it."""
    first, *rest = name.split(".")
    try:
        path = ".".join([obj.resolve(first), *rest])
    except griffe.NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
