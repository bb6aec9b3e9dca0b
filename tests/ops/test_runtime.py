"""samdetr.ops.runtime: precision, recomputation, and copies to the device."""

import subprocess
import sys

import pytest
import torch

from processes import environment
from samdetr.ops.runtime import exact_products, run_layer, upload


def test_exact_products_end_where_they_began():
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.randn(4, 4)
            with exact_products(x.device):
                assert torch.get_float32_matmul_precision() == "highest"
                assert (x @ x).dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "medium"
            assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), exact_products(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torchs_newer_switches_of_precision_may_be_set():
    """In a process of its own: torch does not go back from them to the older one."""
    code = """
import torch
from samdetr.ops.runtime import exact_products, products_are_exact
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert not products_are_exact()
with exact_products(torch.device("cpu")):
    assert products_are_exact()
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment())


def test_layers_with_random_numbers_draw_the_same_when_recomputed():
    torch.manual_seed(0)
    drawn = []

    def layer(x):
        noise = torch.rand_like(x)
        drawn.append(noise)
        return (x * noise).sin()

    x = torch.randn(5, requires_grad=True)
    run_layer(layer, x, recompute=True).sum().backward()
    assert torch.equal(*drawn)
    drawn.clear()
    run_layer(layer, x, recompute=True, random=False).sum().backward()
    assert not torch.equal(*drawn)  # so it is for layers without any


def test_upload():
    cpu = torch.device("cpu")
    assert torch.equal(upload([[1, 2], [3, 4]], cpu, torch.float32), torch.tensor([[1.0, 2], [3, 4]]))
    tensor = torch.tensor([1, 2])
    assert upload(tensor, cpu) is tensor
    assert upload([1], torch.device("meta")).device.type == "meta"
