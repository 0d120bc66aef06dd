"""transformers' EarlyStoppingCallback in a run that is stopped and resumed."""

from collections.abc import Callable

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

_COUNTER = "early_stopping_patience_counter"


class GoOnWaiting(TrainerCallback):
    """EarlyStoppingCallback goes on from the count of the checkpoint, and a run that it ended stays ended.

    The Trainer starts counting again after every resume, so a run that is stopped now and then never ended;
    its restore_callback_states_from_checkpoint restores the patience of the checkpoint, too, over what the
    user gives now.

    is_over: whether one of them has lost its patience. Known once training begins.
    """

    is_over = False

    def __init__(self, callbacks: Callable[[], list[TrainerCallback]]):
        self._callbacks = callbacks

    def on_train_begin(self, args, state, control, **kwargs):
        stored = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, [])
        stored = stored if isinstance(stored, list) else [stored]
        here = [one for one in self._callbacks() if isinstance(one, EarlyStoppingCallback)]
        if state.global_step == 0:
            stored = []
        # Of several, the Trainer adds the states to a list at each save.
        for one, told in zip(here, stored[-len(here) :], strict=False):
            setattr(one, _COUNTER, told["attributes"][_COUNTER])
        waited = [one for one in here if getattr(one, _COUNTER) >= one.early_stopping_patience]
        self.is_over = bool(stored and waited)
        if self.is_over:
            logger.warning(
                f"early stopping ended this run at step {state.global_step}: nothing is left to be trained; "
                "a larger early_stopping_patience goes on"
            )
