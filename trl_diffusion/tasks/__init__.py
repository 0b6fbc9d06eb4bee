"""Tasks that a policy can be trained and measured on: prompts, reward functions and a checker each."""

from .task import TASKS, Task, document, load_task, preference_rows, read_rows, sft_rows


__all__ = ["TASKS", "Task", "document", "load_task", "preference_rows", "read_rows", "sft_rows"]
