"""Called by MkDocs: documents that read well in the repository become pages of the site.

There, they lead to files beside docs/, name the language in their links, and begin with a line that
leads to the other one; the site has a switch for that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
BESIDE = ("benchmarks/results", "examples")
LANGUAGES = {"en": "", "zh-CN": "zh-CN/"}


@event_priority(-200)  # after the plugin for languages, which knows files of docs/ alone
def on_files(files: Files, config: Any) -> Files:
    """What is beside docs/, and pages show or lead to, comes with the site, once a language."""
    language = config.plugins["i18n"].current_language
    beside = (file for folder in BESIDE for file in (ROOT / folder).rglob("*.*"))
    for path in sorted(file for file in beside if file.suffix != ".pyc"):
        made = {name: _file(path, prefix, config) for name, prefix in LANGUAGES.items()}
        made[language].alternates = made
        made[language].locale = made[language].locale_alternate_of = language
        files.append(made[language])
    return files


def _file(path: Path, prefix: str, config: Any) -> Any:
    name = path.relative_to(ROOT).as_posix()
    inclusion = InclusionLevel.NOT_IN_NAV
    file = File.generated(config, name, abs_src_path=str(path), inclusion=inclusion)
    file.dest_uri = prefix + file.dest_uri
    return file


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them, where docs/ is the root; what README says once is shown here."""
    name = page.file.src_uri
    if name.startswith(BESIDE):
        return markdown.replace("](../../docs/", "](../../")
    readme = "README.zh-CN.md" if ".zh-CN." in name else "README.md"
    once = re.compile(r"^.*\n\n<!-- README: (.*) -->$", re.MULTILINE)
    markdown = once.sub(lambda found: _section(readme, found[1]), markdown)
    markdown = re.sub(r"^\[(English|简体中文)\]\(.*\n", "", markdown, flags=re.MULTILINE)
    markdown = markdown.replace("](../", "](").replace("](docs/", "](")
    return re.sub(r"(\]\([\w-]+)\.zh-CN\.md", r"\1.md", markdown)


def _section(readme: str, heading: str) -> str:
    """What stands under a heading."""
    _, found, rest = (ROOT / readme).read_text("utf-8").partition(f"\n## {heading}\n")
    if not found:
        raise PluginError(f"{readme} has no section {heading!r}")
    return rest.partition("\n## ")[0].strip()


@event_priority(-200)
def on_page_context(context: Any, config: Any, **_: Any) -> Any:
    """The switch leads to places of this site, wherever it is served."""
    for alternate in config.extra.alternate:  # an attribute of the plugin's, not the item
        alternate["link"] = alternate["link"].removeprefix("/") or "./"
    return context
