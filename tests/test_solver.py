"""samdetr.solver: learning rates, decay, clipping."""

import copy

import pytest
import torch
from detectron2.modeling import build_model

from helpers import load_config, tiny_config
from samdetr.solver import FullModelClippingAdamW, MovingAverage, build_optimizer, set_float32_precision


def test_backbone_has_its_own_rate_and_decay_applies_to_everything():
    cfg = load_config("sam_detr_R_50_1x", "MODEL.SAMDETR.ENCODER.NUM_LAYERS", 1, "MODEL.SAMDETR.DECODER.NUM_LAYERS", 1)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == len(trainable)
    for name, parameter in trainable.items():
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4), name
        assert group["weight_decay"] == 1e-4, name
    assert not any(name.startswith(("backbone.stem", "backbone.res2")) for name in trainable)


def test_biases_have_a_factor_beside_the_backbones():
    options = ["SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.5]
    cfg = tiny_config("SOLVER.BACKBONE_MULTIPLIER", 0.1, *options)
    model = build_model(cfg)
    groups = {id(p): group for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        factor = (0.1 if name.startswith("backbone.") else 1.0) * (2.0 if name.endswith("bias") else 1.0)
        assert groups[id(parameter)]["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * factor), name
        if name.endswith("in_proj_bias"):
            assert groups[id(parameter)]["weight_decay"] == 0.5
    assert any(name.endswith("in_proj_bias") for name, _ in model.named_parameters())


def test_a_detector_may_have_slower_parameters():
    pytest.importorskip("transformers")
    options = ["MODEL.META_ARCHITECTURE", "TransformersDETR", "MODEL.TRANSFORMERS.DETECTOR", "deformable_detr"]
    cfg = tiny_config(*options)
    model = build_model(cfg)
    rates = {id(p): group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    slow = {name for name, p in model.named_parameters() if p.requires_grad and rates[id(p)] < cfg.SOLVER.BASE_LR}
    slow = {name for name in slow if not name.startswith("backbone.")}
    assert {name.split(".")[-2] for name in slow} == {"sampling_offsets", "reference_points"}
    parameters = dict(model.named_parameters())
    assert all(rates[id(parameters[name])] == pytest.approx(cfg.SOLVER.BASE_LR / 10) for name in slow)


def test_gradients_are_clipped_together():
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))
    optimizer = FullModelClippingAdamW([{"params": [a]}, {"params": [b]}], lr=0.1, max_norm=0.1)
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((4,), -1.0)
    optimizer.step()
    norm = (3 * 4 + 4 * 1) ** 0.5
    assert torch.allclose(a.grad, torch.full((3,), 2.0) * 0.1 / norm)
    assert torch.allclose(b.grad, torch.full((4,), -1.0) * 0.1 / norm)


def test_gradients_of_a_closure_are_clipped():
    a = torch.nn.Parameter(torch.zeros(3))
    optimizer = FullModelClippingAdamW([a], lr=0.1, max_norm=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (2 * a).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert torch.allclose(a.grad.norm(), torch.tensor(0.1))


def test_gradients_that_were_measured_are_not_measured_again(monkeypatch):
    a = torch.nn.Parameter(torch.zeros(3))
    optimizer = FullModelClippingAdamW([a], lr=0.1, max_norm=0.1)
    a.grad = torch.full((3,), 2.0)
    assert torch.allclose(optimizer.measure_gradients(), torch.tensor(12.0).sqrt())
    with monkeypatch.context() as context:
        context.setattr(torch.nn.utils, "get_total_norm", None)
        optimizer.step()
    assert torch.allclose(a.grad.norm(), torch.tensor(0.1))
    a.grad = torch.full((3,), 5.0)
    optimizer.step()  # other gradients, so another measurement
    assert torch.allclose(a.grad.norm(), torch.tensor(0.1))


def test_one_fused_step_is_the_plain_one():
    models = [build_model(tiny_config()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused, plain = (build_optimizer(tiny_config(), model) for model in models)
    for group in plain.param_groups:
        group["fused"] = False
    for pair in zip(*(model.parameters() for model in models)):
        pair[0].grad = torch.randn_like(pair[0])
        pair[1].grad = pair[0].grad.clone()
    for _ in range(2):
        fused.step(), plain.step()
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.allclose(a, b, atol=1e-7)


def test_clipping_follows_the_config():
    cfg = tiny_config()
    model = build_model(cfg)
    assert isinstance(build_optimizer(cfg, model), FullModelClippingAdamW)
    cfg.SOLVER.CLIP_GRADIENTS.FULL_MODEL = False
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW) and not isinstance(optimizer, FullModelClippingAdamW)
    assert "GradientClip" in type(optimizer).__name__
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    assert type(build_optimizer(cfg, model)) is torch.optim.AdamW
    cfg.SOLVER.CLIP_GRADIENTS.update({"ENABLED": True, "FULL_MODEL": True, "CLIP_TYPE": "value"})
    with pytest.raises(ValueError, match="CLIP_TYPE is 'value'"):
        build_optimizer(cfg, model)


@pytest.mark.parametrize("clip", [True, False])
def test_a_checkpoint_of_another_layout_is_resumed_exactly(clip):
    """Moments that lie in memory otherwise than their parameters, from an optimizer that was not fused."""
    cfg = tiny_config("SOLVER.CLIP_GRADIENTS.ENABLED", clip)
    models = [build_model(cfg) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    resumed, plain = (build_optimizer(cfg, model) for model in models)
    for group in plain.param_groups:
        group["fused"] = False
    gradients = [[torch.randn_like(p) for p in models[0].parameters()] for _ in range(2)]

    def step(optimizer, model, values):
        for parameter, value in zip(model.parameters(), values):
            parameter.grad = value.clone()
        optimizer.step()

    step(plain, models[1], gradients[0])
    state = copy.deepcopy(plain.state_dict())
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    models[0].load_state_dict(models[1].state_dict())
    resumed.load_state_dict(state)
    assert all(group["fused"] for group in resumed.param_groups)
    assert any(not p.is_contiguous() for p in models[0].parameters())
    for optimizer, model in ((plain, models[1]), (resumed, models[0])):
        step(optimizer, model, gradients[1])
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.allclose(a, b, atol=1e-7)


def test_gradients_are_clipped_before_they_are_unscaled_by_the_same_norm():
    """A GradScaler leaves unscaling to a fused optimizer, as detectron2's AMPTrainer does."""
    results = []
    for scaled in (False, True):
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = FullModelClippingAdamW([parameter], lr=0.1, eps=1.0, max_norm=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        scaler.scale((parameter * torch.tensor([3.0, 4.0])).sum()).backward()
        scaler.step(optimizer)
        results.append(parameter.detach().clone())
    assert torch.allclose(*results) and not torch.allclose(results[0], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("missing", ["exp_avg", "lr"])
def test_states_that_the_next_step_would_fail_on_are_refused(missing):
    model = build_model(tiny_config())
    optimizer = build_optimizer(tiny_config(), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    del (state["param_groups"][0] if missing == "lr" else state["state"][0])[missing]
    with pytest.raises(ValueError, match=f"of the optimizer lacks {missing}"):
        optimizer.load_state_dict(state)


def test_in_the_moving_average_weights_of_n_steps_ago_count_decay_to_the_n():
    """Parameters, frozen ones among them; buffers of any type are copied. In the end it is torch's average."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 5))
    model[2].weight.requires_grad_(False)
    torchs = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    theirs, ours = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torchs), MovingAverage(model, 0.9)
    history = []
    for step in range(100):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[:2](torch.randn(2, 3, 6, 6))  # changes BatchNorm's buffers
        for each in (theirs, ours):
            each.update_parameters(model)
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), ours.module.buffers())), step
        history.append([parameter.detach().clone() for parameter in model.parameters()])
        if step in (0, 1, 5):
            counts = [0.9 ** (step - number) for number in range(step + 1)]
            for average, *values in zip(ours.module.parameters(), *history):
                expected = sum(count * value for count, value in zip(counts, values)) / sum(counts)
                assert torch.allclose(average, expected, atol=1e-5), step
    assert ours.module[1].num_batches_tracked == ours.n_averaged == 100
    for average, expected in zip(ours.module.parameters(), theirs.module.parameters()):
        assert torch.allclose(average, expected, atol=1e-3)  # 0.9 ** 100 is 3e-5


def test_one_key_decides_about_tf32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for value, products, convolutions in (
            ("high", "high", True),
            ("highest", "highest", False),
            ("", "highest", False),
        ):
            set_float32_precision(tiny_config("FLOAT32_PRECISION", value))
            assert torch.get_float32_matmul_precision() == products
            assert torch.backends.cudnn.allow_tf32 is convolutions
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
