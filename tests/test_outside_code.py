"""Other detectron2 code uses the package with two lines, and registers parts of its own."""

import subprocess
import sys
import textwrap

import pytest

from processes import TINY_CONFIG, environment


def run_code(folder, code):
    """Run Python code in a fresh process, with the tiny config's path as its argument."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(code))
    command = [sys.executable, str(path), str(TINY_CONFIG)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(), timeout=300)


@pytest.mark.slow
def test_one_step_inside_detectron2s_own_default_trainer(tmp_path):
    code = """
        import sys
        from detectron2.config import get_cfg
        from detectron2.engine import DefaultTrainer
        import samdetr

        cfg = get_cfg()
        samdetr.add_samdetr_config(cfg)
        cfg.merge_from_file(sys.argv[1])
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.MAX_ITER = 1
        cfg.SOLVER.STEPS = ()
        cfg.DATASETS.TEST = ()
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        print("loss", trainer.storage.latest()["total_loss"][0])
    """
    result = run_code(tmp_path, code)
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(result.stdout.split("loss")[-1]) > 0
    assert (tmp_path / "output" / "sam_detr_digits_instant_test" / "model_final.pth").exists()


@pytest.mark.slow
def test_own_aligner_and_cross_attention_named_in_a_yaml(tmp_path):
    (tmp_path / "own.yaml").write_text(
        f"""
_BASE_: "{TINY_CONFIG}"
MODEL:
  SAMDETR:
    ALIGNER:
      NAME: "CentreAligner"
    CROSS_ATTENTION:
      NAME: "MeanAttention"
"""
    )
    code = """
        import torch
        from torch import nn
        from detectron2.engine import SimpleTrainer
        from detectron2.modeling import build_model
        import samdetr
        from samdetr.checks import check_config
        from samdetr.data import build_train_loader
        from samdetr.solver import build_optimizer

        @samdetr.SEMANTICS_ALIGNER_REGISTRY.register()
        class CentreAligner(nn.Module):
            def __init__(self, cfg, predict_scales):
                super().__init__()
                assert predict_scales
                self.heads = cfg.MODEL.SAMDETR.NUM_HEADS

            def forward(self, content, reference_boxes, level):
                content = content[:, :, None].expand(-1, -1, self.heads, -1)
                points = reference_boxes[:, :, None, :2].expand(-1, -1, self.heads, -1)
                return samdetr.AlignedQuery(content, content, points, torch.ones_like(points))

        @samdetr.CROSS_ATTENTION_REGISTRY.register()
        class MeanAttention(nn.Module):
            needs_scales = True

            def __init__(self, cfg):
                super().__init__()
                self.output = nn.Linear(cfg.MODEL.SAMDETR.HIDDEN_DIM, cfg.MODEL.SAMDETR.HIDDEN_DIM)

            def forward(self, query, levels, index):
                return self.output(query.content.mean(2) + levels[index].features.mean((1, 2))[:, None])

        cfg = samdetr.load_config("own.yaml", ["MODEL.DEVICE", "cpu"])
        check_config(cfg, training=True)
        model = build_model(cfg)
        trainer = SimpleTrainer(model, build_train_loader(cfg), build_optimizer(cfg, model))
        before = model.decoder.layers[0].cross_attention.output.weight.detach().clone()
        trainer.train(0, 1)
        assert not torch.equal(before, model.decoder.layers[0].cross_attention.output.weight)
        print(type(model.decoder.layers[0].aligner).__name__)
    """
    result = run_code(tmp_path, code)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("CentreAligner")
