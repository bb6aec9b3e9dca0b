"""samdetr.config: the keys, and the way to a config."""

import inspect
import io
import re
import tokenize

import pytest
import yaml
from detectron2.config import get_cfg

import samdetr
from processes import ROOT
from samdetr.config import load_config, parse_config
from samdetr.errors import UserError

DIGITS = str(ROOT / "configs" / "sam_detr_digits.yaml")


@pytest.mark.parametrize(
    ("config_file", "options", "message"),
    [
        ("nowhere.yaml", [], r"nowhere\.yaml: there is no such file"),
        (
            DIGITS,
            ["MODEL.SAMDETR.NUM_QUERY", "5"],
            r"no config key MODEL\.SAMDETR\.NUM_QUERY.*'MODEL\.SAMDETR\.NUM_QUERIES'",
        ),
        ("https://127.0.0.1:9/my.yaml", [], r"^https://127\.0\.0\.1:9/my\.yaml: URLError"),
        (DIGITS, ["MODEL.SAMDETR.NUM_QUERIES"], "pairs of KEY and VALUE"),
        (
            DIGITS,
            ["MODEL.SAMDETR.NUM_QUERIES", "many"],
            r"NUM_QUERIES is of type str: it must be a whole number, such as 1",
        ),
        (
            DIGITS,
            ["SOLVER.BASE_LR", "1"],
            r"the options: SOLVER\.BASE_LR is of type int: it must be .* point, such as 1\.0",
        ),
        (
            DIGITS,
            ["DATASETS.TRAIN", "digits_train"],
            r"DATASETS\.TRAIN is of type str: it must be a tuple, such as .*\('a',\)",
        ),
        (DIGITS, ["SOLVER.EMA.ENABLED", "true"], r"SOLVER\.EMA\.ENABLED is of type str: it must be True or False"),
        (DIGITS, ["MODEL.SAMDETR", "1"], r"MODEL\.SAMDETR is of type int: it must be a section of keys"),
    ],
)
def test_config_files_and_options(config_file, options, message):
    with pytest.raises(UserError, match=message):
        load_config(config_file, options)


@pytest.mark.parametrize("key", ["DATASETS.COCO_FORMAT", "SOLVER.STEPS", "MODEL.WEIGHTS", "INPUT.MIN_SIZE_TRAIN"])
def test_a_key_without_a_value_in_a_file(tmp_path, key):
    """A line whose value is commented out; yacs would take None for a value of any type."""
    node, name = key.split(".")
    path = tmp_path / "empty.yaml"
    path.write_text(f'_BASE_: "{DIGITS}"\n{node}:\n  {name}:  # a value\n')
    with pytest.raises(UserError, match=rf"empty\.yaml: {key} is empty: give it a value, or remove the line"):
        load_config(path)


def test_a_key_that_does_not_exist_in_a_file(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f'_BASE_: "{DIGITS}"\nMODEL:\n  SAMDETR:\n    ALIGNER:\n      POOL_SIZE: 3\n')
    with pytest.raises(
        UserError, match=r"typo\.yaml: there is no config key MODEL\.SAMDETR\.ALIGNER\.POOL_SIZE.*POOLED_SIZE"
    ):
        load_config(path)


def code_of(path):
    """The text of a file without comments and strings, but for those by which a key is looked up: "STEPS"."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    keys = re.compile(r"[A-Z_.]+")
    parts = [
        token.string if token.type != tokenize.STRING else f".{token.string[1:-1]}"
        for token in tokens
        if token.type != tokenize.COMMENT and (token.type != tokenize.STRING or keys.fullmatch(token.string[1:-1]))
    ]
    text = " ".join(parts)
    return re.sub(r"\s*\.\s*", ".", text)


def test_every_key_is_read_by_the_code():
    """A key that nothing reads would lie. Files that only say what it may be do not count, nor do texts and comments."""
    only_said = ("config.py", "checks.py", "limits.py")
    files = [path for path in (ROOT / "projects").rglob("*.py") if path.name not in only_said]
    texts = [code_of(path) for path in files]

    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    cfg = get_cfg()
    of_detectron2 = set(leaves(cfg))
    samdetr.add_samdetr_config(cfg)
    own = [key for key in leaves(cfg) if key not in of_detectron2]
    assert len(own) > 80
    for key in own:
        node, _, name = key.removeprefix("MODEL.SAMDETR.").rpartition(".")
        whole = rf"\b{re.escape(f'{node}.{name}' if node else name)}\b"
        # node = cfg.INPUT.MOSAIC; node.PROB. Or read("VOC_FORMAT"), and in a function below, cfg.DATASETS[key].
        in_parts = rf"(?s)\b{re.escape(node)}\b.*\.{name}\b|\.{name}\b.*\b{re.escape(node)} \["
        assert any(re.search(whole, text) or (node and re.search(in_parts, text)) for text in texts), key


def test_the_defaults_are_commented():
    lines = inspect.getsource(samdetr.add_samdetr_config).splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\s+(node|cfg)\.[\w.]+ = (?!CfgNode)", line):
            above = next(previous for previous in reversed(lines[:i]) if " = " not in previous)
            assert above.strip().startswith("#"), line


def test_bare_names_are_found_from_any_folder(tmp_path, monkeypatch):
    """The names of this project's configs, with and without their ending, below folders, and as bases of one's own."""
    monkeypatch.chdir(tmp_path)
    expected = load_config(DIGITS)
    assert load_config("sam_detr_digits") == load_config("sam_detr_digits.yaml") == expected
    assert load_config("baselines/detr_R_50_1x").MODEL.META_ARCHITECTURE == "TransformersDETR"
    (tmp_path / "mine.yaml").write_text('_BASE_: "sam_detr_digits.yaml"\nSEED: 77\n')
    assert load_config("mine.yaml").SEED == 77 and load_config("mine.yaml").DATASETS == expected.DATASETS
    (tmp_path / "sam_detr_digits.yaml").write_text("SEED: 5\n")
    assert load_config("sam_detr_digits.yaml").SEED == 5  # a file that is there comes first
    with pytest.raises(UserError, match=r"sam_detr_digit: there is no such file .*Did you mean 'sam_detr_digits'"):
        load_config("sam_detr_digit")
    with pytest.raises(UserError, match=r"mine2\.yaml: .*nowhere\.yaml"):
        (tmp_path / "mine2.yaml").write_text('_BASE_: "nowhere.yaml"\n')
        load_config("mine2.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or no YAML of keys and values"),
        ("just words", "is empty or no YAML of keys and values"),
        ("_BASE_: mine.yaml", "_BASE_ leads back to itself"),
    ],
)
def test_files_that_are_no_config_are_refused(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{message}"):
        load_config(path)


def test_without_a_file_there_are_the_defaults():
    assert load_config(None).MODEL.SAMDETR.NUM_QUERIES == 300
    assert load_config("", ["SEED", 3]).SEED == 3


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "!!python/object/apply:os.system ['false']", "SEED: [1]"])
def test_files_that_are_no_configs_are_refused_and_run_nothing(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml: "):
        load_config(tmp_path / "bad.yaml")


def test_a_dumped_config_is_the_config():
    cfg = load_config("sam_detr_pp_digits", ["SEED", 9])
    assert yaml.safe_load(parse_config(cfg.dump()).dump()) == yaml.safe_load(cfg.dump())
