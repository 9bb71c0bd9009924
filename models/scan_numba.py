"""The scan on the CPU: one pass over memory, compiled by numba.

Each task is one row of the batch (or one stripe of its channels, if there are more threads than rows). It
reads the tokens in order with the carried state in cache, so every element of a, b and h crosses the memory
bus once. It reads memory sequentially: the backward pass goes from the last token to the first, and through
the channels of each token from last to first as well. With tokens backwards but channels forwards, the same
bytes take twice as long. Channels are independent, so the result does not depend on the number of threads.
"""

# pyright: reportPossiblyUnboundVariable=false

import torch
from torch import Tensor

from .dtypes import accumulate_dtype
from .numba_support import as_numpy, is_available, run_tasks, stripe_width

if is_available():
    from .numba_support import kernel, load_input, load_state, multiply_add, store_output, store_state

    @kernel
    def _forward_kernel(a, b, h0, h, h_last, stripe, first, last):
        """h and h_last for the tasks first..last; a, b, h [batch, time, width], h0, h_last [batch, width]."""
        time, width = b.shape[1], b.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry = h_last[row, low:high]
            carry[:] = h0[row, low:high]
            for t in range(time):
                a_t, b_t, h_t = a[row, t, low:high], b[row, t, low:high], h[row, t, low:high]
                for d in range(high - low):
                    value = multiply_add(load_input(a_t, d), load_state(carry, d), load_input(b_t, d))
                    store_state(carry, d, value)
                    store_output(h_t, d, value)

    @kernel
    def _backward_kernel(a, h, h0, grad_h, state, da, db, stripe, first, last):
        """da, db [batch, time, width] for the tasks first..last.

        `state` [batch, width] holds the gradient of h_last and is overwritten with dh0.
        """
        time, width = h.shape[1], h.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry = state[row, low:high]
            for t in range(time - 1, -1, -1):
                a_t, g_t, da_t, db_t = (
                    a[row, t, low:high],
                    grad_h[row, t, low:high],
                    da[row, t, low:high],
                    db[row, t, low:high],
                )
                if t > 0:
                    _backward_row(a_t, g_t, h[row, t - 1, low:high], da_t, db_t, carry)
                else:
                    _backward_row(a_t, g_t, h0[row, low:high], da_t, db_t, carry)

    @kernel
    def _backward_row(a_t, g_t, previous, da_t, db_t, carry):
        """One token of one stripe; `previous` is h_{t-1}."""
        for d in range(carry.size - 1, -1, -1):
            gradient = load_state(carry, d) + load_input(g_t, d)
            store_output(db_t, d, gradient)
            store_output(da_t, d, gradient * load_input(previous, d))
            store_state(carry, d, gradient * load_input(a_t, d))

    @kernel
    def _max_plus_kernel(w, key, m, last, stripe, first, last_task):
        """m [batch, time, width] for the tasks first..last_task; `last` [batch, width] holds m0."""
        time, width = key.shape[1], key.shape[2]
        num_stripes = (width + stripe - 1) // stripe
        for task in range(first, last_task):
            row, low = task // num_stripes, (task % num_stripes) * stripe
            high = min(low + stripe, width)
            carry = last[row, low:high]
            for t in range(time):
                w_t, key_t, m_t = w[row, t, low:high], key[row, t, low:high], m[row, t, low:high]
                for d in range(high - low):
                    fallen, top = load_state(carry, d) - load_input(w_t, d), load_input(key_t, d)
                    top = fallen if fallen > top else top
                    store_state(carry, d, top)
                    store_output(m_t, d, top)


def _native(tensor: Tensor) -> Tensor:
    """Contiguous, and in a dtype that the kernels support: fp16 becomes fp32."""
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).contiguous()


def forward(a: Tensor, b: Tensor, h0: Tensor, return_decay: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan.linear_scan`."""
    batch, _, width = b.shape
    dtype, b_dtype = accumulate_dtype(a, b), b.dtype
    a, b = _native(a), _native(b)
    h, h_last = torch.empty_like(b), h0.to(dtype, copy=True).contiguous()
    stripe = stripe_width(batch, width)
    arrays = tuple(map(as_numpy, (a, b, h0.to(dtype).contiguous(), h, h_last)))
    run_tasks(_forward_kernel, (*arrays, stripe), batch * -(-width // stripe))
    decay = a.prod(1, dtype=dtype) if return_decay else h_last.new_empty(0)
    return h.to(b_dtype), h_last, decay


def backward(
    a: Tensor, h: Tensor, h0: Tensor, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`."""
    batch, _, width = h.shape
    dtype, a_dtype, h_dtype = accumulate_dtype(a, h), a.dtype, h.dtype
    a, h = _native(a), _native(h)
    da, db, carry = torch.empty_like(a), torch.empty_like(h), grad_last.to(dtype, copy=True).contiguous()
    stripe = stripe_width(batch, width)
    arrays = tuple(map(as_numpy, (a, h, h0.to(dtype).contiguous(), _native(grad_h), carry, da, db)))
    run_tasks(_backward_kernel, (*arrays, stripe), batch * -(-width // stripe))
    return da.to(a_dtype), db.to(h_dtype), carry


def max_plus(w: Tensor, key: Tensor, m0: Tensor) -> tuple[Tensor, Tensor]:
    """See `max_plus.max_plus_scan`; fp32 or fp64."""
    batch, _, width = key.shape
    m, last = torch.empty_like(key, memory_format=torch.contiguous_format), m0.clone().contiguous()
    stripe = stripe_width(batch, width)
    arrays = tuple(map(as_numpy, (w.contiguous(), key.contiguous(), m, last)))
    run_tasks(_max_plus_kernel, (*arrays, stripe), batch * -(-width // stripe))
    return m, last
