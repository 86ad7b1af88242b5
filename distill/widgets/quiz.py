"""Predict, then run: a question before a measurement, and the measurement as its answer."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .mode import live


class Question:
    """A question with answers to choose from. `choice` is what the reader chose, None before that."""

    def __init__(self, text: str, answers: Sequence[str]):
        self.text, self.answers, self.choice = text, list(answers), None
        self.widget = None

    def choose(self, answer: str) -> None:
        """What a click does. Raises ValueError for an answer that is not offered."""
        if answer not in self.answers:
            raise ValueError(f"{answer!r} is not one of {', '.join(self.answers)}")
        self.choice = answer

    def check(self, measured: str) -> bool | None:
        """Print the measured answer beside the chosen one; whether they agree, None where nothing was chosen.

        Raises ValueError where what was measured is not among the answers: then the question is wrong.
        """
        if measured not in self.answers:
            raise ValueError(f"measured {measured!r}, which is not one of {', '.join(self.answers)}")
        if self.choice is None:
            print(f"Measured: {measured}. (You made no guess; go back and make one, it costs nothing.)")
            return None
        right = self.choice == measured
        print(f"Measured: {measured}. You said: {self.choice}. {'Right!' if right else 'Not so; read on for why.'}")
        return right


def predict(text: str, answers: Sequence[str]) -> Question:
    """Ask a question, as buttons or, without a front end, as a line of text. Call `.check(measured)` on it later."""
    question = Question(text, answers)
    if not live():
        print(f"{text}  [{' | '.join(answers)}]")
        return question
    import ipywidgets
    from IPython.display import display

    buttons = ipywidgets.ToggleButtons(options=question.answers, value=None, style={"button_width": "auto"})
    buttons.observe(lambda change: change["new"] and question.choose(change["new"]), "value")
    question.widget = ipywidgets.VBox([ipywidgets.HTML(f"<b>{html.escape(text)}</b>"), buttons])
    display(question.widget)
    return question
