"""Read an experiment (a YAML file of runs in groups, each run one config with several seeds), and its runs' curves."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import samdetr
from samdetr.errors import UserError
from samdetr.limits import SET_DETECTORS
from samdetr.visualization import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """One config with several seeds."""

    name: str
    config: str
    seeds: list[int]
    options: list[str] = field(default_factory=list)

    def folder(self, output: Path, seed: int) -> Path:
        return output / "runs" / self.name / f"seed{seed}"


@dataclass
class Group:
    """Runs that share a plot; ``also`` names runs of other groups to show beside them."""

    title: str
    runs: list[Run]
    also: list[str] = field(default_factory=list)


@dataclass
class Experiment:
    """What an experiment's file says."""

    goals: list[str]
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file; configs are looked for in the repository."""
    try:
        content = yaml.safe_load(path.read_text())
        groups = []
        for group in content["groups"]:
            runs = [Run(**entry) for entry in group.pop("runs")]
            for entry in runs:
                entry.seeds = [int(seed) for seed in entry.seeds]
                entry.options = [str(option) for option in entry.options]
            groups.append(Group(runs=runs, **group))
        experiment = Experiment(list(content["goals"]), groups)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", argument="experiment") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not an experiment ({type(error).__name__}: {error}): it needs 'goals' and 'groups', "
            "each with 'title', 'runs' (name, config, seeds, perhaps options) and perhaps 'also'.",
            argument="experiment",
        ) from error
    names = [entry.name for entry in experiment.runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} has several runs named {name!r}: give each its own name.", argument="experiment")
    for name in [*experiment.goals, *(name for group in groups for name in group.also)]:
        if name not in names:
            raise UserError(
                f"{path} mentions {name!r}, which is none of its runs: {', '.join(names)}.", argument="experiment"
            )
    return experiment


def config_of(entry: Run, seed: int, folder: Path):
    """Load the full config of a run."""
    return samdetr.load_config(ROOT / entry.config, [*entry.options, "SEED", str(seed), "OUTPUT_DIR", str(folder)])


def differences(cfg, folder: Path) -> list[str]:
    """Return the keys whose values in a run's folder differ from the config's; the place of the folder does not matter.

    Keys that this project has got since count with their default, with which it does what it did before. The keys of SAM-DETR
    do not matter to other detectors.
    """
    kept, wanted, defaults = (
        flatten(yaml.safe_load(text))
        for text in ((folder / "experiment.yaml").read_text(), cfg.dump(), samdetr.load_config(None).dump())
    )
    kept = {**defaults, **kept}
    ignored = ("OUTPUT_DIR",) if cfg.MODEL.META_ARCHITECTURE in SET_DETECTORS else ("OUTPUT_DIR", "MODEL.SAMDETR.")
    return [k for k in sorted({*kept, *wanted}) if kept.get(k) != wanted.get(k) and not k.startswith(ignored)]


def flatten(node: dict, prefix: str = "") -> dict:
    """Return the values of a nested dict by their keys, joined by dots."""
    result = {}
    for key, value in node.items():
        result.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return result


def read_curve(folder: Path, max_iter: int, step_time: float = 0.0) -> list[list[float]]:
    """Return ``[[step, seconds, AP], ...]`` of a run so far, by its seconds per step; AP is 0 where nothing was detected."""
    path = folder / "metrics.json"
    if not path.is_file() or not path.stat().st_size:  # a run that has just begun has an empty one
        return []
    try:
        metrics = read_metrics(folder)
    except UserError:  # one unfinished line
        return []
    # detectron2 counts from 0 during training, and names the last evaluation by the number of steps.
    curve = {min(int(i) + 1, max_iter): 0.0 if ap != ap else ap for i, _, ap in metrics.get("bbox/AP", [])}
    return [[step, round(step * step_time, 2), round(ap, 3)] for step, ap in curve.items()]


def read_step_times(output: Path) -> dict[str, float]:
    """Return the seconds per step of the runs that were timed, by name."""
    path = output / "step_times.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def collect(experiment: Experiment, output: Path) -> list[dict]:
    """Return the curves of all runs that are complete and have the configs of the experiment."""
    results, step_times = [], read_step_times(output)
    for entry in experiment.runs:
        for seed in entry.seeds:
            folder = entry.folder(output, seed)
            cfg = config_of(entry, seed, folder)
            if not (folder / "experiment.yaml").is_file() or differences(cfg, folder):
                continue
            max_iter = cfg.SOLVER.MAX_ITER
            curve = read_curve(folder, max_iter, step_times.get(entry.name, 0.0))
            if curve and curve[-1][0] == max_iter:
                results.append({"name": entry.name, "config": entry.config, "seed": seed, "curve": curve})
    return results
