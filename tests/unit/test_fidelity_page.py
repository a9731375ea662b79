"""The page of docs/fidelity.md: sections can be made again one by one."""

import importlib
import sys

import pytest

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
fidelity = importlib.import_module("fidelity")
Page, Run, Section = (getattr(importlib.import_module("fidelity_page"), n) for n in ("Page", "Run", "Section"))


def a_section(name, figure, **more):
    def compare(page, run):
        page.table(name, "figure")
        page.row(name, str(figure), ok=figure < 10)

    return Section(name, compare, f"- **{name}**: itself.\n", **more)


def made(*sections):
    return fidelity.compare(list(sections), Run(ROOT, []))


def test_one_section_is_replaced_and_the_others_stay(tmp_path):
    every = {"left": a_section("left", 1, short="all"), "right": a_section("right", 2)}
    page = tmp_path / "page.md"
    lines, missed = made(*every.values())
    page.write_text(fidelity.render("intro\n", every, lines))
    assert not missed
    assert "- left: all\n- right: nothing\n" in page.read_text()
    again, _ = made(a_section("right", 3))
    page.write_text(fidelity.render("intro\n", every, fidelity.earlier(page, "intro\n") | again))
    kept = fidelity.earlier(page, "intro\n")
    assert kept == {"left": lines["left"], "right": again["right"]}
    assert page.read_text().endswith("- **left**: itself.\n- **right**: itself.\n")


def test_sections_of_other_versions_are_not_mixed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(fidelity.render("torch 1\n", {}, {}))
    with pytest.raises(SystemExit, match="other versions"):
        fidelity.earlier(page, "torch 2\n")


def test_a_figure_that_misses_is_told():
    assert made(a_section("bad", 11), a_section("good", 1))[1] == ["bad | 11"]


def test_a_section_without_its_package_is_left_out():
    assert made(a_section("rare", 1, needs="no_such_package"))[0] == {}


def test_the_page_that_lies_in_docs_can_be_read_by_section():
    text = (ROOT / "docs/fidelity.md").read_text()
    introduction = text[: text.index("<!-- section")]
    assert set(fidelity.earlier(ROOT / "docs/fidelity.md", introduction)) <= set(fidelity.SECTIONS)
