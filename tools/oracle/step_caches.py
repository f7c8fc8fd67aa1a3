"""Step caches in plain torch: which steps of a stage are made without the network, and from what (stable-diffusion.cpp's ucache,
easycache and spectrum; src/methods/cache.rs says the formulas).

    predict.cache = begin(settings, scheduler, sampler, first, steps)     a stage of `steps` steps, the run's from `first` on

A cache is asked in place of the network and gives the guided output. Only samplers of one evaluation per step are here.
"""

import math

import torch

DEFAULTS = {
    "ucache": {"threshold": 1.0, "start": 0.15, "end": 0.95, "decay": 1.0, "relative": 1, "reset": 1},
    "easycache": {"threshold": 0.2, "start": 0.15, "end": 0.95},
    "spectrum": {"w": 0.4, "m": 3, "lam": 1.0, "window": 2.0, "flex": 0.5, "warmup": 4, "stop": 0.9, "center": 0},
}
# How near an E may come to its limit: f32 must decide as f64 does.
MARGIN = 1e-3


def begin(settings, scheduler, sampler, first, steps):
    if settings.cache is None:
        return None
    given = dict(part.split("=") for part in settings.cache_options.split(",")) if settings.cache_options else {}
    options = DEFAULTS[settings.cache] | {key: float(value) for key, value in given.items()}
    kind = Spectrum if settings.cache == "spectrum" else Change
    return kind(settings.cache, options, Levels(scheduler, sampler), first, steps)


class Levels:
    """Noise levels of a run's steps, and clean samples at them."""

    def __init__(self, scheduler, sampler):
        self.scheduler, self.sigmas = scheduler, sampler.startswith("euler")
        self.v = scheduler.config.prediction_type == "v_prediction"

    def abar(self, i):
        if self.sigmas:
            return 1 / (1 + float(self.scheduler.sigmas[i]) ** 2)
        return float(self.scheduler.alphas_cumprod[self.scheduler.timesteps[i]])

    def sigma(self, i):
        a = self.abar(i)
        return math.sqrt((1 - a) / a)

    def trained_sigma(self, t):
        """Between two timesteps linear in the logarithm."""
        a = self.scheduler.alphas_cumprod.double()
        logs = (((1 - a) / a) ** 0.5).log()
        low = min(int(t), len(logs) - 2)
        return math.exp(logs[low] + (t - low) * (logs[low + 1] - logs[low]))

    def parts(self, i):
        """(p, q): x0 = p x + q e, where x is what the network reads: samples of unit variance."""
        a = self.abar(i)
        return (math.sqrt(a), -math.sqrt(1 - a)) if self.v else (1 / math.sqrt(a), -math.sqrt((1 - a) / a))


class Spectrum:
    def __init__(self, name, options, levels, first, steps):
        for key, value in options.items():
            setattr(self, key, value)
        self.levels, self.first, self.steps = levels, first, steps
        self.c, self.g, self.history = 0, 0, []

    def __call__(self, predict, x, t):
        p, q = self.levels.parts(self.first + self.c)
        stop = int(self.stop * self.steps)
        predicts = (
            self.c >= self.warmup and not (stop > 0 and self.c >= stop) and len(self.history) >= 2
            and (self.g + 1) % max(1, math.floor(self.window)) != 0 and self.c < self.steps - 1
        )  # fmt: skip
        tau = 2 * self.c / 50 - 1
        if predicts:
            output = (self.clean(tau) - p * x) / q
            self.g += 1
        else:
            output = predict.guide(predict.rows(x, t))
            self.history = [*self.history, (tau, p * x + q * output)][-max(int(self.m) + 1, 6) :]
            self.g = 0
            if self.c >= self.warmup:
                self.window += self.flex
        self.c += 1
        return output

    def clean(self, tau):
        m = int(self.m)
        basis = lambda tau: torch.tensor([math.cos(j * math.acos(tau)) if abs(tau) <= 1 else math.cosh(
            j * math.acosh(abs(tau))) * (1 if tau > 0 else (-1) ** j) for j in range(m + 1)], dtype=torch.float64)
        rows = torch.stack([basis(tau) for tau, _ in self.history])
        h = torch.stack([h for _, h in self.history])
        kept = h[-1] if self.center else torch.zeros_like(h[-1])
        right = (h - kept).flatten(1).to(torch.float64)
        coefficients = torch.linalg.solve(rows.T @ rows + self.lam * torch.eye(m + 1, dtype=torch.float64), rows.T @ right)
        fit = (basis(tau) @ coefficients).reshape(kept.shape).to(h.dtype) + kept
        return self.w * fit + (1 - self.w) * (h[-1] + 0.5 * (h[-1] - h[-2]))


class Change:
    """ucache and easycache."""

    def __init__(self, name, options, levels, first, steps):
        for key, value in options.items():
            setattr(self, key, value)
        self.ucache, self.steps = name == "ucache", steps
        sigmas = [levels.sigma(first + j) for j in range(steps)]
        if self.ucache:
            a, b = (sigmas[min(int(share * steps), steps - 1)] for share in (self.start, self.end))
        else:
            a, b = (levels.trained_sigma((1 - share) * 999) for share in (self.start, self.end))
        above = lambda sigma, limit: sigma > limit * (1 + 1e-6)  # f32 tables: equal ones may differ by a rounding
        self.active = [not above(sigma, a) and above(sigma, b) for sigma in sigmas]
        self.c, self.E, self.skips, self.done = 0, 0.0, 0, 0
        self.u = self.o = self.D = self.k = self.norm = self.ema = None

    def __call__(self, predict, x, t):
        j, self.c = self.c, self.c + 1
        if not self.active[j]:
            return predict.guide(predict.rows(x, t))
        mean = lambda x: x.double().abs().mean().item()
        d = None if self.u is None else mean(x - self.u)
        if self.reuses(d) and j < self.steps - 1:
            return predict.guide(torch.cat([x] * len(self.D)) + self.D)
        rows = predict.rows(x, t)
        o = rows[-1:]  # the positive condition
        if self.o is not None:
            change = mean(o - self.o)
            if d and change > 0:
                self.k = change / d
            if change > 0:
                self.ema = change if self.ema is None else 0.8 * self.ema + 0.2 * change
        self.u, self.o, self.D, self.norm = x, o, rows - x, mean(o)
        self.done, self.skips = self.done + 1, 0
        if not self.ucache:
            self.E = 0.0
        return predict.guide(rows)

    def reuses(self, d):
        if self.k is None or not d or not self.norm:
            return False
        if not self.ucache:
            self.E += self.k * d / self.norm
            limit = self.threshold
        else:
            scale = 1.0
            if self.relative:
                scale = max(1e-6, math.sqrt(self.norm * 1.6 * self.ema) if self.ema is not None else self.norm)
            self.E = self.decay * self.E + self.k * d / scale * (1 + 0.5 * self.skips)
            share = self.done / self.steps
            limit = self.threshold * (0.5 if share < 0.2 else 1.5 if share > 0.8 else 1.0)
            if not self.relative:
                limit *= self.norm
        assert abs(self.E - limit) > MARGIN * limit, (self.E, limit)
        if self.E < limit:
            self.skips += 1
            return True
        if not self.ucache or self.reset:
            self.E = 0.0
        return False
