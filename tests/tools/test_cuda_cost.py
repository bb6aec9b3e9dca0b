"""tools/measure/cuda_cost.py: what a training step costs on a GPU can only become less; and every operation works there."""

import json
import subprocess
import sys

from helpers import ROOT
from processes import environment, run_tool

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cuda_cost import measure
import samdetr
for name in sys.argv[2:]:
    cfg = samdetr.load_config(name, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    cost = measure(cfg, (128, 160), 2, 5)
    print(json.dumps([name, dict(cost.waits), sum(cost.operations.values()), cost.peak / 2**30]))
"""
# Operations per step of two padded images, which may only become fewer; see docs/performance.md.
OPERATIONS = {
    "sam_detr_R_50_1x": 3198,
    "sam_detr_smca_R_50_DC5_1x": 3538,
    "sam_detr_pp_smca_dn_R_50_1x": 4353,
    "sam_detr_plus_R_50_1x": 5088,
}


def test_a_step_waits_for_costs_and_losses_only_and_its_operations_only_become_fewer():
    """In one test, since each worker of pytest would count for itself; torch has one pretended device per process."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(ROOT / "tools" / "measure"), *OPERATIONS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    costs = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert list(costs) == list(OPERATIONS)
    for name, (waits, operations, gibibytes) in costs.items():
        matchings = 2 if "plus" in name else 1  # of the decoder's queries, and of the pixels that are selected
        files = {}
        for place, count in waits.items():
            file = place.split(":")[0]
            files[file] = files.get(file, 0) + count
        assert files == {"modeling/criterion.py": matchings, "engine/train_step.py": 1}, name
        assert OPERATIONS[name] * 0.9 < operations <= OPERATIONS[name], name  # lower the ceiling when it has sunk
        assert 0.3 < gibibytes < 2.5, name  # weights, gradients and moments alone are 0.8


def test_only_this_projects_model_is_counted():
    done = run_tool("measure/cuda_cost.py", "--config-file", "baselines/faster_rcnn_R_50_FPN_1x")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'")
