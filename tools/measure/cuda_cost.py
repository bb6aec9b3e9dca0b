#!/usr/bin/env python
"""Count what a training step costs on a GPU, without one: waits for the device, operations, memory traffic, memory.

    tools/measure/cuda_cost.py --config-file configs/sam_detr_smca_R_50_1x.yaml
    tools/measure/cuda_cost.py --config-file configs/sam_detr_pp_smca_dn_R_50_1x.yaml --size 800 1333 --batch 2 --places

The real step of training (forward, loss, backward, clipping, AdamW) runs on torch's fake tensors, which have shapes and no
numbers, on a pretended device that is not the CPU. So nothing is computed, and what the CPU does in its own way is left out.
Prints one JSON object:

* ``waits``: how often the host waits until the device has done all that it was given (``--places``: where);
* ``operations``: kernels that would be launched, roughly: each operation that computes something counts once;
* ``traffic_gb``: bytes that these operations read and write, if nothing is cached, in 10^9;
* ``peak_gib``: the largest sum of tensors alive at once, parameters and optimizer included, in 2^30.

Mixed precision is that of the config (``SOLVER.AMP.ENABLED True``, ``SOLVER.AMP.PRECISION float16``), with torch's rules for
CUDA. The assignment in matching is made up, since it needs numbers; its transfer and the costs count.
Norms, clipping and the optimizer's step count as one operation each, as torch's kernels for many tensors at once are; so does
torch's fused attention, forward and backward.
"""

import argparse
import contextlib
import json
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from detectron2.structures import Boxes, ImageList, Instances
from pretended_autocast import forget_casts, register_autocast
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import samdetr
from samdetr.cli.common import run
from samdetr.engine.train_step import TrainStep
from samdetr.errors import UserError
from samdetr.modeling.build import build_detector
from samdetr.modeling.matcher import HungarianMatcher, Matches
from samdetr.ops.runtime import upload
from samdetr.solver import FullModelClippingAdamW

PACKAGE = Path(samdetr.__file__).parent
DEVICE = "pretended"
# Operations that compute nothing on the device: views of what is there, and questions about it.
FREE = (
    "prim.",
    "aten.detach",
    "aten.alias",
    "aten.lift",
    "aten._local_scalar_dense",
    "aten.empty",
    "aten.new_empty",
    "aten._unsafe_view",
)


class Cost(TorchDispatchMode):
    """Count, while it is active, what the operations on the pretended device cost."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.traffic = self.alive = self.peak = 0
        self._storages: weakref.WeakSet = weakref.WeakSet()
        self._joined = False

    def start_again(self) -> None:
        """Forget what was counted, but not what is alive."""
        self.waits.clear()
        self.operations.clear()
        self.traffic, self.peak = 0, self.alive

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Count what is done inside this context as one operation, as torch's kernels for many tensors are on CUDA."""
        self.operations["joined"] += 1
        self._joined = True
        try:
            yield
        finally:
            self._joined = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if name.startswith("aten._local_scalar_dense"):
            if args[0].device.type == DEVICE:
                self.waits[self.place()] += 1
            return 1.0  # all numbers are fine
        if name == "aten._to_copy.default" and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            dtype = kwargs.get("dtype") or args[0].dtype  # fake tensors would try to copy small constants really
            result = torch.empty(args[0].shape, dtype=dtype, device=kwargs["device"])
        else:
            result = func(*args, **kwargs)
        inputs, outputs = ([leaf for leaf in tree_leaves(x) if torch.is_tensor(leaf)] for x in ((args, kwargs), result))
        devices = {tensor.device.type for tensor in (*inputs, *outputs)}
        if DEVICE not in devices:
            return result
        copies = name.startswith(("aten._to_copy", "aten.copy_"))
        if copies and len(devices) > 1 and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            self.waits[self.place()] += 1
        for output in outputs:
            self.keep(output)
        if not name.startswith(FREE) and not func.is_view:
            self.operations[name] += not self._joined
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        return result

    def keep(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        if tensor.device.type != DEVICE or storage in self._storages:
            return
        size = storage.nbytes()
        self._storages.add(storage)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size

    @staticmethod
    def place() -> str:
        """Return the line of the package, or else of detectron2, that an operation comes from."""
        files = [(frame.filename, frame.lineno) for frame in reversed(traceback.extract_stack())]
        for file, line in files:
            if Path(file).is_relative_to(PACKAGE):
                return f"{Path(file).relative_to(PACKAGE)}:{line}"
        return next((f"{file}:{line}" for file, line in files if "detectron2" in file), "elsewhere")


class FusedAttention(torch.autograd.Function):
    """Costs what torch's fused attention costs on CUDA: one operation forward, one backward, and no matrix of weights."""

    @staticmethod
    def forward(ctx, cost: Cost, q, k, v):
        ctx.cost = cost
        with cost.joined():
            output = v.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, output)
        cost.traffic += sum(x.numel() * x.element_size() for x in (q, k, v, output))
        return output

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, output = ctx.saved_tensors
        with ctx.cost.joined():
            gradients = [torch.empty_like(x) for x in (q, k, v)]
        ctx.cost.traffic += sum(x.numel() * x.element_size() for x in (q, k, v, output, gradient, *gradients))
        return None, *gradients

    @classmethod
    def with_cost(cls, cost: Cost) -> Callable:
        """Return a stand-in for ``torch.nn.functional.scaled_dot_product_attention``."""

        def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
            if torch.is_autocast_enabled(DEVICE):
                q, k, v = (x.to(torch.get_autocast_dtype(DEVICE)) for x in (q, k, v))
            if attn_mask is not None and (attn_mask.dtype != q.dtype or attn_mask.requires_grad):
                raise NotImplementedError(
                    "A mask to be converted, or one that learns, would cost more than is counted."
                )
            return cls.apply(cost, q, k, v)

        return attention


