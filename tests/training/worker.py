"""Training runs in processes of their own, which can be told to die in the middle."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tl_sparse.training.trainer import Trainer


class DyingTrainer(Trainer):
    """A trainer whose process is killed after some step."""

    dies_after = 8

    def train_step(self, model):
        loss = super().train_step(model)
        if self.step + 1 == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


class DyingInSave(Trainer):
    """A trainer whose process is killed in the middle of writing the second checkpoint."""

    def train(self):
        save, calls = torch.save, []

        def dying(state, path):
            calls.append(path)
            if len(calls) == 2:
                Path(path).write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, path)

        torch.save = dying
        return super().train()


def exit_codes(train, *environments):
    """Call a function in one forked process for each environment; returns their exit codes.

    Forked, because importing everything anew takes longer than such a run. What accelerate knows of
    the process that forks is forgotten first: it reads from the environment which process it is in.
    """

    def apart(environment):
        os.environ |= environment
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        train()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=apart, args=(each,)) for each in environments or ({},)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]
