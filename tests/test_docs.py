"""The pages themselves: what they show as a config loads, their tables are tables, their links lead somewhere."""

import re
import textwrap

import pytest

from helpers import ROOT
from samdetr import load_config

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def shown_config(page, tmp_path):
    """The config for data of one's own that a page shows."""
    block = re.search(r"^    _BASE_:.*?\n\n", page.read_text(), flags=re.MULTILINE | re.DOTALL).group()
    (tmp_path / "my.yaml").write_text(textwrap.dedent(block))
    return load_config(tmp_path / "my.yaml")


def test_the_readmes_config_for_own_data_loads(tmp_path):
    cfg = shown_config(ROOT / "README.md", tmp_path)
    assert cfg.DATASETS.TRAIN == ("my_train",) == (cfg.DATASETS.COCO_FORMAT[0][0],)
    assert 0 < cfg.SOLVER.STEPS[0] < cfg.SOLVER.MAX_ITER


def test_the_config_for_small_data_sets_loads(tmp_path):
    cfg = shown_config(ROOT / "docs" / "fine_tuning.md", tmp_path)
    assert cfg.DATASETS.TRAIN == ("mine_train",) == (cfg.DATASETS.YOLO_FORMAT[0][0],)
    assert cfg.SOLVER.EPOCHS > 0 < cfg.SOLVER.PATIENCE and cfg.MODEL.TIMM.WEIGHTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_equally_many_cells_in_every_row_and_links_lead_somewhere(page):
    text = page.read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, delimiter, *rows = (re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines())
        assert header == delimiter, table.splitlines()[0]
        assert all(row <= header for row in rows), table.splitlines()[0]
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
