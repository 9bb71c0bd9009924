"""The law L(N, D) = E + A / N^alpha + B / D^beta, and its fit.

N is a number of parameters, D of tokens. The fit minimises the sum over the points of

    huber(log L_i - log L(N_i, D_i)),   huber(r) = r^2 / 2 for |r| <= DELTA, else DELTA (|r| - DELTA / 2)

(Hoffmann et al., arXiv 2203.15556). It is a sum and not a mean: the gradient of the mean is so small that
their optimiser stopped early (Besiroglu et al., arXiv 2404.10102). For given exponents the law is linear in
E, A and B. So a grid of exponents with non-negative least squares of the relative error inside (variable
projection, arXiv 2603.22339) finds the starts; reweighted least squares and then L-BFGS find the minimum of
all five.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

DELTA = 1e-3  # of the Huber loss, in log L
GRID = np.geomspace(0.03, 1.5, 18)  # of each exponent
NUM_STARTS = 8  # best points of the grid
NUM_STEPS = 100  # of reweighted least squares, at most
TOLERANCE = 1e-6  # relative gain of a step at which it has converged
LOWEST_EXPONENT, HIGHEST_EXPONENT = 0.0, 4.0
SMALLEST_TERM = 1e-9  # of E, A / N^alpha, B / D^beta at the middle of the data, as a part of the mean loss
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """The five numbers of a law. Each may be an array, with one entry for each of several laws."""

    E: float | Array
    A: float | Array
    B: float | Array
    alpha: float | Array
    beta: float | Array

    def loss(self, parameters: float | Array, tokens: float | Array) -> Array:
        """L(N, D), in the unit of the fitted losses."""
        return np.asarray(self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta)

    def optimum(self, compute: float | Array, cost: "Cost") -> tuple[Array, Array]:
        """N and D with the lowest loss among those with cost.flops(N, D) = compute."""
        parameters = self.optimal_parameters(compute, cost)
        return parameters, cost.tokens(compute, parameters)

    def optimal_parameters(self, compute: float | Array, cost: "Cost") -> Array:
        """N of `optimum`; 0 where alpha is.

        On the line D = C / (c N^p), and the derivative of L by log N is 0:
        alpha A N^-alpha = p beta B D^-beta.
        """
        ratio = self.alpha * self.A / (cost.power * self.beta * self.B)
        exponent = self.alpha + cost.power * self.beta
        return np.asarray((ratio * (compute / cost.factor) ** self.beta) ** (1 / exponent))

    def exponent_of_compute(self, cost: "Cost") -> float | Array:
        """a in N_opt ~ C^a."""
        return self.beta / (self.alpha + cost.power * self.beta)


@dataclass(frozen=True)
class Cost:
    """FLOPs of training: factor N^power D."""

    factor: float = 6.0
    power: float = 1.0

    @classmethod
    def fitted(cls, parameters: Array, tokens: Array, flops: Array) -> "Cost":
        """The cost that is closest to measured FLOPs, in the least squares of their logarithms."""
        per_token = np.log(flops / tokens)
        if np.ptp(np.log(parameters)) == 0:
            return cls(float(np.exp(per_token.mean()) / parameters[0]))
        power, log_factor = np.polyfit(np.log(parameters), per_token, 1)
        return cls(float(np.exp(log_factor)), float(power))

    def flops(self, parameters: float | Array, tokens: float | Array) -> Array:
        """FLOPs of training N parameters on D tokens."""
        return np.asarray(self.factor * parameters**self.power * tokens)

    def tokens(self, compute: float | Array, parameters: float | Array) -> Array:
        """Tokens that a compute budget is enough for; infinite for no parameters."""
        with np.errstate(divide="ignore"):
            return np.asarray(compute / (self.factor * np.asarray(parameters) ** self.power))

    def parameters(self, compute: float | Array, ratio: float) -> Array:
        """N that a compute budget is enough for, with D = ratio N."""
        return np.asarray((compute / (self.factor * ratio)) ** (1 / (1 + self.power)))


class Fit:
    """The fit of one law to points.

    Args:
        parameters, tokens, losses: of each point, positive, [P].
    """

    def __init__(self, parameters: Array, tokens: Array, losses: Array):
        self.log_n, self.log_d, self.log_l = np.log(parameters), np.log(tokens), np.log(losses)
        # Around the middle of the data the three terms are hardly correlated with the exponents.
        self.mid_n, self.mid_d, self.mid_l = self.log_n.mean(), self.log_d.mean(), self.log_l.mean()
        self._n, self._d = self.log_n - self.mid_n, self.log_d - self.mid_d
        lowest = self.mid_l + np.log(SMALLEST_TERM)
        terms = [(lowest, self.mid_l + 3)] * 3
        self._bounds = [*terms, *[(LOWEST_EXPONENT, HIGHEST_EXPONENT)] * 2]

    def best(self) -> Law:
        """The law with the smallest loss, from the best starts of the grid."""
        starts = self._starts()
        values = self.refine_many(starts, np.broadcast_to(self.log_l, (len(starts), len(self.log_l))))
        start = min(values, key=lambda each: self._objective(each, self.log_l)[0])
        return self.law(self._polish(start))

    def law(self, values: Array) -> Law:
        """The law of (log E, log A / N^alpha and log B / D^beta at the middle, alpha, beta), [..., 5]."""
        e, a, b, alpha, beta = np.moveaxis(values, -1, 0)
        terms = np.exp(e), np.exp(a + alpha * self.mid_n), np.exp(b + beta * self.mid_d)
        return Law(*(float(x) if np.ndim(x) == 0 else x for x in (*terms, alpha, beta)))

    def values(self, law: Law) -> Array:
        """The inverse of `law`."""
        terms = [law.E, law.A * np.exp(-law.alpha * self.mid_n), law.B * np.exp(-law.beta * self.mid_d)]
        logs = np.log(np.maximum(terms, np.exp(self._bounds[0][0])))
        return np.array([*logs, law.alpha, law.beta])

    def _starts(self) -> Array:
        """The best points of the grid of exponents, [NUM_STARTS, 5]."""
        losses = np.exp(self.log_l)
        candidates = []
        for alpha in GRID:
            for beta in GRID:
                terms = np.stack([np.ones_like(losses), np.exp(-alpha * self._n), np.exp(-beta * self._d)], 1)
                solution, _ = nnls(terms / losses[:, None], np.ones_like(losses))
                logs = np.log(np.maximum(solution, np.exp(self._bounds[0][0])))
                values = np.array([*logs, alpha, beta])
                candidates.append((self._objective(values, self.log_l)[0], values))
        candidates.sort(key=lambda candidate: candidate[0])
        return np.stack([values for _, values in candidates[:NUM_STARTS]])

    def refine_many(self, starts: Array, log_losses: Array, weights: Array | None = None) -> Array:
        """The minima near several starts, all at once, for other losses or weights of the same points.

        Reweighted least squares: the Huber loss is that of squares with the weights 1 / max(|r|, DELTA). Each
        step is damped (Levenberg and Marquardt), and undone where it did not lower the loss.

        Args:
            starts: [R, 5].
            log_losses: [R, P].
            weights: of the points, [R, P]; None for 1.
        """
        weights = np.ones_like(log_losses) if weights is None else weights
        low, high = (np.array(side) for side in zip(*self._bounds, strict=True))
        results = np.clip(starts, low, high)
        left = np.arange(len(results))  # those that have not converged
        values, damping = results.copy(), np.full(len(left), 1e-3)
        predicted, jacobian = self._jacobian(values)
        residuals = predicted - log_losses
        loss = (weights * huber(residuals)).sum(-1)
        for _ in range(NUM_STEPS):
            scaled = jacobian * (weights[left] / np.maximum(np.abs(residuals), DELTA))[..., None]
            hessian = scaled.swapaxes(1, 2) @ jacobian
            gradient = scaled.swapaxes(1, 2) @ residuals[..., None]
            diagonal = np.einsum("rii->ri", hessian) * damping[:, None] + 1e-9
            trial = values - np.linalg.solve(hessian + np.eye(5) * diagonal[:, None], gradient)[..., 0]
            trial = np.clip(trial, low, high)
            predicted, trial_jacobian = self._jacobian(trial)
            trial_residuals = predicted - log_losses[left]
            trial_loss = (weights[left] * huber(trial_residuals)).sum(-1)
            is_better = trial_loss < loss
            is_done = np.where(is_better, loss - trial_loss < TOLERANCE * loss, damping > 1e3)
            values[is_better], residuals[is_better] = trial[is_better], trial_residuals[is_better]
            jacobian[is_better], loss[is_better] = trial_jacobian[is_better], trial_loss[is_better]
            damping = np.where(is_better, damping / 4, damping * 4)
            results[left] = values
            go_on = ~is_done
            left, values, damping, loss = left[go_on], values[go_on], damping[go_on], loss[go_on]
            residuals, jacobian = residuals[go_on], jacobian[go_on]
            if not len(left):
                break
        return results

    def _polish(self, start: Array) -> Array:
        """The minimum near a start, by L-BFGS."""
        values, best = start, np.inf
        for _ in range(4):  # the loss is nearly an absolute value, on which a line search may end early
            result = minimize(
                self._objective,
                values,
                args=(self.log_l,),
                jac=True,
                method="L-BFGS-B",
                bounds=self._bounds,
                options={"maxiter": 500, "ftol": 1e-13, "gtol": 1e-10, "maxcor": 20},
            )
            values, improved, best = result.x, best - result.fun, float(result.fun)
            if improved < 1e-9 * max(best, 1e-12):
                break
        return values

    def log_predictions(self, values: Array) -> Array:
        """log L of each point."""
        return self._terms(values)[0]

    def _terms(self, values: Array) -> tuple[Array, Array]:
        """log L [..., P], and the shares of the three terms in L [..., P, 3]; values [..., 5]."""
        e, a, b, alpha, beta = np.moveaxis(values, -1, 0)[..., None]
        logs = np.stack([e + 0 * self._n, a - alpha * self._n, b - beta * self._d], -1)
        top = logs.max(-1)
        parts = np.exp(logs - top[..., None])
        total = parts.sum(-1)
        return top + np.log(total), parts / total[..., None]

    def _jacobian(self, values: Array) -> tuple[Array, Array]:
        """log L [R, P], and its derivatives by the values [R, P, 5]."""
        predicted, shares = self._terms(values)
        by_exponents = -shares[..., 1:] * np.stack([self._n, self._d], -1)
        return predicted, np.concatenate([shares, by_exponents], -1)

    def _objective(self, values: Array, log_losses: Array) -> tuple[float, Array]:
        """The sum of the Huber losses, and its gradient; both of the order of 1 for the optimiser."""
        predicted, jacobian = self._jacobian(values)
        residuals = predicted - log_losses
        slopes = np.clip(residuals, -DELTA, DELTA)
        return float(huber(residuals).sum()) / DELTA, slopes @ jacobian / DELTA


def huber(residuals: Array) -> Array:
    """The Huber loss of each residual."""
    slopes = np.clip(residuals, -DELTA, DELTA)
    return slopes * residuals - slopes**2 / 2
