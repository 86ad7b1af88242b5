"""The command that shows recipes, and the page it writes."""

from pathlib import Path

from distill.cli import main
from distill.recipes.recipe import recipes

PAGE = Path(__file__).parents[2] / "docs/recipes.md"


def test_the_page_is_the_table_s(capsys):
    assert main(["recipes", "--page"]) == 0
    assert capsys.readouterr().out == PAGE.read_text("utf-8"), "distill recipes --page > docs/recipes.md"


def test_all_are_listed_and_each_tells_its_sources(capsys):
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(recipes())
    for name, recipe in recipes().items():
        assert main(["recipes", name]) == 0
        out = capsys.readouterr().out
        assert all(part in out for part in (recipe.title, recipe.licence, recipe.link, *recipe.sources)), name


def test_no_such_recipe(capsys):
    assert main(["recipes", "turbo"]) == 2
    assert "'turbo' is no recipe; there are sd-turbo" in capsys.readouterr().err
