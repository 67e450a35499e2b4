"""The checks: what passes, what must not, what is refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffnotes import checks
from diffnotes.checks import check, check_mc, check_symbolic, expand

NUMBERS = st.floats(-1e6, 1e6)


def passes(function, *args, **kwargs):
    try:
        function("eq-test-label", *args, **kwargs)
    except AssertionError:
        return False
    return True


@given(NUMBERS, st.floats(1e-5, 1e3), st.floats(0, 0.1))
def test_check_draws_its_line_at_the_tolerance(expected, atol, rtol):
    allowed = atol + rtol * abs(expected)
    for side in (-1, 1):
        assert passes(check, expected + side * 0.999 * allowed, expected, atol=atol, rtol=rtol)
        assert not passes(check, expected + side * 1.001 * allowed, expected, atol=atol, rtol=rtol)


def test_check_judges_every_entry_by_its_own_size():
    expected = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert passes(check, expected * (1 + 1e-9), expected, atol=0, rtol=1e-8)
    assert not passes(check, expected + 1e-3, expected, atol=0, rtol=1e-8)
    assert not passes(check, expected + torch.tensor([0, 1e-11]), expected)


@pytest.mark.parametrize("actual, expected", [
    (math.nan, math.nan), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf),
    (math.inf, -math.inf), (torch.zeros(3), torch.zeros(3, 1)), (torch.zeros(3), 0.0),
    (torch.zeros(1, 3), torch.zeros(3)), ([1.0, math.nan], [1.0, 1.0]),
])
@pytest.mark.parametrize("rtol", [0.0, 0.5])
def test_check_fails_on_nan_infinity_and_shape(actual, expected, rtol):
    assert not passes(check, actual, expected, rtol=rtol)


def test_check_takes_whatever_holds_numbers():
    assert passes(check, 1, 1.0)
    assert passes(check, True, 1)
    assert passes(check, [math.inf, -math.inf], [math.inf, -math.inf])
    assert passes(check, np.float32(0.5), torch.tensor(0.5, requires_grad=True))
    assert passes(check, np.eye(2), [[1, 0], [0, 1]])


def test_check_keeps_the_precision_of_python_numbers():
    assert not passes(check, [1.0 + 1e-10], [1.0])
    assert not passes(check, torch.tensor(0.1), 0.1)


@pytest.mark.parametrize(("actual", "expected", "error"), [
    (2**60 + 1, 2**60, 1), (2**60, 2**60 + 100, 100), (-(2**62), 2**62, 2**63),
    (-(2**63), 2**63 - 1, 2**64), (-(2**60), -(2**60) - 3, 3),
    (torch.tensor(0, dtype=torch.uint8), torch.tensor(255, dtype=torch.uint8), 255),
    (torch.tensor(False), torch.tensor(True), 1)])
def test_check_does_not_round_integers(actual, expected, error):
    assert passes(check, actual, actual) and passes(check, expected, expected)
    assert not passes(check, actual, expected, atol=0.99 * error)
    assert passes(check, actual, expected, atol=1.01 * error)


def test_check_takes_an_integer_beside_a_float_as_a_float():
    assert passes(check, 2**60 + 1, 2.0**60) and not passes(check, 2**53 - 1, 2.0**53)


def test_check_refuses_what_would_prove_nothing():
    with pytest.raises(ValueError, match="nothing to compare"):
        check("eq-test-label", torch.zeros(0, 3), torch.zeros(0, 3))
    for tolerance in ({"atol": math.inf}, {"atol": -1.0}, {"rtol": math.nan}, {"rtol": math.inf}):
        with pytest.raises(ValueError, match="atol and rtol"):
            check("eq-test-label", 1.0, 2.0, **tolerance)
    with pytest.raises(TypeError, match="imaginary"):
        check("eq-test-label", 1 + 1j, 1 + 2j)


def test_check_prints_one_line_and_its_message_names_label_error_and_tolerance(capsys):
    check("eq-test-label", [1.0, 2.0], [1.0, 2.0 + 3e-14])
    check("eq-test-label", 1.0, 1.0)
    printed = "✓ eq-test-label  max error 3e-14\n✓ eq-test-label  max error 0\n"
    assert capsys.readouterr().out == printed
    with pytest.raises(AssertionError) as failed:
        check("eq-test-label", [1.0, 2.0, 3.0], [1.0, 2.5, 3.25], atol=0.1)
    assert str(failed.value) == ("eq-test-label: max error 0.5 exceeds atol 0.1, rtol 0"
                                 " at 2 of 3 entries")


@given(st.integers(2, 50), NUMBERS, st.floats(0.5, 8), st.integers(0, 2 ** 31))
def test_check_mc_draws_its_line_at_n_se_standard_errors(n, expected, n_se, seed):
    samples = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()
    samples = samples - samples.mean(0)
    se = samples.std(0, correction=1) / n ** 0.5
    target = torch.tensor([expected, 0.0], dtype=torch.float64)
    for component in (0, 1):
        for factor in (-1.01, -0.99, 0.99, 1.01):
            shift = torch.zeros(2, dtype=torch.float64)
            shift[component] = factor * n_se * se[component]
            accepted = passes(check_mc, samples + target + shift, target, n_se=n_se)
            assert accepted is (abs(factor) < 1)


def test_check_mc_on_constant_samples_allows_rounding_only():
    third = torch.tensor(1 / 3, dtype=torch.float64)
    for dtype, eps in ((torch.float64, 2.2e-16), (torch.float32, 1.2e-7), (torch.bfloat16, 8e-3)):
        samples = torch.full((1000,), 1 / 3, dtype=dtype)
        assert passes(check_mc, samples, third)
        assert not passes(check_mc, samples, third + 10 * eps)
    assert passes(check_mc, torch.zeros(5), 0.0)
    assert not passes(check_mc, torch.zeros(5), 1e-300)
    assert passes(check_mc, [1, 1, 1], 1) and not passes(check_mc, [True, True], 0.999)


@pytest.mark.parametrize("samples, expected", [
    ([math.nan, 1.0], 1.0), ([1.0, 1.1], math.nan), ([1.0, math.inf], 1.0), ([1.0, 1.1], math.inf),
    ([1e200, -1e200], 0.5), ([math.inf, math.inf], math.inf),
    (torch.randn(100, 3), torch.zeros(3, 1)), (torch.randn(100, 3), 0.0),
])
def test_check_mc_fails_on_nan_infinity_overflow_and_shape(samples, expected):
    assert not passes(check_mc, samples, expected)


def test_check_mc_refuses_what_would_prove_nothing():
    for samples in (1.0, [1.0], torch.zeros(1, 3), torch.zeros(0)):
        with pytest.raises(ValueError, match="n >= 2"):
            check_mc("eq-test-label", samples, 1.0)
    with pytest.raises(ValueError, match="nothing to compare"):
        check_mc("eq-test-label", torch.zeros(5, 0), torch.zeros(0))
    for n_se in (0, -4, math.inf, math.nan):
        with pytest.raises(ValueError, match="n_se"):
            check_mc("eq-test-label", [1.0, 2.0], 1.0, n_se=n_se)


def test_check_mc_prints_z_n_and_resolution(capsys):
    check_mc("eq-test-label", [1.0, 3.0], 1.0)
    assert capsys.readouterr().out == "✓ eq-test-label  largest z 1.0 of 4  (n = 2, se 1e+00)\n"
    with pytest.raises(AssertionError, match=r"z = 6 exceeds 4 .*n = 2, largest gap 6\)"):
        check_mc("eq-test-label", [1.0, 3.0], -4.0)


def test_check_mc_raises_false_alarms_at_the_promised_rate():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 400, generator=generator, dtype=torch.float64)
    alarms = sum(not passes(check_mc, row, 0.0, n_se=2.0) for row in samples)
    rate = math.erfc(2 / 2 ** 0.5)
    assert abs(alarms / 2000 - rate) < 4 * (rate * (1 - rate) / 2000) ** 0.5


def test_check_symbolic(capsys):
    sympy = pytest.importorskip("sympy")
    x = sympy.symbols("x", real=True)
    check_symbolic("eq-test-label", sympy.sin(x) ** 2, 1 - sympy.cos(x) ** 2)
    assert capsys.readouterr().out == "✓ eq-test-label  symbolic identity\n"
    square = sympy.Matrix([[(x + 1) ** 2, 0]])
    assert passes(check_symbolic, square, square.expand())
    assert not passes(check_symbolic, square, -square)
    assert not passes(check_symbolic, sympy.sqrt(x ** 2), x)
    assert not passes(check_symbolic, sympy.nan, sympy.nan)
    assert not passes(check_symbolic, sympy.oo, sympy.oo)
    assert passes(check_symbolic, Fraction(1, 3), sympy.Rational(1, 3))
    with pytest.raises(AssertionError, match=r"eq-test-label: the sides differ by 2\*x"):
        check_symbolic("eq-test-label", x, -x)


def test_require_finite():
    x = torch.tensor([1.0, -2.0])
    assert checks.require_finite("x0", x) is x
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="x0 must be finite, got"):
            checks.require_finite("x0", torch.tensor([1.0, bad]))
    with pytest.raises(TypeError, match="x0 must be a floating-point tensor"):
        checks.require_finite("x0", torch.tensor([1]))
    elsewhere = torch.full((2,), math.nan, device="meta")
    assert checks.require_finite("x0", elsewhere) is elsewhere


def test_require_floating():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(2, dtype=dtype)
        assert checks.require_floating("x0", x) is x
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"x0 must be .*{dtype}"):
            checks.require_floating("x0", torch.zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match="got list"):
        checks.require_floating("x0", [1.0])


def test_require_choice():
    assert checks.require_choice("kind", "b", {"a": 1, "b": 2}) == "b"
    assert checks.require_choice("kind", "b", iter("ab")) == "b"
    for value in ("c", "", None, ["a"]):
        with pytest.raises(ValueError, match="kind must be one of 'a', 'b'; got"):
            checks.require_choice("kind", value, ("a", "b"))


def test_require_positive_int():
    for value in (1, np.int32(7)):
        assert type(checks.require_positive_int("n", value)) is int
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"n must be at least 1, got {value}"):
            checks.require_positive_int("n", value)
    for value in (True, np.bool_(True), 2.0, "2", None, torch.tensor(2)):
        with pytest.raises(TypeError, match="n must be an int"):
            checks.require_positive_int("n", value)


def test_require_time_accepts_its_ends_in_every_form():
    for low, high in ((0.0, 1.0), (1e-3, 1 - 1e-3), (1e-2, 1.0)):
        for dtype in (torch.float32, torch.float64):
            ends = torch.tensor([low, high], dtype=dtype)
            assert checks.require_time(ends, low=low, high=high) is ends
            assert checks.require_time(ends[0], low=low, high=high) == ends[0]
        assert checks.require_time(low, low=low, high=high) == low
    for one in (1, np.float64(1.0), Fraction(1)):
        assert type(checks.require_time(one)) is float
    assert checks.require_time(torch.zeros(0)).shape == (0,)


def test_require_time_refuses():
    for bad in (-1e-9, 1 + 1e-9, math.nan, math.inf, 500):
        for t in (bad, torch.tensor(bad, dtype=torch.float64),
                  torch.tensor([0.5, bad], dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"s must lie in \[0, 1\], got"):
                checks.require_time(t, name="s")
    with pytest.raises(ValueError, match="got 999$"):
        checks.require_time(torch.tensor([0.5, 999.0, 2.0]))
    with pytest.raises(ValueError, match=r"shape \(\) or \(B,\), got \(3, 1\)"):
        checks.require_time(torch.zeros(3, 1))
    for t in (True, "0.5", None, torch.tensor(1), torch.tensor([True])):
        with pytest.raises(TypeError, match="t must be a floating-point tensor"):
            checks.require_time(t)
    with pytest.raises(ValueError, match="0.2"):
        checks.require_time(0.2, low=0.25)


def test_require_time_never_reads_from_an_accelerator():
    t = torch.full((4,), 7.0, device="meta")
    assert checks.require_time(t) is t


def test_require_shape():
    x = torch.zeros(5, 1, 8, 8)
    assert checks.require_shape("x_t", x, (1, 8, 8)) is x
    assert checks.require_shape("x_t", torch.zeros(5), ()).shape == (5,)
    assert checks.require_shape("x_t", x, torch.Size([1, 8, 8])) is x
    for bad in ((5, 8, 8), (1, 8, 8), (), (5, 1, 8, 9)):
        with pytest.raises(ValueError, match=r"x_t must have shape \(B, 1, 8, 8\), got"):
            checks.require_shape("x_t", torch.zeros(bad), (1, 8, 8))


@given(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3))
def test_expand_scales_sample_by_sample(batch, shape):
    a, x = torch.arange(1.0, batch + 1), torch.ones(batch, *shape)
    product = expand(a, x) * x
    assert product.shape == x.shape
    assert all((product[i] == i + 1).all() for i in range(batch))
    assert expand(torch.tensor(3.0), x).shape == ()


def test_expand_refuses():
    for a, x in ((torch.ones(1), torch.ones(2, 3)), (torch.ones(3), torch.ones(2, 3)),
                 (torch.ones(2, 1), torch.ones(2, 3)), (torch.ones(2), torch.tensor(1.0))):
        with pytest.raises(ValueError, match="one number per sample"):
            expand(a, x)
