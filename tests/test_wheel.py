"""The installed package, without a checkout: a wheel holds code, configs and the command."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

from processes import PACKAGE, ROOT, environment
from samdetr import __version__


@pytest.mark.slow
def test_a_wheel_works_from_any_directory(tmp_path):
    source = tmp_path / "source"  # a copy, since building leaves files behind
    for name in ("configs", "projects"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        tmp_path,
        ".",
    ]
    built = subprocess.run([*map(str, command)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (information,) = (tmp_path / "installed").glob("samdetr-*.dist-info")
    assert "samdetr = samdetr.cli:main" in (information / "entry_points.txt").read_text()
    required = [
        line for line in (information / "METADATA").read_text().splitlines() if line.startswith("Requires-Dist")
    ]
    assert len(required) > 10 and not any("@" in line for line in required)  # which a package index refuses
    assert (tmp_path / "installed" / "samdetr" / "py.typed").exists()
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    found = {
        str(path.relative_to(tmp_path / "installed" / "samdetr")) for path in (tmp_path / "installed").rglob("*.yaml")
    }
    assert found == shipped and len(found) > 30
    drawn_with = tmp_path / "installed" / "samdetr" / "visualization"
    assert {path.name for path in drawn_with.iterdir()} >= {"published_training_curves.csv", "report.css", "report.js"}
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "installed")!r})
        import samdetr
        from samdetr.config import config_folder
        assert samdetr.__file__.startswith({str(tmp_path)!r}), samdetr.__file__
        assert str(config_folder()).startswith({str(tmp_path)!r})
        print(samdetr.load_config("sam_detr_pp_smca_dn_R_50_50ep").SOLVER.MAX_ITER)
        from samdetr.cli import main
        main(["--version"])
    """
    paths = [path for path in environment()["PYTHONPATH"].split(os.pathsep) if path and path != str(PACKAGE)]
    variables = {**environment(), "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["375000", "samdetr", __version__] and not result.stderr
