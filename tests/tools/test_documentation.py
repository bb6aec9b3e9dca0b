"""What the documentation site makes by itself: pages of commands, keys and notebooks, links, readable docstrings."""

import json
import re
from types import SimpleNamespace

import pytest
from detectron2.config import get_cfg

import samdetr
from samdetr.cli import COMMANDS
from samdetr.config import _all_keys

documentation = pytest.importorskip("documentation", reason="the site needs: pip install samdetr[docs]")
griffe = documentation.griffe


def leaves(cfg):
    keys = _all_keys(cfg)
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def test_every_key_of_this_project_has_an_entry_with_default_values_and_meaning():
    own = leaves(samdetr.load_config(None)) - leaves(get_cfg())
    entries = re.findall(r"((?:^`[A-Z].*\n)+):   (.+)\n", documentation.keys_page(), flags=re.MULTILINE)
    keys = {
        key: (line, meaning)
        for lines, meaning in entries
        for line in lines.splitlines()
        for key in [line.split("`")[1]]
    }
    assert set(keys) >= own and "MODEL.SAMDETR.ALIGNER.POOLED_SIZE" in own
    line, meaning = keys["MODEL.SAMDETR.QUERY_GENERATOR.DN_BOX_NOISE"]
    assert line.endswith("= `0.4`, at least 0 and at most 1") and meaning.startswith("DN only. Centres move by up to")
    assert keys["SOLVER.NON_FINITE"][0].endswith("= `'stop'`, or `'skip'`")
    assert keys["MODEL.SAMDETR.HIDDEN_DIM"][1] == keys["MODEL.SAMDETR.NUM_HEADS"][1]
    assert "DECAY \\*\\* n times" in keys["SOLVER.EMA.DECAY"][1]


def test_comments_belong_to_the_keys_below_them():
    source = """
def add_samdetr_config(cfg):
    node = cfg.MODEL.SAMDETR = CfgNode()
    # Of both,
    # in two lines.
    node.A = 1
    node.B = (2,
        3)

    cfg.TEST.ALONE = "x"
    # Of a node's keys.
    node.INNER = CfgNode()
    node.INNER.C = 4
    # Of one.
    cfg.D.E = 5
"""
    assert list(documentation.read_keys(source)) == [
        ("Of both, in two lines.", ["MODEL.SAMDETR.A", "MODEL.SAMDETR.B"]),
        ("", ["TEST.ALONE"]),
        ("Of a node's keys.", ["MODEL.SAMDETR.INNER.C"]),
        ("Of one.", ["D.E"]),
    ]


def test_every_command_has_its_text_and_options():
    page = documentation.commands_page()
    sections = dict(re.findall(r"^## samdetr ([\w-]+)\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMANDS)
    assert "\n    samdetr train --config-file my.yaml --resume\n" in sections["train"]
    assert (
        "| `--weights WEIGHTS` | checkpoint; one of this project needs nothing else (required) |"
        in sections["attention"]
    )
    assert (
        "| `--size HEIGHT WIDTH` | to trace with (default: 480 640) |" in sections["export"]
        and "`--input PATH ...`" in sections["predict"]
    )
    assert (
        "| `--num-gpus NUM_GPUS` | GPUs per machine; processes, with MODEL.DEVICE cpu (default: 1) |"
        in sections["train"]
    )
    assert "| `--no-images` | do not read the image files |" in sections["check"]


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("models.md", "[x](training.md#evaluation)", "[x](training.md#evaluation)"),
        ("models.md", "[x](../CONTRIBUTING.md)", "[x](contributing.md)"),
        ("api/model.md", "[x](../../CONTRIBUTING.md#rules)", "[x](../contributing.md#rules)"),
        ("models.md", "[x](../projects/SAMDETR/samdetr/config.py)", "[x](keys.md)"),
        ("index.md", "[x](notebooks/digits.ipynb)", "[x](notebooks/digits.md)"),
        ("results.md", "![x](../setup.py)", "![x](repository/setup.py)"),
        ("contributing.md", "[x](docs/data.md)", "[x](data.md)"),
        ("models.md", "[x](https://a.example/b) [y](#here) a[0](b)", "[x](https://a.example/b) [y](#here) a[0](b)"),
        ("models.md", "[x](../nowhere.py) [y](../README.md)", "[x](../nowhere.py) [y](../README.md)"),
    ],
)
def test_links_lead_to_pages_or_to_copies(page, link, expected):
    from mkdocs.structure.files import Files

    config = SimpleNamespace(site_dir="site", use_directory_urls=False, plugins=SimpleNamespace(_current_plugin=None))
    files = Files([])
    at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert documentation.on_page_markdown(link, at, config, files) == expected
    copied = re.findall(r"repository/([\w./]+)", expected)
    assert [file.src_uri for file in files] == [f"repository/{name}" for name in copied]


def test_a_notebook_becomes_a_page_and_its_pictures(tmp_path):
    picture = {"output_type": "display_data", "data": {"image/jpeg": "/9j/", "text/plain": "<Image>"}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": ["a = 1\n", "print(a)"], "outputs": [{"text": ["1\n"]}, picture]},
    ]
    (tmp_path / "one.ipynb").write_text(json.dumps({"cells": cells}))
    made = documentation.notebook_page(tmp_path / "one.ipynb", "notebooks/one.ipynb")
    assert made["notebooks/one-1.jpeg"] == b"\xff\xd8\xff"
    title, download, code, printed, shown = made["notebooks/one.md"].split("\n\n")
    assert title == "# Title" and 'href="one.ipynb"' in download
    assert code == "```python\na = 1\nprint(a)\n```" and printed == "```text\n1\n```"
    assert shown == "![output](one-1.jpeg)"


def test_references_in_docstrings_become_links_and_registries_get_their_contracts():
    code = '''
from other import Thing
REGISTRY = Registry("X")
REGISTRY.__doc__ = """
Names :class:`Thing`.
"""
class A:
    def f(self):
        """See :meth:`g`, :func:`samdetr.load` and :data:`~unknown.B`."""
    def g(self):
        """Do.

        Attributes:
            one, two: (N,) int.
        """
'''
    with griffe.temporary_visited_module(
        code, module_name="m", extensions=griffe.load_extensions(documentation.ReadableDocstrings)
    ) as module:
        for obj in (module["REGISTRY"], module["A.f"], module["A.g"]):
            documentation.ReadableDocstrings().on_object(obj=obj, loader=None)
        assert module["REGISTRY"].docstring.value == (
            'Names <autoref identifier="other.Thing" optional><code>Thing</code></autoref>.'
        )
        links = re.findall(r'identifier="([\w.]+)"[^>]*><code>([\w.]+)<', module["A.f"].docstring.value)
        assert links == [("m.A.g", "g"), ("samdetr.load", "samdetr.load"), ("unknown.B", "unknown.B")]
        (attributes,) = griffe.parse_google(module["A.g"].docstring)[1].value
        assert attributes.name == "one,\N{NO-BREAK SPACE}two" and attributes.description == "(N,) int."
