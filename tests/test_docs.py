"""The pages themselves: what they show as a config loads, their tables are tables, their links lead somewhere.

And the site that is made of them, and the notebook.
"""

import base64
import io
import json
import re
import shlex
import textwrap

import pytest
from PIL import Image

import samdetr
import samdetr.analysis
import samdetr.converters
import samdetr.visualization
from helpers import ROOT
from samdetr import load_config
from samdetr.about import DETECTRON2
from samdetr.cli import make_parser

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOTEBOOK = ROOT / "docs" / "notebooks" / "digits.ipynb"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site by their paths, built so that any warning fails."""
    pytest.importorskip("material", reason="the site needs: pip install samdetr[docs]")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs: pip install samdetr[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def shown_config(page, tmp_path, number=0):
    """A config that a page shows."""
    blocks = re.findall(r"^    _BASE_:.*?\n\n", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "my.yaml").write_text(textwrap.dedent(blocks[number]))
    return load_config(tmp_path / "my.yaml")


def test_the_config_that_starts_from_cocos_weights_loads(tmp_path):
    cfg = shown_config("docs/fine_tuning.md", tmp_path, number=1)
    assert cfg.DATASETS.TRAIN == ("my_train",) == (cfg.DATASETS.COCO_FORMAT[0][0],)
    assert 0 < cfg.SOLVER.STEPS[0] < cfg.SOLVER.MAX_ITER


def test_the_config_of_another_backbone_loads(tmp_path):
    cfg = shown_config("docs/models.md", tmp_path)
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_backbone" and len(cfg.MODEL.SAMDETR.IN_FEATURES) == 3
    assert cfg.MODEL.SAMDETR.ENCODER.NAME == "DeformableTransformerEncoder"


@pytest.mark.parametrize("page", ["README.md", "docs/fine_tuning.md", "docs/index.md"])
def test_the_config_for_small_data_sets_loads(page, tmp_path):
    cfg = shown_config(page, tmp_path)
    assert cfg.DATASETS.TRAIN == ("mine_train",) == ((cfg.DATASETS.YOLO_FORMAT or cfg.DATASETS.COCO_FORMAT)[0][0],)
    assert cfg.SOLVER.EPOCHS > 0 < cfg.SOLVER.PATIENCE and cfg.MODEL.TIMM.WEIGHTS


def test_the_start_page_shows_commands_that_are_understood():
    text = (ROOT / "docs" / "index.md").read_text()
    examples = [shlex.split(line, comments=True) for line in re.findall(r"^    samdetr (.*)", text, flags=re.MULTILINE)]
    assert {example[0] for example in examples} == {
        "train",
        "evaluate",
        "predict",
        "attention",
        "report",
        "export",
        "check",
    }
    for example in examples:
        assert make_parser().parse_args(example).main
    assert DETECTRON2 in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_equally_many_cells_in_every_row_and_links_lead_somewhere(page):
    text = page.read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, delimiter, *rows = (re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines())
        assert header == delimiter, table.splitlines()[0]
        assert all(row <= header for row in rows), table.splitlines()[0]
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_every_public_name_has_an_entry_on_the_site(site):
    shown = set(re.findall(r'id="(samdetr[\w.]*)"', "".join(site.values())))
    assert {f"samdetr.{name}" for name in samdetr.__all__} <= shown
    parts = (samdetr.data, samdetr.checkpoint, samdetr.analysis, samdetr.converters, samdetr.visualization)
    assert {f"{part.__name__}.{name}" for part in parts for name in part.__all__} <= shown
    contract = site["api/model.html"].split('id="samdetr.ENCODER_REGISTRY"')[1].split("<h3")[0]
    assert "An unpadded pixel must not depend on padded ones." in contract


@pytest.mark.slow
def test_every_page_of_the_repository_is_on_the_site_and_nothing_of_it_comes_from_elsewhere(site):
    own = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in PAGES if "docs" in path.parts}
    assert {*own, "commands.html", "keys.html", "changelog.html", "contributing.html", "notebooks/digits.html"} <= set(
        site
    )
    for name, text in site.items():
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', text), name
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//', text), name
    assert site["notebooks/digits.html"].count("<img") >= 4
    assert 'id="MODEL.SAMDETR.NUM_QUERIES"' in site["keys.html"]


def test_the_stored_notebook_is_small_and_without_errors():
    assert NOTEBOOK.stat().st_size < 400_000
    outputs = [output for cell in json.loads(NOTEBOOK.read_text())["cells"] for output in cell.get("outputs", ())]
    assert sum(key.startswith("image/") for output in outputs for key in output.get("data", ())) == 4
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


@pytest.mark.slow
@pytest.mark.thorough
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="running a notebook needs: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="running a notebook needs: pip install nbclient ipykernel")
    pytest.importorskip("sklearn")
    import nbformat

    monkeypatch.setenv("SAMDETR_NOTEBOOK_STEPS", "4")
    options = r"(\"DATASETS.TEST\", (\"digits_val_20\",), \"OUTPUT_DIR\""
    text = NOTEBOOK.read_text().replace(r"(\"OUTPUT_DIR\"", options)
    assert options in text
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(output.data[kind])))
        for output in outputs
        for kind in ("image/png", "image/jpeg")
        if kind in output.get("data", {})
    ]
    # Curves, pairs of drawings, layers and heads of attention, one head.
    assert len(pictures) == 4 and all(len(set(picture.convert("L").getdata())) > 50 for picture in pictures)
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.search(r"box AP after 4 steps: \d+\.\d", printed)
    assert (tmp_path / "output" / "notebook" / "model_final.pth").exists()
