"""The model on CUDA against the model on the CPU, which the other tests hold; skipped where there is no GPU.

``SAMDETR_TEST_DEVICE=cpu`` runs them on the CPU against itself, to see that the tests work; what only a GPU can show is then
skipped alone.
"""

import copy
import os

import pytest
import torch

from helpers import (
    BATCH,
    BEYOND,
    CONTRASTIVE,
    DN,
    MULTI_SCALE,
    SMCA,
    Batches,
    load_config,
    make_input,
    tiny_config,
    tiny_model,
)
from samdetr.engine import Trainer
from samdetr.engine.train_step import TrainStep
from samdetr.modeling.build import build_detector
from samdetr.ops.attention import attend, attend_plain
from samdetr.ops.blocks import resized_blocks
from samdetr.ops.deformable_sampling import deformable_sampling, deformable_sampling_plain
from samdetr.ops.folded_conv import folded_conv2d, folded_conv2d_plain
from samdetr.solver import build_optimizer

DEVICE = os.environ.get("SAMDETR_TEST_DEVICE", "cuda")
GPU = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="only a GPU can show this")
TINY = {
    "smca dn": [*SMCA, *DN],
    "three levels smca dn": [*SMCA, *DN, *MULTI_SCALE],
    "beyond": [*SMCA, *CONTRASTIVE, *MULTI_SCALE, *BEYOND],
}
COCO = ["sam_detr_R_50_1x", "sam_detr_smca_R_50_1x", "sam_detr_smca_R_50_DC5_1x", "sam_detr_pp_smca_R_50_1x"]
PADDED = [make_input(96, 128, [(5, 5, 90, 80), (40, 20, 120, 90)], [3, 7]), make_input(64, 100, [(9, 5, 50, 60)], [1])]
ALIKE = [PADDED[0], make_input(96, 128, [(9, 5, 50, 60)], [1], seed=1)]


