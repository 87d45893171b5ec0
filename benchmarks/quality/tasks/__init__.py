"""The four domains: a generator and an exact scorer each."""

from __future__ import annotations

from .base import Item, Task
from .functions import generate_functions, score_function
from .instructions import generate_instructions, score_instruction
from .maths import generate_maths, score_maths
from .receipts import generate_receipts, score_receipt

__all__ = ["TASKS", "Item", "Task"]

TASKS = {
    task.name: task
    for task in (
        Task("math", generate_maths, score_maths, max_new_tokens=176),
        Task("code", generate_functions, score_function, max_new_tokens=88),
        Task("json", generate_receipts, score_receipt, max_new_tokens=112),
        Task("instruct", generate_instructions, score_instruction, max_new_tokens=112),
    )
}
