"""Answer five questions of a new user from the page of `vista explore` alone, in headless Chromium, and time it.

    make demo && python -m scripts.benchmarks.explore_questions [FOLDER]

Each question begins with a new visit to the start of the page. A program clicks and types as a person would, and reads
only visible text. The times do not include the time that a person needs to find, read, and think. The answers are
printed. With FOLDER, a screenshot of each answer is written there. Needs the extra `explore`, Playwright, and
Chromium.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.explore_visit import ExploreVisit, exploring, visiting

USER, ITEM, ACTION = "216", "1105", "like"


@dataclass(slots=True)
class Visitor:
    """Uses the page as a person would, and counts clicks and typed texts."""

    visit: ExploreVisit
    clicks: int = 0
    typed: int = 0
    """Texts that were typed, each with Enter."""

    def open_tab(self, name: str) -> None:
        self.clicks += 1
        self.visit.open_tab(name)

    def press(self, button: str) -> None:
        self.clicks += 1
        self.visit.click(button)

    def find_user(self, user: str) -> None:
        self.clicks, self.typed = self.clicks + 1, self.typed + 1
        self.visit.find_user(user)

    def choose(self, label: str, text: str) -> None:
        """Click a list, type the beginning of an option, and press Enter."""
        self.clicks, self.typed = self.clicks + 1, self.typed + 1
        field = self.visit.page.get_by_label(label).last
        field.click()
        field.press_sequentially(text)
        field.press("Enter")
        self.visit.settle()

    def read(self, pattern: str) -> str:
        """The visible text that matches, as soon as it is there."""
        self.visit.page.get_by_text(re.compile(pattern)).first.wait_for()
        found = re.search(pattern, self.visit.text())
        assert found is not None, pattern
        return " ".join(found[0].split())


def why_first(visitor: Visitor) -> str:
    visitor.find_user(USER)
    visitor.open_tab("Ranking")
    return visitor.read(r"Item .* has rank 1\. .*")


def is_fresh(visitor: Visitor) -> str:
    badge = visitor.read(r"Fresh|Held back|Behind the log|Unknown")
    visitor.open_tab("Store")
    return visitor.read(rf"{badge}\. The last refresh started .*")


def helps_heavy_users(visitor: Visitor) -> str:
    visitor.open_tab("Results")
    visitor.press("Measure")
    return visitor.read(r".*longest histories.*")


def generation(visitor: Visitor) -> str:
    return visitor.read(r"generation \d+ is served")


def what_if(visitor: Visitor) -> str:
    visitor.find_user(USER)
    visitor.open_tab("What if")
    visitor.choose("Item", ITEM)
    visitor.choose("Action", ACTION)
    visitor.press("Add event")
    return visitor.read(r".*of the best 10 items are new.*|.*best 10 items stays the same.*")


QUESTIONS: dict[str, Callable[[Visitor], str]] = {
    f"Why was this item ranked first for user {USER}?": why_first,
    "Is the store fresh?": is_fresh,
    "Does the summary help heavy users?": helps_heavy_users,
    "Which generation is served?": generation,
    f"What would change if user {USER} did {ACTION} {ITEM}?": what_if,
}


def main() -> int:
    """Print a table and the answers; returns the exit status."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    print("| question | clicks | texts typed | seconds |\n|---|---|---|---|")
    answers = []
    with exploring() as url, visiting(url) as visit:
        visit.open()
        visit.wait_for_tabs()  # fills the server's caches
        for number, (question, ask) in enumerate(QUESTIONS.items(), 1):
            began = time.perf_counter()
            visit.open()
            visitor = Visitor(visit)
            if ask is not generation:
                visit.wait_for_tabs()
            answers.append(ask(visitor))
            seconds = time.perf_counter() - began
            print(f"| {question} | {visitor.clicks} | {visitor.typed} | {seconds:.1f} |", flush=True)
            if folder is not None:
                visit.settle()
                visit.screenshot(folder / f"answer-{number}.png")
    print("\n" + "\n".join(f"{number}. {answer}" for number, answer in enumerate(answers, 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
