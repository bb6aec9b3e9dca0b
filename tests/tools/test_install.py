"""setup.py's choice of detectron2, and the messages of tools/install.py."""

import hashlib
import importlib.util
import runpy
import shutil
import sys

import install
import pytest
import setuptools

from helpers import ROOT


@pytest.fixture
def requirement(monkeypatch):
    """``setup.py``'s detectron2 requirement, as if detectron2 was installed or not."""

    def run(installed, given=None):
        find_spec = importlib.util.find_spec
        hidden = () if installed else ("detectron2",)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name))
        monkeypatch.setattr(setuptools, "setup", lambda **options: None)
        monkeypatch.delenv("DETECTRON2", raising=False)
        if given is not None:
            monkeypatch.setenv("DETECTRON2", given)
        return runpy.run_path(str(ROOT / "setup.py"))["detectron2_requirement"]()

    return run


def test_an_installed_detectron2_is_not_replaced(requirement, tmp_path):
    assert requirement(installed=True) == []
    assert requirement(installed=True, given=str(tmp_path)) == []


def test_detectron2_comes_from_its_repository_at_a_commit(requirement):
    (found,) = requirement(installed=False)
    assert found.startswith("detectron2 @ git+https://github.com/facebookresearch/detectron2@") and len(found) > 100


def test_detectron2_may_come_from_elsewhere(requirement, tmp_path):
    assert requirement(installed=False, given=str(tmp_path)) == [f"detectron2 @ {tmp_path.as_uri()}"]
    mirror = "git+https://mirror.example/detectron2@main"
    assert requirement(installed=False, given=mirror) == [f"detectron2 @ {mirror}"]
    assert requirement(installed=False, given="detectron2==0.6") == ["detectron2==0.6"]


def test_without_torch_the_install_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"torch is missing here.*--no-build-isolation"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"setup failed: a C\+\+ compiler is missing.*apt-get install g\+\+"):
        install.check_compiler()


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(SystemExit, match=r"setup failed: Python 3\.10 or newer is needed"):
        install.check_machine()


def test_a_failing_step_ends_in_one_line_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(install, "PYTHON", tmp_path / "python")
    (tmp_path / "python").write_text("#!/bin/sh\necho $* >> $(dirname $0)/calls\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(SystemExit, match=r"setup failed: no package index could be reached.*check the network"):
        install.main()
    assert not (tmp_path / "stamp").exists()


def test_an_environment_that_is_up_to_date_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("DETECTRON2", raising=False)
    source = (ROOT / "setup.py").read_bytes() + (ROOT / "tools" / "install.py").read_bytes()
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(install, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(install, "run", lambda *arguments: pytest.fail("something was installed"))
    (tmp_path / "stamp").write_text(hashlib.sha256(source).hexdigest())
    (tmp_path / "python").touch()
    install.main()
