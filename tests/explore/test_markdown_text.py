"""Names and ids lose their meaning as Markdown."""

from __future__ import annotations

import pytest

from vista.explore.markdown_text import escaped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (104, "104"),
        ("M*A*S*H", r"M\*A\*S\*H"),
        ("a]b", r"a\]b"),
        ("$5 $6", r"\$5 \$6"),
        ("![x](http://a/b.png)", r"!\[x\](http\://a/b.png)"),
        (":red[x] <b> `c` \\ _d_ ~e~ &amp; # |", r"\:red\[x\] \<b\> \`c\` \\ \_d\_ \~e\~ \&amp; \# \|"),
        ("two\n\n# lines", r"two \# lines"),
        ("Léon (1994), 50 %", "Léon (1994), 50 %"),
    ],
)
def test_escaped(text: object, expected: str) -> None:
    assert escaped(text) == expected
