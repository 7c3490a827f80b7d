"""The page of all keys is that of the schema, and every key says what it does."""

import keys_table


def test_the_page_is_made_from_the_schema() -> None:
    assert keys_table.PAGE.read_text() == keys_table.page(), "python tests/support/keys_table.py"


def test_every_key_has_its_row() -> None:
    page = keys_table.page()
    assert page.count("\n| `") > 60
    assert "|  |\n" not in page, "a key without a word in its docstring"
    assert all(f"\n## {key}\n" in page for key in ("data", "encoder", "objective moco", "runtime"))
