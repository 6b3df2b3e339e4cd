"""Tables at 80 columns, which is what they have wherever there is no terminal."""


def assert_readable(text: str, *names: str) -> None:
    """No line is longer than 80 characters, nothing is cut off, and each of these names stands in a line."""
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "…" not in text
    assert [name for name in names if name not in text] == []