@pytest.fixture(autouse=True)
def exact():
    """Float32 as such: neither convolutions nor products in TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def moved(model):
    return copy.deepcopy(model).to(DEVICE)


def losses_and_gradients(model, inputs, noise):
    """Losses and gradients with denoising queries whose noise does not depend on the device."""
    generator = model.query_generator
    if hasattr(generator, "add_noise"):
        generator.add_noise = lambda targets: (targets.labels, (targets.boxes + noise).clamp(0.01, 0.99))
    losses = model(inputs)
    sum(losses.values()).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients


def check_alike(model, inputs):
    """Compare losses and all gradients with those on the CPU, and then the raw outputs."""
    other = moved(model)
    expected, found = (losses_and_gradients(m, inputs, 0.05) for m in (model, other))
    for name, loss in expected[0].items():
        assert torch.allclose(found[0][name], loss, rtol=1e-3, atol=1e-4), name
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-4)
        assert (found[1][name] - gradient).abs().max() <= 2e-3 * scale, name
    expected, found = (m.eval().predict(inputs) for m in (model, other))
    for name, value in expected.items():
        assert torch.allclose(found[name].cpu(), value, atol=1e-4 if "boxes" in name else 1e-3), name


@pytest.mark.parametrize("inputs", [ALIKE, PADDED], ids=["alike", "padded"])
@pytest.mark.parametrize("options", TINY.values(), ids=TINY)
def test_small_models_compute_what_they_compute_on_the_cpu(options, inputs):
    check_alike(tiny_model(*options), inputs)


@needs_gpu
@pytest.mark.parametrize("name", [*COCO, "sam_detr_plus_R_50_1x"])
def test_coco_models_compute_what_they_compute_on_the_cpu(name):
    options = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.WEIGHTS",
        "",
        "MODEL.RESNETS.NORM",
        "BN",
    ]  # random weights keep their scale
    model = build_detector(load_config(name, *options))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model.training = True
    check_alike(model, PADDED)


@pytest.mark.parametrize("elements", [100, 5000, 10**7])
def test_kernels_are_their_plain_twins_in_blocks_of_any_size(elements):
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE).requires_grad_()

    def compare(found, expected, inputs):
        gradient = torch.randn_like(found)
        pairs = zip(torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient))
        for a, b in [(found, expected), *pairs]:
            assert torch.allclose(a, b, atol=1e-4 * max(1, b.abs().max().item()))

    with resized_blocks(elements, torch.device(DEVICE).type):
        q, k, v = leaf(2, 4, 7, 8), leaf(2, 1, 30, 8), leaf(2, 4, 30, 5)
        bias = leaf(2, 4, 7, 6), leaf(2, 4, 7, 5)
        mask = torch.zeros(2, 5, 6, dtype=torch.bool, device=DEVICE)
        mask[1, 3:] = True
        compare(attend(q, k, v, mask, *bias), attend_plain(q, k, v, mask, *bias), [q, k, v, *bias])
        sizes = [(5, 6), (2, 3)]
        value, locations, weights = leaf(2, 36, 3, 4), leaf(2, 9, 3, 2, 2, 2), leaf(2, 9, 3, 2, 2)
        arguments = value, sizes, locations, weights
        compare(deformable_sampling(*arguments), deformable_sampling_plain(*arguments), [value, locations, weights])
        x, weight = leaf(2, 6, 9, 7), leaf(8, 6, 3, 3)
        scale, shift = torch.rand(8, device=DEVICE), leaf(8)
        rest = scale, shift, (1, 1), (1, 1), (1, 1), 1
        compare(folded_conv2d(x, weight, *rest), folded_conv2d_plain(x, weight, *rest), [x, weight, shift])


def make_step(model, *options):
    cfg = tiny_config(*options, "MODEL.DEVICE", DEVICE)
    return TrainStep(cfg, model, Batches(BATCH), build_optimizer(cfg, model))


def run_steps(step, number):
    from detectron2.utils.events import EventStorage

    with EventStorage() as storage:
        for step.iter in range(number):
            step.run_step()
        return {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_stays_close_to_float32(precision):
    if precision == "float16" and not GPU:
        pytest.skip("only a GPU can show this")
    options = [*SMCA, *CONTRASTIVE, *MULTI_SCALE, *BEYOND]
    model = moved(tiny_model(*options))
    half = copy.deepcopy(model)
    expected = run_steps(make_step(model, *options), 1)
    mixed = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    found = run_steps(make_step(half, *options, *mixed), 1)
    assert found["total_loss"] == pytest.approx(expected["total_loss"], rel=0.05)
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


@needs_gpu
def test_a_float16_overflow_leaves_the_weights_and_halves_the_scale():
    options = [*SMCA, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"]
    model = moved(tiny_model(*options))
    step = make_step(model, *options)
    step.scaler.scale(torch.ones(1, device=DEVICE))
    step.scaler._scale.fill_(2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    run_steps(step, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert step.scaler.get_scale() == 2.0**39


def test_a_batch_without_boxes():
    model = moved(tiny_model(*SMCA, *CONTRASTIVE, *MULTI_SCALE, *BEYOND))
    losses = model([make_input(64, 64), make_input(48, 80)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path):
    precision = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"] if GPU else []
    options = [*SMCA, *CONTRASTIVE, *BEYOND, *precision, "SOLVER.EMA.ENABLED", True, "MODEL.DEVICE", DEVICE, "SEED", 5]
    options += ["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,), "SOLVER.CHECKPOINT_PERIOD", 3, "DATASETS.TEST", ()]
    options += ["SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (64,)]

    def train(folder, until=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(5)  # of the weights that both start from
        trainer = Trainer(tiny_config(*options, "OUTPUT_DIR", str(folder)))
        trainer.resume_or_load(True)
        trainer.max_iter = until or trainer.max_iter
        trainer.train()
        return trainer

    whole = train(tmp_path / "whole")
    train(tmp_path / "stopped", 3)
    resumed = train(tmp_path / "stopped")
    for a, b in ((whole.inner_model, resumed.inner_model), (whole.average, resumed.average)):
        for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
            # Sums that are added atomically may differ in their last bits.
            assert torch.allclose(p.float(), q.float(), rtol=1e-3, atol=1e-5), name
    assert whole._trainer.scaler.state_dict() == resumed._trainer.scaler.state_dict()


@needs_gpu
def test_a_step_waits_as_often_as_is_counted_without_a_gpu(recwarn):
    options = [*SMCA, *DN, *MULTI_SCALE]
    step = make_step(moved(tiny_model(*options)), *options)
    run_steps(step, 3)
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        run_steps(step, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in recwarn if "synchronizing" in str(warning.message)]
    assert len(waits) <= 3, waits


@needs_gpu
def test_one_process_with_nccl(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(
            moved(tiny_model(*SMCA, *DN)), device_ids=[torch.cuda.current_device()], gradient_as_bucket_view=True
        )
        sum(model(BATCH).values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    finally:
        torch.distributed.destroy_process_group()
