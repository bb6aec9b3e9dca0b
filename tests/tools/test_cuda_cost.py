"""tools/measure/cuda_cost.py: what a training step costs on a GPU can only become less; and every operation works there."""

import json
import subprocess
import sys

import pytest

from helpers import ROOT
from processes import environment, run_tool

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cuda_cost import measure
import samdetr
for name, precision in json.loads(sys.argv[2]):
    options = ["SOLVER.AMP.ENABLED", precision != "float32"]
    options += ["SOLVER.AMP.PRECISION", precision] if options[1] else []
    cfg = samdetr.load_config(name, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *options])
    cost = measure(cfg, (800, 1333), 2, 7)
    print(json.dumps([name, dict(cost.waits), sum(cost.operations.values()), cost.peak / 2**30]))
"""
# Operations and memory in GiB of a step of two padded images, which may only become less; see docs/performance.md.
CEILINGS = {
    ("sam_detr_R_50_1x", "float32"): (2809, 2.24),
    ("sam_detr_smca_R_50_DC5_1x", "float16"): (4433, 2.44),
    ("sam_detr_pp_smca_dn_R_50_1x", "bfloat16"): (5418, 4.74),
    ("sam_detr_plus_R_50_1x", "float32"): (4642, 7.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [pytest.param(list(CEILINGS)[:2], marks=pytest.mark.thorough, id="other models"), list(CEILINGS)[2:]]
)
def test_a_step_waits_for_costs_and_losses_only_and_what_it_costs_only_becomes_less(keys):
    """In a process of its own: torch has one pretended device per process."""
    arguments = [str(ROOT / "tools" / "measure"), json.dumps(keys)]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    costs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in costs] == [name for name, _ in keys]
    for (name, waits, operations, gibibytes), key in zip(costs, keys):
        most_operations, most_gibibytes = CEILINGS[tuple(key)]
        matchings = 2 if "plus" in name else 1  # of the decoder's queries, and of the pixels that are selected
        files = {}
        for place, count in waits.items():
            file = place.split(":")[0]
            files[file] = files.get(file, 0) + count
        assert files == {"modeling/criterion.py": matchings, "engine/train_step.py": 1}, name
        assert most_operations * 0.9 < operations <= most_operations, name  # lower the ceiling when it has sunk
        assert most_gibibytes * 0.9 < gibibytes <= most_gibibytes, name


def test_only_this_projects_model_is_counted():
    done = run_tool("measure/cuda_cost.py", "--config-file", "baselines/faster_rcnn_R_50_FPN_1x")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'")
