"""samdetr.engine.train_step: accumulation, precision, numbers that are not finite."""

import copy
import logging
import math

import pytest
import torch

from helpers import (
    BATCH,
    BEYOND,
    CONTRASTIVE,
    DN,
    MULTI_SCALE,
    SMCA,
    frozen_statistics,
    make_input,
    make_step,
    run_steps,
    tiny_model,
)
from samdetr.engine.train_step import step_seed
from samdetr.errors import UserError


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    """Parts with and without boxes; all of one size, so that padding at the border does not depend on the part."""
    whole = frozen_statistics(tiny_model(*SMCA, *BEYOND))
    accumulated = copy.deepcopy(whole)
    expected = run_steps(make_step(whole, BATCH))
    found = run_steps(make_step(accumulated, BATCH, "SOLVER.ACCUMULATION_STEPS", parts))
    for name in ("total_loss", "loss_class", "loss_giou_0", "loss_proposal_l1", "loss_dense_class"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    for (name, a), b in zip(whole.named_parameters(), accumulated.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * a.grad.abs().max().clamp(min=1e-3)), name


@pytest.mark.parametrize("options", [DN, CONTRASTIVE], ids=["dn", "negatives"])
def test_denoising_losses_are_normalised_by_the_whole_batch(options):
    model = tiny_model(*options)
    normalizers = model.loss_normalizers([BATCH[:2], BATCH[2:]])
    assert normalizers.tolist() == [6, 5 * 6]
    part = model(BATCH[:1], normalizers=normalizers)
    torch.manual_seed(0)
    alone = model(BATCH[:1])
    assert part["loss_l1"].item() == pytest.approx(alone["loss_l1"].item() * 2 / 6, rel=1e-4)


@pytest.mark.parametrize(
    "options", [SMCA, [*SMCA, *CONTRASTIVE, *MULTI_SCALE, *BEYOND]], ids=["single-scale", "multi-scale"]
)
def test_bfloat16_trains_and_stays_close_to_float32(options):
    full = tiny_model(*options)
    half = copy.deepcopy(full)
    expected = run_steps(make_step(full, BATCH, *options))
    found = run_steps(make_step(half, BATCH, *options, "SOLVER.AMP.ENABLED", True))
    assert found["total_loss"] == pytest.approx(expected["total_loss"], rel=0.03)
    assert found["total_loss"] != expected["total_loss"]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())


