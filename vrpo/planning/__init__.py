"""What a training costs before it runs: arithmetic, memory per GPU and time per step, from sizes alone.

shape.py: a model's sizes, from its config.json. setup.py: the training and the machine. memory.py and
step_time.py: the model of each. plan.py: all together, and what to change where it does not fit. No torch.
"""

from vrpo.planning.memory import memory_parts
from vrpo.planning.plan import Plan, advice, make_plan
from vrpo.planning.setup import Machine, TrainingSetup
from vrpo.planning.shape import ModelShape, read_shape

__all__ = [
    "Machine",
    "ModelShape",
    "Plan",
    "TrainingSetup",
    "advice",
    "make_plan",
    "memory_parts",
    "read_shape",
]
