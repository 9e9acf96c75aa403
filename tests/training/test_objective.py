"""What a trainer does for objectives that are not one loss of the model."""

import multiprocessing
import os

import torch
from torch import nn

from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.train_step import (
    apply_gradient_rule,
    average_gradients,
    make_optimizer,
    set_learning_rate,
    share_weights,
)


def one_of_two(rank, place, results):
    """What each of two processes ends with: weights shared, gradients averaged."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=2
    )
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(rank + 1.0)
        model.bias.fill_(rank + 5.0)
    share_weights([model])
    model.weight.grad = torch.full_like(model.weight, 3.0 * rank)
    average_gradients([model])
    found = model.weight.tolist(), model.bias.tolist(), model.weight.grad.tolist(), model.bias.grad
    results.put((rank, found))
    results.close()
    results.join_thread()
    os._exit(0)  # without the parent's clean-up


def test_two_processes_share_weights_and_average_gradients(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=one_of_two, args=(rank, tmp_path / "store", results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found[0] == found[1] == ([[1.0, 1.0]], [5.0], [[1.5, 1.5]], None)


def test_one_process_keeps_its_gradients():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones_like(model.weight)
    average_gradients([model])
    assert bool((model.weight.grad == 1).all())


def test_a_companion_has_a_learning_rate_of_its_own(small_model):
    companion = nn.Linear(2, 1)
    group = {"params": list(companion.parameters()), "weight_decay": 0.3, "lr_share": 0.25}
    config = TrainingConfig(steps=10, lr=0.1, warmup=0.0)
    model = small_model()
    optimizer = make_optimizer(model, config, [group])
    set_learning_rate(optimizer, config, 8)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(companion.weight)] == 0.25 * config.base_lr_at(8)
    assert rates[id(model.blocks[0].mlp.W_in)] == config.lr_at(8) > config.base_lr_at(8)
    assert optimizer.param_groups[-1]["weight_decay"] == 0.3
    assert len(rates) == len(list(model.parameters())) + 2


def test_a_model_without_gradients_is_left_alone():
    apply_gradient_rule(nn.Linear(2, 1).parameters(), "normalise")
