"""Long-context tasks of the RULER family: seeded, made offline, and of exact length.

A task is a function that returns a :class:`~sparse_prefill.tasks.prompt_template.PromptTemplate`; ``register_task``
registers it.
"""

from sparse_prefill.tasks import counting, needles, questions, tracking  # noqa: F401 (imported for their tasks)
from sparse_prefill.tasks.prompt_template import DEPTHS, PromptTemplate, TaskSampler, register_task
from sparse_prefill.tasks.scoring import containment, score, summary
from sparse_prefill.tasks.task import Task, list_tasks, make

Draft, Draw = PromptTemplate, TaskSampler  # former names

__all__ = [
    "DEPTHS",
    "PromptTemplate",
    "Task",
    "TaskSampler",
    "containment",
    "list_tasks",
    "make",
    "register_task",
    "score",
    "summary",
]
