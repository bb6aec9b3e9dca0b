"""Fast kernels, each beside a readable twin. This folder imports nothing else of the package.

How to read it: each kernel comes in up to three parts.

* ``name`` is what the model calls. Its docstring states shapes and meaning. While a model is traced, exported or compiled,
  it calls ``name_plain``, so that the graph consists of ordinary operations.
* ``name_plain`` computes the same in a few lines. Read this one to learn what the kernel does; the tests compare the two,
  outputs and gradients.
* ``_Name`` is the ``torch.autograd.Function`` behind ``name``. It works block by block (``blocks.py``), so that no large
  intermediate result exists at once, and recomputes in the backward pass what would be expensive to keep.

``triton_attention.py`` and ``triton_sampling.py`` hold the same two kernels for GPUs, in Triton, with the same plain twins.
``roi_align.py`` has one more twin: ``torchvision.ops.roi_align``, which the tests compare with.
"""
