"""The documentation: its Python blocks run, its links exist, and every public name has a docstring and an entry."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.tolerances import TOLERANCE, TOLERANCE_ON

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("bench/**/*.md"), *ROOT.glob("examples/**/*.md")]
PACKAGES = ("llm_ext", "llm_ext.ops", "llm_ext.reference", "llm_ext.nn", "llm_ext.models", "llm_ext.cli")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page run one after the other in one namespace."""
    torch.manual_seed(0)
    text = page.read_text()
    if "from transformers import" in text:
        pytest.importorskip("transformers", minversion="5.24")
    namespace: dict[str, object] = {}
    for match in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback shows the line of the page.
        code = "\n" * text.count("\n", 0, match.start(1)) + match[1]
        exec(compile(code, str(page), "exec"), namespace)


def test_readme_and_guides_have_blocks() -> None:
    with_blocks = {name_of(page) for page in PAGES if blocks_of(page)}
    guides = {"layers", "attention", "models", "ops", "installation", "conversion", "export", "hugging-face", "privacy"}
    assert {"README.md", *(f"docs/guides/{guide}.md" for guide in guides)} <= with_blocks


def anchors_of(page: Path) -> set[str]:
    """The anchors that MkDocs gives the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_exist(page: Path) -> None:
    """MkDocs checks the links of the site; this also checks those of README.md and the other pages outside of it."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors_of(file), f"{name_of(page)} links to {target}, which is no heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_wrapped(page: Path) -> None:
    """Prose is wrapped at 120 columns; tables, formulas and code are not."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


@pytest.mark.parametrize("name", ["docs/guides", "docs/internals", "docs/lab", "docs/math", "docs/reference"])
def test_every_page_is_in_the_navigation(name: str) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in (ROOT / name).glob("*.md") if str(page.relative_to(DOCS)) not in navigation]
    assert missing == [], f"mkdocs.yml does not list these pages of {name}"


@pytest.mark.parametrize(
    ("index", "pages"),
    [("docs/index.md", DOCS.glob("guides/*.md")), ("examples/README.md", (ROOT / "examples").glob("[!_]*"))],
    ids=["guides", "examples"],
)
def test_an_index_leads_to_every_page(index: str, pages: Iterable[Path]) -> None:
    folder = (ROOT / index).parent
    links = re.findall(r"\]\(([^)\s#]+)", (ROOT / index).read_text())
    found = {(folder / link).resolve() for link in links}
    missing = [page.name for page in pages if page.name != "README.md" and not {page, page / "README.md"} & found]
    assert missing == [], f"{index} does not link to these"


def public(package: str) -> list[tuple[str, object]]:
    module = importlib.import_module(package)
    return [(name, getattr(module, name)) for name in module.__all__]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_a_docstring(package: str) -> None:
    """Every public name, and every public method that llm_ext defines in a public class, has a docstring."""
    missing = []
    for name, value in public(package):
        if not inspect.getdoc(value):
            missing.append(name)
        if not inspect.isclass(value):
            continue
        for base in value.__mro__:
            if not base.__module__.startswith("llm_ext"):
                continue
            for member, definition in vars(base).items():
                # torch.nn.Module documents its hook extra_repr; other overrides need a docstring of their own.
                if member.startswith("_") or member == "extra_repr":
                    continue
                function = definition.fget if isinstance(definition, property) else definition
                if inspect.isfunction(function) and not function.__doc__:
                    missing.append(f"{name}.{member}")
    assert missing == [], f"{package}: these public names have no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_in_the_api_reference(package: str) -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$|^        - (\w+)$", text, re.MULTILINE))
    entries = {full.rpartition(".")[2] or short for full, short in listed}
    names = {name for name, value in public(package) if not isinstance(value, ModuleType)}
    assert names <= entries, f"docs/reference lists none of {sorted(names - entries)}"


def test_tolerances_are_those_of_the_tests() -> None:
    """docs/math/precision.md repeats the table of tolerances."""
    cpu, _, cuda = (DOCS / "math/precision.md").read_text().partition("## CUDA")
    rows = re.findall(r"^\| (b?float\d\d) \| (\S+) \| (\S+) \|", cpu, re.MULTILINE)
    found = {dtype: (float(forward), float(backward)) for dtype, forward, backward in rows}
    assert len(found) == 4, "the search finds the table of the recurrences"
    for dtype, values in found.items():
        expected = TOLERANCE["lstm", getattr(torch, dtype)], TOLERANCE["lstm_backward", getattr(torch, dtype)]
        assert values == expected, f"recurrences, {dtype}"
    columns = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for op in ("attention_pool", "prefix_pool", "additive_attention"):
        row = re.search(rf"^\| `{op}` \|(.+)\|$", cpu, re.MULTILINE)
        assert row is not None
        for dtype, cell in zip(columns, row[1].split("|"), strict=True):
            forward, backward = (float(value) for value in cell.split("/"))
            assert (forward, backward) == (TOLERANCE[op, dtype], TOLERANCE[f"{op}_backward", dtype]), f"{op}, {dtype}"
    for name, *numbers in re.findall(r"^\| (\w+16) \| (\S+) \| (\S+) \|", cuda, re.MULTILINE):
        dtype = getattr(torch, name)
        on_cuda = {**TOLERANCE, **TOLERANCE_ON["cuda"]}
        assert [float(number) for number in numbers] == [on_cuda["lstm", dtype], on_cuda["lstm_backward", dtype]]


def test_makefile_names_the_packages_of_pyproject() -> None:
    """`make` installs the extras by name; only the packages that come before the build are listed again."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    makefile = (ROOT / "Makefile").read_text()

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}

    def variable(name: str) -> set[str]:
        found = re.search(rf"^{name} := (.+)$", makefile, re.MULTILINE)
        assert found is not None
        return set(found[1].split()) - {"$(BUILD_NEEDS)"}

    build = names(project["build-system"]["requires"])
    extras = project["project"]["optional-dependencies"]
    assert variable("BUILD_NEEDS") == build
    assert variable("GPU_NEEDS") == names(extras["test"])
    assert variable("WHEEL_NEEDS") == names(extras["wheel"])
    pinned = names([line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalnum()])
    pinned_extras = ("cli", "data", "hf", "tune", "privacy", "export", "test", "lint", "wheel", "docs")
    needed = build.union(*(names(extras[extra]) for extra in pinned_extras))
    assert needed <= pinned, f"constraints.txt does not pin {sorted(needed - pinned)}"
