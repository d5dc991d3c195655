"""The documents: short, plainly written, without dead links, all listed, and showing what the code is."""

import re
import statistics
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import yaml
from fork_server import ROOT
from models import make_config
from transformers import PreTrainedTokenizerBase

from fullft.data.describe import show_row
from fullft.data.load import tokenise_rows

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")] + sorted(
    DOCS.rglob("*.md")
)
MOST_LINES = 150  # of README, and of train.py
MOST_WORDS = 18  # of the median sentence

# ---------------------------------------------------------------------------------------------- reading Markdown


def without_code(markdown: str) -> str:
    """Drop fenced blocks and HTML comments."""
    return re.sub(r"^```.*?^```\n?|<!--.*?-->\n?", "", markdown, flags=re.DOTALL | re.MULTILINE)


def anchors(markdown: str) -> set[str]:
    """List the anchors of a page's headings that GitHub and mkdocs agree about."""
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", without_code(markdown), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        words = re.sub(r"[^\w\s-]", "", text).strip().lower()
        ascii_words = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
        if (slug := words.replace(" ", "-")) == re.sub(r"[-\s]+", "-", ascii_words):
            found.add(slug)
    return found


def broken_links(page: Path, markdown: str) -> list[str]:
    """List the relative links and images of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(markdown)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        # A site of docs/ alone has nothing outside of that folder.
        exists = target.exists() and (DOCS in target.parents or DOCS not in page.parents)
        if not exists or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def sentences(markdown: str) -> list[str]:
    """Split a page's prose: no code, tables, headings or pictures; each item of a list begins anew."""
    blocks = [""]
    for line in without_code(markdown).splitlines():
        if re.match(r"\s*(\||#{1,6} |!\[|$)", line):
            blocks.append("")
        elif item := re.match(r"\s*([-*]|\d+\.) +(.*)", line):
            blocks.append(item[2])
        else:
            blocks[-1] += f" {line.strip()}"
    ends = re.compile(r"(?<=[.!?])[)\"*_]*\s+")
    text = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", block).strip() for block in blocks]
    code = [re.sub(r"`[^`]*`", "`code`", block) for block in text]
    return [each for block in code for each in ends.split(block) if len(each.split()) > 1]


def median_words(markdown: str) -> float:
    """Count the words of the median sentence."""
    return statistics.median(len(sentence.split()) for sentence in sentences(markdown))


def listed(entries: object) -> list[str]:
    """List the pages of a navigation, however deep."""
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in listed(part)]  # type: ignore[attr-defined]


def missing_lines(shown: str, code: str) -> list[str]:
    """List the lines shown that the code does not have, comments aside."""
    there = {line.split("  #")[0].strip() for line in code.splitlines()}
    lines = [line.split("  #")[0].strip() for line in shown.splitlines()]
    return [line for line in lines if line not in {*there, "", "..."} and not line.startswith("#")]


def the_loop() -> str:
    (shown,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return shown


def between_markers(page: str) -> str:
    return page.split("<!-- options:begin -->")[1].split("<!-- options:end -->")[0].strip()


def unnamed(names: Iterable[str], text: str) -> list[str]:
    """List the files and folders that a text does not name; a longer name does not count for a shorter one."""
    return [name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}", text)]


# ---------------------------------------------------------------------------------------------- short and plain


def test_readme_is_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_train_py_is_at_most_150_lines() -> None:
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_readme_sentences_are_short() -> None:
    assert median_words(README) <= MOST_WORDS


def test_docs_sentences_are_short() -> None:
    assert median_words("\n\n".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))) <= MOST_WORDS


def test_long_sentences_are_counted() -> None:
    long = "word " * (MOST_WORDS + 1)
    assert median_words(f"{long}. Short one.\n\n- {long}\n") > MOST_WORDS
    assert median_words(f"# {long}\n\n| {long} |\n\n```\n{long}\n```\nA short one.\n") == 3


# ---------------------------------------------------------------------------------------------- linked and listed


def test_links_lead_somewhere() -> None:
    broken = {page.name: broken_links(page, page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name: links for name, links in broken.items() if links} == {}


def test_dead_links_are_found() -> None:
    page = ROOT / "README.md"
    assert broken_links(page, "[a](docs/none.md) ![b](none.png) [c](docs/index.md#none) [d](#none)") == [
        *("docs/none.md", "none.png", "docs/index.md#none", "#none")
    ]
    assert broken_links(page, "# Some `words`, here\n[a](docs/index.md) [b](https://example.org/none)") == []
    assert broken_links(DOCS / "index.md", "[outside of the site](../README.md)") == ["../README.md"]


def test_anchors_are_those_of_headings() -> None:
    assert anchors("# One `two`, three\n\n```\n# four\n```\n## five & six\n") == {"one-two-three"}


def test_every_page_is_listed_once() -> None:
    nav = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_nested_navigation_is_read() -> None:
    assert listed([{"a": "a.md"}, {"b": [{"c": "c.md"}, "d.md"]}]) == ["a.md", "c.md", "d.md"]


# ---------------------------------------------------------------------------------------------- as the code is


def test_loop_shown_is_train_py() -> None:
    shown, code = the_loop(), (ROOT / "train.py").read_text(encoding="utf-8")
    assert len([line for line in shown.splitlines() if line.strip() and "#" not in line]) > 15
    assert missing_lines(shown, code) == []


def test_changed_loop_is_noticed() -> None:
    code = (ROOT / "train.py").read_text(encoding="utf-8")
    assert missing_lines("optimizer.step()\noptimizer.leap()\n# a comment\n...", code) == ["optimizer.leap()"]


def test_options_table_is_the_generated_one() -> None:
    page = (DOCS / "reference" / "options.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "fullft.config.options"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert between_markers(page) == printed.strip()
    assert "`--model`" in printed


def test_options_table_ends_at_its_markers() -> None:
    assert between_markers("a\n<!-- options:begin -->\n\nb\n\n<!-- options:end -->\nc") == "b"


def test_readme_names_every_folder() -> None:
    layout = README.split("## Layout")[1]
    paths = [path for path in (ROOT / "fullft").iterdir() if not path.name.startswith(("_", "."))]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in paths if path.is_dir() or path.suffix == ".py"]
    assert unnamed(names, layout) == []


def test_layout_page_names_every_module() -> None:
    layout = (DOCS / "internals" / "layout.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "fullft").rglob("*.py") if path.name != "__init__.py"}
    assert unnamed(sorted(modules), layout) == []


def test_unnamed_modules_are_found() -> None:
    assert unnamed(["loss.py", "head.py", "data/"], "`my_loss.py`, `head.py`, docs/data/") == ["loss.py", "data/"]


def previews(page: str) -> list[tuple[str, str]]:
    """Return the rows of a page, and what it says becomes of each."""
    return re.findall(r"<!-- preview -->\n```json\n(.*?)\n```\n\n```text\n(.*?)\n```", page, re.DOTALL)


def test_rows_shown_become_what_the_page_says(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    page = (DOCS / "guides" / "data.md").read_text(encoding="utf-8")
    shown = previews(page)
    assert len(shown) == page.count("<!-- preview -->") == 6
    for row, text in shown:
        (tmp_path / "row.jsonl").write_text(row)
        _, _, tokenised = tokenise_rows(make_config(dataset=str(tmp_path / "row.jsonl")), tokenizer)
        assert [show_row(each, tokenizer) for each in tokenised] == [text]
