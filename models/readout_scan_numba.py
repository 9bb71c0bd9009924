"""The readout scan on the CPU: the complex states stay in cache and are never written out.

The forward pass reads the inputs and writes the outputs. The backward pass goes through the tokens twice. In
order, it computes the states again, and with them their derivatives for the decay, p_t = decay p_{t-1} +
h_{t-1}; in reverse order, it computes the gradients of the states. So nothing is saved of the states.
Complex numbers are pairs, real part first.
"""

# pyright: reportPossiblyUnboundVariable=false

import torch
from torch import Tensor

from .boundaries import Boundaries
from .numba_support import as_numpy, boundary_arrays, is_available, run_tasks, stripe_width

if is_available():
    import numpy as np

    from .numba_support import (
        ZERO,
        inlined,
        kernel,
        load_input,
        load_state,
        multiply_add,
        store_output,
        store_state,
    )

    @inlined
    def _times_plus(a, ai, x, xi, b, bi):
        """(a + i ai) (x + i xi) + (b + i bi)."""
        return (
            multiply_add(-ai, xi, multiply_add(a, x, b)),
            multiply_add(ai, x, multiply_add(a, xi, bi)),
        )

    @kernel
    def _forward(u, decay, weight, starts, lengths, state, y, stripe, first, last):
        """y [B, T, D]; u [B, T, D], decay and weight [2, N, D], starts [B, T] or [0, 0], lengths [B].

        `state` [B, 2, N, D] holds h0 and is overwritten with the last state. y holds zeros.
        """
        width = y.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            for t in range(lengths[row]):
                u_t, y_t = u[row, t, low:high], y[row, t, low:high]
                if starts.size > 0 and starts[row, t] != 0:
                    state[row, :, :, low:high] = ZERO
                for n in range(decay.shape[1]):
                    h, hi = state[row, 0, n, low:high], state[row, 1, n, low:high]
                    a, ai = decay[0, n, low:high], decay[1, n, low:high]
                    w, wi = weight[0, n, low:high], weight[1, n, low:high]
                    for d in range(high - low):
                        x, xi = _times_plus(
                            load_input(a, d),
                            load_input(ai, d),
                            load_state(h, d),
                            load_state(hi, d),
                            load_input(u_t, d),
                            ZERO,
                        )
                        store_state(h, d, x)
                        store_state(hi, d, xi)
                        total = multiply_add(load_input(w, d), x, load_state(y_t, d))
                        store_state(y_t, d, multiply_add(-load_input(wi, d), xi, total))

    @kernel
    def _sums(u, decay, starts, lengths, grad_y, states, sums, stripe, first, last):
        """sums [B, 4, N, D]: of grad_y h and of grad_y p, over the tokens; it holds zeros.

        `states` [B, 4, N, D] holds h0 and zeros, and is overwritten with the last h and p.
        """
        width = u.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            for n in range(decay.shape[1]):
                a, ai = decay[0, n, low:high], decay[1, n, low:high]
                own, total = states[row, :, n, low:high], sums[row, :, n, low:high]
                h, hi, p, pi = own[0], own[1], own[2], own[3]
                gh, ghi, gp, gpi = total[0], total[1], total[2], total[3]
                for t in range(lengths[row]):
                    u_t, g_t = u[row, t, low:high], grad_y[row, t, low:high]
                    if starts.size > 0 and starts[row, t] != 0:
                        own[:] = ZERO
                    for d in range(high - low):
                        c, ci, g = load_input(a, d), load_input(ai, d), load_input(g_t, d)
                        x, xi = load_state(h, d), load_state(hi, d)
                        z, zi = _times_plus(c, ci, load_state(p, d), load_state(pi, d), x, xi)
                        x, xi = _times_plus(c, ci, x, xi, load_input(u_t, d), ZERO)
                        store_state(h, d, x)
                        store_state(hi, d, xi)
                        store_state(p, d, z)
                        store_state(pi, d, zi)
                        store_state(gh, d, multiply_add(g, x, load_state(gh, d)))
                        store_state(ghi, d, multiply_add(g, xi, load_state(ghi, d)))
                        store_state(gp, d, multiply_add(g, z, load_state(gp, d)))
                        store_state(gpi, d, multiply_add(g, zi, load_state(gpi, d)))

    @kernel
    def _input_gradients(decay, weight, starts, lengths, grad_y, state, du, stripe, first, last):
        """du [B, T, D], which holds zeros; `state` [B, 2, N, D], the gradient of the last state, becomes dh0.

        The gradient of the pair h is a pair, conj(weight) grad_y; through a token it is times conj(decay).
        """
        width = du.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            total = np.empty(high - low, np.float32)
            for t in range(lengths[row] - 1, -1, -1):
                g_t, du_t = grad_y[row, t, low:high], du[row, t, low:high]
                total[:] = ZERO
                for n in range(decay.shape[1]):
                    g, gi = state[row, 0, n, low:high], state[row, 1, n, low:high]
                    a, ai = decay[0, n, low:high], decay[1, n, low:high]
                    w, wi = weight[0, n, low:high], weight[1, n, low:high]
                    for d in range(high - low):
                        x = multiply_add(load_input(w, d), load_input(g_t, d), load_state(g, d))
                        xi = multiply_add(-load_input(wi, d), load_input(g_t, d), load_state(gi, d))
                        store_state(total, d, load_state(total, d) + x)
                        x, xi = _times_plus(load_input(a, d), -load_input(ai, d), x, xi, ZERO, ZERO)
                        store_state(g, d, x)
                        store_state(gi, d, xi)
                if starts.size > 0 and starts[row, t] != 0:
                    state[row, :, :, low:high] = ZERO
                for d in range(high - low):
                    store_output(du_t, d, load_state(total, d))


