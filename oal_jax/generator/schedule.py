"""The forward noise process of a diffusion model.

x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 = prod(1 - beta) and sigma_t^2 = 1 - alpha_t^2
(Ho et al., arXiv 2006.11239, equation 4).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from oal_jax.errors import UserError


class NoiseSchedule(NamedTuple):
    """A discrete variance-preserving schedule; hashable, so that it can be a static argument."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """From the content of a `scheduler_config.json` of diffusers.

        The noise process is read; the sampler is the caller's choice, so `_class_name` and
        `skip_prk_steps` are ignored (PNDM never takes Runge-Kutta steps). Older configs are read as
        diffusers' pipeline reads them: an offset of 0 or none means 1, and `clip_sample`, which is
        for images and not for latents, is ignored.

        Raises:
          UserError: betas or a prediction type that are not supported; a value that is no number.
        """
        for key in ("trained_betas", "rescale_betas_zero_snr"):
            if config.get(key):
                raise UserError(f"scheduler_config.json: {key} is not supported")
        schedule = cls(
            train_steps=config.get("num_train_timesteps", 1000),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            beta_schedule=config.get("beta_schedule", "linear"),
            steps_offset=1,
            # Without an entry, diffusers' DDIM has another default than its other schedulers.
            set_alpha_to_one=config.get(
                "set_alpha_to_one", config.get("_class_name") == "DDIMScheduler"
            ),
            prediction_type=config.get("prediction_type", "epsilon"),
        )
        numbers = schedule.train_steps, schedule.beta_start, schedule.beta_end
        if not all(isinstance(n, int | float) and n > 0 for n in numbers):
            raise UserError(f"scheduler_config.json: steps and betas {numbers} must be above 0")
        if schedule.beta_schedule not in ("linear", "scaled_linear"):
            raise UserError(f"beta_schedule {schedule.beta_schedule!r} is not supported")
        if schedule.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction_type {schedule.prediction_type!r} is not supported")
        return schedule

    def alphas_cumprod(self) -> np.ndarray:
        """alpha_t^2 for t = 0 .. train_steps - 1, float64.

        The "scaled linear" schedule is linear in sqrt(beta) (Rombach et al., arXiv 2112.10752).
        """
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.train_steps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2
        return np.cumprod(1.0 - betas)

    def final_alpha_cumprod(self) -> float:
        """alpha^2 of the end of the last step of PNDM and DDIM."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod()[0])