def test_what_needs_float32_keeps_it_in_mixed_precision():
    model = tiny_model(*SMCA, *MULTI_SCALE).eval()
    seen = {}
    layer = model.decoder.layers[0]
    layer.cross_attention.register_forward_pre_hook(lambda module, args: seen.update(aligned=args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.predict([make_input(64, 64)])
    assert out["pred_boxes"].dtype == out["pred_logits"].dtype == torch.float32
    assert seen["aligned"].keypoints.dtype == seen["aligned"].gaussian_scales.dtype == torch.float32
    assert seen["aligned"].content.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [[], MULTI_SCALE], ids=["single-scale", "multi-scale"])
def test_activation_checkpointing_changes_nothing_but_what_is_kept(options):
    plain = frozen_statistics(tiny_model(*options))
    recomputing = frozen_statistics(tiny_model(*options, "MODEL.SAMDETR.ACTIVATION_CHECKPOINTING", True))
    recomputing.load_state_dict(plain.state_dict())
    kept = {}
    for name, model in (("plain", plain), ("recomputing", recomputing)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = sum(model(BATCH).values())
        kept[name] = sum(sizes)
        loss.backward()
    assert kept["recomputing"] < 0.6 * kept["plain"]
    for a, b in zip(plain.parameters(), recomputing.parameters()):
        assert torch.equal(a.grad, b.grad)


def poisoned(name):
    batch = copy.deepcopy(BATCH)
    for inputs in batch:
        if inputs["file_name"] == name:
            inputs["image"][:] = math.nan
    return batch


def test_numbers_that_are_not_finite_stop_with_the_images():
    with pytest.raises(UserError, match=r"b\.jpg"):
        run_steps(make_step(frozen_statistics(tiny_model()), poisoned("b.jpg")))
    step = make_step(tiny_model(), BATCH)
    step.model.decoder.box_heads[0].layers[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"Iteration 0: .*gradient norm nan; .*loss_l1 .*a\.jpg, b\.jpg"):
        run_steps(step)


def test_steps_that_are_not_finite_are_left_out_on_demand(caplog):
    options = ["SOLVER.NON_FINITE", "skip"]
    model = tiny_model(*options)  # with BatchNorm, whose running statistics must not keep the NaN either
    before = copy.deepcopy(model.state_dict())
    step = make_step(model, poisoned("b.jpg"), *options)
    with caplog.at_level(logging.WARNING):
        run_steps(step, 2)
    assert "Iteration 1: a loss or gradient is not finite" in caplog.text and "b.jpg" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    step.data_loader.batch = BATCH
    step._data_loader_iter_obj = None
    run_steps(step)
    assert step.skips_in_a_row == 0
    assert not torch.equal(before["query_generator.reference_logits"], model.query_generator.reference_logits)


def test_float16_overflow_that_never_ends_stops():
    """The loss scaler leaves out steps while it looks for a scale; below a scale of 1 something else is wrong."""
    step = make_step(tiny_model(), BATCH, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16")
    step.model.decoder.box_heads[0].layers[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"gradient norm nan.*a\.jpg"):
        run_steps(step, 40)
    assert step.iter == 17  # 2 ** 16, halved until it is below 1


def test_float16_trains_and_its_scale_is_resumed():
    options = [*SMCA, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"]
    step = make_step(tiny_model(*SMCA), BATCH, *options)
    before = copy.deepcopy(step.model.state_dict())
    run_steps(step, 3)
    assert not torch.equal(before["query_generator.reference_logits"], step.model.query_generator.reference_logits)
    state = step.state_dict()
    assert state["scaler"]["_growth_tracker"] > 0
    state["scaler"]["scale"] = 123.0
    resumed = make_step(tiny_model(*SMCA), BATCH, *options)
    resumed.iter = 0
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == 123.0


def test_bfloat16_leaves_padding_out():
    model = tiny_model(*SMCA, *MULTI_SCALE).eval()
    small, large = make_input(64, 64, seed=1), make_input(96, 128, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together, alone = model.predict([small, large]), model.predict([small])
    assert together["pred_logits"].isfinite().all()
    assert (together["pred_boxes"][:, :1] - alone["pred_boxes"]).abs().mean() < 0.02


def test_more_parts_than_images_per_process_are_refused_in_words():
    with pytest.raises(UserError, match="more than the 4 images that each process has per step"):
        run_steps(make_step(tiny_model(), BATCH, "SOLVER.ACCUMULATION_STEPS", 6))


def test_a_batch_norm_over_one_value_says_what_to_raise():
    options = ["MODEL.RESNETS.NORM", "BN"]
    step = make_step(tiny_model(*options), [make_input(height=4, width=4)], *options)
    with pytest.raises(UserError, match=r"images at a time: 1\): raise SOLVER\.IMS_PER_BATCH or INPUT\.MIN_SIZE_TRAIN"):
        step.run_step()


def test_skipping_without_end_stops():
    options = ["SOLVER.NON_FINITE", "skip"]
    step = make_step(frozen_statistics(tiny_model(*options)), poisoned("b.jpg")[1:2], *options)
    step.skips_in_a_row = 100
    with pytest.raises(UserError, match="not finite"):
        run_steps(step)


def test_unreadable_images_are_counted_up_to_a_limit(caplog):
    batch = [{**inputs, "unreadable_files": ["x.jpg", "y.jpg"]} for inputs in BATCH]
    skip = ["DATALOADER.UNREADABLE_IMAGES", "skip"]
    step = make_step(tiny_model(), batch, *skip)
    assert run_steps(step, 2)["unreadable_images"] == 2
    assert "Images that cannot be used: 2 so far, new: x.jpg, y.jpg" in caplog.text
    with pytest.raises(UserError, match=r"2 images cannot be used, more than .*MAX_UNREADABLE_IMAGES \(1\)"):
        run_steps(make_step(tiny_model(), batch, *skip, "DATALOADER.MAX_UNREADABLE_IMAGES", 1))


def test_steps_have_random_numbers_of_their_own():
    assert len({step_seed(seed, i, rank) for seed in range(3) for i in range(5) for rank in range(2)}) == 30