def _run(kernel_function, tensors: tuple[Tensor, ...], batch: int, width: int) -> None:
    stripe = stripe_width(batch, width)
    run_tasks(kernel_function, (*map(as_numpy, tensors), stripe), batch * -(-width // stripe))


def forward(
    u: Tensor, decay: Tensor, weight: Tensor, h0: Tensor, boundaries: Boundaries
) -> tuple[Tensor, Tensor]:
    """See `readout_scan.readout_scan`."""
    batch, time, width = u.shape
    y, state = torch.zeros_like(u, dtype=torch.float32), h0.clone(memory_format=torch.contiguous_format)
    where = boundary_arrays(boundaries, batch, time)
    tensors = (u.contiguous(), decay.contiguous(), weight.contiguous(), *where, state, y.contiguous())
    _run(_forward, tensors, batch, width)
    return tensors[-1], state


def backward(
    u: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    boundaries: Boundaries,
    grad_y: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for u, decay, weight and h0."""
    batch, time, width = u.shape
    u, decay, weight, grad_y = (x.contiguous() for x in (u, decay, weight, grad_y))
    where, du = boundary_arrays(boundaries, batch, time), torch.zeros_like(u)
    states, sums = torch.cat([h0, torch.zeros_like(h0)], dim=1), h0.new_zeros(batch, 4, *h0.shape[2:])
    _run(_sums, (u, decay, *where, grad_y, states, sums), batch, width)
    state = grad_last.clone(memory_format=torch.contiguous_format)
    _run(_input_gradients, (decay, weight, *where, grad_y, state, du), batch, width)
    h, hi, p, pi = sums.sum(0)
    (w, wi), (g, gi), (last, last_i) = weight, grad_last.unbind(1), states[:, 2:].unbind(1)
    real = w * p - wi * pi + (g * last + gi * last_i).sum(0)
    imaginary = (gi * last - g * last_i).sum(0) - w * pi - wi * p
    return du, torch.stack([real, imaginary]), torch.stack([h, -hi]), state
