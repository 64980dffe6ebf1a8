"""The row templates: which stretches a task has, in which order, and what is a target.

::

    text      task_text  bos text* eos*                      (packed, one per document)
    t2i, t2a  task_...   bos text+ eos   boi codes* eoi      (boa, eoa for audio)
    i2t, a2t  task_...   boi codes+ eoi  bos text* eos*
    joint_*   as t2i and t2a, with text* and codes*

``*`` is maskable, ``+`` is the condition, the rest is fixed. In joint rows the text's
``eos`` is fixed unless its length is predicted. Joint rows carry the task token of
t2i or t2a: with all text masked they are the unconditional case of that task.
"""

from __future__ import annotations

from diffmm.typing import Modality

_TEXT, _IMAGE, _AUDIO = Modality.TEXT, Modality.IMAGE, Modality.AUDIO

TEMPLATES: dict[str, tuple[tuple[Modality, bool], ...]] = {
    "text": ((_TEXT, True),),
    "t2i": ((_TEXT, False), (_IMAGE, True)),
    "i2t": ((_IMAGE, False), (_TEXT, True)),
    "t2a": ((_TEXT, False), (_AUDIO, True)),
    "a2t": ((_AUDIO, False), (_TEXT, True)),
    "joint_ti": ((_TEXT, True), (_IMAGE, True)),
    "joint_ta": ((_TEXT, True), (_AUDIO, True)),
}
"""Stretches of every task in order: modality, and whether it is a target."""

TASKS = tuple(TEMPLATES)
"""Names of the tasks; ``Batch.task`` holds the index."""

TASK_TOKENS = {task: f"task_{task}" for task in TASKS} | {
    "joint_ti": "task_t2i",
    "joint_ta": "task_t2a",
}
"""Special token at the head of every row of a task."""


class BadExampleError(ValueError):
    """One example cannot become a row (too long, empty); a pipeline may skip it."""


def template_of(task: str) -> tuple[tuple[Modality, bool], ...]:
    """The stretches of a task.

    Raises:
      ValueError: unknown task; the message lists the known ones.
    """
    try:
        return TEMPLATES[task]
    except (KeyError, TypeError):
        raise ValueError(f"task={task!r} must be one of {TASKS}") from None
