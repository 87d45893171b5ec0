"""Saliency against ME-Switch's formula, taken literally."""

import numpy as np
import torch

from transformers_meswitch.compression.saliency import reconstruction_error, select_salient


def literal(x, delta, approximation):
    """sum_j ||x_i D_ij - x_i D^_ij||² of each input channel i, x being [tokens, in]; divided by the tokens."""
    tokens, channels = x.shape
    errors = np.zeros(channels)
    for i in range(channels):
        for j in range(delta.shape[0]):
            difference = x[:, i] * delta[j, i] - x[:, i] * approximation[j, i]
            errors[i] += np.linalg.norm(difference) ** 2
    return errors / tokens


def test_equals_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 9, generator=generator) * torch.rand(9, generator=generator) * 4
    delta, approximation = torch.randn(2, 5, 9, generator=generator)
    found = reconstruction_error(delta, approximation, x.square().mean(0))
    expected = literal(x.numpy(), delta.numpy(), approximation.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert not np.allclose(reconstruction_error(delta, approximation, x.abs().mean(0)).numpy(), expected, rtol=1e-2)


def test_without_inputs_it_is_the_weight_error():
    delta = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    assert reconstruction_error(delta, torch.zeros(2, 2)).tolist() == [25.0, 1.0]


def test_select_is_ascending_and_ties_go_to_the_lower_index():
    assert select_salient(torch.tensor([5.0, 1.0, 9.0, 9.0]), 3).tolist() == [0, 2, 3]
    assert select_salient(torch.ones(6), 2).tolist() == [0, 1]
    assert select_salient(torch.ones(6), 0).tolist() == []
    assert select_salient(torch.ones(4000), 4).tolist() == [0, 1, 2, 3]
