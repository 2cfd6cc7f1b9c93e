"""Which questions a limited run asks: the rule, and the record of what it chose.

The rule spreads the questions over paragraphs. Encoding compares a question with the other questions on its paragraph,
so a paragraph should keep several questions; intervals come from a bootstrap over paragraphs, so there should be many
paragraphs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

RULE = 1  # version of the rule; a change that makes a limit choose other questions needs a new number
PREFERRED_QUESTIONS = 4  # per paragraph


@dataclass(frozen=True)
class Selection:
    """What a run asked for, and what it took. Saved in ``manifest.json``.

    Parameters
    ----------
    limit, paragraphs, questions_per_paragraph : int, optional
        As asked for; None where the caller set no bound.
    paragraphs_taken, questions_taken : int
        What the run asks. A question counts once, in however many languages and settings it is asked.
    paragraphs_in_data, questions_in_data : int
        What the run could ask without a bound, in its languages and settings.
    rule : int
        Version of the rule that chose the questions.

    Examples
    --------
    >>> Selection(limit=8, paragraphs_taken=2, questions_taken=8, paragraphs_in_data=240, questions_in_data=1190).rule
    1
    """

    limit: int | None = None
    paragraphs: int | None = None
    questions_per_paragraph: int | None = None
    paragraphs_taken: int = 0
    questions_taken: int = 0
    paragraphs_in_data: int = 0
    questions_in_data: int = 0
    rule: int = RULE

    @property
    def shortfall(self) -> str | None:
        """What was asked for and is not there; None if the data holds enough.

        Examples
        --------
        >>> Selection(paragraphs=999, paragraphs_taken=12, paragraphs_in_data=12).shortfall
        'paragraphs (--paragraphs) is 999, but the data holds 12 in these languages and settings: all are used'
        """
        pairs = (("limit", "questions", self.limit, self.questions_taken),
                 ("paragraphs", "paragraphs", self.paragraphs, self.paragraphs_taken))  # fmt: skip
        for name, what, wanted, taken in pairs:
            if wanted is not None and taken < wanted:
                number = f"{taken} {what}" if name != what else str(taken)
                return (
                    f"{name} (--{name}) is {wanted}, but the data holds {number} in these languages and settings: all "
                    "are used"
                )
        return None

    def to_dict(self) -> dict[str, int | None]:
        """Plain values for ``manifest.json``."""
        return asdict(self)


def order_questions(paragraphs: Sequence[Sequence[str]]) -> list[str]:
    """Every question id, in the order in which ``limit`` takes them.

    1. The first four questions of each paragraph that has four or more, paragraph after paragraph.
    2. All questions of each paragraph that has two or three, paragraph after paragraph.
    3. The other questions of the paragraphs of step 1, round robin: the fifth question of each, the sixth of each, ...
    4. The questions that are alone on their paragraph.

    A limit takes the first questions of this order, so a larger limit contains the questions of a smaller one. No
    other choice of as many questions has four questions on more paragraphs. At most one paragraph, the last one that
    the limit reached in step 1 or 2, lacks some of its first four questions; a limit that ends exactly one question
    into a paragraph leaves that question alone.

    Parameters
    ----------
    paragraphs : sequence of sequences of str
        Question ids by paragraph, in the order of the data.

    Examples
    --------
    Four paragraphs with six, one, three and five questions. A limit of 8 takes four questions on each of ``a`` and
    ``d``; a limit of 12 adds the three of ``c`` and the fifth of ``a``.

    >>> paragraphs = [["a1", "a2", "a3", "a4", "a5", "a6"], ["b1"], ["c1", "c2", "c3"], ["d1", "d2", "d3", "d4", "d5"]]
    >>> order = order_questions(paragraphs)
    >>> order[:8]
    ['a1', 'a2', 'a3', 'a4', 'd1', 'd2', 'd3', 'd4']
    >>> order[8:12]
    ['c1', 'c2', 'c3', 'a5']
    >>> order[12:]
    ['d5', 'a6', 'b1']
    """
    ordered = order_paragraphs(paragraphs, PREFERRED_QUESTIONS)
    several = [questions for questions in ordered if len(questions) > 1]
    order = [id_ for questions in several for id_ in questions[:PREFERRED_QUESTIONS]]
    longest = max(map(len, several), default=0)
    for index in range(PREFERRED_QUESTIONS, longest):
        order += [questions[index] for questions in several if len(questions) > index]
    return order + [questions[0] for questions in ordered if len(questions) == 1]


def order_paragraphs(paragraphs: Sequence[Sequence[str]], questions: int) -> list[Sequence[str]]:
    """The paragraphs that have at least ``questions`` questions, then the other ones with several, then those with one.

    Each of the three parts is in the order of the data. Empty paragraphs are left out.

    Examples
    --------
    >>> order_paragraphs([["a1"], ["b1", "b2"], ["c1", "c2", "c3"]], 3)
    [['c1', 'c2', 'c3'], ['b1', 'b2'], ['a1']]
    >>> order_paragraphs([["a1"], ["b1", "b2"], ["c1", "c2", "c3"]], 1)
    [['a1'], ['b1', 'b2'], ['c1', 'c2', 'c3']]
    """
    # sorted() keeps the order of equal keys
    return sorted(filter(None, paragraphs), key=lambda ids: 0 if len(ids) >= questions else 1 if len(ids) > 1 else 2)


def choose_questions(
    paragraphs: Sequence[Sequence[str]],
    available: Collection[str],
    *,
    limit: int | None = None,
    n_paragraphs: int | None = None,
    questions_per_paragraph: int | None = None,
) -> list[str]:
    """The ids of the questions to ask: all that are available if no bound is given.

    Parameters
    ----------
    paragraphs : sequence of sequences of str
        All question ids by paragraph, in the order of the data, whatever languages a run asks in.
    available : collection of str
        The ids that can be asked. The others are passed over, and the order of the rest stays the same.
    limit : int, optional
        How many questions, in the order of ``order_questions``.
    n_paragraphs : int, optional
        How many paragraphs, in the order of ``order_paragraphs``. All if None.
    questions_per_paragraph : int, optional
        Most questions of one paragraph: its first ones. All if None.

    Returns
    -------
    list of str
        Fewer questions than asked for if the data has no more.

    Examples
    --------
    >>> paragraphs = [["a1", "a2"], ["b1", "b2", "b3", "b4"], ["c1", "c2", "c3"]]
    >>> everything = ["a1", "a2", "b1", "b2", "b3", "b4", "c1", "c2", "c3"]
    >>> choose_questions(paragraphs, everything, limit=5)
    ['b1', 'b2', 'b3', 'b4', 'a1']
    >>> choose_questions(paragraphs, everything, n_paragraphs=2, questions_per_paragraph=3)
    ['b1', 'b2', 'b3', 'c1', 'c2', 'c3']
    """
    known = set(available)
    if limit is not None:
        return [id_ for id_ in order_questions(paragraphs) if id_ in known][:limit]
    wanted = PREFERRED_QUESTIONS if questions_per_paragraph is None else questions_per_paragraph
    present = ([id_ for id_ in ids if id_ in known] for ids in order_paragraphs(paragraphs, wanted))
    chosen = [ids[:questions_per_paragraph] for ids in present if ids]
    return [id_ for ids in chosen[:n_paragraphs] for id_ in ids]