class FusedAdamW(FullModelClippingAdamW):
    """Costs what the fused optimizer costs on CUDA: one operation each for the norms, for clipping and for the step."""

    _step_supports_amp_scaling = True  # torch's, too: its kernel itself skips a step whose gradients overflow

    def __init__(self, *args, cost: Cost, **kwargs):
        super().__init__(*args, **kwargs)
        self.cost = cost
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        # As after a first step.
        self.moments = {parameter: [torch.zeros_like(parameter) for _ in range(2)] for parameter in parameters}

    def measure_gradients(self) -> torch.Tensor:
        with self.cost.joined():
            return super().measure_gradients()

    def step(self, closure=None):
        with self.cost.joined():
            parameters = [p for group in self.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, self._measured_norm)
        with self.cost.joined():
            for parameter in parameters:
                first, second = self.moments[parameter]
                parameter.data.addcdiv_(first.mul_(0.9), second.mul_(0.9))


def pretend(module: torch.nn.Module, device: torch.device) -> None:
    """Replace a module's parameters and buffers by fake ones on a device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device=device)
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=device)


def made_up_match(self: HungarianMatcher, predictions, targets) -> Matches:
    """Cost what matching costs, and match the first queries."""
    layers, images = predictions.logits.shape[:2]
    device = predictions.logits.device
    finite = (predictions.logits.isfinite().all(-1) & predictions.boxes.isfinite().all(-1)).all(2).all(0)
    torch.cat([self.costs(predictions, targets).flatten(), finite]).cpu()
    image = [i for i, target in enumerate(targets) for _ in range(len(target))]
    query = [[j for target in targets for j in range(len(target))]] * layers
    index = [list(range(len(image)))] * layers
    uploaded = (upload(values, device, torch.long) for values in (image, query, index))
    return Matches(*uploaded, finite=[True] * images)


def batches(size: tuple[int, int], batch: int, boxes: int, num_classes: int) -> Iterator[list[dict]]:
    """Yield the same images for ever, the first one as large as ``size``, the others narrower."""
    inputs = []
    for index in range(batch):
        height, width = size[0], size[1] if index == 0 else size[1] * 4 // 5
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[1.0, 1, width - 1, height - 1]] * boxes))
        instances.gt_classes = torch.arange(boxes) % num_classes
        inputs.append({"image": torch.zeros(3, height, width, dtype=torch.uint8), "instances": instances})
    while True:
        yield inputs


class Loader:
    """What a training step asks its loader for."""

    seed = 1

    def __init__(self, inputs: Iterator[list[dict]]):
        self.inputs = inputs

    def __iter__(self):
        return self.inputs


def measure(cfg, size: tuple[int, int], batch: int, boxes: int) -> Cost:
    """Return the cost of a training step of a model, not its first."""
    backend = torch._C._get_privateuse1_backend_name()
    if backend == "privateuseone":
        _setup_privateuseone_for_python_backend(DEVICE)
        getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        register_autocast(DEVICE)
    device = torch.device(DEVICE)
    model = build_detector(cfg)
    # Targets are made on the CPU from numbers, and then uploaded.
    inputs = next(batches(size, batch, boxes, cfg.MODEL.SAMDETR.NUM_CLASSES))
    with mock.patch.object(type(model), "device", torch.device("cpu")):
        targets = model.prepare_targets(inputs)

    def prepare_targets(_):
        return [type(t)(upload(t.labels, device), upload(t.boxes, device)) for t in targets]

    def preprocess_images(inputs):
        images = [entry["image"].to(device, non_blocking=True) for entry in inputs]
        images = [(image - model.pixel_mean) / model.pixel_std for image in images]
        divisor = max(1, model.backbone.size_divisibility)
        shape = [-(-side // divisor) * divisor for side in size]
        padded = images[0].new_full((len(images), 3, *shape), 0.0)
        for image, place in zip(images, padded):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return ImageList(padded, [tuple(image.shape[-2:]) for image in images])

    model.prepare_targets, model.preprocess_images = prepare_targets, preprocess_images
    cost = Cost()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(HungarianMatcher, "__call__", made_up_match),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", FusedAttention.with_cost(cost)),
        cost,
    ):
        pretend(model, device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = FusedAdamW(parameters, max_norm=cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, cost=cost)
        step = TrainStep(cfg, model, Loader(batches(size, batch, boxes, cfg.MODEL.SAMDETR.NUM_CLASSES)), optimizer)
        step._write_metrics = lambda losses, data_time: None  # they are on the CPU by then
        step.iter = 1
        with torch.no_grad(), step.autocast():
            model(inputs)  # keeps folded norms and embeddings of positions
        forget_casts()
        cost.start_again()
        step.run_step()
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=7, help="per image")
    parser.add_argument("--places", action="store_true", help="name the places that wait, and the commonest operations")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE")
    arguments = parser.parse_args()
    if min(*arguments.size, arguments.batch, arguments.boxes) < 1:
        raise UserError("--size, --batch and --boxes must be 1 or more.")
    cfg = samdetr.load_config(arguments.config_file, [*arguments.opts, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    if cfg.MODEL.META_ARCHITECTURE != "SAMDETR":
        raise UserError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}: this counts for SAMDETR only.")
    cost = measure(cfg, tuple(arguments.size), arguments.batch, arguments.boxes)
    result = {
        "waits": sum(cost.waits.values()),
        "operations": sum(cost.operations.values()),
        "traffic_gb": round(cost.traffic / 1e9, 1),
        "peak_gib": round(cost.peak / 2**30, 2),
    }
    if arguments.places:
        result |= {"places": dict(cost.waits), "commonest": dict(cost.operations.most_common(20))}
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
