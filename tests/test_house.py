"""The house keeps its shape: rooms, doors between them, public names, sizes."""

import ast
import statistics
import subprocess
from pathlib import Path

import pytest

import dflash_core

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "dflash_core").rglob("*.py"))
APP = sorted((ROOT / "app").rglob("*.py"))
SOURCES = [*CORE, *APP, ROOT / "app.py"]


def imported(path: Path) -> set[str]:
    """Full dotted names of every module or name a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def reaches(path: Path, room: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for name in imported(path))


def test_top_level_is_exactly_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} == {
        "app", "dflash_core", "assets", "tests", "app.py", "requirements.txt", "README.md", "LICENSE",
    }  # fmt: skip


def test_public_names_are_exact_and_sorted():
    assert dflash_core.__all__ == [
        "DFlashDraftModel", "DFlashError", "DFlashPipeline", "DFlashTokenDiffusionScheduler", "DraftConfig", "Finish",
        "Pair", "Prefill", "SamplingParams", "Step", "decode", "load_pair", "pair_names", "transformers_decode",
    ]  # fmt: skip
    for name in dflash_core.__all__:
        value = getattr(dflash_core, name)
        assert callable(value) and value.__doc__, f"{name} needs a docstring"


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_core_knows_nothing_of_the_app(path):
    for room in ("app", "gradio"):
        assert not reaches(path, room)


@pytest.mark.parametrize("path", APP, ids=lambda p: str(p.relative_to(ROOT)))
def test_app_enters_the_core_by_its_front_door_only(path):
    assert not reaches(path, "torch") and not reaches(path, "transformers")
    inside = {name for name in imported(path) if name.startswith("dflash_core.")}
    assert inside <= {f"dflash_core.{name}" for name in dflash_core.__all__}


def test_the_loop_names_no_model_class_and_no_library():
    for room in ("transformers", "dflash_core.model", "gradio", "plotly"):
        assert not reaches(ROOT / "dflash_core/decode.py", room)


def test_the_draft_model_is_plain_pytorch():
    assert not reaches(ROOT / "dflash_core/model.py", "transformers.models")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_introduce_themselves_and_fit_one_sitting(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    assert ast.get_docstring(ast.parse(text)), "a module docstring says what it does and what it refuses to know"


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.body[0].lineno + 1


def test_functions_are_short():
    lengths = dict(pair for path in SOURCES for pair in functions(path))
    assert {name: n for name, n in lengths.items() if n > 70} == {}
    assert statistics.median(lengths.values()) <= 10


def test_weights_never_come_from_pickles_or_remote_code():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("torch", "pickle"), path
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}: a bare except hides bugs"
