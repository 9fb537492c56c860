"""The documentation as a site: built strictly, in both languages, and complete in itself."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs_static_i18n", reason="pip install 'gemma2-stream[docs]' builds it")

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if "." not in path.stem)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
# Of <link>, these name a place and load nothing.
NAMES = {"canonical", "alternate", "prev", "next"}


class Page(HTMLParser):
    """What a page loads, where it leads, and the anchors that lead into it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values.get("id", ""), values.get("name", "")}
        self.classes |= {*values.get("class", "").split()}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADS and LOADS[tag] in values and values.get("rel") not in NAMES:
            self.loads.append(values[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command of `make docs`; a warning fails it, a dead link or anchor among them."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.parametrize("name", PAGES)
def test_each_page_is_there_in_both_languages(site: Path, name: str) -> None:
    """Under its own heading, with a way to the other language."""
    folder = "" if name == "index" else name
    for language, suffix in (("en", ""), ("zh", ".zh-CN")):
        path = site / ("zh-CN" if suffix else "") / folder / "index.html"
        source = ROOT / "docs" / f"{name}{suffix}.md"
        if not source.exists():  # the API reference
            source = ROOT / "docs" / f"{name}.md"
        text = path.read_text("utf-8")
        title = source.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        heading = re.search(r"<h1[^>]*>(.*?)<a class=\"headerlink\"", text)
        assert heading is not None
        assert re.sub(r"<.*?>", "", heading[1]) == title.replace("`", "")
        assert f'<html lang="{language}"' in text
        assert 'hreflang="en"' in text
        assert 'hreflang="zh-CN"' in text


def test_nothing_comes_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    """Every script, style, picture and font is a file of the site."""
    for path, page in pages.items():
        foreign = [url for url in page.loads if urlsplit(url).netloc]
        assert foreign == [], path
        # The theme would fetch a drawing library for these.
        assert not page.classes & {"mermaid", "arithmatex"}, path
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", style.read_text("utf-8")), style


def test_every_link_leads_to_a_place_that_is_there(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()), f"{path}: {link}"
            assert target.exists(), f"{path}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].anchors, f"{path}: {link}"


@pytest.mark.parametrize(
    ("name", "readme", "heading"),
    [
        ("streaming", "README.md", "What is guaranteed"),
        ("parameters", "README.md", "Parameters"),
        ("zh-CN/streaming", "README.zh-CN.md", "保证什么"),
        ("zh-CN/parameters", "README.zh-CN.md", "命令行"),
    ],
)
def test_what_readme_says_once_is_shown(site: Path, name: str, readme: str, heading: str) -> None:
    """A section whole, as far as its code tells."""
    section = (ROOT / readme).read_text("utf-8").partition(f"\n## {heading}\n")[2]
    prose = re.sub(r"(?ms)^```.*?^```$", "", section.partition("\n## ")[0])
    page = (site / name / "index.html").read_text("utf-8")
    shown = {html.unescape(each) for each in re.findall(r"<code>(.*?)</code>", page)}
    assert set(re.findall(r"`([^`\n]+)`", prose)) <= shown


def test_search_knows_both_languages(site: Path) -> None:
    """Chinese is cut into words, without which only whole sentences could be found."""
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    words = {"en": "callback", "zh": "\u200b回调\u200b"}
    found = {
        "zh" if entry["location"].startswith("zh-CN/") else "en"
        for entry in index["docs"]
        if any(word in entry["text"] for word in words.values())
    }
    assert index["config"]["lang"] == ["en", "zh"]
    assert found == {"en", "zh"}


def test_the_api_reference_has_every_public_name(pages: dict[Path, Page], site: Path) -> None:
    import gemma2_stream

    anchors = pages[site / "api" / "index.html"].anchors
    assert {f"gemma2_stream.{name}" for name in gemma2_stream.__all__} <= anchors
    assert "gemma2_stream.testing.FakeEngine" in anchors
