import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arq_env.quantization.quantizers import activation_levels, highest, lowest_levels, to_integers, weight_range, weight_steps

bits = st.integers(2, 8)
values = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=40).map(torch.tensor)


ranges = st.one_of(
    bits.map(weight_range), bits.map(lambda b: (0, highest(b, 0), 1)), bits.map(lambda b: (1 - 2 ** (b - 1), 2 ** (b - 1) - 1, 1))
)


@given(values, ranges, st.floats(0.015625, 2, width=32))
def test_quantizer_properties(x, levels, step):
    low, high, distance = levels
    step = torch.tensor(step)
    q = to_integers(x, step, *levels)
    assert ((q >= low) & (q <= high) & ((q - low) % distance == 0)).all()
    torch.testing.assert_close(to_integers(q * step, step, *levels), q)  # idempotent
    order = x.argsort()
    assert (q[order].diff() >= 0).all()  # monotone
    inside = (x >= low * step) & (x <= high * step)
    assert ((q * step - x).abs()[inside] <= distance * step / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(to_integers(8 * x, 8 * step, *levels), q)  # scale-equivariant
    if low < 0:
        # without zero among the levels torch's rounding takes either of two nearest ones, by the sign
        tie = (((x / step - low) / distance % 1 - 0.5).abs() < 1e-5) & (distance > 1)
        torch.testing.assert_close(to_integers(-x, step, *levels)[~tie], -q[~tie])  # symmetric


@given(bits)
def test_levels(b):
    assert highest(b, 0) == 2**b - 1
    for lowest in lowest_levels(b):
        assert lowest <= 0 <= highest(b, lowest) and highest(b, lowest) - lowest + 1 in (2**b - 1, 2**b)
    low, high, distance = weight_range(b)
    assert low == -high and (high - low) // distance + 1 == (4 if b == 2 else 2**b - 1)


def test_two_bits_use_all_four_levels():
    """Ternary weights have over half as much squared error again on a normal distribution: .190 against .119 of its variance."""
    torch.manual_seed(0)
    weight = torch.randn(1, 100_000)
    step = weight_steps(weight, 2)
    assert to_integers(weight, step, *weight_range(2)).unique().tolist() == [-3, -1, 1, 3]
    assert float(error(weight, step, 2)) / 1e5 == pytest.approx(0.119, abs=0.003)
    best_ternary = min((to_integers(weight, torch.tensor(s), -1, 1) * s - weight).square().mean() for s in (1.1, 1.2, 1.3))
    assert float(best_ternary) == pytest.approx(0.190, abs=0.004)


def error(x, step, b, activations=False):
    levels = (0, 2**b - 1) if activations else weight_range(b)
    return (to_integers(x, step, *levels) * step - x).square().sum(-1)


@pytest.mark.parametrize("b", [2, 3, 4, 5])
def test_steps_have_the_least_error(b):
    torch.manual_seed(0)
    weight = torch.randn(6, 64, 3, 3)
    rows, step = weight.flatten(1), weight_steps(weight, b)
    best = error(rows, step[:, None], b)
    for factor in (0.8, 0.9, 1.1, 1.25):
        assert (error(rows, step[:, None] * factor, b) >= best * 0.999).all()
    # every channel has its own step, which scales with the channel
    torch.testing.assert_close(weight_steps(weight * torch.arange(1.0, 7).view(6, 1, 1, 1), b), step * torch.arange(1.0, 7))


def test_error_falls_with_bits():
    torch.manual_seed(0)
    x = torch.randn(1, 5_000).relu()
    errors = [float(error(x, activation_levels(x, b).step, b, activations=True)) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]


def test_negative_levels_only_where_there_are_negative_values():
    x = torch.linspace(0, 1, 101)
    step, lowest = activation_levels(x, 8)
    assert float(step) == pytest.approx(1 / 255, rel=0.05) and lowest == 0
    step, lowest = activation_levels(x * 2 - 1, 8)
    assert float(step) == pytest.approx(1 / 127, rel=0.05) and lowest in (-127, -128)
    assert activation_levels(-x, 4).lowest == -15


@pytest.mark.parametrize("b", [3, 4, 8])
@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.GELU(), torch.nn.Hardswish()])
def test_a_small_negative_part_does_not_halve_the_range(b, activation):
    """Symmetric levels have about four times the squared error: half as many codes for the positive part."""
    torch.manual_seed(0)
    x = activation(torch.randn(10_000))
    step, lowest = activation_levels(x, b)
    symmetric = min(
        (to_integers(x, s, 1 - 2 ** (b - 1), 2 ** (b - 1) - 1) * s - x).square().mean() for s in step * torch.linspace(0.5, 4, 200)
    )
    found = (to_integers(x, step, lowest, highest(b, lowest)) * step - x).square().mean()
    assert found < 0.55 * symmetric


@pytest.mark.parametrize("outlier", [30.0, 100.0])
def test_one_outlier_in_a_million_does_not_decide_the_step(outlier):
    x = torch.rand(1_000_000)
    x[7] = outlier
    kept = torch.cat([x[1000:17_000], torch.tensor([outlier])])
    weights = torch.full_like(kept, len(x) / 16_000)
    weights[-1] = 1
    step, lowest = activation_levels(kept, 4, weights)

    def mean_error(step):
        return float((to_integers(x, step, 0, 15) * step - x).square().mean())

    least = min(mean_error(s) for s in torch.linspace(0.05, 0.5, 200))
    assert lowest == 0 and mean_error(step) < 1.05 * least


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1.0, 1e19])
def test_steps_follow_the_size_of_the_values(size):
    torch.manual_seed(0)
    weight = torch.randn(3, 50)
    torch.testing.assert_close(weight_steps(weight * size, 4) / size, weight_steps(weight, 4), rtol=0.02, atol=0)


@pytest.mark.parametrize("b", [2, 3])
def test_a_channel_of_zeros_stays_zero(b):
    weight = torch.zeros(2, 3, 1, 1)
    weight[1] = 1.0
    step = weight_steps(weight, b)
    assert (step > 0).all() and (1 / step).square().isfinite().all()
    zeros = to_integers(weight[0], step[0], *weight_range(b)) * step[0]
    assert zeros.abs().max() < 2e-6 if b == 2 else not zeros.any()  # at 2 bits no level is 0: all but
