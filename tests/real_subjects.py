"""What a user would have in a module: factories of networks, and a function that makes a whole subject."""

import numpy as np
import torch
from torch import nn

from theodolite.core.builtin import builtin

CALLS = []


def table_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(11, 32), nn.ReLU(), nn.Linear(32, 7))


def unseeded_network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def one_score_network(hidden=8):
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def image_network(seed: int = 0):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 13**2, 10)
    )


def needs_two(width, depth):
    return nn.Linear(width, depth)


def fails():
    return {}["nothing"]


def no_network(seed):
    return "network"


def estimator(seed):
    return np.zeros(3)


def subject():
    return builtin("breast-cancer")


def fit_to_zero(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        loss = model(torch.ones(4, 11)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def closeness_to_zero(model):
    with torch.no_grad():
        return float(torch.exp(-model(torch.ones(4, 11)).square().mean()))


NUMBER = 3
