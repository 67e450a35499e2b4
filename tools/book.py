"""Sphinx extension of the book: hides directives, numbers chapters, repairs scripts, links."""

import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as Collector

ROOT = Path(__file__).resolve().parent.parent
NAVBAR = ("navbar_start", "navbar_center", "navbar_end", "navbar_persistent")


def strip_directives(app, doctree):
    """Hide `#| ...` lines from readers only: the execution cache is keyed by the code."""
    for block in doctree.findall(nodes.literal_block):
        lines = block.astext().splitlines()
        if any(line.startswith("#|") for line in lines):
            block.rawsource = "\n".join(x for x in lines if not x.startswith("#|"))
            block.children = [nodes.Text(block.rawsource)]


def number_by_file(app):
    """Number chapters as their files: 10_ddpm is chapter 10, its first equation (10.1)."""
    assign = Collector.assign_section_numbers

    def assign_by_file(self, env):
        changed = assign(self, env)
        for name, numbers in env.toc_secnumbers.items():
            if not (match := re.match(r"(\d\d)_", name)):
                continue
            chapter = int(match[1])
            env.toc_secnumbers[name] = {k: n and (chapter, *n[1:]) for k, n in numbers.items()}
            for node in [env.titles[name], *env.tocs[name].findall(nodes.reference)]:
                if node.get("secnumber"):
                    node["secnumber"] = [chapter, *node["secnumber"][1:]]
        return changed

    Collector.assign_section_numbers = assign_by_file


def drop_repeated_scripts(app, pagename, templatename, context, doctree):
    """Keep one copy of each inline script: sphinx-thebe adds its own twice, a script error."""
    seen, kept = set(), []
    for script in context.get("script_files", []):
        body = (getattr(script, "attributes", None) or {}).get("body")
        if body is None or body not in seen:
            kept.append(script)
        seen.add(body)
    context["script_files"] = kept


def theme_options(app, config):
    """No second search bar; launch buttons and links once settings.ini names a public address."""
    config.html_theme_options.update(dict.fromkeys(NAVBAR, []))
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    settings = parser["DEFAULT"]
    if settings["git_url"].strip():
        config.html_theme_options.update(
            repository_url=settings["git_url"].strip(),
            repository_branch=settings["branch"],
            path_to_docs="nbs",
            use_repository_button=True,
            use_issues_button=True,
            use_edit_page_button=True,
            launch_buttons={
                "notebook_interface": "jupyterlab",
                "binderhub_url": "https://mybinder.org",
                "colab_url": "https://colab.research.google.com",
            },
        )


def setup(app):
    app.connect("builder-inited", number_by_file)
    app.connect("doctree-read", strip_directives)
    app.connect("html-page-context", drop_repeated_scripts, priority=990)
    app.connect("config-inited", theme_options, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
