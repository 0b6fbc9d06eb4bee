"""Tasks that a policy can be trained and measured on: prompts, reward functions and a checker each."""

from .documents import document, preference_rows, sft_rows
from .load import OTHERS, TASKS, check_task_name, load_task
from .rows import read_rows
from .task import Task


__all__ = [
    "OTHERS",
    "TASKS",
    "Task",
    "check_task_name",
    "document",
    "load_task",
    "preference_rows",
    "read_rows",
    "sft_rows",
]
