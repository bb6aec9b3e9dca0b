"""The config keys and the shipped YAML files."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_config, make_input
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import samdetr

FAMILIES = [
    *("sam_detr_R_50", "sam_detr_smca_R_50"),
    *("sam_detr_R_50_DC5", "sam_detr_smca_R_50_DC5", "sam_detr_dn_R_50_DC5", "sam_detr_smca_dn_R_50_DC5"),
    *("sam_detr_pp_R_50", "sam_detr_pp_smca_R_50", "sam_detr_pp_smca_dn_R_50"),
]
COCO_CONFIGS = [f"{family}_{schedule}" for family in FAMILIES for schedule in ("1x", "50ep")]


def test_every_config_is_known():
    found = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    others = {"Base-SAMDETR", "Base-SAMDETR-DC5", "Base-SAMDETR-pp", "sam_detr_digits", "sam_detr_pp_digits"}
    assert found == set(COCO_CONFIGS) | others


@pytest.mark.parametrize("name", COCO_CONFIGS)
def test_schedule_and_architecture_follow_from_the_name(name):
    cfg = load_config(name)
    node = cfg.MODEL.SAMDETR
    images = cfg.SOLVER.IMS_PER_BATCH
    assert images == (8 if "DC5" in name else 16)
    epochs = 50 if "50ep" in name else 12
    assert cfg.SOLVER.MAX_ITER * images / 118287 == pytest.approx(epochs, rel=0.02)
    assert cfg.SOLVER.STEPS[0] * images / 118287 == pytest.approx(40 if epochs == 50 else 10, rel=0.02)
    assert cfg.TEST.EVAL_PERIOD * images / 118287 == pytest.approx(1, rel=0.02)
    assert (node.CROSS_ATTENTION.NAME == "SMCACrossAttention") == ("smca" in name)
    assert (node.QUERY_GENERATOR.NAME == "DenoisingQueryGenerator") == ("_dn_" in name)
    assert (len(node.IN_FEATURES) == 3) == ("_pp_" in name)
    assert (node.PROJECTION_NUM_GROUPS == 0) == (epochs == 50 and "_pp_" not in name)
    assert f"output/{name}" == cfg.OUTPUT_DIR


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_leaves_hold_only_differences(path):
    """No leaf repeats a value that it would inherit anyway."""
    content = yaml.safe_load(path.read_text())
    if "_BASE_" not in content:
        return
    base = get_cfg()
    samdetr.add_samdetr_config(base)
    base.merge_from_file(str(path.parent / content.pop("_BASE_")))

    def check(node, inherited, key):
        for name, value in node.items():
            if isinstance(value, dict):
                check(value, inherited[name], f"{key}{name}.")
            else:
                if isinstance(inherited[name], tuple):
                    value = tuple(yaml.safe_load(value.replace("(", "[").replace(",)", "]").replace(")", "]")))
                assert value != inherited[name], f"{path.name} repeats {key}{name}"

    check(content, base, "")


def test_every_key_is_read_by_the_code():
    """A key that nothing reads would lie."""
    source = "".join(
        path.read_text() for path in (ROOT / "projects").rglob("*.py") if path.name not in ("config.py", "checks.py")
    )

    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    for key in leaves(cfg.MODEL.SAMDETR):
        assert re.search(rf"\b{re.escape(key)}\b", source), key


def test_the_defaults_are_commented():
    lines = inspect.getsource(samdetr.add_samdetr_config).splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\s+(node|cfg)\.[\w.]+ = (?!CN)", line):
            above = next(previous for previous in reversed(lines[:i]) if " = " not in previous)
            assert above.strip().startswith("#"), line


TRAINABLE = {"R_50": 58.05e6, "DC5": 58.05e6, "pp": 54.95e6}


@pytest.mark.slow
@pytest.mark.parametrize("name", COCO_CONFIGS)
def test_every_coco_config_builds_trains_and_evaluates(name):
    from samdetr.solver import build_optimizer

    cfg = load_config(name)
    model = build_model(cfg)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = TRAINABLE["pp" if "_pp_" in name else "DC5" if "DC5" in name else "R_50"]
    expected += 0.05e6 * ("smca" in name) + 81 * 255 * ("_dn_" in name)
    assert abs(trainable - expected) < 0.05e6
    optimizer = build_optimizer(cfg, model)
    inputs = [make_input(64, 96, [(5, 5, 40, 50)], [17]), make_input(80, 64)]
    before = model.query_generator.reference_logits.detach().clone()
    with EventStorage():
        for _ in range(2):
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    assert not (before == model.query_generator.reference_logits).all()
    assert len(model.eval()(inputs)[0]["instances"]) > 0


def test_readme_names_existing_configs():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"configs/([\w/-]+\.yaml)", text)
    assert named
    for name in named:
        assert Path(ROOT / "configs" / name).is_file(), name
