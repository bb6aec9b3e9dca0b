"""tools/install.py's choice of detectron2 and its messages, and the package's requirements."""

import hashlib
import runpy
import shutil
import subprocess
import sys

import install
import pytest
import setuptools

from processes import ROOT, environment
from samdetr.about import INSTALL_DETECTRON2


@pytest.fixture
def requirement(monkeypatch):
    """The requirement that installs detectron2, by what the variable DETECTRON2 says."""

    def run(given=None):
        monkeypatch.delenv("DETECTRON2", raising=False)
        if given is not None:
            monkeypatch.setenv("DETECTRON2", given)
        return install.detectron2_requirement()

    return run


def test_detectron2_comes_from_its_repository_at_a_commit(requirement):
    found = requirement()
    assert found.startswith("detectron2 @ git+https://github.com/facebookresearch/detectron2@") and len(found) > 100
    assert found in INSTALL_DETECTRON2  # what a user is told who has none
    assert found in (ROOT / "README.md").read_text()


def test_detectron2_may_come_from_elsewhere(requirement, tmp_path):
    assert requirement(str(tmp_path)) == f"detectron2 @ {tmp_path.as_uri()}"
    mirror = "git+https://mirror.example/detectron2@main"
    assert requirement(mirror) == f"detectron2 @ {mirror}"
    assert requirement("detectron2==0.6") == "detectron2==0.6"


def test_the_package_requires_nothing_by_address(monkeypatch):
    """A package index refuses such packages."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    requirements = [*given["install_requires"], *(line for extra in given["extras_require"].values() for line in extra)]
    assert "pycocotools" in requirements and not any("@" in line for line in requirements)


def test_without_detectron2_the_import_names_the_line_that_brings_it():
    code = "import sys; sys.modules['detectron2'] = None; import samdetr"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.stderr.strip().endswith(f"samdetr needs detectron2. This line brings it: {INSTALL_DETECTRON2}")


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
    sources = ("setup.py", "projects/SAMDETR/samdetr/about.py", "tools/install.py")
    source = b"".join((ROOT / path).read_bytes() for path in sources)
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(install, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(install, "run", lambda *arguments: pytest.fail("something was installed"))
    (tmp_path / "stamp").write_text(hashlib.sha256(source).hexdigest())
    (tmp_path / "python").touch()
    install.main()
