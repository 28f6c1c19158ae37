"""The tester of pages: what it runs, what it lets pass, and what it rewrites."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.docs.matching import line_matches, matches, updated
from tests.docs.page import REASONS, PageError, steps_of
from tests.docs.run_page import PageFailed, check_page
from tests.docs.update_output import main


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_right_outputs_pass(page: Path, folder: Path) -> None:
    page.write_text(
        """# Page

```python
from pathlib import Path
total = 1 + 2
Path("made.txt").write_text("from python\\n")
```

The same names and the same folder:

```python
print(total)
print("a  b")
```

```text
3
a ... b
```

```console
$ cat made.txt && \\
  echo more
from python
more
$ cd / && export GREETING=hello
$ echo "$GREETING from $PWD" >&2
hello from /
$ vista no-such-command
error: unknown command ...
```

1. In a list:

   ```python
   for number in range(100):
       print(number)
   ```

   ```text
   0
   ...
   99
   ```

```bash
exit 1
```

```
exit 1
```
"""
    )
    assert check_page(page, folder) == 7
    assert (folder / "made.txt").read_text() == "from python\n"


def test_programs_are_those_of_the_interpreter(page: Path, folder: Path) -> None:
    page.write_text(
        "```console\n$ python -c 'import vista; print(vista.__name__)'\nvista\n$ vista --version\n0...\n```\n"
    )
    with pytest.raises(PageFailed, match=r"page.md:5: the output .*\n.*\n.*\n.*\n-0\.\.\.\n\+vista \d"):
        check_page(page, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", r"page.md:6: the output is not what the page shows"),
        ("```python\nprint(1)\n```\n\n```text\n```\n", r"\+1"),
        ("```python\nprint(1)\n```\n\n```text\n1\n2\n```\n", r"-2"),
        ("```console\n$ echo one\ntwo\n```\n", r"page.md:3: .*\n.*\n.*\n.*\n-two\n\+one"),
        ("```console\n$ echo one\n...\ntwo\n```\n", r"-two"),
        (
            "```python\n1 / 0\n```\n",
            r"page.md:2: the block raised an error(.|\n)*page.md\", line 2(.|\n)*ZeroDivisionError",
        ),
        ("```python\nraise SystemExit\n```\n", r"page.md:2: the block raised an error"),
        ("```python\nimport os; os._exit(0)\n```\n", r"page.md:2: the block raised an error"),
        ("```console\n$ true\n$ false\n```\n", r"page.md:3: \$ false\nexit status 1"),
        ("```console\n$ exit\n```\n", r"page.md:2: \$ exit\nexit status None"),
        ("```console\n$ false | true\nerror: ...\n```\n", r"exit status 0"),
        ("```console\n$ no-such-program\n```\n", r"exit status 127"),
    ],
)
def test_wrong_outputs_and_errors_fail(page: Path, folder: Path, text: str, message: str) -> None:
    page.write_text(text)
    with pytest.raises(PageFailed, match=message):
        check_page(page, folder)


@pytest.mark.parametrize(
    "block", ["```python\nimport time\ntime.sleep(60)\n```\n", "```console\n$ sleep 60 | cat\n```\n"]
)
def test_a_page_has_a_time_limit(page: Path, folder: Path, block: str) -> None:
    page.write_text(block)
    started = time.monotonic()
    with pytest.raises(PageFailed, match=r"page.md:2: the page's blocks take longer than 0.5 s"):
        check_page(page, folder, limit_s=0.5)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("reason", REASONS)
def test_a_block_with_a_reason_is_not_run(page: Path, folder: Path, reason: str) -> None:
    page.write_text(f"```console no-run: {reason}\n$ exit 1\n```\n\n```python no-run: {reason}\n1 / 0\n```\n")
    assert check_page(page, folder) == 0


@pytest.mark.parametrize(
    "info",
    ["no-run", "no-run:", "no-run: it is slow", "no-run needs a gpu", "x no-run: needs a GPU", "within 0.1", "x"],
)
def test_a_block_without_an_allowed_reason_is_refused(page: Path, info: str) -> None:
    page.write_text(f"text\n```python {info}\n1 / 0\n```\n")
    with pytest.raises(
        PageError, match=r"page.md:2: write `no-run: REASON` with one of downloads data, .*; or `within 10 %`; got"
    ):
        steps_of(page)


def test_malformed_blocks_are_refused(page: Path) -> None:
    page.write_text("```python\n1 / 0\n")
    with pytest.raises(PageError, match=r"page.md:1: the block is not closed"):
        steps_of(page)
    page.write_text("```console\nvista train\n```\n")
    with pytest.raises(PageError, match=r"page.md:2: a console block begins with a line `\$ command`"):
        steps_of(page)


@pytest.mark.parametrize("language", ["", "bash", "sh"])
@pytest.mark.parametrize("command", ["vista train", "$ vista train", "make lint", "python -m scripts.train"])
def test_commands_are_not_hidden_from_the_tests(page: Path, language: str, command: str) -> None:
    page.write_text(f"```{language}\ncd folder\n{command}\n```\n")
    with pytest.raises(PageError, match=r"page.md:1: put these commands into a ```console block"):
        steps_of(page)
    page.write_text(f"```bash no-run: needs a scheduler\n{command}\n```\n")
    assert steps_of(page) == []


@pytest.mark.parametrize("text", ["", "# Page\n\nNo blocks.\n", "```yaml\ndim: 8\n```\n"])
def test_a_page_may_have_nothing_to_run(page: Path, folder: Path, text: str) -> None:
    page.write_text(text)
    assert check_page(page, folder) == 0


def test_only_a_text_block_right_below_is_an_output(page: Path) -> None:
    page.write_text("```python\nprint(1)\n```\n\nand\n\n```text\n2\n```\n")
    (step,) = steps_of(page)
    assert step.shown is None


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ([], [], True),
        ([], [""], True),
        (["a"], ["a  ", "", ""], True),
        (["a", "", "b"], ["a", "b"], False),
        (["a.c"], ["abc"], False),
        (["a...d...f"], ["abcdef"], True),
        (["a...d"], ["ad"], True),
        (["a...", "b"], ["a", "c", "b"], False),
        (["..."], [], True),
        (["...", "b"], ["a", "b", "b"], True),
        (["a", "...", "b"], ["a", "b"], True),
        (["a", "...", "b"], ["a", "c", "d", "b"], True),
        (["a", "...", "b", "...", "c"], ["a", "c", "b"], False),
        (["  ...", "b"], ["b", "a"], False),
    ],
)
def test_matching(shown: list[str], printed: list[str], same: bool) -> None:
    assert matches(shown, printed) is same
    result = updated(shown, printed)
    assert matches(result, printed)
    assert not same or result == shown


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("auc 0.800", "auc 0.879", True),
        ("auc 0.800", "auc 0.721", True),
        ("auc 0.800", "auc 0.881", False),
        ("auc 0.800", "auc 0.719", False),
        ("auc 0.800", "auc 0.80", False),
        ("auc 0.800", "ndcg 0.800", False),
        ("auc -0.800", "auc 0.800", False),
        ("step 100", "step 101", False),
        ("step 100", "step 100.0", False),
        ("x 9.9, y 2.0", "x 10.1, y 1.9", True),
        ("x ... 1.0", "x 5.0 1.0", True),
        ("x ... 1.0 ...", "x 5.0 1.0 7.0", True),
        ("(... s): 0.5000, 2", "(12.3 s): 0.5100, 2", True),
        ("0.0", "0.1", False),
    ],
)
def test_a_tolerance_is_for_decimal_numbers(shown: str, printed: str, same: bool) -> None:
    assert matches([shown], [printed], 0.1) is same
    assert line_matches(shown, shown, 0.1) and line_matches(shown, shown)


def test_a_block_says_its_tolerance(page: Path, folder: Path) -> None:
    python, console = "```python\nprint(0.52)\n```\n\n```text within 5 %\n0.50\n```\n", "$ echo 0.52\n0.50\n```\n"
    text = f"{python}\n```console within 5 %\n{console}"
    page.write_text(text)
    assert check_page(page, folder) == 2
    main([str(page)])
    assert page.read_text() == text
    page.write_text(text.replace("within 5 %\n$", "within 3 %\n$"))
    with pytest.raises(PageFailed, match=r"page.md:11: the output"):
        check_page(page, folder)


@pytest.mark.parametrize(
    ("shown", "printed", "result"),
    [
        (["?"], ["a", "b"], ["a", "b"]),
        (["a", "b"], [], []),
        (["a 1", "...", "loss ...", "b 1"], ["a 2", "x", "y", "loss 3", "b 2"], ["a 2", "...", "loss ...", "b 2"]),
        (["took ... ms", "n=1"], ["took 5 ms", "n=2"], ["took ... ms", "n=2"]),
        (["a", "b"], ["a", "new", "b"], ["a", "new", "b"]),
        (["a", "old", "b"], ["a", "b"], ["a", "b"]),
    ],
)
def test_updates_keep_what_matches(shown: list[str], printed: list[str], result: list[str]) -> None:
    assert updated(shown, printed) == result


def test_update_mode_rewrites_pages(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """# Page

1. In a list:

   ```python
   print("one", 2)
   print("three")
   ```

   ```text
   one ...
   ```

```console
$ echo left alone
$ seq 1 3
?

$ seq 9
1
...
9
```

Last.
"""
    page.write_text(text)
    main([str(page)])
    assert capsys.readouterr().out == f"{page}: updated\n"
    expected = text.replace("   one ...\n", "   one ...\n   three\n").replace("?\n", "1\n2\n3\n")
    assert page.read_text() == expected
    check_page(page, folder)
    main([str(page)])
    assert capsys.readouterr().out == f"{page}: unchanged\n"
    page.write_text(expected + "```python\n1 / 0\n```\n")
    with pytest.raises(PageFailed, match="raised an error"):
        main([str(page)])
