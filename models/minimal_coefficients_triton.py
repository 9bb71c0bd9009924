"""The cells inside a Triton kernel: from pre-activations to coefficients and their derivatives, in fp32.

These are the functions of `minimal_coefficients`, written for the GPU. Special functions (exp2, reciprocal)
are expensive there, at an eighth of the rate of a multiply-add. So each pair of sigmoids shares its
exponential, and clamps replace branches:

    minGRU     t = e^k                       a = 1 / (1 + t)    z = t / (1 + t)
    minLSTM    P = 1 + e^-p,  Q = 1 + e^-q   a = Q / (P + Q)    z = P / (P + Q)    since f = 1 / P, i = 1 / Q

Neither factor is one minus the other. Exponents are clamped to 120 (powers of 2), where the other factor is
below 1e-36. In the minLSTM, if both exponents are large, both are first shifted by the same amount, which
does not change the ratio. NaN passes through every clamp. Derivatives:

    minGRU     da/dk = -a z    dz/dk = a z
    minLSTM    d = log(i / f),  da/dd = -a z    dz/dd = a z    dd/dp = -sigmoid(-p)    dd/dq = sigmoid(-q)
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false
# (triton may be missing, and gives the functions it compiles another meaning)

# ruff: noqa: RET505 (Triton compiles what follows a branch that returns)

from __future__ import annotations

from .tiles_triton import INTERPRETED, jit, tl


@jit
def reciprocal(x):
    """1 / x to one unit in the last place; results below 2^-126 are 0."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def clamped_exp2(x):
    """2^min(x, 120), NaN where x is."""
    return tl.exp2(tl.minimum(x, 120.0, propagate_nan=tl.PropagateNan.ALL))


@jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + tl.exp2(x * -1.4426950408889634))


@jit
def silu(x):
    """x sigmoid(x), and its derivative."""
    s = sigmoid(x)
    y = x * s
    return y, s + y * (1.0 - s)


@jit
def tanh(x):
    """tanh(x) with a relative error of 1e-6: 1 - 2 / (1 + e^2x), near 0 a Taylor polynomial."""
    square = x * x
    near_zero = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * -0.0539682540)))
    elsewhere = 1.0 - 2.0 * reciprocal(1.0 + tl.exp2(x * 2.8853900817779268))
    return tl.where(tl.abs(x) < 0.25, near_zero, elsewhere)


@jit
def candidate(u, ACTIVATION: tl.constexpr):
    """c(u), and its derivative."""
    tl.static_assert(
        ACTIVATION == "g" or ACTIVATION == "none" or ACTIVATION == "tanh" or ACTIVATION == "silu"
    )
    if ACTIVATION == "g":
        s = sigmoid(u)
        return tl.where(u >= 0, u + 0.5, s), tl.where(u >= 0, 1.0, s * (1.0 - s))
    elif ACTIVATION == "tanh":
        c = tanh(u)
        return c, 1.0 - c * c
    elif ACTIVATION == "silu":
        return silu(u)
    else:
        return u, 1.0


@jit
def mingru_factors(k):
    """(a, z) from k multiplied by log2(e)."""
    t = clamped_exp2(k)
    r = reciprocal(1.0 + t)
    return r, t * r


@jit
def minlstm_factors(p, q):
    """(a, z, sigmoid(-p), sigmoid(-q)) from p and q multiplied by log2(e)."""
    # If both are below -60, 1 + e^-p is e^-p, and the ratio depends only on the difference.
    shift = tl.maximum(tl.minimum(-p, -q) - 60.0, 0.0)
    t_p, t_q = clamped_exp2(-p - shift), clamped_exp2(-q - shift)
    forget_inverse, input_inverse = 1.0 + t_p, 1.0 + t_q
    r = reciprocal(forget_inverse + input_inverse)
    return (
        input_inverse * r,
        forget_inverse * r,
        t_p * reciprocal(forget_inverse),
        t_q * reciprocal(input_inverse),
    )


@jit
def factors(k, q, k_bias, q_bias, CELL: tl.constexpr):
    """(a, z, dk, dq): the factors of both coefficients, and each gate's factor of the gradient a z (dz - da).

    k: the first gate's pre-activation (minLSTM: p), without its bias; q: the minLSTM's second. The biases are
    already multiplied by log2(e).
    """
    tl.static_assert(CELL == "mingru" or CELL == "minlstm")
    k = k.to(tl.float32) * 1.4426950408889634 + k_bias
    if CELL == "mingru":
        a, z = mingru_factors(k)
        return a, z, 1.0, 1.0
    else:
        a, z, forget_slope, input_slope = minlstm_factors(k, q.to(tl.float32) * 1.4426950408889634 + q_bias)
        return a, z, -forget_slope, input_slope


@jit
def coefficients(k, q, u, k_bias, q_bias, CELL: tl.constexpr, ACTIVATION: tl.constexpr):
    """(a, b) of a row."""
    a, z, _, _ = factors(k, q, k_bias, q_bias, CELL)
    c, _ = candidate(u.to(tl.float32), ACTIVATION)
    return a, z * c


@jit
def gradients(
    k, q, u, k_bias, q_bias, state_grad, previous_state, CELL: tl.constexpr, ACTIVATION: tl.constexpr
):
    """(dk, dq, du) of a row, from its state's total gradient and the previous state (minGRU: dq unused)."""
    a, z, dk, dq = factors(k, q, k_bias, q_bias, CELL)
    c, slope = candidate(u.to(tl.float32), ACTIVATION)
    d_factors = a * z * state_grad * (c - previous_state)
    return d_factors * dk, d_factors * dq, z * slope * state_grad
